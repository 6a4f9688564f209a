"""Random erasing: a rectangle of a training image is covered, so that no single place tells it all."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import UInt8

# Width / height of the rectangle, drawn evenly in its logarithm.
RATIO = (0.3, 1 / 0.3)
# Rectangles that do not fit are drawn again this often, then the image stays whole.
ATTEMPTS = 10


def erase(
    image: UInt8[np.ndarray, "H W 3"],
    *,
    scale: tuple[float, float],
    colour: tuple[float, float, float] | None,
    within: tuple[float, float, float, float],
    rng: np.random.Generator,
) -> UInt8[np.ndarray, "H W 3"]:
    """A copy in which one random rectangle is covered (Zhong et al. 2017, arXiv:1708.04896, algorithm 1).

    scale: range of the rectangle's share of the area. colour: of the cover in 0..1, None = noise.
    within: [x0, y0, x1, y1] in fractions of the image: the part, without its padding, in which it lies.
    """
    height, width = image.shape[:2]
    left, top, right, bottom = (round(v * side) for v, side in zip(within, (width, height) * 2, strict=True))
    low, high = (math.log(r) for r in RATIO)
    for _ in range(ATTEMPTS):
        area = (right - left) * (bottom - top) * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(low, high))
        w, h = max(1, round(math.sqrt(area * ratio))), max(1, round(math.sqrt(area / ratio)))
        if w <= right - left and h <= bottom - top:
            x, y = int(rng.integers(left, right - w + 1)), int(rng.integers(top, bottom - h + 1))
            image = image.copy()
            if colour is None:
                image[y : y + h, x : x + w] = rng.integers(0, 256, (h, w, 3), np.uint8)
            else:
                image[y : y + h, x : x + w] = np.rint(np.array(colour) * 255).astype(np.uint8)
            return image
    return image
