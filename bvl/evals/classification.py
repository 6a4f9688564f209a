"""What classification suites share: the labels of a record set as arrays, and the metrics with their intervals."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from bvl.data.pipeline import encode_labels
from bvl.data.sources import RecordSet
from bvl.errors import DataError
from bvl.evals.base import BOOTSTRAP_SAMPLES, LEVEL, Collector, describe, fields_of, with_images
from bvl.metrics.bootstrap import bootstrap_interval, bootstrap_mean
from bvl.metrics.classification import accuracy, balanced_accuracy, macro_auroc, one_hot


@dataclasses.dataclass(frozen=True)
class LabelTable:
    """Labels of the records that have an image and the field in question.

    indices: of the records. labels: 0/1. valid: where the label is known; single-label rows are valid throughout.
    """

    indices: np.ndarray
    classes: tuple[str, ...]
    labels: Bool[np.ndarray, "n c"]
    valid: Bool[np.ndarray, "n c"]
    left_out: dict[str, int]


def label_table(
    record_set: RecordSet,
    *,
    by: str,
    multi_label: bool,
    classes: Sequence[str] | None = None,
    skip_unknown: bool = False,
) -> LabelTable:
    """The labels of a record set by the field `by` ("labels", "modality" or any other).

    classes: the columns; None = all values that occur, sorted. A single-label record must have exactly one value,
    and it must be one of the classes; with `skip_unknown` records of other classes are left out and counted.
    Raises DataError where that is not so or no record has the field.
    """
    candidates, left_out = with_images(record_set)
    indices, values = [], []
    for i in candidates:
        names = _names(record_set.describe(i), by, record_set)
        if names is None:
            left_out[f"without {by}"] += 1
            continue
        if not multi_label and len(names) != 1:
            raise DataError(
                f"{describe(record_set)}, record {record_set.describe(i)['id']!r}: {by} is {names}, but with "
                f"multi_label=False every record needs exactly one; set multi_label=True"
            )
        if skip_unknown and not multi_label and names[0] not in classes:
            left_out[f"with {by} {names[0]!r}, which is no class"] += 1
            continue
        indices.append(i)
        values.append(names)
    if not indices:
        reasons = ", ".join(f"{n} {why}" for why, n in left_out.items())
        raise DataError(
            f"{describe(record_set)}: no record with an image has the field {by!r} ({reasons}); fields that records "
            f"have: {fields_of(record_set)}"
        )
    occurring = collections.Counter(name for names in values for name in names)
    columns = tuple(classes) if classes is not None else tuple(sorted(occurring))
    unknown = {name: count for name, count in occurring.items() if name not in columns}
    if unknown and not multi_label:
        listed = ", ".join(f"{name!r} ({count} records)" for name, count in sorted(unknown.items()))
        raise DataError(
            f"{describe(record_set)}: no prompt or column for {by} {listed}; there are {', '.join(columns)}"
        )
    class_index = {name: i for i, name in enumerate(columns)}
    rows = []
    for i, names in zip(indices, values, strict=True):
        # Which names were looked for is said of the field `labels` only.
        known = record_set.describe(i).get("labels_known") if by == "labels" and multi_label else None
        rows.append(encode_labels({"labels": names, "labels_known": known}, class_index))
    labels, valid = (np.stack(part) for part in zip(*rows, strict=True))
    return LabelTable(np.array(indices), columns, labels > 0, valid, dict(left_out))


def require_outcomes(table: LabelTable, record_set: RecordSet, by: str) -> None:
    """Raise DataError unless some class has both positives and negatives."""
    positive = (table.labels & table.valid).any(0)
    negative = (~table.labels & table.valid).any(0)
    if not (positive & negative).any():
        raise DataError(
            f"{describe(record_set)}: of the classes {', '.join(table.classes)} none has records with and without it "
            f"in {by!r}, so nothing can be told apart"
        )


def judge(
    record_set: RecordSet,
    table: LabelTable,
    kept: Sequence[int],
    scores: Float[np.ndarray, "n c"],
    *,
    by: str,
    multi_label: bool,
) -> tuple[Collector, list[dict[str, Any]]]:
    """Metrics and a line for each example of `scores`, whose rows belong to the records `kept` of the table."""
    rows = np.isin(table.indices, kept)
    labels, valid = table.labels[rows], table.valid[rows]
    groups = record_set.groups()
    options: dict[str, Any] = dict(groups=[groups[i] for i in kept], unit=record_set.group_unit())
    if multi_label:
        found = multi_label_metrics(scores, labels, valid, table.classes, **options)
    else:
        found = single_label_metrics(scores, labels, table.classes, **options)
    per_example = []
    for row, index in enumerate(kept):
        names = [name for name, is_true in zip(table.classes, labels[row], strict=True) if is_true]
        example = {"id": record_set.describe(int(index))["id"], by: names if multi_label else names[0]}
        if not multi_label:
            example["predicted"] = table.classes[int(scores[row].argmax())]
        elif not valid[row].all():
            example["known"] = [n for n, known in zip(table.classes, valid[row], strict=True) if known]
        example["scores"] = {n: float(s) for n, s in zip(table.classes, scores[row], strict=True)}
        per_example.append(example)
    return found, per_example


def single_label_metrics(
    probabilities: Float[np.ndarray, "n c"],
    labels: Bool[np.ndarray, "n c"],
    classes: Sequence[str],
    *,
    groups: Sequence[Hashable],
    unit: str,
) -> Collector:
    """accuracy, balanced_accuracy and auroc_macro (one against the rest), each with its interval; recall/<class>."""
    out = Collector()
    out.metrics["num_images"] = len(labels)
    truth, predicted = labels.argmax(1), probabilities.argmax(1)
    correct = (truth == predicted).astype(np.float64)
    options: dict[str, Any] = dict(num_samples=BOOTSTRAP_SAMPLES, level=LEVEL, unit=unit)
    out.add("accuracy", accuracy(predicted, truth), bootstrap_mean(correct, groups, **options))
    out.add(
        "balanced_accuracy",
        balanced_accuracy(predicted, truth),
        bootstrap_interval(lambda rows: balanced_accuracy(predicted[rows], truth[rows]), groups, **options),
    )
    targets = one_hot(truth, len(classes))
    _add_auroc_macro(out, probabilities, targets, np.ones_like(targets), groups, options)
    for c, name in enumerate(classes):
        rows = truth == c
        out.add(f"recall/{name}", float(correct[rows].mean()) if rows.any() else float("nan"))
    return out


def multi_label_metrics(
    scores: Float[np.ndarray, "n c"],
    labels: Bool[np.ndarray, "n c"],
    valid: Bool[np.ndarray, "n c"],
    classes: Sequence[str],
    *,
    groups: Sequence[Hashable],
    unit: str,
) -> Collector:
    """auroc/<class> over the rows valid for it, and auroc_macro with its interval over the classes that have one."""
    out = Collector()
    out.metrics["num_images"] = len(labels)
    options: dict[str, Any] = dict(num_samples=BOOTSTRAP_SAMPLES, level=LEVEL, unit=unit)
    per_class = _add_auroc_macro(out, scores, labels, valid, groups, options)
    out.metrics["num_classes"] = int(np.isfinite(per_class).sum())
    for name, value in zip(classes, per_class, strict=True):
        out.add(f"auroc/{name}", float(value))
    return out


def _add_auroc_macro(out: Collector, scores, labels, valid, groups, options: dict[str, Any]) -> np.ndarray:
    found = macro_auroc(scores, labels, valid)
    weighted = WeightedAuroc(scores, labels, valid)

    def replicate(rows: np.ndarray) -> float:
        areas = weighted(np.bincount(rows, minlength=len(scores)))
        defined = areas[~np.isnan(areas)]
        return float(defined.mean()) if len(defined) else float("nan")

    out.add("auroc_macro", found.value, bootstrap_interval(replicate, groups, **options))
    return found.per_class


class WeightedAuroc:
    """Area under the ROC curve of every column, its rows counted as often as asked.

    Columns are sorted once, so that a bootstrap replicate costs cumulative sums instead of a sort for each class.
    """

    def __init__(
        self,
        scores: Float[np.ndarray, "n c"],
        labels: Bool[np.ndarray, "n c"],
        valid: Bool[np.ndarray, "n c"],
    ):
        self._order = np.argsort(scores, axis=0, kind="stable")
        ordered = np.take_along_axis(scores, self._order, 0)
        self._positive = np.take_along_axis(labels & valid, self._order, 0)
        self._negative = np.take_along_axis(~labels & valid, self._order, 0)
        # For each row where its run of equal scores begins, and one past where it ends.
        position = np.arange(len(scores))[:, None]
        edge = np.ones((1, scores.shape[1]), bool)
        differs = ordered[1:] != ordered[:-1]
        begins, ends = np.concatenate([edge, differs]), np.concatenate([differs, edge])
        self._first = np.maximum.accumulate(np.where(begins, position, 0), axis=0)
        self._last = np.minimum.accumulate(np.where(ends, position + 1, len(scores))[::-1], axis=0)[::-1]

    def __call__(self, counts: np.ndarray) -> Float[np.ndarray, " c"]:
        """`counts`: how often each row is in the sample. NaN where a class lacks positives or negatives."""
        weights = counts[self._order]
        positive = weights * self._positive
        below = np.zeros((len(weights) + 1, weights.shape[1]))
        np.cumsum(weights * self._negative, axis=0, out=below[1:])
        # Negatives below, plus half of those with an equal score.
        won = 0.5 * (np.take_along_axis(below, self._first, 0) + np.take_along_axis(below, self._last, 0))
        pairs = positive.sum(0) * below[-1]
        return np.divide((positive * won).sum(0), pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)


def _names(record: dict[str, Any], by: str, record_set: RecordSet) -> list[str] | None:
    value = record.get(by)
    if value is None:
        return None
    if isinstance(value, str):
        return [value]
    if isinstance(value, bool | int):
        return [str(value)]
    if isinstance(value, list | tuple) and all(isinstance(v, str) for v in value):
        return list(value)
    raise DataError(
        f"{describe(record_set)}, record {record['id']!r}: {by} is a {type(value).__name__}; classes need a string "
        f"or a list of strings"
    )
