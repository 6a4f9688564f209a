"""Which record stands at which position of the training stream: a pure function of (seed, position)."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from bvl.errors import ConfigError

# A mixture is laid out in blocks of this many positions, each with the same share of every source.
BLOCK = 1000


class Sampler:
    """Weighted mixture of shuffled sources; every source runs through all its records before it repeats one.

    `sizes`: records of each source. `weights`: expected share of each source, rounded to 1/1000.
    Random access: nothing depends on earlier positions, so a resume needs the position alone.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int):
        if len(sizes) != len(weights) or not sizes or min(sizes) < 1:
            raise ConfigError(f"a mixture needs non-empty sources, got sizes {list(sizes)}")
        if min(weights) <= 0:
            raise ConfigError(f"source weights must be above 0, got {list(weights)}")
        self.sizes = tuple(sizes)
        self.seed = seed
        exact = np.asarray(weights, np.float64) / np.sum(weights) * BLOCK
        counts = np.floor(exact).astype(int)
        for i in np.argsort(counts - exact, kind="stable")[: BLOCK - counts.sum()]:
            counts[i] += 1
        if counts.min() == 0:
            raise ConfigError(
                f"source {int(counts.argmin())} has a share below 1/{BLOCK} of the mixture; raise its weight"
            )
        self.counts = counts
        # Sources of a block in a fixed order, and the rank of each place among the places of its source.
        self._source_of = np.repeat(np.arange(len(counts)), counts)
        self._rank_of = np.concatenate([np.arange(c) for c in counts])
        # By source: epoch -> order of its records, of the two epochs asked for last.
        self._orders: list[dict[int, np.ndarray]] = [{} for _ in sizes]

    def __call__(self, position: int) -> tuple[int, int]:
        """(source, index within the source) at `position`."""
        block, offset = divmod(position, BLOCK)
        if len(self.sizes) == 1:
            source, place = 0, position
        else:
            slot = _block(self.seed, block)[offset]
            source = int(self._source_of[slot])
            place = block * int(self.counts[source]) + int(self._rank_of[slot])
        epoch, index = divmod(place, self.sizes[source])
        return source, int(self._order(source, epoch)[index])

    def replacement(self, source: int, position: int, attempt: int) -> int:
        """Another index of the same source, for a record that could not be read."""
        return int(np.random.default_rng((self.seed, position, attempt)).integers(self.sizes[source]))

    def _order(self, source: int, epoch: int) -> np.ndarray:
        known = self._orders[source]
        if epoch not in known:
            order = _permutation(self.sizes[source], self.seed, 1 + source, epoch)
            # A new dict instead of a changed one, as several threads read it. Two epochs are enough where reading
            # ahead crosses from one into the next, and an order of a large source takes much memory.
            known = self._orders[source] = dict([*list(known.items())[-1:], (epoch, order)])
        return known[epoch]


@functools.lru_cache(maxsize=64)
def _block(seed: int, block: int) -> np.ndarray:
    return _permutation(BLOCK, seed, 0, block)


def _permutation(size: int, seed: int, stream: int, epoch: int) -> np.ndarray:
    order = np.random.default_rng((seed, stream, epoch)).permutation(size)
    return order.astype(np.int32) if size <= np.iinfo(np.int32).max else order
