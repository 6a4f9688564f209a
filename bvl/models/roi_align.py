"""What lies inside boxes of a feature map: RoIAlign and averages over regions, as products of matrices."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def roi_align(
    features: Float[Array, "b h w c"],
    boxes: Float[Array, "b r 4"],
    *,
    output_size: tuple[int, int],
    sampling_ratio: int = 2,
) -> Float[Array, "b r i j c"]:
    """The features inside each box on a grid of `output_size` cells (RoIAlign, He et al. 2017, arXiv:1703.06870, section 3).

    A cell is the mean of sampling_ratio x sampling_ratio points, interpolated bilinearly between the centres of the
    feature cells; beyond the outermost centres the map goes on unchanged. boxes: fractions of the image. As bilinear
    interpolation is separable, it is one small matrix a box along each axis, which suits matrix units and any grid.
    """
    rows, cols = output_size
    along_y = _sampling(boxes[..., 1], boxes[..., 3], features.shape[1], rows, sampling_ratio)
    along_x = _sampling(boxes[..., 0], boxes[..., 2], features.shape[2], cols, sampling_ratio)
    y = jnp.einsum("brih,bhwc->briwc", along_y.astype(features.dtype), features)
    return jnp.einsum("brjw,briwc->brijc", along_x.astype(features.dtype), y)


def _sampling(
    low: Float[Array, "b r"], high: Float[Array, "b r"], size: int, cells: int, ratio: int
) -> Float[Array, "b r n s"]:
    """Weights of the map's `size` rows (or columns) in each of the box's cells."""
    steps = (jnp.arange(cells * ratio) + 0.5) / (cells * ratio)
    points = (low[..., None] + (high - low)[..., None] * steps) * size - 0.5
    points = jnp.clip(points, 0.0, size - 1.0)
    weights = jnp.maximum(1.0 - jnp.abs(points[..., None] - jnp.arange(size)), 0.0)
    return weights.reshape(*low.shape, cells, ratio, size).mean(axis=-2)


def box_coverage(boxes: Float[Array, "*n 4"], grid: tuple[int, int]) -> Float[Array, "*n h w"]:
    """The share of each cell of a grid that a box covers; boxes in fractions of the image."""

    def overlap(low: Float[Array, "*n"], high: Float[Array, "*n"], size: int) -> Float[Array, "*n s"]:
        edges = jnp.arange(size) / size
        inside = jnp.minimum(high[..., None], edges + 1 / size) - jnp.maximum(low[..., None], edges)
        return jnp.maximum(inside, 0.0) * size

    along_y = overlap(boxes[..., 1], boxes[..., 3], grid[0])
    along_x = overlap(boxes[..., 0], boxes[..., 2], grid[1])
    return along_y[..., :, None] * along_x[..., None, :]


def mask_coverage(masks: Bool[Array, "*n h w"], grid: tuple[int, int]) -> Float[Array, "*n i j"]:
    """The share of each cell of a grid that a mask of any size covers."""

    def shares(size: int, cells: int) -> Float[Array, "c s"]:
        low = jnp.arange(cells) / cells
        boxes = jnp.stack([low, jnp.zeros(cells), low + 1 / cells, jnp.ones(cells)], axis=-1)
        covered = box_coverage(boxes, (1, size))[:, 0]
        return covered / (size / cells)

    masks = masks.astype(jnp.float32)
    return jnp.einsum(
        "ih,...hw,jw->...ij", shares(masks.shape[-2], grid[0]), masks, shares(masks.shape[-1], grid[1])
    )


def region_mean(
    values: Float[Array, "b l d"], weights: Float[Array, "b r l"], *, epsilon: float = 1e-6
) -> Float[Array, "b r d"]:
    """Means of the values of an image's cells, weighted for each region; in float32. Without any weight: 0."""
    weights = weights.astype(jnp.float32)
    shares = weights / jnp.maximum(weights.sum(-1, keepdims=True), epsilon)
    return jnp.einsum("brl,bld->brd", shares, values.astype(jnp.float32)).astype(values.dtype)
