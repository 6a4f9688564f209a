"""Percentile bootstrap by group: all rows of a patient are drawn together, because they are not independent.

Efron and Tibshirani 1993, chapter 13 (percentile interval); Davison and Hinkley 1997, section 3.8 (groups).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterator, Sequence

import numpy as np
from jaxtyping import Float, Integer, Num

from bvl.errors import DataError


@dataclasses.dataclass(frozen=True)
class Interval:
    """A two-sided interval. `unit` names what was resampled ("patient", "image"), `num_groups` how many there are.

    `num_dropped` replicates had no value (a class was absent from the sample) and were left out. The ends are
    NaN when there are fewer than two groups, since one group shows no spread, or when no replicate has a
    value.
    """

    low: float
    high: float
    num_groups: int
    unit: str
    num_dropped: int = 0


def bootstrap_interval(
    statistic: Callable[[Integer[np.ndarray, " rows"]], float],
    groups: Sequence[Hashable],
    *,
    num_samples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    unit: str = "patient",
) -> Interval:
    """Interval of `statistic(row indices)` under resampling of the groups with replacement.

    `groups` has one id a row; a group drawn twice gives its rows twice. The draws depend on (seed, number of
    groups) alone, so two statistics on the same rows see the same samples. Raises DataError for no rows.
    """
    codes, num_groups = _codes(groups, num_samples, level)
    order = np.argsort(codes, kind="stable")
    sizes = np.bincount(codes, minlength=num_groups)
    starts = np.cumsum(sizes) - sizes
    values = np.empty(num_samples)
    for i, drawn in enumerate(_draws(num_groups, num_samples, seed)):
        lengths = sizes[drawn]
        # Row p of the sample is row p - (rows before its group) of that group's run in `order`.
        offsets = np.repeat(starts[drawn] - (np.cumsum(lengths) - lengths), lengths)
        values[i] = statistic(order[offsets + np.arange(len(offsets))])
    return _percentiles(values, num_groups, level, unit)


def bootstrap_mean(
    values: Float[np.ndarray, " n"],
    groups: Sequence[Hashable],
    *,
    num_samples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    unit: str = "patient",
) -> Interval:
    """`bootstrap_interval` of the mean of per-example values (hits, correct or not), from sums by group.

    NaN values are left out of every mean. Same draws as `bootstrap_interval` with the same seed.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1:
        raise DataError(f"values {values.shape}: give one a row")
    known = ~np.isnan(values)
    columns = np.stack([np.where(known, values, 0.0), known], axis=1)

    def mean(sums: np.ndarray) -> float:
        return sums[0] / sums[1] if sums[1] else np.nan

    return bootstrap_sums(columns, mean, groups, num_samples=num_samples, seed=seed, level=level, unit=unit)


def bootstrap_sums(
    values: Num[np.ndarray, "n s"],
    statistic: Callable[[Float[np.ndarray, " s"]], float],
    groups: Sequence[Hashable],
    *,
    num_samples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    unit: str = "patient",
) -> Interval:
    """`bootstrap_interval` of a statistic of the sums over rows (corpus BLEU, micro F1), from sums by group.

    Row i of `values` is what example i adds to each of the s sums. Same draws as `bootstrap_interval` with
    the same seed. Raises DataError for no rows or when the numbers of rows disagree.
    """
    codes, num_groups = _codes(groups, num_samples, level)
    values = np.asarray(values, np.float64)
    if values.ndim != 2 or len(values) != len(codes):
        raise DataError(f"{values.shape} values but {len(codes)} groups; give one of each a row")
    sums = np.zeros((num_groups, values.shape[1]))
    np.add.at(sums, codes, values)
    found = np.empty(num_samples)
    for i, drawn in enumerate(_draws(num_groups, num_samples, seed)):
        found[i] = statistic(np.bincount(drawn, minlength=num_groups) @ sums)
    return _percentiles(found, num_groups, level, unit)


def _draws(num_groups: int, num_samples: int, seed: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(seed)
    for _ in range(num_samples):
        yield rng.integers(num_groups, size=num_groups)


def _codes(groups: Sequence[Hashable], num_samples: int, level: float) -> tuple[np.ndarray, int]:
    if num_samples < 1 or not 0 < level < 1:
        raise DataError(
            f"num_samples={num_samples}, level={level}: need at least 1 sample and a level in (0, 1)"
        )
    seen: dict[Hashable, int] = {}
    codes = np.array([seen.setdefault(group, len(seen)) for group in groups], np.int64)
    if not len(codes):
        raise DataError("no rows to resample")
    return codes, len(seen)


def _percentiles(values: np.ndarray, num_groups: int, level: float, unit: str) -> Interval:
    known = values[~np.isnan(values)]
    low, high = np.nan, np.nan
    if num_groups > 1 and len(known):
        low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high), num_groups, unit, len(values) - len(known))
