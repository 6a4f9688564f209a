"""How true the findings are that texts state: precision, recall, F1, invented findings, wrong negations.

Everything follows from one table an example, stated status by true status, and tables add up: intervals come from
resampling sums of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float, Integer, Num

from bvl.errors import ConfigError, DataError
from bvl.metrics.labeller import Lexicon, Status, label_text

# Rows (stated) and columns (true) of a table.
OUTCOMES = ("present", "uncertain", "absent", "unmentioned")
_CODE = {outcome: code for code, outcome in enumerate(OUTCOMES)}
_PRESENT, _UNCERTAIN, _ABSENT, _UNMENTIONED = range(4)

Treatment = Literal["positive", "negative", "ignored"]


@dataclasses.dataclass(frozen=True)
class FindingRules:
    """What counts as positive in precision, recall and F1; cells of an ignored status count nowhere.

    A finding that a text does not mention is not stated positive, hence missed where it is truly positive.
    """

    uncertain_stated: Treatment = "positive"
    uncertain_true: Treatment = "positive"
    unmentioned_true: Treatment = "ignored"  # "negative" where the truth names all that is there

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if (value := getattr(self, field.name)) not in ("positive", "negative", "ignored"):
                raise ConfigError(
                    f"finding rules: {field.name} must be 'positive', 'negative' or 'ignored', not {value!r}"
                )


@dataclasses.dataclass(frozen=True)
class FindingScores:
    """Micro averages count all findings together; macro averages are means over the findings where defined.

    `invented_rate`: of the findings stated as present, the share that is negative in truth. `wrong_negation_rate`: of
    the findings stated as absent, the share that is positive in truth. Both look at no uncertain statements, and at
    those alone whose truth the rules call positive or negative: what truth ignores could be neither right nor wrong.
    Values without a denominator are NaN.
    """

    precision: float
    recall: float
    f1: float
    macro_precision: float
    macro_recall: float
    macro_f1: float
    invented_rate: float
    wrong_negation_rate: float
    per_finding_precision: Float[np.ndarray, " f"]
    per_finding_recall: Float[np.ndarray, " f"]
    per_finding_f1: Float[np.ndarray, " f"]


def label_texts(texts: Sequence[str], lexicon: Lexicon) -> list[dict[str, Status]]:
    """`label_text` of every text."""
    return [label_text(text, lexicon) for text in texts]


def finding_tables(
    stated: Sequence[Mapping[str, Status]], truth: Sequence[Mapping[str, Status]], findings: Sequence[str]
) -> Integer[np.ndarray, "n f 4 4"]:
    """One count an example and finding, at (stated status, true status) in the order of `OUTCOMES`.

    A finding missing from a mapping is unmentioned; names that `findings` lacks are left out. Raises DataError where
    the numbers of examples differ or a status is unknown.
    """
    if len(stated) != len(truth):
        raise DataError(f"findings: {len(stated)} texts but {len(truth)} truths; give one of each an example")
    rows, columns = _codes(stated, findings), _codes(truth, findings)
    tables = np.zeros((*rows.shape, 4, 4), np.int32)
    n, f = np.indices(rows.shape, sparse=True)
    tables[n, f, rows, columns] = 1
    return tables


def finding_scores(table: Num[np.ndarray, "f 4 4"], rules: FindingRules | None = None) -> FindingScores:
    """Scores of a sum of `finding_tables` over examples. Raises DataError for another shape."""
    table, rules = np.asarray(table, np.float64), rules or FindingRules()
    if table.ndim != 3 or table.shape[1:] != (4, 4):
        raise DataError(f"findings: a summed table must have shape [findings, 4, 4], not {table.shape}")
    row = {"positive": [_PRESENT], "negative": [_ABSENT, _UNMENTIONED], "ignored": []}
    column = {"positive": [_PRESENT], "negative": [_ABSENT], "ignored": []}
    row[rules.uncertain_stated].append(_UNCERTAIN)
    column[rules.uncertain_true].append(_UNCERTAIN)
    column[rules.unmentioned_true].append(_UNMENTIONED)

    def count(rows: str, columns: str) -> Float[np.ndarray, " f"]:
        return table[:, row[rows]][:, :, column[columns]].sum((1, 2))

    hits, invented, missed = (
        count("positive", "positive"),
        count("positive", "negative"),
        count("negative", "positive"),
    )
    each = _precision_recall_f1(hits, invented, missed)
    micro = _precision_recall_f1(hits.sum(), invented.sum(), missed.sum())
    macro = [_mean(values) for values in each]

    def share(stated: int, wrong: str) -> float:
        """Of what is stated so and can be judged, the share whose truth is `wrong`."""
        statuses = table[:, stated].sum(0)
        return float(
            _ratio(statuses[column[wrong]].sum(), statuses[column["positive"] + column["negative"]].sum())
        )

    return FindingScores(
        *(float(value) for value in micro),
        *macro,
        share(_PRESENT, "negative"),
        share(_ABSENT, "positive"),
        *each,
    )


def _codes(labels: Sequence[Mapping[str, Status]], findings: Sequence[str]) -> Integer[np.ndarray, "n f"]:
    codes = np.full((len(labels), len(findings)), _UNMENTIONED)
    for i, statuses in enumerate(labels):
        for j, finding in enumerate(findings):
            if finding in statuses:
                status = statuses[finding]
                if status not in _CODE:
                    raise DataError(
                        f"findings: example {i} has {status!r} for {finding!r}; statuses are {', '.join(OUTCOMES)}"
                    )
                codes[i, j] = _CODE[status]
    return codes


def _ratio(part: Num[np.ndarray, ...], whole: Num[np.ndarray, ...]) -> Float[np.ndarray, ...]:
    part, whole = np.asarray(part, np.float64), np.asarray(whole, np.float64)
    return np.divide(part, whole, out=np.full(whole.shape, np.nan), where=whole > 0)


def _precision_recall_f1(hits, invented, missed) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return (
        _ratio(hits, hits + invented),
        _ratio(hits, hits + missed),
        _ratio(2 * hits, 2 * hits + invented + missed),
    )


def _mean(values: Float[np.ndarray, " f"]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")
