"""Drawing on a pixel grid: shapes with exact footprints, smooth random fields, soft ellipses.

Coordinates are fractions of the image side with the origin at the top left; pixel j has its centre at
(j + 0.5) / size. Drawn content is the same, in proportion, at every size.
"""

import dataclasses
import functools
import math

import numpy as np
from jaxtyping import Bool, Float

from bvl.data.phantoms.scene import Instance


@dataclasses.dataclass(frozen=True, slots=True)
class Footprint:
    """The pixels about an instance: where they are, their offsets, and their normalised radius."""

    rows: slice
    cols: slice
    dx: Float[np.ndarray, "1 w"]
    dy: Float[np.ndarray, "h 1"]
    rho: Float[np.ndarray, "h w"]
    inside: Bool[np.ndarray, "h w"]
    edge: Float[np.ndarray, "h w"]  # pixels to a unit of rho, for anti-aliased edges

    def alpha(self, limit: float = 1.0) -> Float[np.ndarray, "h w"]:
        """Coverage of the shape scaled by `limit`, anti-aliased over one pixel."""
        return np.clip((limit - self.rho) * self.edge + 0.5, 0.0, 1.0)

    @property
    def window(self) -> tuple[slice, slice]:
        return self.rows, self.cols


@functools.lru_cache(maxsize=16)
def centres(size: int) -> Float[np.ndarray, "size"]:
    """Pixel centres along one axis."""
    return ((np.arange(size) + 0.5) / size).astype(np.float32)


def grid(size: int) -> tuple[Float[np.ndarray, "1 size"], Float[np.ndarray, "size 1"]]:
    """Pixel centres as a row of x and a column of y, to be broadcast."""
    line = centres(size)
    return line[None, :], line[:, None]


def window(
    size: int, x: float, y: float, reach: float
) -> tuple[slice, slice, Float[np.ndarray, "1 w"], Float[np.ndarray, "h 1"]]:
    """The pixels within `reach` of a point, and their offsets from it."""
    margin = reach + 1.0 / size
    cols = slice(max(0, int((x - margin) * size)), max(0, min(size, int((x + margin) * size) + 1)))
    rows = slice(max(0, int((y - margin) * size)), max(0, min(size, int((y + margin) * size) + 1)))
    line = centres(size)
    return rows, cols, line[None, cols] - np.float32(x), line[rows, None] - np.float32(y)


def footprint(instance: Instance, size: int) -> Footprint:
    """The exact footprint of an instance at one image size; never empty."""
    rows, cols, dx, dy = window(size, instance.x, instance.y, instance.reach)
    c, s = math.cos(instance.angle), math.sin(instance.angle)
    u, v = dx * c + dy * s, dy * c - dx * s
    minor = instance.minor
    if instance.bend:
        v = v + instance.bend / instance.radius * (u * u) - 0.35 * instance.bend * instance.radius
    if instance.wobble:
        k = 2.4 / minor
        amount = instance.wobble * minor
        u, v = (
            u + amount * np.sin(k * v + instance.phase),
            v + amount * np.sin(k * u + 2 * instance.phase),
        )
    u, v = u / instance.radius, v / minor
    rho = np.sqrt(u * u + v * v)
    # One pixel changes rho by the length of its gradient: little at the tips of a long shape.
    steepness = np.sqrt((u / instance.radius) ** 2 + (v / minor) ** 2)
    edge = np.maximum(size * rho / np.maximum(steepness, 1e-6), max(1.0, minor * size))
    inside = rho < 1.0
    if not inside.any():
        # Thinner than the pixel spacing at this size: what is drawn is at least its nearest pixel.
        inside = rho <= rho.min()
    return Footprint(rows, cols, dx, dy, rho, inside, edge)


@functools.lru_cache(maxsize=64)
def _interpolation(size: int, cells: int) -> Float[np.ndarray, "size cells"]:
    """Smooth (raised cosine) interpolation from `cells` nodes spanning the image to pixels."""
    position = centres(size).astype(np.float64) * (cells - 1)
    distance = np.abs(position[:, None] - np.arange(cells)[None, :])
    return (0.5 + 0.5 * np.cos(np.pi * np.minimum(distance, 1.0))).astype(np.float32)


def upsample(values: Float[np.ndarray, "cells cells"], size: int) -> Float[np.ndarray, "size size"]:
    """A coarse grid of values as a smooth image."""
    matrix = _interpolation(size, values.shape[0])
    return matrix @ values @ matrix.T


def smooth_field(rng: np.random.Generator, size: int, *, cells: int) -> Float[np.ndarray, "size size"]:
    """A smooth random field of about unit variance with `cells` nodes a side."""
    return upsample(rng.standard_normal((cells, cells), dtype=np.float32), size)


def grain(rng: np.random.Generator, size: int, *, limit: int = 128) -> Float[np.ndarray, "size size"]:
    """Unit-variance pixel noise whose grain, above `limit` pixels a side, grows with the image."""
    if size <= limit:
        return rng.standard_normal((size, size), dtype=np.float32)
    return upsample(rng.standard_normal((limit, limit), dtype=np.float32), size)


def ellipse(
    x: Float[np.ndarray, "1 size"],
    y: Float[np.ndarray, "size 1"],
    centre: tuple[float, float],
    axes: tuple[float, float],
    *,
    sharpness: float,
) -> Float[np.ndarray, "size size"]:
    """A soft filled ellipse: 1 inside, 0 outside; `sharpness` is the slope across its outline."""
    ex, ey = (x - centre[0]) / axes[0], (y - centre[1]) / axes[1]
    return np.clip((1.0 - (ex * ex + ey * ey)) * sharpness + 0.5, 0.0, 1.0)


def blend(
    image: Float[np.ndarray, "h w 3"],
    where: tuple[slice, slice],
    alpha: Float[np.ndarray, "h w"],
    colour: tuple[float, float, float] | np.ndarray,
) -> None:
    """Paint a colour with coverage `alpha` into a window of the image, in place."""
    part = image[where]
    part += alpha[..., None] * (np.asarray(colour, np.float32) - part)


def to_uint8(image: Float[np.ndarray, "h w *c"]) -> np.ndarray:
    """Values in 0..1 as uint8 [h, w, 3]; a grey image is repeated over the channels."""
    pixels = np.clip(image * 255.0 + 0.5, 0.0, 255.0).astype(np.uint8)
    return np.repeat(pixels[..., None], 3, axis=-1) if pixels.ndim == 2 else pixels
