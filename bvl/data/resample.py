"""Maps on the model's grid, brought back to the pixels of the original image."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from bvl.data.transforms import Transformed


def to_original_pixels(
    maps: Float[np.ndarray, "k h w"],
    transformed: Transformed,
    size: tuple[int, int],
    *,
    outside: float,
) -> Float[np.ndarray, "k H W"]:
    """Maps over the model's image at each pixel of the original of `size` (height, width), interpolated bilinearly.

    outside: the value of pixels that the model did not see, since they were cut off.
    """
    forward = transformed.to_original.inverse()
    weights, seen = [], []
    for axis, count, cells in ((1, size[0], maps.shape[1]), (0, size[1], maps.shape[2])):
        place = (np.arange(count) + 0.5) / count * forward.scale[axis] + forward.offset[axis]
        seen.append((place >= 0) & (place <= 1))
        position = np.clip(place * cells - 0.5, 0, cells - 1)
        distance = np.abs(position[:, None] - np.arange(cells))
        weights.append(np.maximum(1.0 - distance, 0.0).astype(np.float32))
    rows, cols = weights
    out = rows @ maps.astype(np.float32) @ cols.T
    if not (seen[0].all() and seen[1].all()):
        out[:, ~(seen[0][:, None] & seen[1][None])] = outside
    return out
