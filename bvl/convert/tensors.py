"""Files of tensors: safetensors, whole or in shards, and what `torch.save` wrote, read without running any code of it."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from bvl.convert.peers import import_peer
from bvl.errors import ConversionError

# In the order in which each library looks for them; with an index the file lies in shards. A public folder often holds
# one model for both libraries.
WEIGHT_FILES = {
    "hf": (
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    ),
    "open_clip": (
        "open_clip_model.safetensors",
        "open_clip_pytorch_model.safetensors",
        "open_clip_pytorch_model.bin",
        "open_clip_pytorch_model.pth",
        "model.safetensors",
        "pytorch_model.bin",
        "pytorch_model.pth",
        "model.pth",
        "model.safetensors.index.json",
    ),
}
# What open_clip takes under any other name, and what its training writes.
_ANY_NAME = (".safetensors", ".bin", ".pth", ".pt")
# What training on several devices and compilation put in front of all names.
_WRAPPERS = ("module.", "_orig_mod.")

_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_TORCH_DTYPES = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool".split()


@dataclasses.dataclass(frozen=True)
class Tensors:
    """Tensors by name: their shapes, and a function that loads one of them."""

    shapes: Mapping[str, tuple[int, ...]]
    load: Callable[[str], np.ndarray]

    def renamed(self, rename: Callable[[str], str]) -> Tensors:
        """The same tensors under other names."""
        names = {rename(name): name for name in self.shapes}
        return Tensors(
            {new: self.shapes[old] for new, old in names.items()}, lambda new: self.load(names[new])
        )


def open_weights(folder: Path, library: Literal["open_clip", "hf"] = "hf") -> Tensors:
    """The weights in a folder, not loaded yet, as a library finds them.

    Raises ConversionError where there are none, or damaged ones, or several and nothing says which.
    """
    if not folder.is_dir():
        raise ConversionError(f"no folder {folder}")
    path = weights_file(folder, library)
    found = _open_shards(path) if path.name.endswith(".index.json") else _open_file(path)
    if not found.shapes:
        raise ConversionError(f"{path} holds no tensors")
    while wrapper := next((w for w in _WRAPPERS if all(name.startswith(w) for name in found.shapes)), None):
        found = found.renamed(lambda name, wrapper=wrapper: name.removeprefix(wrapper))
    return found


def weights_file(folder: Path, library: Literal["open_clip", "hf"]) -> Path:
    """The file of weights, or the index of their shards, that a library reads; raises as `open_weights` does."""
    for name in WEIGHT_FILES[library]:
        if (folder / name).is_file():
            return folder / name
    others = [p for p in sorted(folder.iterdir()) if p.suffix in _ANY_NAME and p.is_file()]
    if library != "open_clip":
        others = []
    if len(others) == 1:
        return others[0]
    if others:
        raise ConversionError(
            f"{folder} has several files of weights ({', '.join(p.name for p in others)}); name the one that is meant "
            f"{WEIGHT_FILES[library][0]} (or .bin: {WEIGHT_FILES[library][2]})"
        )
    there = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
    raise ConversionError(
        f"{folder} has no weights: looked for {', '.join(WEIGHT_FILES[library])}; there are: {there}"
    )


def _open_file(path: Path) -> Tensors:
    return _open_safetensors(path) if path.suffix == ".safetensors" else _open_torch(path)


def _open_shards(index: Path) -> Tensors:
    try:
        places: dict[str, str] = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        names = sorted(set(places.values()))
        if not all(isinstance(name, str) for name in names):
            raise TypeError("names of files must be texts")
    except (ValueError, KeyError, TypeError) as error:
        raise ConversionError(f"{index} is no index of shards: {error!r}") from error
    files: dict[str, Tensors] = {}
    for name in names:
        path = index.parent / name
        if not path.is_file():
            raise ConversionError(f"{index} names the shard {name}, which is missing beside it")
        files[name] = _open_file(path)
    for tensor, name in places.items():
        if tensor not in files[name].shapes:
            raise ConversionError(f"{index}: the shard {name} has no tensor {tensor}")
    return Tensors(
        {tensor: files[name].shapes[tensor] for tensor, name in places.items()},
        lambda tensor: files[places[tensor]].load(tensor),
    )


def _open_safetensors(path: Path) -> Tensors:
    """The library checks the file; its header is read here too, since numpy alone knows no bfloat16."""
    try:
        with safetensors.safe_open(path, framework="numpy"):
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except Exception as error:  # the library's own error type, and whatever a damaged header leads to
        raise ConversionError(
            f"{path} is damaged, or no safetensors file: {error}; fetch or save it again"
        ) from error
    header.pop("__metadata__", None)
    unknown = sorted({entry["dtype"] for entry in header.values()} - _DTYPES.keys())
    if unknown:
        raise ConversionError(f"{path} has tensors of type {', '.join(unknown)}, which bvl does not read")

    # Read rather than mapped: mapped pages stay in memory beside what is made of them. The last is kept, since a fused
    # matrix is asked for once for each of its parts.
    @functools.lru_cache(maxsize=1)
    def load(name: str) -> np.ndarray:
        entry = header[name]
        start, end = entry["data_offsets"]
        data = np.fromfile(path, np.uint8, count=end - start, offset=8 + length + start)
        return data.view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])

    return Tensors({name: tuple(entry["shape"]) for name, entry in header.items()}, load)


def _open_torch(path: Path) -> Tensors:
    torch = import_peer("torch", what=f"reading {path.name}")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # written in the format before zip files, which cannot be mapped
        loaded = _load_old(torch, path)
    except Exception as error:
        raise _no_plain_weights(path, error) from error
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]  # a training checkpoint of open_clip
    tensors = {k: v for k, v in loaded.items() if torch.is_tensor(v)} if isinstance(loaded, dict) else {}
    if not tensors:
        raise ConversionError(f"{path} holds no tensors by name")
    known = {getattr(torch, name) for name in _TORCH_DTYPES}
    unknown = sorted({str(tensor.dtype) for tensor in tensors.values() if tensor.dtype not in known})
    if unknown:
        raise ConversionError(f"{path} has tensors of type {', '.join(unknown)}, which bvl does not read")

    def load(name: str) -> np.ndarray:
        tensor = tensors[name].detach()
        if tensor.dtype == torch.bfloat16:
            tensor = tensor.float()
        return tensor.numpy()

    return Tensors({name: tuple(tensor.shape) for name, tensor in tensors.items()}, load)


def _load_old(torch, path: Path):
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise _no_plain_weights(path, error) from error


def _no_plain_weights(path: Path, error: Exception) -> ConversionError:
    lines = str(error).strip().splitlines()
    return ConversionError(
        f"{path} is damaged, or not weights alone: {lines[0] if lines else type(error).__name__}. A pickle can run any "
        "code, so bvl reads none; save the weights as model.safetensors where you trust the file"
    )


def save_safetensors(path: Path, tensors: Mapping[str, np.ndarray], *, metadata: dict[str, str]) -> None:
    """Write tensors by name; the file is whole or not there."""
    temporary = path.with_name(path.name + ".tmp")
    # Opened here, since the library makes a file that nobody else may read.
    temporary.touch()
    mode = temporary.stat().st_mode
    safetensors.numpy.save_file(dict(tensors), temporary, metadata=metadata)
    temporary.chmod(mode)
    temporary.replace(path)
