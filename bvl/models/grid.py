"""The grid that a tower makes of an image, and position embeddings on it."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

from bvl.errors import ConfigError


def grid_of(image_size: tuple[int, int], stride: int, *, what: str, divisor: str) -> tuple[int, int]:
    """Rows and columns of an image (height, width) whose sides `stride` divides.

    Raises ConfigError if it does not: `what` is the image's name in it, `divisor` the stride's.
    """
    if any(side % stride for side in image_size):
        near = tuple(max(round(side / stride), 1) * stride for side in image_size)
        raise ConfigError(f"{what} {tuple(image_size)} is not divisible by the {divisor}; nearest is {near}")
    return image_size[0] // stride, image_size[1] // stride


PositionResize = Literal["antialias", "plain"]


def resize_positions(
    positions: Float[Array, "l d"],
    old: tuple[int, int],
    new: tuple[int, int],
    *,
    how: PositionResize = "antialias",
) -> Float[Array, "m d"]:
    """Resample a grid of position embeddings to another grid by cubic interpolation.

    how: "antialias" widens the kernel where the grid shrinks; "plain" never does, and its kernel is the sharper one of
    `cubic_weights`, as PyTorch's interpolation has it, by which DINOv2 and the towers of transformers read images of
    other sizes. Rows before those of the grid (a class token's) stay as they are.
    """
    if old == new:
        return positions
    prefix = len(positions) - old[0] * old[1]
    grid = rearrange(positions[prefix:], "(h w) d -> h w d", h=old[0])
    if how == "plain":
        rows, columns = (cubic_weights(*sizes) for sizes in zip(old, new, strict=True))
        grid = jnp.einsum(
            "ph,qw,hwd->pqd", rows, columns, grid.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
        )
    else:
        grid = jax.image.resize(grid, (*new, grid.shape[-1]), method="bicubic", antialias=True)
    return jnp.concatenate([positions[:prefix], rearrange(grid, "h w d -> (h w) d").astype(positions.dtype)])


def cubic_weights(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """The matrix that resamples `old` values to `new` by cubic convolution with a = -0.75 and the border repeated.

    Keys 1981 (doi:10.1109/TASSP.1981.1163711), equation 8; pixel centres at half steps.
    """
    a = -0.75
    at = (np.arange(new) + 0.5) * (old / new) - 0.5
    first = np.floor(at).astype(int)
    matrix = np.zeros((new, old))
    for tap in range(-1, 3):
        t = np.abs(at - (first + tap))
        near = ((a + 2) * t - (a + 3)) * t * t + 1
        far = ((t - 5) * t + 8) * t * a - 4 * a
        np.add.at(matrix, (np.arange(new), np.clip(first + tap, 0, old - 1)), np.where(t <= 1, near, far))
    return matrix.astype(np.float32)
