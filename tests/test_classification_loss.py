"""Classification losses against numpy and optax, with masks, weights and nothing valid at all."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bvl.losses.classification import sigmoid_cross_entropy, softmax_cross_entropy

ROWS, CLASSES = 6, 4
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(ROWS, CLASSES)).astype(np.float32) * 3
ONE_HOT = np.eye(CLASSES, dtype=np.float32)[RNG.integers(0, CLASSES, ROWS)]
MULTI_HOT = (RNG.random((ROWS, CLASSES)) < 0.4).astype(np.float32)
ROW_MASK = np.array([1, 1, 0, 1, 0, 1], bool)
ENTRY_MASK = RNG.random((ROWS, CLASSES)) < 0.7
WEIGHTS = np.array([0.5, 1.0, 2.0, 4.0], np.float32)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["equal", "weighted"])
def test_softmax(weights, smoothing):
    actual = softmax_cross_entropy(
        LOGITS, ONE_HOT, valid=ROW_MASK, class_weights=weights, label_smoothing=smoothing
    )
    targets = optax.smooth_labels(jnp.asarray(ONE_HOT), smoothing)
    losses = np.asarray(optax.softmax_cross_entropy(LOGITS, targets))
    row_weights = ROW_MASK * (1.0 if weights is None else weights[ONE_HOT.argmax(1)])
    np.testing.assert_allclose(actual, (row_weights * losses).sum() / row_weights.sum(), rtol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["equal", "weighted"])
def test_sigmoid(weights, smoothing):
    actual = sigmoid_cross_entropy(
        LOGITS, MULTI_HOT, valid=ENTRY_MASK, class_weights=weights, label_smoothing=smoothing
    )
    p = 1 / (1 + np.exp(-LOGITS.astype(np.float64)))
    targets = MULTI_HOT * (1 - smoothing) + smoothing / 2
    losses = -(targets * np.log(p) + (1 - targets) * np.log(1 - p))
    entry_weights = ENTRY_MASK * (1.0 if weights is None else weights[None])
    np.testing.assert_allclose(actual, (entry_weights * losses).sum() / entry_weights.sum(), rtol=1e-5)


def test_large_logits_stay_exact():
    logits = jnp.array([[300.0, -300.0]])
    labels = jnp.array([[0.0, 1.0]])
    np.testing.assert_allclose(sigmoid_cross_entropy(logits, labels, valid=jnp.ones((1, 2), bool)), 300.0)
    np.testing.assert_allclose(softmax_cross_entropy(logits, labels, valid=jnp.ones(1, bool)), 600.0)
    # bf16 logits are computed in f32.
    small = jnp.asarray(LOGITS, jnp.bfloat16)
    value = softmax_cross_entropy(small, ONE_HOT, valid=ROW_MASK)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(
        value, softmax_cross_entropy(small.astype(jnp.float32), ONE_HOT, valid=ROW_MASK)
    )


@pytest.mark.parametrize(
    "loss, labels, mask",
    [(softmax_cross_entropy, ONE_HOT, ROW_MASK), (sigmoid_cross_entropy, MULTI_HOT, ENTRY_MASK)],
    ids=["softmax", "sigmoid"],
)
def test_what_is_invalid_does_not_count(loss, labels, mask):
    value_and_grad = jax.jit(lambda x, y, m: jax.value_and_grad(lambda x: loss(x, y, valid=m))(x))
    value, gradient = value_and_grad(LOGITS, labels, mask)
    entries = mask[:, None] if mask.ndim == 1 else mask
    # Other logits, infinite ones and NaN included, and other labels where nothing is valid.
    spoilt = np.where(entries, LOGITS, np.resize([np.nan, np.inf, -np.inf, 5.0], LOGITS.shape))
    again, again_gradient = value_and_grad(spoilt, np.where(entries, labels, 1 - labels), mask)
    assert float(value) > 0
    np.testing.assert_array_equal(value, again)
    np.testing.assert_array_equal(gradient, again_gradient)
    np.testing.assert_array_equal(np.where(entries, 0, gradient), 0)

    nothing, no_gradient = value_and_grad(spoilt, labels, np.zeros_like(mask))
    assert float(nothing) == 0
    np.testing.assert_array_equal(no_gradient, 0)


def test_rows_without_a_label_do_not_count_in_the_softmax():
    labels = ONE_HOT * ROW_MASK[:, None]
    np.testing.assert_allclose(
        softmax_cross_entropy(LOGITS, labels, valid=np.ones(ROWS, bool)),
        softmax_cross_entropy(LOGITS, ONE_HOT, valid=ROW_MASK),
        rtol=1e-6,
    )


def test_gradient_against_optax():
    mask = np.ones(ROWS, bool)
    ours = jax.grad(lambda x: softmax_cross_entropy(x, ONE_HOT, valid=mask))(LOGITS)
    theirs = jax.grad(lambda x: optax.softmax_cross_entropy(x, ONE_HOT).mean())(LOGITS)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    every = np.ones((ROWS, CLASSES), bool)
    ours = jax.grad(lambda x: sigmoid_cross_entropy(x, MULTI_HOT, valid=every))(LOGITS)
    theirs = jax.grad(lambda x: optax.sigmoid_binary_cross_entropy(x, MULTI_HOT).mean())(LOGITS)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
