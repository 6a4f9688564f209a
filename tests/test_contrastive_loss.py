"""Contrastive losses: the naive twins against closed forms, the blocked losses against their twins.

`tests/sharded/test_contrastive_sharded.py` runs the same cases on 8 devices.
"""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bvl.errors import ConfigError
from bvl.losses.contrastive import naive_sigmoid_loss, naive_softmax_loss, sigmoid_loss, softmax_loss
from bvl.losses.targets import Targets, diagonal, label_similarity, multi_text, same_labels, same_text

LOSSES = {"softmax": (softmax_loss, naive_softmax_loss), "sigmoid": (sigmoid_loss, naive_sigmoid_loss)}
SCALE, BIAS = 9.0, -3.0
# These tests compile far longer than they compute.
FAST_COMPILE = {"xla_backend_optimization_level": 0}


def features(seed, *shape):
    x = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def random_mask(seed, size):
    return np.random.default_rng(seed).random(size) < 0.7


def make_case(name, n):
    """(number of texts, options) of a case that both losses must agree with their twins on."""
    rng = np.random.default_rng(n)
    labels = (rng.random((n, 3)) < 0.4).astype(np.float32)
    weights = rng.random(n).astype(np.float32) * 2
    ids = rng.integers(0, n // 3, n).astype(np.uint32)
    masks = dict(image_valid=random_mask(1, n), text_valid=random_mask(2, n))
    if name == "diagonal":
        return n, {}
    if name == "masks_and_weights":
        options = dict(label_smoothing=0.1, direction_weights=(0.7, 0.2), pair_weights=weights)
        return n, masks | options
    if name == "two_texts":
        return 2 * n, dict(pair_weights=weights, text_valid=random_mask(3, 2 * n), label_smoothing=0.2)
    if name == "same_text":
        return n, dict(targets=same_text(ids, ids)) | masks
    if name == "same_text_two_texts":
        two = rng.integers(0, n, (n, 2)).astype(np.uint32)
        return 2 * n, dict(targets=same_text(two, two.reshape(-1)), direction_weights=(1.0, 0.0))
    if name == "same_labels":
        return n, dict(targets=same_labels(labels, labels), image_valid=masks["image_valid"])
    if name == "soft_labels":
        return n, dict(targets=same_labels(labels, labels, soft=True), label_smoothing=0.1)
    if name == "label_similarity":
        return n, dict(targets=label_similarity(labels, labels, temperature=0.5)) | masks
    if name == "multi_text":  # images 0, 1 and 2 have no text at all; fewer texts than images
        owner = rng.integers(3, n, n - 8)
        text_weights = rng.random(n - 8).astype(np.float32)
        return n - 8, dict(targets=multi_text(owner, num_images=n), pair_weights=(weights, text_weights))
    if name == "all_invalid":
        return n, dict(image_valid=np.zeros(n, bool), label_smoothing=0.1)
    raise KeyError(name)


CASES = (
    "diagonal",
    "masks_and_weights",
    "two_texts",
    "same_text",
    "same_text_two_texts",
    "same_labels",
    "soft_labels",
    "label_similarity",
    "multi_text",
    "all_invalid",
)


def make_inputs(n, m, options, dim=16):
    """Features related on the diagonal; invalid rows are NaN, because what stands in them must not matter."""
    image, text = features(0, n, dim), features(1, m, dim)
    text = text + image[np.arange(m) % n]
    for x, valid in ((image, options.get("image_valid")), (text, options.get("text_valid"))):
        if valid is not None:
            x[~valid] = np.nan
    return image, text


def value_and_gradients(loss, image, text, options):
    """The loss and its gradients by image, text, scale and bias (the last 0 for a loss without one)."""
    options = {name: x for name, x in options.items() if name in inspect.signature(loss).parameters}
    has_bias = "bias" in inspect.signature(loss).parameters

    def call(image, text, scale, bias):
        return loss(image, text, scale=scale, **options, **({"bias": bias} if has_bias else {}))

    arguments = (image, text, jnp.float32(SCALE), jnp.float32(BIAS))
    step = jax.jit(jax.value_and_grad(call, argnums=(0, 1, 2, 3)), compiler_options=FAST_COMPILE)
    value, gradients = step(*arguments)
    assert value.dtype == jnp.float32 and value.shape == ()
    return dict(zip(("value", "image", "text", "scale", "bias"), (value, *gradients), strict=True))


def assert_equal(actual, expected, tolerance=1e-5):
    for name in expected:
        a, b = np.asarray(actual[name], np.float64), np.asarray(expected[name], np.float64)
        assert a.shape == b.shape and np.isfinite(a).all() and np.isfinite(b).all(), name
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max(), (name, a, b)


# --- The naive twins --------------------------------------------------------------------------------------


def test_naive_softmax_is_the_mean_of_two_cross_entropies():
    image, text = features(0, 6, 4), features(1, 6, 4)
    logits = SCALE * image @ text.T
    labels = optax.smooth_labels(jnp.eye(6), 0.3)
    to_text = optax.softmax_cross_entropy(logits, labels)
    to_image = optax.softmax_cross_entropy(logits.T, labels)
    weights = np.arange(6.0)
    actual = naive_softmax_loss(
        image, text, scale=SCALE, label_smoothing=0.3, direction_weights=(2.0, 0.5), pair_weights=weights
    )
    expected = 2 * (weights * to_text).mean() + 0.5 * (weights * to_image).mean()
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_naive_softmax_leaves_out_invalid_rows_and_rows_without_positive():
    image, text = features(0, 4, 4), features(1, 4, 4)
    logits = SCALE * image @ text.T
    # Valid are images 0, 1, 2 and texts 0, 1, 3: image 2 and text 3 have lost their partner, but stay candidates.
    image_valid, text_valid = np.array([1, 1, 1, 0], bool), np.array([1, 1, 0, 1], bool)
    to_text = optax.softmax_cross_entropy_with_integer_labels(logits[:2][:, [0, 1, 3]], jnp.arange(2))
    to_image = optax.softmax_cross_entropy_with_integer_labels(logits[:3][:, :2].T, jnp.arange(2))
    actual = naive_softmax_loss(image, text, scale=SCALE, image_valid=image_valid, text_valid=text_valid)
    np.testing.assert_allclose(actual, (to_text.mean() + to_image.mean()) / 2, rtol=1e-5)


def test_naive_softmax_normalises_several_positives_in_each_direction():
    image, text = features(0, 3, 4), features(1, 3, 4)
    logits = SCALE * image @ text.T
    ids = np.array([7, 7, 9], np.uint32)
    q = jnp.array([[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1]])
    expected = (
        optax.softmax_cross_entropy(logits, q) + optax.softmax_cross_entropy(logits.T, q.T)
    ).mean() / 2
    actual = naive_softmax_loss(image, text, scale=SCALE, targets=same_text(ids, ids))
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_naive_sigmoid_is_binary_cross_entropy_summed_over_pairs_per_image():
    image, text = features(0, 5, 4), features(1, 5, 4)
    weights, image_valid = np.arange(1.0, 6.0), np.array([1, 1, 0, 1, 1], bool)
    entropy = optax.sigmoid_binary_cross_entropy(SCALE * image @ text.T + BIAS, jnp.eye(5))
    expected = entropy.sum() / 5
    np.testing.assert_allclose(naive_sigmoid_loss(image, text, scale=SCALE, bias=BIAS), expected, rtol=1e-5)
    pair = (weights[:, None] + weights[None, :]) / 2
    expected = (entropy * pair)[image_valid].sum() / 4
    options = dict(scale=SCALE, bias=BIAS, image_valid=image_valid, pair_weights=weights)
    np.testing.assert_allclose(naive_sigmoid_loss(image, text, **options), expected, rtol=1e-5)


def test_naive_sigmoid_takes_soft_targets():
    labels = np.array([[1, 1, 0], [1, 0, 0], [0, 0, 0]], np.float32)
    targets = same_labels(labels, labels, soft=True)
    image, text = features(0, 3, 4), features(1, 3, 4)
    t = jnp.array([[1, 0.5, 0], [0.5, 1, 0], [0, 0, 1]])
    expected = optax.sigmoid_binary_cross_entropy(SCALE * image @ text.T + BIAS, t).sum() / 3
    actual = naive_sigmoid_loss(image, text, scale=SCALE, bias=BIAS, targets=targets)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


# --- Targets ----------------------------------------------------------------------------------------------


def matrix(targets):
    return np.asarray(targets.block(targets.rows, targets.cols))


def test_target_matrices():
    np.testing.assert_array_equal(matrix(diagonal(2, 4)), [[1, 1, 0, 0], [0, 0, 1, 1]])
    np.testing.assert_array_equal(
        matrix(multi_text(np.array([1, 0, 1]), num_images=2)), [[0, 1, 0], [1, 0, 1]]
    )
    ids = np.array([5, 6, 5], np.uint32)
    np.testing.assert_array_equal(matrix(same_text(ids, ids)), [[1, 0, 1], [0, 1, 0], [1, 0, 1]])
    two = np.array([[5, 6], [7, 5]], np.uint32)
    np.testing.assert_array_equal(matrix(same_text(two, two.reshape(-1))), [[1, 1, 0, 1], [1, 0, 1, 1]])
    labels = np.array([[1, 0, 1], [1, 0, 0], [1, 0, 1]], np.float32)
    np.testing.assert_array_equal(matrix(same_labels(labels, labels)), [[1, 0, 1], [0, 1, 0], [1, 0, 1]])
    soft = matrix(same_labels(labels, labels, soft=True))
    np.testing.assert_array_equal(soft, [[1, 0.5, 1], [0.5, 1, 0.5], [1, 0.5, 1]])


def test_a_row_is_its_own_positive_whatever_its_text_and_labels():
    # The image side may carry another text (or other labels) than the text it is paired with.
    ids = np.array([1, 2], np.uint32)
    np.testing.assert_array_equal(matrix(same_text(ids, ids + 10)), np.eye(2))
    labels = np.eye(2, dtype=np.float32)
    np.testing.assert_array_equal(matrix(same_labels(labels, labels[::-1])), np.ones((2, 2)))


# --- The blocked losses against their twins ---------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("case", CASES)
def test_blocked_equals_naive(loss, case):
    fast, naive = LOSSES[loss]
    m, options = make_case(case, 24)
    image, text = make_inputs(24, m, options)
    expected = value_and_gradients(naive, image, text, options)
    actual = value_and_gradients(fast, image, text, options | {"chunk_size": 7})
    assert_equal(actual, expected)
    if case == "all_invalid":
        assert all(np.all(np.asarray(x) == 0) for x in actual.values())
    else:
        assert all(
            np.any(np.asarray(x) != 0) for name, x in actual.items() if (loss, name) != ("softmax", "bias")
        )


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("chunk_size", [None, 1, 12, 1000])
def test_any_chunk_size(loss, chunk_size):
    fast, naive = LOSSES[loss]
    m, options = make_case("masks_and_weights", 24)
    image, text = make_inputs(24, m, options)
    actual = value_and_gradients(fast, image, text, options | {"chunk_size": chunk_size})
    assert_equal(actual, value_and_gradients(naive, image, text, options))


@pytest.mark.parametrize("loss", LOSSES)
def test_targets_of_ones_own(loss):
    """Any static function of two descriptors will do, here soft targets from a teacher's one-dimensional score."""
    fast, naive = LOSSES[loss]
    score = np.linspace(0, 1, 24, dtype=np.float32)
    options = dict(targets=Targets(score, score, lambda r, c: jnp.exp(-jnp.abs(r[:, None] - c[None, :]))))
    image, text = make_inputs(24, 24, {})
    actual = value_and_gradients(fast, image, text, options | {"chunk_size": 5})
    assert_equal(actual, value_and_gradients(naive, image, text, options))


@pytest.mark.parametrize("loss", LOSSES)
def test_bfloat16_features_are_summed_in_float32(loss):
    fast, naive = LOSSES[loss]
    image, text = (jnp.asarray(x, jnp.bfloat16) for x in make_inputs(24, 24, {}))
    actual = value_and_gradients(fast, image, text, {"chunk_size": 7})
    assert actual["image"].dtype == actual["text"].dtype == jnp.bfloat16
    expected = value_and_gradients(naive, image.astype(jnp.float32), text.astype(jnp.float32), {})
    for name in ("image", "text"):
        assert_equal(
            {name: actual.pop(name)}, {name: expected.pop(name)}, tolerance=2.0**-8
        )  # of the result's type
    assert_equal(actual, expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_of_pair_weights(loss):
    fast, naive = LOSSES[loss]
    bias = {"bias": BIAS} if loss == "sigmoid" else {}
    image, text = make_inputs(8, 16, {})

    def gradient(function):
        def call(weights):
            return function(image, text, scale=SCALE, pair_weights=weights, **bias)

        return {"weights": jax.jit(jax.grad(call))(jnp.arange(1.0, 9.0))}

    assert_equal(gradient(fast), gradient(naive))


def test_scale_and_bias_may_be_python_numbers():
    image, text = make_inputs(8, 8, {})
    np.testing.assert_allclose(
        softmax_loss(image, text, scale=5), naive_softmax_loss(image, text, scale=5.0), rtol=1e-5
    )
    np.testing.assert_allclose(
        sigmoid_loss(image, text, scale=5, bias=-1),
        naive_sigmoid_loss(image, text, scale=5.0, bias=-1.0),
        rtol=1e-5,
    )


def test_softmax_keeps_small_losses_of_large_logits():
    """Logits of 10800 and 10812: log-sum-exp minus logit would lose every digit of the loss."""
    x = np.concatenate([np.eye(16), np.full((16, 1), 30.0)], axis=1).astype(np.float32)
    expected = np.log1p(15 * np.exp(-12.0))
    step = jax.jit(jax.value_and_grad(lambda s, x: softmax_loss(x, x, scale=s, chunk_size=5)))
    np.testing.assert_allclose(step(12.0, x)[0], expected, rtol=1e-2)
    # d loss / d scale = sum of the wrong probabilities times the difference of their products, 1.
    gradient = step(12.0, x[:, :16])[1]
    np.testing.assert_allclose(gradient, -15 * np.exp(-12.0) / (1 + 15 * np.exp(-12.0)), rtol=1e-2)


# --- Wrong arguments --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "m, options, message",
    [
        (8, {"chunk_size": 0}, "chunk_size=0"),
        (9, {}, "9 texts for 8 images"),
        (8, {"image_valid": np.ones(7, bool)}, "image_valid has shape"),
        (8, {"pair_weights": np.ones(7)}, "pair_weights of shapes"),
        (8, {"targets": diagonal(4, 8)}, "targets of image"),
    ],
)
def test_wrong_arguments(m, options, message):
    with pytest.raises(ConfigError, match=message):
        softmax_loss(features(0, 8, 4), features(1, m, 4), scale=1.0, **options)


def test_features_of_different_size():
    with pytest.raises(ConfigError, match="same d"):
        sigmoid_loss(features(0, 8, 4), features(1, 8, 5), scale=1.0, bias=0.0)


def test_unknown_labels_are_like_no_other_row():
    labels = jnp.array(
        [[0.0, 0.0], [jnp.nan, jnp.nan], [jnp.nan, jnp.nan], [0.0, 0.0], [1.0, 1.0], [1.0, 0.0]]
    )
    for soft, shared in ((False, 0.0), (True, 0.5)):
        targets = same_labels(labels, labels, soft=soft)
        weights = targets.block(targets.rows, targets.cols)
        expected = np.eye(6)
        expected[0, 3] = expected[3, 0] = 1.0
        expected[4, 5] = expected[5, 4] = shared
        np.testing.assert_array_equal(weights, expected)


def test_label_similarity_is_a_softmax_of_cosines():
    labels = np.array([[1, 1, 0], [1, 0, 0], [0, 0, 0], [0, 0, 0], [np.nan, 0, 0]], np.float32)
    targets = label_similarity(labels, labels, temperature=0.5)
    weights = np.asarray(targets.block(targets.rows, targets.cols))
    half = np.sqrt(0.5)
    cosine = np.array([[1, half, 0, 0], [half, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]])
    expected = np.exp(cosine / 0.5) / np.exp(cosine / 0.5).sum(1, keepdims=True)
    np.testing.assert_allclose(weights[:4, :4] / weights[:4, :4].sum(1, keepdims=True), expected, rtol=1e-5)
    np.testing.assert_array_equal(weights[4], [0, 0, 0, 0, 1])
    np.testing.assert_array_equal(weights[:, 4], [0, 0, 0, 0, 1])
    with pytest.raises(ConfigError, match="above 0"):
        label_similarity(labels, labels, temperature=0.0)


def test_equal_texts_of_equal_embedding_leave_the_softmax_loss_alone():
    """Sharing a target among candidates of the same logit changes no cross-entropy, and summed over a group of equal
    texts neither does sharing it among their images; the sigmoid loss, which judges each pair, does change."""
    ids = np.array([1, 2, 1, 1, 3], np.uint32)
    image, text = features(0, 5, 8), features(1, 4, 8)[ids]
    for loss, equal in ((naive_softmax_loss, True), (naive_sigmoid_loss, False)):
        options = dict(scale=SCALE, **({} if equal else {"bias": BIAS}))
        plain, shared = (
            loss(image, text, **options),
            loss(image, text, targets=same_text(ids, ids), **options),
        )
        assert bool(np.isclose(plain, shared, rtol=1e-5)) is equal
