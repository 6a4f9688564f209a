"""Overlap and distance of boxes [x0, y0, x1, y1], differentiable also where a box has no area."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

# Areas below this count as none. Its square is still a normal f32 number, so no gradient becomes 0 * inf.
_MIN_AREA = 1e-12


def box_l1(a: Float[Array, "*#n 4"], b: Float[Array, "*#n 4"]) -> Float[Array, "*n"]:
    """Sum of the four absolute differences of two boxes, row by row."""
    return jnp.abs(a.astype(jnp.float32) - b.astype(jnp.float32)).sum(-1)


def box_iou(a: Float[Array, "*#b n 4"], b: Float[Array, "*#b m 4"]) -> Float[Array, "*b n m"]:
    """Intersection over union of every box of `a` with every box of `b`; 0 where both have no area."""
    inter, union = _overlap(a[..., :, None, :].astype(jnp.float32), b[..., None, :, :].astype(jnp.float32))
    return inter / jnp.maximum(union, _MIN_AREA)


def generalized_iou(a: Float[Array, "*#n 4"], b: Float[Array, "*#n 4"]) -> Float[Array, "*n"]:
    """IoU minus the share of the smallest enclosing box that neither covers, row by row; in [-1, 1].

    GIoU = I / U - (H - U) / H with intersection I, union U and enclosing box H (Rezatofighi et al. 2019,
    algorithm 1). Reversed corners count as no area. The loss is 1 - GIoU; unlike that of the IoU its gradient
    also draws boxes together that do not meet.
    """
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    inter, union = _overlap(a, b)
    hull = _area(jnp.minimum(a[..., :2], b[..., :2]), jnp.maximum(a[..., 2:], b[..., 2:]))
    return inter / jnp.maximum(union, _MIN_AREA) - (hull - union) / jnp.maximum(hull, _MIN_AREA)


def pairwise_generalized_iou(
    a: Float[Array, "*#b n 4"], b: Float[Array, "*#b m 4"]
) -> Float[Array, "*b n m"]:
    """`generalized_iou` of every box of `a` with every box of `b`."""
    return generalized_iou(a[..., :, None, :], b[..., None, :, :])


def _area(low: Float[Array, "*n 2"], high: Float[Array, "*n 2"]) -> Float[Array, "*n"]:
    sides = jnp.maximum(high - low, 0.0)
    return sides[..., 0] * sides[..., 1]


def _overlap(a: Float[Array, "*#n 4"], b: Float[Array, "*#n 4"]) -> tuple[Array, Array]:
    inter = _area(jnp.maximum(a[..., :2], b[..., :2]), jnp.minimum(a[..., 2:], b[..., 2:]))
    union = _area(a[..., :2], a[..., 2:]) + _area(b[..., :2], b[..., 2:]) - inter
    return inter, union
