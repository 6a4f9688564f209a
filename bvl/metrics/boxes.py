"""How well boxes [x0, y0, x1, y1] fit: intersection over union, accuracy at a threshold, suppression of doubles."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from jaxtyping import Float, Integer

from bvl.errors import DataError


def iou(a: Float[np.ndarray, "n 4"], b: Float[np.ndarray, "n 4"]) -> Float[np.ndarray, " n"]:
    """Intersection over union of box i of `a` with box i of `b`; 0 where both have no area.

    The mean over phrases is the mIoU, and `bootstrap_mean` takes the array as it is. Raises DataError unless both
    are [n, 4] with the same n.
    """
    a, b = _boxes(a, "first"), _boxes(b, "second")
    if a.shape != b.shape:
        raise DataError(f"IoU row by row: {len(a)} boxes but {len(b)}; give one of each a row")
    return _iou(a, b)


def pairwise_iou(a: Float[np.ndarray, "n 4"], b: Float[np.ndarray, "m 4"]) -> Float[np.ndarray, "n m"]:
    """`iou` of every box of `a` with every box of `b`; either may be empty."""
    return _iou(_boxes(a, "first")[:, None], _boxes(b, "second")[None])


def hits_at(ious: Float[np.ndarray, " n"], threshold: float) -> Float[np.ndarray, " n"]:
    """1 where the IoU is at least the threshold, else 0; NaN stays NaN (for `bootstrap_mean`)."""
    ious = np.asarray(ious, np.float64)
    return np.where(np.isnan(ious), np.nan, ious >= threshold)


def accuracy_at(ious: Float[np.ndarray, " n"], threshold: float) -> float:
    """Acc@threshold: the share of IoUs that reach it, NaN ones left out; NaN for none."""
    hits = hits_at(ious, threshold)
    known = hits[~np.isnan(hits)]
    return float(known.mean()) if len(known) else float("nan")


def non_maximum_suppression(
    boxes: Float[np.ndarray, "n 4"],
    scores: Float[np.ndarray, " n"],
    *,
    iou_threshold: float = 0.5,
    labels: Sequence[Hashable] | None = None,
) -> Integer[np.ndarray, " kept"]:
    """Indices of the boxes that stay, best score first: a kept box removes all worse ones above the threshold.

    Equal scores keep their order. With `labels` a box removes those of its own label only. Raises DataError where
    the numbers of boxes, scores and labels differ or a score is NaN.
    """
    boxes, scores = _boxes(boxes, "all"), np.asarray(scores, np.float64)
    if scores.shape != (len(boxes),) or (labels is not None and len(labels) != len(boxes)):
        raise DataError(f"{len(boxes)} boxes need as many scores and labels; the scores are {scores.shape}")
    if np.isnan(scores).any():
        raise DataError("a score is NaN; boxes without a score have no order")
    codes: dict[Hashable, int] = {}
    label = np.array([codes.setdefault(name, len(codes)) for name in labels or [0] * len(boxes)])
    left = np.argsort(-scores, kind="stable")
    kept = []
    while len(left):
        best, left = left[0], left[1:]
        kept.append(best)
        left = left[(_iou(boxes[best], boxes[left]) <= iou_threshold) | (label[left] != label[best])]
    return np.array(kept, np.int64)


def _boxes(boxes: Float[np.ndarray, "n 4"], which: str) -> Float[np.ndarray, "n 4"]:
    boxes = np.asarray(boxes, np.float64)
    if boxes.size == 0:
        return boxes.reshape(0, 4)
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise DataError(f"{which} boxes {boxes.shape}: give [n, 4] with rows [x0, y0, x1, y1]")
    return boxes


def _area(low: Float[np.ndarray, "... 2"], high: Float[np.ndarray, "... 2"]) -> Float[np.ndarray, ...]:
    return np.maximum(high - low, 0.0).prod(-1)


def _iou(a: Float[np.ndarray, "... 4"], b: Float[np.ndarray, "... 4"]) -> Float[np.ndarray, ...]:
    inter = _area(np.maximum(a[..., :2], b[..., :2]), np.minimum(a[..., 2:], b[..., 2:]))
    union = _area(a[..., :2], a[..., 2:]) + _area(b[..., :2], b[..., 2:]) - inter
    return np.divide(inter, union, out=np.zeros_like(inter), where=union > 0)
