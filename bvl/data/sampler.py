"""Which record stands at which position of the training stream: a pure function of (seed, position).

A mixture says which source stands at a position and how often that source came before; the order of the source says
which of its records that is. Nothing depends on earlier positions, so a resume needs the position alone.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from bvl.errors import ConfigError

# A mixture of constant weights is laid out in blocks of this many positions, each with the same share of every source.
BLOCK = 1000
# Shares that follow a schedule are whole multiples of one part in so many, so that their sums are exact.
PARTS = 2**20

# A constant, or points (step, weight) with straight lines between them and constants before and after.
Weight = float | tuple[tuple[int, float], ...]


def check_weight(weight: Weight) -> None:
    """Raises ConfigError unless the weight is finite and above 0, at some step if it is a schedule."""
    if not isinstance(weight, tuple):
        if not 0 < weight < math.inf:
            raise ConfigError(f"weight={weight} must be a number above 0")
        return
    steps = [step for step, _ in weight]
    if not all(math.isfinite(w) for _, w in weight):
        raise ConfigError(f"weight={weight}: every weight must be a finite number")
    if not steps or steps[0] < 0 or sorted(set(steps)) != steps:
        raise ConfigError(f"weight={weight}: give (step, weight) points in the order of their steps")
    if min(w for _, w in weight) < 0 or max(w for _, w in weight) <= 0:
        raise ConfigError(f"weight={weight}: no weight may be below 0, and one must be above")


def weight_at(weight: Weight, step: int | Int[np.ndarray, " n"]) -> np.ndarray:
    """The weight at each step."""
    points = weight if isinstance(weight, tuple) else ((0, weight),)
    return np.interp(step, [s for s, _ in points], [w for _, w in points])


class Sampler:
    """Weighted mixture of sources, each of which runs through all its records before it repeats one.

    sizes: records of each source. weights: expected share of each source, constant (rounded to 1/1000) or a schedule
      over steps of `batch_size` positions.
    classes: for each source None, or the indices of the records of each class, of which every one then comes equally
      often; the records of a class are run through before one of them is repeated.
    Raises ConfigError for a mixture that cannot be laid out.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        weights: Sequence[Weight],
        seed: int,
        *,
        batch_size: int = 1,
        classes: Sequence[Sequence[np.ndarray] | None] | None = None,
    ):
        if len(sizes) != len(weights) or not sizes or min(sizes) < 1:
            raise ConfigError(f"a mixture needs non-empty sources, got sizes {list(sizes)}")
        for weight in weights:
            check_weight(weight)
        self.sizes, self.seed = tuple(sizes), seed
        if len(sizes) == 1:
            self._mixture = _single
        elif any(isinstance(weight, tuple) for weight in weights):
            self._mixture = _Scheduled(weights, seed, batch_size)
        else:
            self._mixture = _Constant(weights, seed)
        self._orders = [
            _Shuffled(size, (seed, 1 + source)) if groups is None else _Balanced(groups, (seed, 1 + source))
            for source, (size, groups) in enumerate(zip(sizes, classes or [None] * len(sizes), strict=True))
        ]

    def __call__(self, position: int) -> tuple[int, int]:
        """(source, index within the source) at `position`."""
        source, place = self._mixture(position)
        return source, self._orders[source](place)

    def replacement(self, source: int, position: int, attempt: int) -> int:
        """Another index of the same source, for a record that could not be read."""
        return int(np.random.default_rng((self.seed, position, attempt)).integers(self.sizes[source]))


def _single(position: int) -> tuple[int, int]:
    return 0, position


class _Constant:
    """Position -> (source, how often the source came before), by blocks of equal content."""

    def __init__(self, weights: Sequence[float], seed: int):
        exact = np.asarray(weights, np.float64) / np.sum(weights) * BLOCK
        counts = np.floor(exact).astype(int)
        for i in np.argsort(counts - exact, kind="stable")[: BLOCK - counts.sum()]:
            counts[i] += 1
        if counts.min() == 0:
            raise ConfigError(
                f"source {int(counts.argmin())} has a share below 1/{BLOCK} of the mixture; raise its weight"
            )
        self._seed, self._counts = seed, counts
        # Sources of a block in a fixed order, and the rank of each place among the places of its source.
        self._source_of = np.repeat(np.arange(len(counts)), counts)
        self._rank_of = np.concatenate([np.arange(c) for c in counts])

    def __call__(self, position: int) -> tuple[int, int]:
        block, offset = divmod(position, BLOCK)
        slot = _block(self._seed, block, BLOCK)[offset]
        source = int(self._source_of[slot])
        return source, block * int(self._counts[source]) + int(self._rank_of[slot])


