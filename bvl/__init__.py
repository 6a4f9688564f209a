"""Biomedical vision-language models in JAX: train, evaluate, hand on. `bvl.load("runs/x")` gives a Model."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bvl.api import Model, load

__version__ = "0.1.0"
__all__ = ["Model", "__version__", "load"]


def __getattr__(name: str) -> Any:
    # Imported on first use, so that `import bvl` and the command line's help need no JAX.
    if name in ("Model", "load"):
        from bvl import api

        return getattr(api, name)
    raise AttributeError(f"module 'bvl' has no attribute {name!r}")
