"""A model of bvl -> the folder of the PyTorch file: weights, resolved config, tokenizer, preprocessing, calibration."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange

from bvl.config import Config
from bvl.convert.table import Converted, flat_params, split_layers
from bvl.convert.tensors import save_safetensors
from bvl.convert.torch_format.bundle import bundled
from bvl.convert.torch_format.resolve import resolve
from bvl.data.text import Tokenizer


def export_torch(
    folder: Path,
    *,
    config: Config,
    params: Mapping[str, Any],
    tokenizer: Tokenizer,
    calibration: Mapping[str, Any] | None = None,
) -> list[Converted]:
    """Write the folder; gives each parameter and the tensor it became.

    params: {"model": ..., "heads": ...}. calibration: of exactly these parameters.
    Raises ConversionError for a config with an option that the PyTorch file does not know.
    """
    flat = split_layers({name: np.asarray(x) for name, x in flat_params(params).items()})
    resolved = resolve(config, tokenizer, {name: tuple(x.shape) for name, x in flat.items()})
    folder.mkdir(parents=True, exist_ok=True)
    tensors, converted = {}, []
    for name, x in flat.items():
        theirs, how, array = to_torch(name, x)
        tensors[theirs] = np.array(array, dtype=np.float32, order="C")
        converted.append(Converted(name, tuple(x.shape), theirs, tensors[theirs].shape, how))
    weights = folder / "model.safetensors"
    save_safetensors(weights, tensors, metadata={"format": "pt"})
    tokenizer.save(folder / "tokenizer.json")
    _write_json(folder / "config.json", resolved)
    _write_json(folder / "preprocess.json", config.data.preprocess.to_dict())
    if calibration is not None:
        digest = hashlib.sha256(weights.read_bytes()).hexdigest()
        _write_json(folder / "calibration.json", {**calibration, "weights_sha256": digest})
    (folder / "bvl_model.py").write_text(bundled(), encoding="utf-8")
    return converted


def to_torch(name: str, x: np.ndarray) -> tuple[str, str, np.ndarray]:
    """(name of the tensor, how its values are laid out, the values) of one of our parameters."""
    *parents, leaf = name.split("/")
    theirs = ".".join([*parents, {"kernel": "weight", "scale": "weight"}.get(leaf, leaf)])
    if leaf != "kernel":
        return theirs, "same", x
    if x.ndim == 4:
        return theirs, "convolution", rearrange(x, "p q i o -> o i p q")
    if parents == ["image", "patch_embed"]:
        p = round((len(x) / 3) ** 0.5)
        return theirs, "patches", rearrange(x, "(p q c) o -> o c p q", p=p, q=p)
    if parents[:2] == ["image", "stem"] and parents[-1].startswith("conv_"):
        return theirs, "patches", rearrange(x, "(p q c) o -> o c p q", p=3, q=3)
    return theirs, "transpose", x.T


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
