"""Classification metrics on plain arrays. Every name says how it averages; what is undefined is NaN, never 0.5."""

from __future__ import annotations

import dataclasses

import numpy as np
import scipy.stats
from jaxtyping import Bool, Float, Integer, Num

from bvl.errors import DataError


@dataclasses.dataclass(frozen=True)
class MacroAuroc:
    """Unweighted mean of the areas that are defined; `num_undefined` classes lacked a positive or a negative."""

    value: float
    per_class: Float[np.ndarray, " c"]
    num_undefined: int


def accuracy(predicted: Integer[np.ndarray, " n"], labels: Integer[np.ndarray, " n"]) -> float:
    """Share of examples whose predicted class is the labelled one; NaN for no examples."""
    predicted, labels = _same_shape(predicted, labels)
    return float(np.mean(predicted == labels)) if len(labels) else float("nan")


def balanced_accuracy(predicted: Integer[np.ndarray, " n"], labels: Integer[np.ndarray, " n"]) -> float:
    """Mean recall over the classes that occur in `labels`; NaN for no examples."""
    predicted, labels = _same_shape(predicted, labels)
    if not len(labels):
        return float("nan")
    _, codes = np.unique(labels, return_inverse=True)
    recalls = np.bincount(codes, weights=predicted == labels) / np.bincount(codes)
    return float(recalls.mean())


def auroc(scores: Float[np.ndarray, " n"], labels: Num[np.ndarray, " n"] | Bool[np.ndarray, " n"]) -> float:
    """Area under the ROC curve: P(score of a positive > score of a negative), equal scores counting one half.

    `labels` are 0/1 or bool. NaN when a class is absent or a score is NaN. The area is the Mann-Whitney U
    statistic over the number of pairs (Hanley and McNeil 1982).
    """
    scores, positive = _binary(scores, labels)
    num_positive, num_negative = int(positive.sum()), int((~positive).sum())
    if not num_positive or not num_negative or np.isnan(scores).any():
        return float("nan")
    ranks = scipy.stats.rankdata(scores)
    u = ranks[positive].sum() - num_positive * (num_positive + 1) / 2
    return float(u / (num_positive * num_negative))


def per_class_auroc(
    scores: Float[np.ndarray, "n c"],
    labels: Num[np.ndarray, "n c"] | Bool[np.ndarray, "n c"],
    valid: Bool[np.ndarray, "n c"] | Bool[np.ndarray, " n"] | None = None,
) -> Float[np.ndarray, " c"]:
    """`auroc` of every column over the rows that are valid in it; NaN where it is undefined."""
    scores, labels = _same_shape(scores, labels)
    if scores.ndim != 2:
        raise DataError(f"per-class areas need [n, c] scores and labels, got {scores.shape}")
    valid = np.ones(scores.shape, bool) if valid is None else np.asarray(valid, bool)
    if valid.shape not in (scores.shape, scores.shape[:1]):
        raise DataError(f"valid {valid.shape} must be [n] or [n, c] for scores {scores.shape}")
    valid = np.broadcast_to(valid if valid.ndim == 2 else valid[:, None], scores.shape)
    return np.array([auroc(scores[v, c], labels[v, c]) for c, v in enumerate(valid.T)], np.float64)


def macro_auroc(
    scores: Float[np.ndarray, "n c"],
    labels: Num[np.ndarray, "n c"] | Bool[np.ndarray, "n c"],
    valid: Bool[np.ndarray, "n c"] | Bool[np.ndarray, " n"] | None = None,
) -> MacroAuroc:
    """Mean of `per_class_auroc` over the classes where it is defined, with the number of those left out."""
    per_class = per_class_auroc(scores, labels, valid)
    defined = per_class[~np.isnan(per_class)]
    value = float(defined.mean()) if len(defined) else float("nan")
    return MacroAuroc(value=value, per_class=per_class, num_undefined=len(per_class) - len(defined))


def one_hot(labels: Integer[np.ndarray, " n"], num_classes: int) -> Bool[np.ndarray, "n c"]:
    """Single labels as columns for the one-against-rest areas; raises DataError for labels out of range."""
    labels = np.asarray(labels)
    if labels.size and (labels.min() < 0 or labels.max() >= num_classes):
        raise DataError(f"labels {labels.min()}..{labels.max()} do not fit {num_classes} classes")
    return labels[:, None] == np.arange(num_classes)


def _same_shape(a, b) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape:
        raise DataError(f"predictions {a.shape} and labels {b.shape} must have the same shape")
    return a, b


def _binary(scores, labels) -> tuple[np.ndarray, np.ndarray]:
    scores, labels = _same_shape(scores, labels)
    if not np.isin(labels, (0, 1)).all():
        raise DataError("binary labels must be 0 or 1; leave unknown (-1, NaN) ones out through `valid`")
    return scores, labels.astype(bool)
