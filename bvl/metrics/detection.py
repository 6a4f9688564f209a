"""Average precision of detected boxes or masks, as COCO defines it (Lin et al. 2014; pycocotools).

Matching is done once; every resample of the images then costs one pass over the detections:

    matches = match_detections(ious, scores, predicted, true)
    average_precision(matches).mean                                              # mAP over 0.50:0.95
    bootstrap_interval(lambda rows: average_precision(matches, rows).at(0.5), groups)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence

import numpy as np
from jaxtyping import Bool, Float, Integer

from bvl.errors import DataError

COCO_THRESHOLDS = tuple(np.linspace(0.5, 0.95, 10).tolist())
_RECALLS = np.linspace(0.0, 1.0, 101)


@dataclasses.dataclass(frozen=True)
class Matches:
    """Which detections are right: for each class those of all images, best score first.

    `hits[c]` has one row a threshold and one column a detection of class c, `images[c]` the image of each.
    """

    classes: tuple[Hashable, ...]
    thresholds: Float[np.ndarray, " t"]
    hits: tuple[Bool[np.ndarray, "t d"], ...]
    images: tuple[Integer[np.ndarray, " d"], ...]
    num_true: Integer[np.ndarray, "images c"]


@dataclasses.dataclass(frozen=True)
class AveragePrecision:
    """AP of each threshold and class; a class without a true object has NaN and counts in no mean."""

    classes: tuple[Hashable, ...]
    thresholds: Float[np.ndarray, " t"]
    values: Float[np.ndarray, "t c"]

    @property
    def mean(self) -> float:
        """mAP: over the classes and all thresholds."""
        return _mean(self.values)

    @property
    def per_class(self) -> dict[Hashable, float]:
        """Mean over the thresholds of each class."""
        return {name: _mean(self.values[:, c]) for c, name in enumerate(self.classes)}

    def at(self, threshold: float) -> float:
        """Mean over the classes at one threshold: AP50 is `at(0.5)`. Raises DataError for one not matched."""
        return _mean(self._row(threshold))

    def per_class_at(self, threshold: float) -> dict[Hashable, float]:
        """AP of each class at one threshold. Raises DataError for one that was not matched."""
        return dict(zip(self.classes, self._row(threshold).tolist(), strict=True))

    def _row(self, threshold: float) -> Float[np.ndarray, " c"]:
        found = np.flatnonzero(np.isclose(self.thresholds, threshold, rtol=0, atol=1e-9))
        if not len(found):
            raise DataError(
                f"IoU threshold {threshold} was not matched; there are {self.thresholds.tolist()}"
            )
        return self.values[found[0]]


def match_detections(
    ious: Sequence[Float[np.ndarray, "d g"]],
    scores: Sequence[Float[np.ndarray, " d"]],
    predicted: Sequence[Sequence[Hashable]],
    true: Sequence[Sequence[Hashable]],
    *,
    thresholds: Sequence[float] = COCO_THRESHOLDS,
    max_detections: int = 100,
) -> Matches:
    """Match detections to true objects within image and class, greedily in order of score.

    All arguments have one entry an image: the IoUs of its detections with its objects (of boxes or of masks), the
    detections' scores and class names, the objects' class names. Of an image and class the `max_detections` best
    count. A detection takes the object of greatest IoU at or above the threshold that no better one has taken,
    among equal IoUs the last; equal scores keep their order, first by image, then as given (all as in COCO). Raises
    DataError where numbers disagree or a score or IoU is NaN.
    """
    _check(ious, scores, predicted, true)
    classes = tuple(sorted({name for names in (*true, *predicted) for name in names}, key=str))
    thresholds = np.asarray(thresholds, np.float64)
    num_true = np.array([[list(names).count(c) for c in classes] for names in true], np.int64)
    hits, images = [], []
    for name in classes:
        found, score, image = [np.zeros((len(thresholds), 0), bool)], [np.zeros(0)], [np.zeros(0, np.int64)]
        for i in range(len(ious)):
            mine = np.array([label == name for label in predicted[i]], bool)
            objects = np.array([label == name for label in true[i]], bool)
            order = np.flatnonzero(mine)
            order = order[np.argsort(-np.asarray(scores[i])[order], kind="stable")][:max_detections]
            found.append(_greedy(np.asarray(ious[i])[order][:, objects], thresholds))
            score.append(np.asarray(scores[i], np.float64)[order])
            image.append(np.full(len(order), i))
        best_first = np.argsort(-np.concatenate(score), kind="stable")
        hits.append(np.concatenate(found, axis=1)[:, best_first])
        images.append(np.concatenate(image)[best_first])
    return Matches(classes, thresholds, tuple(hits), tuple(images), num_true.reshape(len(ious), len(classes)))


def average_precision(
    matches: Matches, images: Integer[np.ndarray, " rows"] | None = None
) -> AveragePrecision:
    """Mean over 101 recalls 0, 0.01, ..., 1 of the best precision at that recall or a greater one (COCO).

    `images` are the images that count, by position, one named twice counting twice (a bootstrap sample); all by
    default.
    """
    num_images = len(matches.num_true)
    weights = np.ones(num_images) if images is None else np.bincount(images, minlength=num_images)
    num_true = weights @ matches.num_true
    values = np.full((len(matches.thresholds), len(matches.classes)), np.nan)
    for c, (hits, image) in enumerate(zip(matches.hits, matches.images, strict=True)):
        if num_true[c]:
            # A detection that counts w times moves the curve as w equal ones in a row do: between them neither
            # a hit's precision falls nor a miss's recall rises.
            right = np.cumsum(np.where(hits, weights[image], 0.0), axis=1)
            precision = right / (np.cumsum(weights[image]) + np.spacing(1))
            values[:, c] = [_interpolated(*row) for row in zip(right / num_true[c], precision, strict=True)]
    return AveragePrecision(matches.classes, matches.thresholds, values)


def _greedy(ious: Float[np.ndarray, "d g"], thresholds: Float[np.ndarray, " t"]) -> Bool[np.ndarray, "t d"]:
    hits = np.zeros((len(thresholds), len(ious)), bool)
    if not ious.shape[1]:
        return hits
    for t, threshold in enumerate(thresholds):
        free = np.ones(ious.shape[1], bool)
        for d, row in enumerate(ious):
            left = np.where(free, row, -1.0)
            best = len(left) - 1 - int(np.argmax(left[::-1]))
            # COCO's way to let an IoU of 1 pass a threshold of 1 in spite of rounding.
            if left[best] >= min(threshold, 1 - 1e-10):
                hits[t, d], free[best] = True, False
    return hits


def _interpolated(recall: Float[np.ndarray, " d"], precision: Float[np.ndarray, " d"]) -> float:
    best_from_here = np.maximum.accumulate(precision[::-1])[::-1]
    first = np.searchsorted(recall, _RECALLS, side="left")
    return float(np.append(best_from_here, 0.0)[first].mean())


def _mean(values: Float[np.ndarray, ...]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def _check(ious: Sequence, scores: Sequence, predicted: Sequence, true: Sequence) -> None:
    if not len(ious) == len(scores) == len(predicted) == len(true):
        raise DataError(
            f"detections: IoUs of {len(ious)} images, scores of {len(scores)}, names of {len(predicted)} and "
            f"objects of {len(true)}; give one entry of each an image"
        )
    for i, matrix in enumerate(ious):
        shape, score = (len(predicted[i]), len(true[i])), np.asarray(scores[i])
        if np.shape(matrix) != shape or score.shape != shape[:1]:
            raise DataError(
                f"detections: image {i} has {shape[0]} detections and {shape[1]} objects, "
                f"but IoUs {np.shape(matrix)} and scores {score.shape}"
            )
        if np.isnan(score).any() or np.isnan(matrix).any():
            raise DataError(f"detections: image {i} has a score or an IoU that is NaN")
