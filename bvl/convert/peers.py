"""PyTorch, open_clip and transformers, which only proofs and old weight files need."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

from bvl.errors import ConversionError

# Operators that torchvision's wheel cannot load beside a CPU build of torch; its import then fails for want of their
# schemas, though nothing here calls them.
_SCHEMAS = tuple(
    f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor" for name in ("nms", "qnms")
)
# Libraries live as long as this holds them.
_libraries: list[Any] = []


def import_peer(name: str, *, what: str) -> ModuleType:
    """Import torch, open_clip, timm or transformers; ConversionError says that `what` needs it and how to install it."""
    try:
        torch = importlib.import_module("torch")
        if name != "torch":
            _declare_operators(torch)
        return importlib.import_module(name)
    except ImportError as error:
        raise ConversionError(
            f"{what} needs {name}, which cannot be imported ({error}); pip install 'bvl[parity]'"
        ) from error


def _declare_operators(torch: ModuleType) -> None:
    """Let torchvision be imported beside a CPU-only torch."""
    if _libraries or torch.version.cuda is not None:
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        try:
            library.define(schema)
        except RuntimeError:  # declared already
            continue
    _libraries.append(library)