class _Scheduled:
    """Position -> (source, how often the source came before), where the shares change from step to step.

    The first source takes its share of all positions, the second its share of the positions that are left, and so
    on. After each step the positions a source has taken are its share so far, rounded: no share is lost to rounding
    within a step. The counts up to the last point of the schedule are kept, those after it follow from them.
    """

    def __init__(self, weights: Sequence[Weight], seed: int, batch_size: int):
        self._seed, self._batch_size = seed, batch_size
        points = sorted({step for w in weights if isinstance(w, tuple) for step, _ in w})
        total = sum(weight_at(w, np.array(points)) for w in weights)
        if total.min() <= 0:
            step = points[int(total.argmin())]
            raise ConfigError(f"all source weights are 0 at step {step}: nothing is left to train on")
        steps = np.arange(points[-1] + 1)
        by_step = np.stack([weight_at(w, steps) for w in weights])
        self._parts = []
        for source in range(len(weights) - 1):
            rest = by_step[source:].sum(0)
            share = np.divide(by_step[source], rest, out=np.zeros_like(rest), where=rest > 0)
            self._parts.append(np.rint(share * PARTS).astype(np.int64))
        # Sums before each step 0 .. last: of the parts a source took, and of the positions left to it and later ones.
        left = steps * batch_size
        self._sums, self._left = [], []
        for parts in self._parts:
            self._left.append(left)
            taken_parts = np.concatenate([[0], np.cumsum(parts[:-1] * np.diff(left))])
            self._sums.append(taken_parts)
            left = left - _rounded(taken_parts)

    def before(self, step: int) -> list[int]:
        """How many positions each source has in the steps before `step`."""
        known = min(step, len(self._left[0]) - 1)
        left, counts = step * self._batch_size, []
        for parts, sums, left_before in zip(self._parts, self._sums, self._left, strict=True):
            count = _rounded(int(sums[known]) + int(parts[known]) * (left - int(left_before[known])))
            counts.append(count)
            left -= count
        return [*counts, left]

    def __call__(self, position: int) -> tuple[int, int]:
        step, row = divmod(position, self._batch_size)
        before = self.before(step)
        ends = np.cumsum(np.subtract(self.before(step + 1), before))
        slot = int(_block(self._seed, step, self._batch_size)[row])
        source = int(np.searchsorted(ends, slot, side="right"))
        return source, before[source] + slot - (int(ends[source - 1]) if source else 0)


def _rounded(parts: Any) -> Any:
    """Whole positions of a sum of parts; a number or an array."""
    return (parts + PARTS // 2) // PARTS


class _Shuffled:
    """How often a source came before -> index: all records in random order, then all in another."""

    def __init__(self, size: int, seed: tuple[int, ...], stream: tuple[int, ...] = ()):
        self._size, self._seed, self._stream = size, seed, stream
        # Epoch -> order, of the two epochs asked for last.
        self._known: dict[int, np.ndarray] = {}

    def __call__(self, place: int) -> int:
        epoch, offset = divmod(place, self._size)
        known = self._known
        if epoch not in known:
            order = _permutation(self._size, *self._seed, epoch, *self._stream)
            # A new dict instead of a changed one, as several threads read it. Two epochs are enough where reading
            # ahead crosses from one into the next, and an order of a large source takes much memory.
            known = self._known = dict([*list(known.items())[-1:], (epoch, order)])
        return int(known[epoch][offset])


class _Balanced:
    """How often a source came before -> index: one record of every class in random order, then again."""

    def __init__(self, classes: Sequence[np.ndarray], seed: tuple[int, ...]):
        self._classes = [np.asarray(members) for members in classes]
        # Streams begin at 1: a stream of 0 would be the seed of the plain order.
        self._turns = _Shuffled(len(classes), seed, (1,))
        self._members = [_Shuffled(len(m), seed, (2 + i,)) for i, m in enumerate(self._classes)]

    def __call__(self, place: int) -> int:
        turn = self._turns(place)
        return int(self._classes[turn][self._members[turn](place // len(self._classes))])


@functools.lru_cache(maxsize=64)
def _block(seed: int, block: int, size: int) -> np.ndarray:
    return _permutation(size, seed, 0, block)


def _permutation(size: int, *seed: int) -> np.ndarray:
    order = np.random.default_rng(seed).permutation(size)
    return order.astype(np.int32) if size <= np.iinfo(np.int32).max else order
