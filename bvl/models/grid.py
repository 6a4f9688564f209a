"""The grid that a tower makes of an image, and position embeddings on it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
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


def resize_positions(
    positions: Float[Array, "l d"], old: tuple[int, int], new: tuple[int, int]
) -> Float[Array, "m d"]:
    """Resample a grid of position embeddings to another grid (bicubic, antialiased).

    Rows before those of the grid (a class token's) stay as they are.
    """
    if old == new:
        return positions
    prefix = len(positions) - old[0] * old[1]
    grid = rearrange(positions[prefix:], "(h w) d -> h w d", h=old[0])
    grid = jax.image.resize(grid, (*new, grid.shape[-1]), method="bicubic", antialias=True)
    return jnp.concatenate([positions[:prefix], rearrange(grid, "h w d -> (h w) d")])
