"""Captions by a trained model: what evaluations, the Python object and the command line share."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from bvl.config import Config
from bvl.decode.options import DecodeOptions
from bvl.errors import ConfigError, UserError
from bvl.runs import Components
from bvl.tasks.base import Task
from bvl.tasks.caption import Caption
from bvl.tasks.contrastive import embed_texts, has_contrastive
from bvl.tasks.writing_rows import Candidate, image_visual, row_scales, warn_once, write_rows

# What the null rows of guidance go without.
GuidanceNull = Literal["image", "controls", "both"]
Kind = TypeVar("Kind", bound=Task)


@dataclasses.dataclass(frozen=True)
class ImageTokens:
    """Images encoded once, for several calls of `write_captions`; see `encode_for_captions`."""

    tokens: Float[np.ndarray, "n l d"]

    def __len__(self) -> int:
        return len(self.tokens)


def encode_for_captions(
    components: Components, images: Sequence[Any], *, batch_size: int = 16
) -> ImageTokens:
    """What a captioner's decoder reads of images: `write_captions` takes it in their place, with the same result.

    A sweep over scales so encodes its images once. Holds for these components alone. Raises UserError without images.
    """
    images = list(images)
    _check_batches(images, batch_size)
    return ImageTokens(np.concatenate(list(_token_batches(components, images, batch_size))))


def captioning_task_of(config: Config) -> Caption:
    """A config's captioning task; ConfigError, naming what is missing, if it has none."""
    return task_of(
        config,
        Caption,
        "write captions",
        "tasks={..., 'caption': Caption()} and model.decoder set, as configs/quickstart.py does",
    )


def task_of(config: Config, kind: type[Kind], what: str, remedy: str) -> Kind:
    """A config's task of a type; ConfigError that says what the run cannot do, and what to train one with."""
    for task in config.tasks.values():
        if isinstance(task, kind):
            return task
    there = ", ".join(f"{name} ({type(task).__name__})" for name, task in config.tasks.items())
    raise ConfigError(
        f"this run cannot {what}: it has no task of type {kind.__name__}, only {there}. Train one with {remedy}"
    )


def name_of(config: Config, task: Task) -> str:
    """What a task of a config is called there."""
    return next(name for name, other in config.tasks.items() if other is task)


def longest_text(config: Config, *, of_regions: bool = False) -> int:
    """The most tokens, END included, that a run's decoder is trained to write of images, or of regions."""
    context = config.data.tokenizer.context_length
    if of_regions:
        context = config.data.regions.context_length or context
    # The start token of the context is no part of what is written.
    return context - 1


def check_max_length(
    config: Config, options: DecodeOptions, *, who: str = "this run", of_regions: bool = False
) -> None:
    """Raise ConfigError for texts longer than the run of `config` is trained on."""
    longest = longest_text(config, of_regions=of_regions)
    if options.max_length > longest:
        key = "data.regions" if of_regions and config.data.regions.context_length else "data.tokenizer"
        raise ConfigError(
            f"max_length={options.max_length}: {who} was trained on texts of up to {longest} tokens "
            f"({key}.context_length)"
        )


def check_language_model(
    components: Components, language_model: Components | None, options: DecodeOptions
) -> None:
    """Raise UserError or ConfigError for a model whose texts cannot be the null of guidance of `components`."""
    if language_model is None:
        return
    captioning_task_of(language_model.config)
    if language_model.tokenizer.hash != components.tokenizer.hash:
        raise UserError(
            "the language model reads another vocabulary than the captioner: train it with "
            "data.tokenizer.path set to the captioner's tokenizer.json"
        )
    check_max_length(language_model.config, options, who="the language model")


