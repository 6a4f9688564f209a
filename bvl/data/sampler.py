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

    def __call__(self, position: int) -> tuple[int, int]:
        """(source, index within the source) at `position`."""
        block, offset = divmod(position, BLOCK)
        if len(self.sizes) == 1:
            source, place = 0, position
        else:
            slot = _permutation(BLOCK, self.seed, 0, block)[offset]
            source = int(self._source_of[slot])
            place = block * int(self.counts[source]) + int(self._rank_of[slot])
        epoch, index = divmod(place, self.sizes[source])
        return source, int(_permutation(self.sizes[source], self.seed, 1 + source, epoch)[index])

    def replacement(self, source: int, position: int, attempt: int) -> int:
        """Another index of the same source, for a record that could not be read."""
        return int(np.random.default_rng((self.seed, position, attempt)).integers(self.sizes[source]))


@functools.lru_cache(maxsize=64)
def _permutation(size: int, seed: int, stream: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, stream, epoch)).permutation(size)
