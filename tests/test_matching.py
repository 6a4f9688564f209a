"""Matching on the device: the cost of SciPy's optimum, padding, repeats, too few queries, broken costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment
from tiny_run import fast_compilation  # noqa: F401

from bvl.errors import ConfigError
from bvl.losses.matching import match, matching_cost

pytestmark = pytest.mark.usefixtures("fast_compilation")

# One compilation a shape and number of repeats for the whole file.
jitted = jax.jit(match, static_argnames="repeats")


def least_cost(cost, valid, repeats):
    columns = np.tile(cost[:, valid], (1, repeats)).astype(np.float64)
    rows, cols = linear_sum_assignment(columns)
    return columns[rows, cols].sum()


def counts(assigned, m):
    return np.bincount(assigned[assigned >= 0], minlength=m)


@pytest.mark.parametrize("repeats", [1, 2])
@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e4])
def test_equals_scipy_with_padding(repeats, scale):
    rng = np.random.default_rng(0)
    cost = (scale * rng.normal(size=(4, 5, 12, 5))).astype(np.float32)
    valid = rng.random((4, 5, 5)) < 0.6
    cost = np.where(valid[:, :, None], cost, -1e3 * scale).astype(np.float32)  # padding looks cheap
    assigned = np.asarray(jitted(cost, valid, repeats=repeats))
    assert assigned.dtype == np.int32
    for i, j in np.ndindex(4, 5):
        np.testing.assert_array_equal(counts(assigned[i, j], 5), repeats * valid[i, j])
        rows = np.flatnonzero(assigned[i, j] >= 0)
        total = cost[i, j][rows, assigned[i, j][rows]].astype(np.float64).sum()
        assert total == pytest.approx(least_cost(cost[i, j], valid[i, j], repeats), abs=1e-5 * scale)


def test_fewer_queries_than_targets_with_padding():
    rng = np.random.default_rng(1)
    cost = rng.normal(size=(20, 3, 6)).astype(np.float32)
    valid = np.stack([rng.permutation(6) < k for k in rng.integers(0, 7, 20)])
    assigned = np.asarray(jitted(cost, valid))
    for c, v, a in zip(cost, valid, assigned, strict=True):
        assert (a >= 0).sum() == min(3, v.sum())
        rows = np.flatnonzero(a >= 0)
        assert v[a[rows]].all() and len(set(a[rows])) == len(rows)
        assert c[rows, a[rows]].sum() == pytest.approx(least_cost(c, v, 1), abs=1e-5)


def test_no_second_query_before_all_targets_have_one():
    cost = np.zeros((1, 5, 4), np.float32)
    cost[..., 1:] = 100.0  # every query would rather have target 0
    assigned = np.asarray(jitted(cost, np.array([[True, True, True, False]]), repeats=3))[0]
    assert sorted(counts(assigned, 4).tolist()) == [0, 1, 2, 2]
    assert counts(assigned, 4)[0] == 2


def test_nothing_valid_and_no_targets():
    assert (np.asarray(jitted(np.ones((1, 5, 4), np.float32), np.zeros((1, 4), bool), repeats=3)) == -1).all()
    assert match(jnp.zeros((2, 3, 0)), jnp.zeros((2, 0), bool)).tolist() == [[-1] * 3] * 2


def test_broken_costs_are_matched_last():
    cost = np.array([[[np.nan, 2.0], [1.0, 5.0], [3e38, 9.0], [8.0, -3e38]]], np.float32)
    assert np.asarray(jitted(cost, np.ones((1, 2), bool))).tolist() == [[-1, 0, -1, 1]]
    cost = np.where(np.abs(cost) > 1e30, np.inf * cost, cost)
    assert np.asarray(jitted(cost, np.ones((1, 2), bool))).tolist() == [[-1, 0, -1, 1]]
    broken = np.full((1, 4, 2), np.nan, np.float32)
    assert counts(np.asarray(jitted(broken, np.ones((1, 2), bool)))[0], 2).tolist() == [1, 1]


def test_cost_is_the_weighted_sum_and_has_no_gradient():
    boxes = jnp.array([[0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 1.0, 1.0]])
    targets = jnp.array([[0.0, 0.0, 1.0, 1.0]])
    scores = jnp.array([[0.25], [0.75]])
    cost = matching_cost(boxes, scores, targets, l1=3, giou=4, score=8)
    np.testing.assert_allclose(cost, [[3 * 0.5 - 4 * 0.5 - 2], [3 * 0.5 - 4 * 0.5 - 6]])
    assert not jax.grad(lambda b: matching_cost(b, scores, targets).sum())(boxes).any()


def test_repeats_below_one():
    with pytest.raises(ConfigError, match="repeats=0"):
        match(jnp.zeros((2, 2)), jnp.ones(2, bool), repeats=0)
