"""How well masks fit, and the separate instances of a mask."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.ndimage
from jaxtyping import Bool, Float

from bvl.errors import DataError

# Pixels in one product of masks: the f32 sums of fewer than 2^24 ones are exact.
_CHUNK_PIXELS = 2**20


class Instances(NamedTuple):
    """Connected parts of one mask, from the top down; boxes are tight and in fractions of the mask's sides."""

    masks: Bool[np.ndarray, "n h w"]
    boxes: Float[np.ndarray, "n 4"]


def dice(predicted: Bool[np.ndarray, "*n h w"], true: Bool[np.ndarray, "*n h w"]) -> Float[np.ndarray, "*n"]:
    """2 |P and T| / (|P| + |T|) of each mask; NaN where both are empty, for there is nothing to find.

    A mask that is empty in truth alone has 0. Raises DataError for different shapes or masks that are not bool.
    """
    both, sizes = _counts(predicted, true)
    return np.divide(2 * both, sizes, out=np.full(both.shape, np.nan), where=sizes > 0)


def mask_iou(
    predicted: Bool[np.ndarray, "*n h w"], true: Bool[np.ndarray, "*n h w"]
) -> Float[np.ndarray, "*n"]:
    """|P and T| / |P or T| of each mask; NaN where both are empty. Raises what `dice` raises."""
    both, sizes = _counts(predicted, true)
    return np.divide(both, sizes - both, out=np.full(both.shape, np.nan), where=sizes > 0)


def pairwise_mask_iou(a: Bool[np.ndarray, "n h w"], b: Bool[np.ndarray, "m h w"]) -> Float[np.ndarray, "n m"]:
    """IoU of every mask of `a` with every mask of `b`, 0 where both are empty: what `match_detections` takes.

    Raises DataError for masks of different sizes or that are not bool.
    """
    a, b = _masks(a), _masks(b)
    if a.ndim != 3 or b.ndim != 3 or a.shape[1:] != b.shape[1:]:
        raise DataError(f"masks {a.shape} and {b.shape}: give [n, h, w] and [m, h, w] on one grid")
    a, b = a.reshape(len(a), np.prod(a.shape[1:])), b.reshape(len(b), np.prod(b.shape[1:]))
    both = np.zeros((len(a), len(b)))
    for start in range(0, a.shape[1], _CHUNK_PIXELS):
        pixels = slice(start, start + _CHUNK_PIXELS)
        both += a[:, pixels].astype(np.float32) @ b[:, pixels].T.astype(np.float32)
    union = a.sum(1)[:, None] + b.sum(1)[None] - both
    return np.divide(both, union, out=np.zeros_like(both), where=union > 0)


def instances_of(mask: Bool[np.ndarray, "h w"], *, min_area: int = 1) -> Instances:
    """Parts of a mask that are connected by their sides (not by corners alone) and have `min_area` pixels or more.

    Raises DataError for a mask that is not a bool [h, w].
    """
    mask = _masks(mask)
    if mask.ndim != 2:
        raise DataError(f"mask {mask.shape}: instances are taken from one mask [h, w]")
    labels, count = scipy.ndimage.label(mask)
    areas = np.bincount(labels.reshape(-1), minlength=count + 1)[1:]
    spans = scipy.ndimage.find_objects(labels)
    kept = [i for i in range(count) if areas[i] >= min_area]
    height, width = mask.shape
    boxes = [
        (x.start / width, y.start / height, x.stop / width, y.stop / height)
        for y, x in (spans[i] for i in kept)
    ]
    masks = labels[None] == np.array(kept, labels.dtype)[:, None, None] + 1
    return Instances(masks, np.array(boxes, np.float64).reshape(-1, 4))


def _masks(masks: Bool[np.ndarray, ...]) -> Bool[np.ndarray, ...]:
    masks = np.asarray(masks)
    if masks.dtype != bool:
        raise DataError(f"masks have dtype {masks.dtype}; give bool, e.g. probabilities > 0.5")
    return masks


def _counts(predicted: Bool[np.ndarray, ...], true: Bool[np.ndarray, ...]) -> tuple[np.ndarray, np.ndarray]:
    predicted, true = _masks(predicted), _masks(true)
    if predicted.shape != true.shape or predicted.ndim < 2:
        raise DataError(f"masks {predicted.shape} and {true.shape}: give two of the same shape [..., h, w]")
    axes = (-2, -1)
    both = np.asarray((predicted & true).sum(axes), np.float64)
    return both, np.asarray(predicted.sum(axes) + true.sum(axes), np.float64)
