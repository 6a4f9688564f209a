"""Top-k in two stages, and top-k and nucleus truncation by bisection, against sorts."""

import functools

import jax
import numpy as np
import pytest

from bvl.decode.topk import CHUNK, top_k
from bvl.decode.truncation import truncate


@functools.partial(jax.jit, static_argnames=("k", "p"))
def truncated(log_probs, k=0, p=1.0):
    return truncate(log_probs, top_k=k, top_p=p)


def kept_by_sorting(log_probs, k=0, p=1.0):
    """Indices kept in one row, in f64."""
    order = np.argsort(-log_probs.astype(np.float64), kind="stable")
    order = order[: k or len(order)]
    probs = np.exp(log_probs[order].astype(np.float64) - log_probs[order[0]])
    before = np.cumsum(probs / probs.sum()) - probs / probs.sum()
    return set(order[before < p].tolist()) if p < 1 else set(order.tolist())


@pytest.mark.parametrize("k, p", [(0, 0.9), (0, 0.3), (5, 1.0), (50, 0.8), (1, 1.0), (1000, 0.5)])
def test_every_row_keeps_exactly_its_own(k, p):
    rng = np.random.default_rng(0)
    # From almost certain to almost even, so that the nuclei have very different sizes.
    scale = np.array([0.1, 1, 3, 10, 40])[:, None]
    log_probs = (rng.normal(size=(5, 300)) * scale).astype(np.float32)
    found = np.asarray(truncated(log_probs, k=k, p=p))
    sizes = set()
    for row in range(5):
        kept = set(np.flatnonzero(np.isfinite(found[row])).tolist())
        assert kept == kept_by_sorting(log_probs[row], k, p)
        np.testing.assert_array_equal(found[row, sorted(kept)], log_probs[row, sorted(kept)])
        sizes.add(len(kept))
    assert p == 1.0 or len(sizes) > 2


def test_of_equal_tokens_only_as_many_as_needed_stay():
    log_probs = np.full((2, 6), -np.inf, np.float32)
    log_probs[0] = np.log([0.25, 0.125, 0.125, 0.125, 0.125, 0.25])
    log_probs[1, 0] = 0.0
    kept = np.isfinite(np.asarray(truncated(log_probs, p=0.7)))
    np.testing.assert_array_equal(kept[0], [True, True, True, False, False, True])
    np.testing.assert_array_equal(kept[1], [True, False, False, False, False, False])
    kept = np.isfinite(np.asarray(truncated(log_probs[:1], k=4)))
    np.testing.assert_array_equal(kept[0], [True, True, True, False, False, True])


def test_one_token_always_stays_and_impossible_ones_never_come_back():
    log_probs = np.array([[-3.0, -np.inf, -1.0, -2.0]], np.float32)
    np.testing.assert_array_equal(np.isfinite(truncated(log_probs, p=1e-9)), [[False, False, True, False]])
    np.testing.assert_array_equal(np.isfinite(truncated(log_probs, p=0.999999)), [[True, False, True, True]])
    nothing = np.full((1, 4), -np.inf, np.float32)
    np.testing.assert_array_equal(truncated(nothing, k=2, p=0.5), nothing)


@pytest.mark.parametrize("n", [CHUNK * 40, CHUNK * 40 + 13])
@pytest.mark.parametrize("kind", ["random", "ties", "impossible", "rising"])
def test_top_k_is_that_of_lax(n, kind):
    rng = np.random.default_rng(n)
    x = {
        "random": rng.normal(size=(3, n)),
        "ties": rng.integers(0, 4, size=(3, n)),
        "impossible": np.where(rng.random((3, n)) < 0.001, 1.0, -np.inf),
        "rising": np.broadcast_to(np.arange(n), (3, n)),
    }[kind].astype(np.float32)
    assert n > 4 * 8 * CHUNK, "the two stages are not taken"
    for found, expected in zip(jax.jit(top_k, static_argnums=1)(x, 8), jax.lax.top_k(x, 8), strict=True):
        np.testing.assert_array_equal(found, expected)
