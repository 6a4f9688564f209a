"""bvl's model -> the folder of another library: the class that fits, its tensors and the files that stand beside them."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bvl.config import Config
from bvl.convert.families import Family, Library
from bvl.convert.registry import families
from bvl.convert.table import Converted, flat_params, split_layers, to_theirs, unwritten_params
from bvl.convert.tensors import save_safetensors
from bvl.data.text import Tokenizer
from bvl.errors import ConversionError


@dataclasses.dataclass(frozen=True)
class Exported:
    """What was written. foreign: its config."""

    family: Family
    foreign: Mapping[str, Any]
    converted: tuple[Converted, ...]
    unwritten: Mapping[str, str]


def choose_family(library: Library, config: Config, tokenizer: Tokenizer) -> tuple[Family, dict[str, Any]]:
    """(the first class of a library that holds a model of ours, its config).

    Raises ConversionError that says of each class which option prevents it.
    """
    reasons = []
    for family in families(library):
        try:
            return family, family.foreign(config, tokenizer)
        except ConversionError as error:
            reasons.append(f"{family.name}: {error}")
    raise ConversionError(
        f"no class of {library} holds this model:\n  "
        + "\n  ".join(reasons)
        + "\n--to torch writes any model, with one file of plain PyTorch"
    )


def export_model(
    folder: Path,
    library: Library,
    *,
    config: Config,
    params: Mapping[str, Any],
    tokenizer: Tokenizer,
    hub_id: str | None = None,
) -> Exported:
    """Write weights, config, tokenizer and preprocessing into an existing folder, as the library reads them.

    Raises ConversionError naming the option where no class of the library fits.
    """
    family, foreign = choose_family(library, config, tokenizer)
    foreign = family.placed(foreign, folder, hub_id=hub_id)
    # Heads belong to training; only a family whose table names them hands them on.
    table = family.table(config.model, foreign)
    flat = split_layers({name: np.asarray(x) for name, x in flat_params(params).items()})
    named = {row.ours for row in table.rows}
    unwritten = unwritten_params(table, flat) | {
        name: "used in training alone" for name in flat if name.startswith("heads/") and name not in named
    }
    flat = {name: x for name, x in flat.items() if name not in unwritten}
    if "log_scale" in flat:
        # Ours never reads a scale above its limit; theirs has no limit.
        flat["log_scale"] = np.minimum(flat["log_scale"], np.float32(math.log(config.model.max_scale)))
    tensors, converted = to_theirs(table, flat, where=family.name)
    save_safetensors(folder / family.weights_file, tensors, metadata={"format": "pt"})
    (folder / family.config_file).write_text(json.dumps(foreign, indent=2) + "\n", encoding="utf-8")
    family.write_files(folder, foreign, config, tokenizer)
    return Exported(family, foreign, tuple(converted), unwritten)
