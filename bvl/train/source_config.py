"""The config that a run has to have to start from other models: theirs, laid over each other as their parameters are."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from bvl.config import Config, load_dump, split_sources
from bvl.convert.registry import is_foreign, looks_foreign
from bvl.data.controls import Controls
from bvl.data.text import TokenizerConfig
from bvl.data.transforms import Preprocess
from bvl.errors import ConfigError
from bvl.models.vlm import DualEncoderConfig
from bvl.runs import RunFolder, load_components
from bvl.tasks.caption import Caption
from bvl.tasks.contrastive import Contrastive

# Shared space of two towers that have none in common, as far as they are wide enough.
_EMBED_DIM = 512


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """What a run takes over beside the parameters. tasks: "contrastive" and "caption", as far as the model can.

    fresh_decoder_parts: whether the decoder is that of a language model, whose way to see images is yet to be trained.
    """

    model: DualEncoderConfig
    preprocess: Preprocess
    tokenizer: TokenizerConfig
    controls: Controls
    tasks: dict[str, Any]
    fresh_decoder_parts: bool


def source_config(init_from: str | tuple[str, ...] | None, workdir: str | Path | None = None) -> SourceConfig:
    """The towers, preprocessing and tokenizer of the models that `init_from` names (see `bvl.config.Config`).

    A tower or decoder is that of the last model that has one; preprocessing belongs to the image tower, the tokenizer to
    the last vocabulary. Region modules are left out. Where a run in `workdir` has begun, it says all this, and the
    models may be gone.
    Raises ConfigError where nothing is named, or where there is no image tower or nothing that reads or writes text;
    RunFolderError, CheckpointError or ConversionError for what is no model.
    """
    begun = RunFolder(workdir) if workdir is not None else None
    if begun is not None and begun.has_checkpoint() and begun.config.is_file():
        return _laid_over([load_dump(begun.config)])
    specs = split_sources(init_from)
    if not specs:
        raise ConfigError(
            "this config starts from a model: add init_from=RUN, init_from=open_clip:DIR or init_from=hf:DIR"
        )
    return _laid_over([_config_of(spec) for spec in specs])


def _config_of(spec: str) -> Config:
    run = RunFolder(spec)
    if not is_foreign(spec) and run.config.is_file() and not looks_foreign(run.path):
        return load_dump(run.config)
    return load_components(spec, use_ema=False).config


def _laid_over(configs: list[Config]) -> SourceConfig:
    def last(part: str) -> Config | None:
        return next((c for c in reversed(configs) if getattr(c.model, part) is not None), None)

    image, text, decoder = map(last, ("image", "text", "decoder"))
    if image is None:
        raise ConfigError("init_from: no model has an image tower; name one more, with commas between")
    if text is None and decoder is None:
        raise ConfigError(
            "init_from: no model reads or writes text; name one more, for example init_from=hf:VISION,hf:BERT"
        )
    model = dataclasses.replace(
        image.model,
        text=None if text is None else text.model.text,
        decoder=None if decoder is None else decoder.model.decoder,
        region_encoder=None,
        region_decoder=None,
        **_projections(image, text or decoder),
    )
    words = text or decoder
    return SourceConfig(
        model=model,
        preprocess=image.data.preprocess,
        # The model has its tokenizer with it, wherever that came from.
        tokenizer=dataclasses.replace(words.data.tokenizer, path=None),
        controls=Controls() if decoder is None else decoder.data.controls,
        tasks=_tasks(model, configs),
        fresh_decoder_parts=decoder is not None and decoder.model.image is None,
    )


def _projections(image: Config, text: Config) -> dict[str, Any]:
    """How towers of two models meet: in the space of the one that had one, a new linear map for the other."""
    if image is text:
        return {}
    spaces = [c.model for c in (image, text) if not c.model.is_alone]
    widths = (image.model.image_width, text.model.text_width)
    embed_dim = spaces[0].embed_dim if spaces else min(_EMBED_DIM, *widths)
    kept = {
        f"{tower}_projection": "linear" if c.model.is_alone else getattr(c.model, f"{tower}_projection")
        for tower, c in (("image", image), ("text", text))
    }
    logits = spaces[0] if spaces else DualEncoderConfig()
    names = ("init_temperature", "max_scale", "init_bias")
    return {"embed_dim": embed_dim, **kept, **{name: getattr(logits, name) for name in names}}


def _tasks(model: DualEncoderConfig, configs: list[Config]) -> dict[str, Any]:
    """Contrast and captions, trained as the models were where that is known."""

    def known(kind: type, otherwise: Any) -> Any:
        found = [task for c in reversed(configs) for task in c.tasks.values() if isinstance(task, kind)]
        return found[0] if found else otherwise

    tasks: dict[str, Any] = {}
    if model.embeds_text:
        loss = "softmax" if model.init_bias is None else "sigmoid"
        tasks["contrastive"] = known(Contrastive, Contrastive(loss_type=loss))
        if tasks["contrastive"].loss_type != loss:
            tasks["contrastive"] = Contrastive(loss_type=loss)
    if model.decoder is not None:
        tasks["caption"] = known(Caption, Caption(image_dropout=0.2 if model.decoder.null else 0.0))
    return tasks
