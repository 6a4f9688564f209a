"""Records, transforms and batches. `from_arrays` makes a source of images and texts in memory."""

from typing import Any

__all__ = ["from_arrays"]


def __getattr__(name: str) -> Any:
    # Loaded when asked for: importing the package costs nothing.
    if name == "from_arrays":
        from bvl.data.arrays import from_arrays

        return from_arrays
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