def write_captions(
    components: Components,
    images: Sequence[Any] | ImageTokens,
    *,
    options: DecodeOptions,
    guidance: float | Sequence[float] | np.ndarray = 1.0,
    guidance_null: GuidanceNull = "image",
    language_model: Components | None = None,
    controls: Mapping[str, Any] | None = None,
    begin: str | Sequence[str] | None = None,
    seed: int = 0,
    first_row: int | Sequence[int] = 0,
    batch_size: int = 16,
    always_guided: bool = False,
) -> list[list[Candidate]]:
    """`options.num_return` texts for each image, best first (samples: as drawn).

    images: paths, PIL images or arrays, or what `encode_for_captions` made of them.
    guidance: one scale or one an image; 1 is plain decoding.
    guidance_null: what the null rows go without. language_model: another captioner with the same vocabulary whose
      text without an image is the null instead.
    controls: "section", "length" (words), "quality" (bin), "prompt" -> a value, or a sequence with one an image; what
      is absent or None is left out.
    begin: the captions' first words, one text or one an image.
    seed: of sampling; what an image gets depends on the seed and its number alone.
    first_row: number of the first image, where the others count on from, or one number an image: with the numbers of
      the whole, neither its division into several calls nor images left out change what the others get.
    always_guided: decode null rows even at scale 1, so that a sweep over scales compiles one program.
    Raises ConfigError for a run without a captioning task, UserError for values that cannot be used, such as a scale
    other than 1 for a model that knows no null image.
    """
    captioning_task_of(components.config)
    images = images if isinstance(images, ImageTokens) else list(images)
    _check_batches(images, batch_size)
    check_max_length(components.config, options)
    if guidance_null not in ("image", "controls", "both"):
        raise UserError(f"guidance_null={guidance_null!r}: choose image, controls or both")
    check_language_model(components, language_model, options)
    scale = row_scales(guidance, len(images))
    if language_model is None and (always_guided or (scale != 1).any()):
        _check_null(components.config, guidance_null)
    if language_model is None and (scale != 1).any():
        _warn_of_untrained_null(components.config, guidance_null)
    batches = _token_batches(components, images, batch_size)

    def visual_of(
        rows: Int[np.ndarray, " b"], with_null: bool
    ) -> tuple[Float[Array, "c s w"], Bool[Array, "c s"]]:
        tokens = next(batches)[rows - rows[0]]
        copies = (False, guidance_null != "controls") if with_null else (False,)
        return image_visual(
            components.params["model"],
            tokens,
            np.repeat(copies, len(rows)),
            mesh=components.encoder.mesh,
            model=components.model,
        )

    return write_rows(
        components,
        visual_of,
        options=options,
        scale=scale,
        null_has_controls=guidance_null == "image",
        language_model=language_model,
        controls=controls,
        begin=begin,
        seed=seed,
        first_row=first_row,
        batch_size=batch_size,
        always_guided=always_guided,
    )


def rerank(
    scorer: Components,
    image_embed: Float[np.ndarray, "n d"],
    candidates: Sequence[Sequence[Candidate]],
    *,
    batch_size: int = 64,
) -> list[str]:
    """For each image the candidate most like it by the cosine of a contrastive model; the first of equal ones.

    image_embed: the images' embeddings by the scorer. See `check_scorer` for what scorers there are.
    """
    texts = [candidate.text for row in candidates for candidate in row]
    text = embed_texts(scorer, texts, batch_size=batch_size)
    chosen, start = [], 0
    for embedding, row in zip(image_embed, candidates, strict=True):
        similarity = text[start : start + len(row)] @ embedding
        chosen.append(row[int(similarity.argmax())].text)
        start += len(row)
    return chosen


def check_scorer(scorer: Components) -> None:
    """Raise UserError for a model without trained embeddings of texts to score captions with."""
    if not scorer.model.config.embeds_text:
        raise UserError(
            "scoring captions needs a contrastive model, and this run has no text tower: name one as scorer"
        )
    # A captioner's config may have a text tower that no task has trained.
    if not has_contrastive(scorer.config):
        raise UserError(
            "scoring captions needs a contrastive model, and the tasks of this run are "
            f"{', '.join(scorer.config.tasks)}: name one with a task of type Contrastive as scorer"
        )


def _check_batches(images: Sequence[Any] | ImageTokens, batch_size: int) -> None:
    if not len(images):
        raise UserError("no images to caption: give at least one")
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size}: must be at least 1")


def _token_batches(
    components: Components, images: Sequence[Any] | ImageTokens, batch_size: int
) -> Iterator[Float[np.ndarray, "b l d"]]:
    """The image tokens of up to batch_size images at a time."""
    if isinstance(images, ImageTokens):
        for start in range(0, len(images), batch_size):
            yield images.tokens[start : start + batch_size]
        return
    for features in components.encode_images(images, frozenset({"visual"}), batch_size):
        yield np.asarray(features.for_decoder)


def _check_null(config: Config, guidance_null: GuidanceNull) -> None:
    """Raise UserError for null rows that go without the image, of a model that has nothing in its place."""
    if guidance_null != "controls" and not config.model.decoder.null:
        raise UserError(
            "guidance other than 1 needs a null image, and this model has none (model.decoder.null=False, as imported "
            "captioners have it): fine-tune it with model.decoder.null=true and the captioning task's "
            "image_dropout=0.2, or give a language_model"
        )


def _warn_of_untrained_null(config: Config, guidance_null: GuidanceNull) -> None:
    """Warn, once for a run, of a null that training has never shown."""
    task = captioning_task_of(config)
    if guidance_null != "controls" and not task.image_dropout:
        warn_once(
            config.workdir,
            "guidance: this run was trained with image_dropout=0, so its null image means nothing; train with "
            f"tasks.{name_of(config, task)}.image_dropout=0.2",
        )
    controls = config.data.controls
    if guidance_null != "image" and controls.enabled and not controls.dropout:
        warn_once(
            config.workdir,
            f"guidance_null={guidance_null!r}: this run was trained with controls.dropout=0, so it has not seen a "
            "caption without controls; train with data.controls.dropout=0.1",
        )
