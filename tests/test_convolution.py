"""Convolutions agree with XLA's, batch norm with its definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import fast_compilation  # noqa: F401

from bvl.mesh import unbox
from bvl.models.batch_norm import BatchNorm, normalize, normalize_naive
from bvl.models.convolution import convolve

pytestmark = pytest.mark.usefixtures("fast_compilation")


def assert_close(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()), rtol=0)


@pytest.mark.parametrize(
    "size, stride, groups",
    [(1, 1, 1), (1, 2, 1), (3, 1, 1), (3, 2, 1), (7, 2, 1), (3, 1, 8), (3, 2, 8), (3, 1, 2)],
)
def test_matmul_convolution_equals_lax(size, stride, groups):
    features = 8 if groups == 8 else 6
    k1, k2, k3 = jax.random.split(jax.random.key(size), 3)
    # Odd sides: the last stride is cut off.
    x = jax.random.normal(k1, (2, 9, 8, 8))
    kernel = jax.random.normal(k2, (size, size, 8 // groups, features))
    options = dict(stride=stride, groups=groups)
    shape = (2, -(-9 // stride), -(-8 // stride), features)
    weights = jax.random.normal(k3, shape)

    @functools.partial(jax.jit, static_argnums=2)
    def run(x, kernel, implementation):
        function = functools.partial(convolve, implementation=implementation, **options)
        value, pull = jax.vjp(function, x, kernel)
        return value, pull(weights)

    want = run(x, kernel, "lax")
    assert want[0].shape == shape
    assert_close(run(x, kernel, "matmul"), want)


def test_closed_form_gradient_of_batch_norm():
    k1, k2, k3 = jax.random.split(jax.random.key(0), 3)
    x = 3 + jax.random.normal(k1, (4, 3, 2, 5))
    scale, bias = 1 + 0.1 * jax.random.normal(k2, (2, 5))
    weights = jax.random.normal(k3, x.shape)

    @functools.partial(jax.jit, static_argnums=0)
    def run(function):
        y, pull = jax.vjp(lambda *args: function(*args, 1e-5)[0], x, scale, bias)
        return y, pull(weights)

    assert_close(run(normalize), run(normalize_naive))


@functools.partial(jax.jit, static_argnums=(0, 3))
def apply(norm, params, x, training):
    """(output, new state)."""
    return norm.apply(params, x, training=training, mutable=["statistics"])


def norm_and_params(mode):
    norm = BatchNorm(mode)
    x = 3 + 2 * jax.random.normal(jax.random.key(1), (4, 2, 2, 3))
    params = unbox(jax.jit(functools.partial(norm.init, training=False))(jax.random.key(0), x))
    assert set(params["params"]) == {"scale", "bias", "running_mean", "running_var"}
    return norm, params, x


def test_training_uses_and_moves_batch_statistics():
    norm, params, x = norm_and_params("synced")
    y, state = apply(norm, params, x, True)
    np.testing.assert_allclose(y.mean((0, 1, 2)), 0, atol=1e-6)
    np.testing.assert_allclose(y.var((0, 1, 2)), 1, rtol=1e-4)
    # As torch: momentum 0.1, unbiased variance.
    wide = np.asarray(x, np.float64).reshape(-1, 3)
    np.testing.assert_allclose(state["statistics"]["running_mean"], 0.1 * wide.mean(0), rtol=1e-5)
    want = 0.9 + 0.1 * wide.var(0, ddof=1)
    np.testing.assert_allclose(state["statistics"]["running_var"], want, rtol=1e-5)


@pytest.mark.parametrize("mode, training", [("synced", False), ("frozen", False), ("frozen", True)])
def test_running_statistics(mode, training):
    norm, params, x = norm_and_params(mode)
    params["params"]["running_mean"] = jnp.asarray([1.0, 2.0, 3.0])
    params["params"]["running_var"] = jnp.asarray([1.0, 4.0, 9.0])
    y, state = apply(norm, params, x, training)
    assert "statistics" not in state
    want = (x - jnp.asarray([1.0, 2.0, 3.0])) / jnp.asarray([1.0, 2.0, 3.0])
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["synced", "frozen"])
def test_running_statistics_take_no_gradient(mode):
    norm, params, x = norm_and_params(mode)

    def loss(params):
        return (norm.apply(params, x, training=True, mutable=["statistics"])[0] ** 3).sum()

    grads = jax.jit(jax.grad(loss))(params)["params"]
    for name, gradient in grads.items():
        assert bool(jnp.any(gradient != 0)) == (not name.startswith("running_")), name


def test_statistics_stay_in_float32():
    x = (100 + jax.random.normal(jax.random.key(0), (8, 8, 8, 2))).astype(jnp.bfloat16)
    norm = BatchNorm(dtype=jnp.bfloat16)
    params = unbox(norm.init(jax.random.key(0), x, training=False))
    y, state = apply(norm, params, x, True)
    assert y.dtype == jnp.bfloat16
    assert state["statistics"]["running_mean"].dtype == jnp.float32
    np.testing.assert_allclose(
        state["statistics"]["running_mean"], 0.1 * x.astype(jnp.float32).mean((0, 1, 2)), rtol=1e-5
    )
