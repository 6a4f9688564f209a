"""The chunked next-token loss against its naive twin, and what it may hold in memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bvl.errors import ConfigError
from bvl.losses.caption import naive_next_token_loss, next_token_loss, token_losses


def problem(n=24, d=12, vocabulary=70, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    hidden, table = (rng.normal(size=shape).astype(np.float32) for shape in ((n, d), (vocabulary, d)))
    targets = rng.integers(0, vocabulary, n)
    # Half of them right, so that the count of right ones says something.
    targets[::2] = (hidden @ table.T).argmax(-1)[::2]
    weights = rng.random(n).astype(np.float32)
    weights[:5] = 0.0
    # What stands in padding.
    targets[:5] = [0, -1, -100, vocabulary, 3]
    arrays = hidden.astype(dtype), table.astype(dtype), rng.normal(size=vocabulary).astype(np.float32)
    return *(jnp.asarray(a) for a in arrays), jnp.asarray(targets), jnp.asarray(weights)


def values_and_gradients(function, hidden, table, bias, targets, weights, **options):
    def loss(arrays):
        hidden, table, bias = arrays
        return function(hidden, table, targets, weights, bias=bias, **options)

    (value, correct), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))((hidden, table, bias))
    return value, correct, grads


def assert_close(got, wanted, limit=1e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        assert np.isfinite(a).all()
        assert np.abs(a - b).max() <= limit * np.abs(b).max()


@pytest.mark.parametrize("chunk_size", [1, 7, 16, 35, 69, 70, 1000, None])
def test_equals_naive(chunk_size):
    arrays = problem()
    wanted = values_and_gradients(naive_next_token_loss, *arrays, label_smoothing=0.1)
    got = values_and_gradients(next_token_loss, *arrays, label_smoothing=0.1, chunk_size=chunk_size)
    assert_close(got, wanted)
    assert 0 < float(got[1]) < float(arrays[-1].sum())


def test_without_bias_and_smoothing():
    hidden, table, _, targets, weights = problem()
    wanted = values_and_gradients(naive_next_token_loss, hidden, table, None, targets, weights)
    got = values_and_gradients(next_token_loss, hidden, table, None, targets, weights, chunk_size=16)
    assert_close(got, wanted)


def test_naive_against_loops():
    hidden, table, bias, targets, weights = (np.asarray(x) for x in problem())
    total = right = 0.0
    for row, target, weight in zip(hidden, targets, weights, strict=True):
        if weight:
            logits = (table @ row + bias).astype(np.float64)
            nll = np.log(np.exp(logits).sum()) - logits
            total += weight * (0.8 * nll[target] + 0.2 * nll.mean())
            right += weight * (logits.argmax() == target)
    loss, correct = naive_next_token_loss(hidden, table, targets, weights, bias=bias, label_smoothing=0.2)
    assert float(loss) == pytest.approx(total, rel=1e-5)
    assert float(correct) == pytest.approx(right, rel=1e-5)


def test_rows_of_weight_zero_reach_no_gradient():
    hidden, table, bias, targets, weights = problem()
    got = values_and_gradients(next_token_loss, hidden, table, bias, targets, weights, chunk_size=16)
    assert not np.asarray(got[2][0])[:5].any() and np.asarray(got[2][0])[5:].any()
    rest = values_and_gradients(
        next_token_loss, hidden[5:], table, bias, targets[5:], weights[5:], chunk_size=16
    )
    assert_close((got[0], got[1], got[2][1:]), (rest[0], rest[1], rest[2][1:]))


def test_gradient_of_weights_and_of_single_rows():
    hidden, table, bias, targets, weights = problem()
    grads = [
        jax.grad(lambda w, f=f: f(hidden, table, targets, w, bias=bias)[0])(weights)
        for f in (functools.partial(next_token_loss, chunk_size=16), naive_next_token_loss)
    ]
    assert_close(*grads)
    losses, _ = token_losses(hidden, table, targets, bias=bias, chunk_size=16)
    assert_close(losses, grads[1])


def test_the_first_of_equal_logits_counts():
    hidden, table = jnp.zeros((3, 4)), jnp.ones((40, 4))
    for chunk_size in (8, None):
        _, correct = token_losses(hidden, table, jnp.array([0, 1, 39]), chunk_size=chunk_size)
        assert correct.tolist() == [1, 0, 0]


def test_logits_far_from_zero():
    hidden, table, bias, targets, weights = problem()
    for shift in (500.0, -500.0):
        arrays = hidden, table, bias + shift, targets, weights
        assert_close(
            values_and_gradients(next_token_loss, *arrays, chunk_size=16),
            values_and_gradients(naive_next_token_loss, *arrays),
            1e-4,
        )


def test_bfloat16():
    exact = values_and_gradients(naive_next_token_loss, *problem())
    arrays = problem(dtype=jnp.bfloat16)
    got = values_and_gradients(next_token_loss, *arrays, chunk_size=16)
    assert got[0].dtype == jnp.float32 and got[2][0].dtype == got[2][1].dtype == jnp.bfloat16
    assert_close(got[0], exact[0], 1e-2)
    assert_close(got[2], exact[2], 2e-2)
    # A table of float32 keeps a gradient of float32.
    hidden, table, bias, targets, weights = problem()
    mixed = values_and_gradients(
        next_token_loss, hidden.astype(jnp.bfloat16), table, bias, targets, weights, chunk_size=16
    )
    assert mixed[2][1].dtype == jnp.float32
    assert_close(mixed[2], exact[2], 2e-2)


def test_logits_are_never_whole():
    n, d, vocabulary = 2048, 64, 32768
    shapes = [((n, d), jnp.float32), ((vocabulary, d), jnp.float32), ((n,), jnp.int32), ((n,), jnp.float32)]
    structs = [jax.ShapeDtypeStruct(*s) for s in shapes]

    def temporaries(function):
        step = jax.value_and_grad(lambda h, t, y, w: function(h, t, y, w, label_smoothing=0.1)[0], (0, 1))
        return jax.jit(step).lower(*structs).compile().memory_analysis().temp_size_in_bytes

    logits = n * vocabulary * 4
    assert temporaries(naive_next_token_loss) >= logits
    assert temporaries(next_token_loss) < 0.3 * logits


def test_bad_options():
    hidden, table, bias, targets, weights = problem()
    with pytest.raises(ConfigError, match="chunk_size=0"):
        next_token_loss(hidden, table, targets, weights, chunk_size=0)
    with pytest.raises(ConfigError, match="label_smoothing=1"):
        next_token_loss(hidden, table, targets, weights, label_smoothing=1)
