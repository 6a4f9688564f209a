"""Foreign folder -> bvl's config, parameters, tokenizer and preprocessing."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bvl.assembly import build_model, parameter_shapes
from bvl.config import Config, from_dict
from bvl.convert.families import Described, Family, Source
from bvl.convert.kinds import check_kinds
from bvl.convert.registry import family_of, open_source
from bvl.convert.table import Converted, Table, join_layers, nested_params, split_layers, to_ours
from bvl.convert.tensors import Tensors
from bvl.convert.tokenizers import read_tokenizer
from bvl.data.pipeline import DataConfig
from bvl.data.text import Tokenizer, TokenizerConfig
from bvl.data.transforms import Preprocess
from bvl.errors import ConversionError
from bvl.models.text import TextConfig


@dataclasses.dataclass(frozen=True)
class Imported:
    """A foreign model taken over. params: {"model": ..., "heads": ...} of float32 arrays on the first device.

    converted: a line for every parameter. unread: foreign tensor -> why bvl has no parameter for it.
    """

    config: Config
    params: dict[str, Any]
    tokenizer: Tokenizer
    family: Family
    source: Source
    converted: tuple[Converted, ...]
    unread: Mapping[str, str]


def import_model(spec: str | Path, *, context_length: int | None = None) -> Imported:
    """Read the folder that a spec ("open_clip:DIR", "hf:DIR", "hf-hub:NAME") names.

    context_length: of the texts, where it shall be shorter than the model allows (BERT and rotary positions).
    Raises ConversionError for a folder that is none, an architecture or option that is not known, and tensors that
    are missing, left over or of another shape.
    """
    source = open_source(spec)
    family = family_of(source)
    check_kinds(source.config, where=str(source.folder))
    described = family.describe(source)
    tokenizer, options = _tokenizer(source, described, context_length)
    config = config_of(described, options)
    tensors = family.tensors(source)
    table = family.table(described.model, source.config)
    params, converted = read_params(table, tensors, config, tokenizer, described, where=str(source.folder))
    return Imported(
        config, params, tokenizer, family, source, tuple(converted), unread_tensors(table, tensors)
    )


def _tokenizer(
    source: Source, described: Described, context_length: int | None
) -> tuple[Tokenizer, TokenizerConfig]:
    facts, model = described.text, described.model
    if facts is None:
        options = TokenizerConfig()
        return Tokenizer.without_words(options.context_length), options
    if context_length is not None:
        if not 3 <= context_length <= facts.context_length:
            raise ConversionError(
                f"context_length={context_length}: {source.folder} takes 3 to {facts.context_length} tokens; for longer "
                "texts start a training run from it with data.tokenizer.context_length, which stretches its positions"
            )
        learned = model.decoder is not None and model.decoder.layout != "prefix"
        if context_length < facts.context_length and (learned or isinstance(model.text, TextConfig)):
            raise ConversionError(
                f"context_length={context_length}: {source.folder} has a position embedding for each of its "
                f"{facts.context_length} tokens and reads texts of that length alone; leave the option out"
            )
    text_cfg = source.config["model_cfg"].get("text_cfg", {}) if source.library == "open_clip" else None
    return read_tokenizer(
        source.folder, facts, context_length=context_length or facts.context_length, text_cfg=text_cfg
    )


def config_of(described: Described, tokenizer: TokenizerConfig) -> Config:
    """The config of a foreign model: what can be known of it; training options are bvl's defaults."""
    return Config(
        model=described.model,
        data=DataConfig(preprocess=described.preprocess or Preprocess(image_size=224), tokenizer=tokenizer),
        tasks={name: from_dict(dict(task)) for name, task in described.tasks.items()},
        optim=from_dict({"type": "bvl.train.optim.OptimConfig"}),
        steps=1,
        batch_size=1,
    )


def read_params(
    table: Table,
    tensors: Tensors,
    config: Config,
    tokenizer: Tokenizer,
    described: Described,
    *,
    where: str,
) -> tuple[dict[str, Any], list[Converted]]:
    """(parameters on the first device, the report), one tensor after the other, so that no second copy is held."""
    shapes = parameter_shapes(build_model(config, tokenizer)) | dict(described.heads)
    layers = split_layers(shapes, lambda shape, _: shape[1:])
    flat, converted = to_ours(table, tensors, layers, where=where)
    flat = join_layers(flat, shapes)
    device = jax.local_devices()[0]
    for name in list(flat):
        # A copy of its own: what torch.load maps into memory may change, and of a fused matrix no other part is kept.
        flat[name] = jax.device_put(np.array(flat[name], np.float32), device)
    return nested_params(flat), converted


def unread_tensors(table: Table, tensors: Tensors) -> dict[str, str]:
    """Foreign tensor -> why there is no parameter for it, for those of a complete table that are not read."""
    read = {row.theirs for row in table.rows}
    why = {alias.theirs: f"the same as {alias.of}" for alias in table.aliases}
    why |= {constant.theirs: "no parameter" for constant in table.constants}
    out = {}
    for name in sorted(tensors.shapes.keys() - read):
        out[name] = why.get(name) or next(u.why for u in table.unread if re.fullmatch(u.pattern, name))
    return out
