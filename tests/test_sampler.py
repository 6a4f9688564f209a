"""Which record stands where: epochs, shares, random access."""

import collections
import subprocess
import sys

import numpy as np
import pytest

from bvl.data.sampler import BLOCK, Sampler
from bvl.errors import ConfigError


def test_every_record_once_an_epoch_in_a_new_order():
    sampler = Sampler([17], [1.0], seed=3)
    epochs = [[sampler(17 * epoch + i) for i in range(17)] for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == [(0, i) for i in range(17)]
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != [(0, i) for i in range(17)]


def test_epochs_within_a_mixture():
    sizes = (7, 50, 2000)
    sampler = Sampler(sizes, (1, 2, 1), seed=0)
    seen = collections.defaultdict(list)
    for position in range(9 * BLOCK):
        source, index = sampler(position)
        seen[source].append((index, position))
    for source, size in enumerate(sizes):
        # Records of a source in the order of its own count, which is that of the blocks.
        indices = [index for index, _ in seen[source]]
        counts = collections.Counter(indices)
        full, rest = divmod(len(indices), size)
        assert set(counts.values()) <= {full, full + 1} and len(counts) == size
        assert sum(count == full + 1 for count in counts.values()) == rest


@pytest.mark.parametrize(
    "weights, shares",
    [
        ((1, 1), (500, 500)),
        ((0.7, 0.2, 0.1), (700, 200, 100)),
        ((1, 1, 1), (334, 333, 333)),
        ((999, 1), (999, 1)),
        ((3e-5, 1e-5), (750, 250)),
    ],
)
def test_shares_are_exact_in_every_block(weights, shares):
    sampler = Sampler([11] * len(weights), weights, seed=5)
    for block in (0, 1, 12):
        sources = [sampler(block * BLOCK + i)[0] for i in range(BLOCK)]
        counts = collections.Counter(sources)
        assert tuple(counts[i] for i in range(len(weights))) == shares
        # Mixed, not one source after the other.
        assert len(set(sources[:100])) > 1 or min(shares) < 10


def test_orders_of_many_epochs_are_not_all_kept():
    sampler = Sampler([5, 3], [1, 1], seed=2)
    first = [sampler(i) for i in range(2 * BLOCK)]
    assert [len(orders) for orders in sampler._orders] == [2, 2]
    assert [sampler(i) for i in range(2 * BLOCK)] == first


def test_random_access():
    make = lambda: Sampler([13, 400], [0.3, 0.7], seed=9)  # noqa: E731
    forward = [make()(p) for p in range(0, 5000, 7)]
    shuffled = np.random.default_rng(0).permutation(len(forward))
    sampler = make()
    assert {int(i): sampler(int(i) * 7) for i in shuffled} == dict(enumerate(forward))
    assert sampler(10**9) == make()(10**9)


def test_seeds_give_different_orders():
    orders = {tuple(Sampler([50], [1], seed=s)(p)[1] for p in range(50)) for s in range(5)}
    assert len(orders) == 5


def test_equal_in_another_process():
    code = (
        "from bvl.data.sampler import Sampler\n"
        "s = Sampler([13, 400], [0.3, 0.7], seed=9)\n"
        "print([s(p) for p in range(0, 3000, 11)], s.replacement(1, 5, 0))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    }
    sampler = Sampler([13, 400], [0.3, 0.7], seed=9)
    here = f"{[sampler(p) for p in range(0, 3000, 11)]} {sampler.replacement(1, 5, 0)}\n"
    assert outputs == {here}


def test_replacements_vary_and_stay_in_the_source():
    sampler = Sampler([5, 1000], [1, 1], seed=0)
    drawn = [sampler.replacement(1, 77, attempt) for attempt in range(8)]
    assert len(set(drawn)) > 4 and all(0 <= i < 1000 for i in drawn)
    assert all(0 <= sampler.replacement(0, p, 0) < 5 for p in range(20))


@pytest.mark.parametrize(
    "sizes, weights, match",
    [
        ([], [], "non-empty"),
        ([3, 0], [1, 1], "non-empty"),
        ([3], [1, 1], "non-empty"),
        ([3, 3], [1, 0], "above 0"),
        ([3, 3], [1, 1e-6], "source 1 has a share below"),
    ],
)
def test_bad_mixtures(sizes, weights, match):
    with pytest.raises(ConfigError, match=match):
        Sampler(sizes, weights, seed=0)
