"""Which record stands where: epochs, shares, random access."""

import collections
import subprocess
import sys

import numpy as np
import pytest

from bvl.data.sampler import BLOCK, Sampler, weight_at
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
    assert [len(order._known) for order in sampler._orders] == [2, 2]
    assert [sampler(i) for i in range(2 * BLOCK)] == first


def test_constant_weights_give_the_order_they_always_gave():
    """Runs that were begun earlier go on with the same records."""
    sampler = Sampler([13, 400], [0.3, 0.7], seed=9)
    drawn = [(0, 2), (1, 134), (1, 35), (1, 113), (1, 189), (1, 153), (1, 84), (1, 376), (1, 176)]
    assert [sampler(p) for p in range(0, 9000, 1000)] == drawn


# --- Classes of equal frequency ---------------------------------------------------------------------------


def test_balanced_classes():
    classes = [np.array([0, 1, 2, 3, 4, 5, 6]), np.array([7, 2]), np.array([8])]
    sampler = Sampler([9], [1.0], seed=1, classes=[classes])
    drawn = [sampler(p)[1] for p in range(3 * 14)]
    turns = [drawn[i : i + 3] for i in range(0, len(drawn), 3)]
    # Every turn has one record of each class, in changing order.
    orders = set()
    for turn in turns:
        order = tuple(i for x in turn for i, c in enumerate(classes) if x in c and not (x == 2 and i == 0))
        orders.add(order)
        assert 8 in turn and any(x in classes[1] for x in turn)
    assert len(orders) > 3
    counts = collections.Counter(drawn)
    # Before a record of a class comes again, all others of the class have come.
    assert counts[8] == 14 and counts[7] == 7
    assert all(counts[i] == 2 for i in classes[0] if i != 2) and counts[2] == 2 + 7
    again = Sampler([9], [1.0], seed=1, classes=[classes])
    assert again(40)[1] == drawn[40]


def test_balanced_and_plain_sources_in_one_mixture():
    sampler = Sampler([4, 50], [1, 1], seed=0, classes=[[np.array([0]), np.array([1, 2, 3])], None])
    plain = Sampler([4, 50], [1, 1], seed=0)
    drawn = [sampler(p) for p in range(BLOCK)]
    assert collections.Counter(drawn)[0, 0] == 250
    assert [d for d in drawn if d[0] == 1] == [d for d in map(plain, range(BLOCK)) if d[0] == 1]


# --- Shares that change -----------------------------------------------------------------------------------

SCHEDULES = [
    (1.0, ((0, 1.0), (100, 0.0))),
    (1.0, ((0, 0.0), (50, 2.0), (120, 0.5)), ((0, 1.0), (100, 0.0))),
    (((20, 3.0), (20 + 1, 0.0)), 0.1, 1e-3),
]


@pytest.mark.parametrize("weights", SCHEDULES)
def test_scheduled_shares(weights):
    batch_size, sizes = 8, (7, 11, 30)[: len(weights)]
    sampler = Sampler(sizes, weights, seed=4, batch_size=batch_size)
    expected, counts, seen = np.zeros(len(weights)), np.zeros(len(weights)), collections.defaultdict(list)
    for step in range(260):
        for row in range(batch_size):
            source, index = sampler(step * batch_size + row)
            counts[source] += 1
            seen[source].append(index)
        now = np.array([weight_at(w, step) for w in weights])
        expected += batch_size * now / now.sum()
        # Never more than rounding away from the shares so far.
        assert np.abs(counts - expected).max() <= 2, step
        assert counts.sum() == (step + 1) * batch_size
    for source, indices in seen.items():
        full, rest = divmod(len(indices), sizes[source])
        assert (
            collections.Counter(collections.Counter(indices).values())
            == collections.Counter({full: sizes[source] - rest, full + 1: rest} if full else {1: rest})
            or not rest
            and set(collections.Counter(indices).values()) == {full}
        )


def test_scheduled_shares_are_random_access():
    weights = SCHEDULES[1]
    make = lambda: Sampler((7, 11, 30), weights, seed=4, batch_size=8)  # noqa: E731
    forward = [make()(p) for p in range(0, 2000, 37)]
    sampler = make()
    assert [sampler(p) for p in reversed(range(0, 2000, 37))] == forward[::-1]
    assert sampler(10**12) == make()(10**12)
    # The rows of a step are mixed, not one source after the other.
    steps = [
        [Sampler((9, 9), SCHEDULES[0], 0, batch_size=16)(s * 16 + r)[0] for r in range(16)] for s in range(9)
    ]
    assert any(step != sorted(step) for step in steps)


def test_a_source_of_weight_zero_never_comes():
    weights = (1.0, ((10, 0.0), (20, 1.0)), ((0, 0.0), (20, 1.0), (21, 0.0)))
    sampler = Sampler((5, 5, 5), weights, seed=0, batch_size=10)
    assert {sampler(p)[0] for p in range(10)} == {0}
    assert {sampler(p)[0] for p in range(300, 500)} == {0, 1}


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
        ([3], [((5, 1.0), (2, 1.0))], "in the order of their steps"),
        ([3], [((-1, 1.0), (2, 1.0))], "in the order of their steps"),
        ([3], [()], "in the order of their steps"),
        ([3], [((0, 0.0), (2, 0.0))], "one must be above"),
        ([3, 3], [((0, 1.0), (9, 0.0)), ((0, 1.0), (5, 0.0))], "all source weights are 0 at step 9"),
    ],
)
def test_bad_mixtures(sizes, weights, match):
    with pytest.raises(ConfigError, match=match):
        Sampler(sizes, weights, seed=0)
