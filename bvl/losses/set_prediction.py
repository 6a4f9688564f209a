"""Losses of a set of predicted boxes against a set of true ones (DETR: Carion et al. 2020, arXiv:2005.12872)."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from bvl.losses.boxes import box_iou, box_l1, generalized_iou
from bvl.losses.matching import match, matching_cost


class MatchedBoxes(NamedTuple):
    """Which target each prediction was matched to, -1 for none, and by prediction set the losses of the matched boxes.

    l1, giou: means over the matched predictions, 0 where there are none. iou: of every prediction with the target that
    it overlaps most, 0 without targets.
    """

    assigned: Int[Array, "*b q"]
    l1: Float[Array, "*b"]
    giou: Float[Array, "*b"]
    iou: Float[Array, "*b q"]

    @property
    def matched(self) -> Bool[Array, "*b q"]:
        return self.assigned >= 0

    @property
    def count(self) -> Int[Array, "*b"]:
        """How many predictions were matched, at least 1: what sums over predictions are divided by."""
        return jnp.maximum(self.matched.sum(-1), 1)


def match_boxes(
    boxes: Float[Array, "*b q 4"],
    scores: Float[Array, "*b q #m"],
    targets: Float[Array, "*#b m 4"],
    valid: Bool[Array, "*b m"],
    *,
    repeats: int = 1,
) -> MatchedBoxes:
    """Match every valid target to `repeats` predictions by box and score, and take the losses of these boxes.

    scores: probabilities of a prediction being the target's, or with one column any target's.
    """
    targets = jnp.broadcast_to(targets, (*valid.shape, 4))
    assigned = match(matching_cost(boxes, scores, targets), valid, repeats=repeats)
    own = jnp.take_along_axis(targets, jnp.maximum(assigned, 0)[..., None], axis=-2)
    matched = assigned >= 0
    count = jnp.maximum(matched.sum(-1), 1)

    def mean(values: Float[Array, "*b q"]) -> Float[Array, "*b"]:
        return jnp.where(matched, values, 0.0).sum(-1) / count

    return MatchedBoxes(
        assigned=assigned,
        l1=mean(box_l1(boxes, own)),
        giou=mean(1.0 - generalized_iou(boxes, own)),
        iou=jnp.where(valid[..., None, :], box_iou(boxes, targets), 0.0).max(-1),
    )
