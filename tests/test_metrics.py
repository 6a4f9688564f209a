"""Retrieval, classification and bootstrap against brute force and closed forms."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats

from bvl.errors import DataError
from bvl.metrics.bootstrap import bootstrap_interval, bootstrap_mean, bootstrap_sums
from bvl.metrics.classification import (
    accuracy,
    auroc,
    balanced_accuracy,
    macro_auroc,
    one_hot,
    per_class_auroc,
)
from bvl.metrics.retrieval import chance_of_hit, recall_at_k

# --- retrieval


def brute_force_hit(scores, positive, k):
    """Order by score, negatives before positives of the same score, and look at the first k."""
    order = sorted(range(len(scores)), key=lambda j: (-scores[j], positive[j]))
    return any(positive[j] for j in order[:k])


@pytest.mark.parametrize("chunk_rows", [3, 512])
def test_recall_matches_brute_force_with_many_to_many_positives_and_ties(chunk_rows):
    rng = np.random.default_rng(0)
    # Small integers give many exact ties.
    images, texts = (rng.integers(-1, 2, (n, 3)).astype(np.float32) for n in (17, 23))
    image_groups = [set(rng.integers(0, 9, rng.integers(1, 3)).tolist()) for _ in images]
    text_groups = [list(rng.integers(0, 9, rng.integers(1, 3)).tolist()) for _ in texts]
    result = recall_at_k(images, texts, image_groups, text_groups, ks=(1, 4), chunk_rows=chunk_rows)
    scores = images @ texts.T
    positive = np.array([[bool(set(a) & set(b)) for b in text_groups] for a in image_groups])
    for name, s, p in (("i2t", scores, positive), ("t2i", scores.T, positive.T)):
        for k in (1, 4):
            expected = np.array(
                [brute_force_hit(*row, k) if row[1].any() else np.nan for row in zip(s, p, strict=True)],
                float,
            )
            np.testing.assert_array_equal(result.hits[f"{name}_r{k}"], expected)
            assert result.rates[f"{name}_r{k}"] == pytest.approx(np.nanmean(expected))
    assert 0 < result.rates["i2t_r1"] < 1


def test_perfect_and_collapsed_models():
    embed = np.eye(12, dtype=np.float32)
    rows = np.arange(12)
    assert recall_at_k(embed, embed, rows, rows).rates["t2i_r1"] == 1.0
    rng = np.random.default_rng(0)
    # Every embedding the same vector: each score is a tie, whatever order the sums were taken in.
    one = rng.standard_normal((1, 64)).astype(np.float32)
    collapsed = recall_at_k(
        one.repeat(301, 0), one.repeat(301, 0), np.arange(301), np.arange(301), chunk_rows=37
    )
    assert all(collapsed.rates[f"{d}_r{k}"] == 0.0 for d in ("i2t", "t2i") for k in (1, 5, 10))
    nan = np.full((12, 12), np.nan, np.float32)
    assert recall_at_k(nan, embed, rows, rows).rates["i2t_r1"] == 0.0


def test_any_of_several_positives_is_enough_and_queries_without_one_are_left_out():
    images = np.array([[1.0, 0.0], [0.0, 1.0]], np.float32)
    texts = np.array([[0.0, 1.0], [0.9, 0.1], [1.0, 0.0]], np.float32)
    result = recall_at_k(images, texts, ["a", "other"], ["a", "a", "distractor"], ks=(1, 2))
    np.testing.assert_array_equal(result.hits["i2t_r1"], [0.0, np.nan])
    np.testing.assert_array_equal(result.hits["i2t_r2"], [1.0, np.nan])
    assert (
        result.rates["i2t_r2"] == 1.0
        and result.rates["i2t_queries"] == 1
        and result.rates["t2i_queries"] == 2
    )
    none = recall_at_k(images, texts, [0, 1], [2, 3, 4], ks=(1,))
    assert math.isnan(none.rates["i2t_r1"]) and math.isnan(none.rates["i2t_r1_chance"])


def test_chance_level_is_the_share_of_random_orders_that_hit():
    for total, positives, k in itertools.product((1, 5, 9), (1, 3), (1, 4, 20)):
        if positives > total:
            continue
        expected = 1 - math.comb(total - positives, min(k, total)) / math.comb(total, min(k, total))
        assert chance_of_hit(np.array([positives]), total, k)[0] == pytest.approx(expected)
    rng = np.random.default_rng(1)
    groups = rng.integers(0, 30, 400)
    noise = recall_at_k(rng.standard_normal((400, 8)), rng.standard_normal((400, 8)), groups, groups, ks=(5,))
    assert noise.rates["i2t_r5"] == pytest.approx(noise.rates["i2t_r5_chance"], abs=0.1)
    assert 0.1 < noise.rates["i2t_r5_chance"] < 0.3


def test_retrieval_refuses_what_does_not_fit():
    embed = np.eye(3)
    with pytest.raises(DataError, match="2 text rows"):
        recall_at_k(embed, embed, [0, 1, 2], [0, 1])
    with pytest.raises(DataError, match=r"\(3, 3\) and \(3, 2\)"):
        recall_at_k(embed, embed[:, :2], [0, 1, 2], [0, 1, 2])
    with pytest.raises(DataError, match="ks="):
        recall_at_k(embed, embed, [0, 1, 2], [0, 1, 2], ks=(0,))


# --- classification


def test_accuracy_and_balanced_accuracy():
    labels = np.array([0] * 8 + [1] * 2)
    assert accuracy(np.zeros(10, int), labels) == 0.8
    assert balanced_accuracy(np.zeros(10, int), labels) == 0.5
    # A class that is predicted but never labelled has no recall; labels need not be 0..c-1.
    assert balanced_accuracy(np.array([7, 3, 3]), np.array([7, 7, 3])) == 0.75
    assert math.isnan(accuracy(np.array([], int), np.array([], int)))
    with pytest.raises(DataError):
        accuracy(np.zeros(3), np.zeros((3, 1)))


def test_auroc_matches_all_pairs_and_scipy():
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 6, 50).astype(np.float32), rng.integers(0, 2, 50)
    positive, negative = scores[labels == 1], scores[labels == 0]
    pairs = np.mean([(p > n) + 0.5 * (p == n) for p in positive for n in negative])
    u = scipy.stats.mannwhitneyu(positive, negative).statistic / (len(positive) * len(negative))
    assert auroc(scores, labels) == pytest.approx(pairs) == pytest.approx(u)
    assert auroc(np.zeros(50), labels) == 0.5
    assert auroc(np.array([0.1, 0.9]), np.array([False, True])) == 1.0
    assert math.isnan(auroc(scores, np.ones(50)))
    assert math.isnan(auroc(np.array([0.0, np.nan]), np.array([0, 1])))
    with pytest.raises(DataError, match="valid"):
        auroc(scores, np.full(50, -1))


def test_per_class_auroc_masks_entries_and_counts_what_is_undefined():
    scores = np.array([[0.9, 0.1, 0.5], [0.2, 0.8, 0.5], [0.1, 0.9, 0.5]])
    labels = np.array([[1, 0, 0], [0, 1, 0], [1, 0, 0]])
    valid = np.array([[True, True, True], [True, True, True], [False, True, True]])
    np.testing.assert_allclose(per_class_auroc(scores, labels, valid), [1.0, 0.5, np.nan])
    macro = macro_auroc(scores, labels, valid)
    assert macro.value == 0.75 and macro.num_undefined == 1
    # An unknown label under the mask may hold any value; a row mask works for all classes.
    labels = np.where(valid, labels, -1)
    assert macro_auroc(scores, labels, valid).value == 0.75
    assert per_class_auroc(scores, labels, valid[:, 0])[0] == 1.0
    np.testing.assert_array_equal(one_hot(np.array([2, 0]), 3), [[0, 0, 1], [1, 0, 0]])
    with pytest.raises(DataError, match="3 classes"):
        one_hot(np.array([3]), 3)


# --- bootstrap


def test_interval_of_a_mean_has_the_normal_width_and_covers():
    rng = np.random.default_rng(0)
    covered, widths = 0, []
    for trial in range(60):
        values = rng.normal(size=80)
        interval = bootstrap_mean(values, range(80), num_samples=300, seed=trial)
        covered += interval.low <= 0 <= interval.high
        widths.append(interval.high - interval.low)
    assert covered >= 50  # 57 expected; fewer than 50 has a probability below 1e-3 at 95 % coverage
    assert np.mean(widths) == pytest.approx(2 * 1.96 / math.sqrt(80), rel=0.1)


def test_rows_of_one_patient_are_not_independent():
    rng = np.random.default_rng(0)
    values = rng.normal(size=50).repeat(4)
    patients = np.arange(50).repeat(4)
    by_patient = bootstrap_mean(values, patients)
    by_row = bootstrap_mean(values, range(200))
    assert (by_patient.high - by_patient.low) / (by_row.high - by_row.low) == pytest.approx(2, rel=0.2)
    assert by_patient.num_groups == 50 and by_row.num_groups == 200
    # Copies of the rows tell nothing new: the interval by patient is that of one row a patient.
    assert by_patient.low == pytest.approx(bootstrap_mean(values[::4], range(50)).low)


def test_general_and_fast_path_agree_on_unequal_groups():
    rng = np.random.default_rng(0)
    groups = [f"p{i}" for i in rng.integers(0, 12, 70)]
    values = rng.normal(size=70)
    values[3] = np.nan
    slow = bootstrap_interval(
        lambda rows: np.nanmean(values[rows]), groups, num_samples=100, seed=5, unit="image"
    )
    fast = bootstrap_mean(values, groups, num_samples=100, seed=5, unit="image")
    assert (slow.low, slow.high) == pytest.approx((fast.low, fast.high))
    assert slow.unit == fast.unit == "image"
    other = bootstrap_mean(values, groups, num_samples=100, seed=6)
    assert other.low != fast.low


def test_all_rows_of_a_drawn_group_come_together():
    groups = ["a", "b", "a", "c", "b", "a"]
    rows_of = {"a": (0, 2, 5), "b": (1, 4), "c": (3,)}

    def statistic(rows):
        counts = np.bincount(rows, minlength=6)
        assert all(len({counts[r] for r in rows_of[g]}) == 1 for g in rows_of)
        assert sum(counts[rows_of[g][0]] for g in rows_of) == 3
        return float(len(rows))

    interval = bootstrap_interval(statistic, groups, num_samples=200)
    assert interval.low < 6 < interval.high


def test_bootstrap_of_sums_equals_that_of_rows():
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 9, 40).tolist()
    counts = rng.integers(0, 5, (40, 3))

    def micro_f1(sums):
        hits, extra, missed = sums
        return 2 * hits / (2 * hits + extra + missed)

    by_sums = bootstrap_sums(counts, micro_f1, groups, num_samples=60, seed=2)
    by_rows = bootstrap_interval(lambda r: micro_f1(counts[r].sum(0)), groups, num_samples=60, seed=2)
    assert (by_sums.low, by_sums.high) == pytest.approx((by_rows.low, by_rows.high), rel=1e-12)
    assert by_sums.low < micro_f1(counts.sum(0)) < by_sums.high


def test_undefined_replicates_are_dropped_and_counted():
    labels, scores = np.array([1, 0, 0, 0]), np.array([0.9, 0.1, 0.2, 0.95])
    interval = bootstrap_interval(lambda rows: auroc(scores[rows], labels[rows]), range(4), num_samples=400)
    # The only positive is missing from (3/4)^4 of the samples, and 1/4^4 have nothing else.
    assert interval.num_dropped / 400 == pytest.approx(0.75**4 + 0.25**4, abs=0.08)
    assert 0 <= interval.low <= interval.high <= 1
    nothing = bootstrap_mean(np.full(3, np.nan), range(3), num_samples=10)
    assert math.isnan(nothing.low) and nothing.num_dropped == 10


def test_one_group_has_no_interval_and_bad_arguments_are_refused():
    single = bootstrap_mean(np.arange(5.0), ["p"] * 5)
    assert math.isnan(single.low) and math.isnan(single.high) and single.num_groups == 1
    with pytest.raises(DataError, match="no rows"):
        bootstrap_mean(np.array([]), [])
    with pytest.raises(DataError, match="3 groups"):
        bootstrap_mean(np.arange(2.0), [1, 2, 3])
    with pytest.raises(DataError, match="give one a row"):
        bootstrap_mean(np.ones((2, 2)), [1, 2])
    with pytest.raises(DataError, match="3 groups"):
        bootstrap_sums(np.ones((2, 2)), np.sum, [1, 2, 3])
    with pytest.raises(DataError, match="level"):
        bootstrap_mean(np.arange(2.0), [1, 2], level=95)
