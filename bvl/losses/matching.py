"""Which query predicts which object: the assignment of least cost, on the device (DETR, Carion et al. 2020)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from bvl.errors import ConfigError
from bvl.losses.boxes import box_l1, pairwise_generalized_iou

# Costs of this size count as infinite: differences of larger ones could overflow, and a NaN never ends the search.
_INFINITE = 1e30


def matching_cost(
    boxes: Float[Array, "*b q 4"],
    scores: Float[Array, "*b q #m"],
    targets: Float[Array, "*b m 4"],
    *,
    l1: float = 5.0,
    giou: float = 2.0,
    score: float = 2.0,
) -> Float[Array, "*b q m"]:
    """l1 |box - target|_1 - giou GIoU(box, target) - score s of every query and target (Carion et al. 2020).

    `scores` are probabilities of the query being this target's (or, with one column, any object), not logits.
    No gradient flows back: the assignment that follows from the cost has none.
    """
    distance = box_l1(boxes[..., :, None, :], targets[..., None, :, :])
    overlap = pairwise_generalized_iou(boxes, targets)
    return jax.lax.stop_gradient(l1 * distance - giou * overlap - score * scores.astype(jnp.float32))


def match(
    cost: Float[Array, "*b q m"], valid: Bool[Array, "*b m"], *, repeats: int = 1
) -> Int[Array, "*b q"]:
    """The target that each query is matched to, or -1: of all assignments, one with the least sum of costs.

    Every valid target is matched to `repeats` queries (H-DETR, Jia et al. 2022, section 3), to one by default,
    and targets that are not valid to none. Where there are fewer queries than that, every query is matched,
    and no target has a second query (third, ...) before all have their first (second, ...); which targets go
    without is whatever costs least. NaN and infinite costs count as the dearest finite cost of the problem,
    minus infinity as the cheapest. Raises ConfigError for `repeats` below 1.
    """
    if repeats < 1:
        raise ConfigError(f"matching: repeats={repeats}; every target is matched to at least 1 query")
    *leading, q, m = cost.shape
    if q == 0 or m == 0:
        return jnp.full((*leading, q), -1, jnp.int32)
    assigned = jax.vmap(lambda c, v: _match_one(c, v, repeats))(
        jax.lax.stop_gradient(cost).astype(jnp.float32).reshape(-1, q, m), valid.reshape(-1, m)
    )
    return assigned.reshape(*leading, q)


def _match_one(cost: Float[Array, "q m"], valid: Bool[Array, " m"], repeats: int) -> Int[Array, " q"]:
    q, m = cost.shape
    known = (jnp.abs(cost) < _INFINITE) & valid
    low, high = jnp.min(cost, initial=jnp.inf, where=known), jnp.max(cost, initial=-jnp.inf, where=known)
    cost = jnp.where(jnp.isnan(cost), high, jnp.clip(cost, low, high))
    # Costs from 0 to 1: the steps below must be neither lost in large costs nor drown small ones.
    cost = jnp.where(valid & known.any(), (cost - low) / jnp.maximum(high - low, 1e-30), 0.0)

    # A later column is dearer than any pair of an earlier one. As long as a better column is free, moving a
    # query there pays off, and where all are taken the steps are the same in every assignment.
    copy = jnp.arange(repeats)[:, None]
    step = jnp.where(valid, copy, repeats).reshape(-1).astype(jnp.float32)
    rows, columns = optax.assignment.hungarian_algorithm(jnp.tile(cost, (1, repeats)) + 2.0 * step)
    target = columns % m
    return jnp.full(q, -1, jnp.int32).at[rows].set(jnp.where(valid[target], target, -1).astype(jnp.int32))
