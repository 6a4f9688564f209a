"""Counted floating-point operations against formulas and against XLA's own count."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, PartitionSpec

from bvl.train.flops import count_flops


def flops(function, *args):
    return count_flops(jax.make_jaxpr(function)(*args))


A, B = jnp.ones((3, 4, 5)), jnp.ones((3, 5, 6))
PRODUCT = 2 * 3 * 4 * 5 * 6


def test_matrix_products_by_formula_and_by_xla():
    assert flops(jnp.matmul, A, B) == PRODUCT
    # Two more products of the same size for the gradients.
    loss = lambda a, b: jnp.sin(a @ b).sum()  # noqa: E731
    assert flops(jax.grad(loss, (0, 1)), A, B) == 3 * PRODUCT
    large = jnp.ones((128, 256)), jnp.ones((256, 64))
    xla = jax.jit(jnp.matmul).lower(*large).compile().cost_analysis()["flops"]
    assert flops(jnp.matmul, *large) == pytest.approx(xla, rel=1e-3)


def test_every_turn_of_a_scan_counts():
    """Where XLA's count takes the body once."""
    w = jnp.ones((64, 64))
    stack = lambda x: jax.lax.scan(lambda c, _: (c @ w, None), x, length=7)[0]  # noqa: E731
    assert flops(stack, w) == 7 * 2 * 64**3
    assert flops(jax.grad(lambda x: stack(x).sum()), w) == 2 * 7 * 2 * 64**3
    assert jax.jit(stack).lower(w).compile().cost_analysis()["flops"] < 2 * 2 * 64**3


def test_work_done_again_counts():
    layer = lambda a: jnp.sin(jnp.sin(a) @ B[0])  # noqa: E731
    plain, again = (jax.grad(lambda a, f=f: f(a).sum()) for f in (layer, jax.checkpoint(layer)))
    assert flops(again, A[0]) == flops(plain, A[0]) + PRODUCT // 3


def test_branches_and_custom_gradients():
    branches = lambda i, a: jax.lax.cond(i, lambda a: a @ B, lambda a: (a @ B) @ jnp.ones((6, 6)), a)  # noqa: E731
    assert flops(branches, True, A) == PRODUCT + 2 * 3 * 4 * 6 * 6

    @jax.custom_vjp
    def product(a):
        return a @ B

    product.defvjp(lambda a: (a @ B, None), lambda _, g: (g @ B.mT,))
    assert flops(product, A) == PRODUCT
    assert flops(jax.grad(lambda a: product(a).sum()), A) == 2 * PRODUCT


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions(stride, groups):
    """The gradients with respect to image and kernel cost as much as the convolution, whatever its stride."""
    image, kernel = jnp.ones((2, 16, 16, 4)), jnp.ones((3, 3, 4 // groups, 8))
    conv = functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=(stride, stride),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )
    side = 16 // stride
    expected = 2 * (2 * side * side * 8) * (3 * 3 * 4 // groups)
    assert flops(conv, image, kernel) == expected
    for argument in (0, 1):
        gradient = flops(jax.grad(lambda i, k: jnp.sin(conv(i, k)).sum(), argument), image, kernel)
        assert gradient == 2 * expected


def test_the_work_of_all_devices_counts():
    mesh = Mesh(jax.devices()[:1], ("data",))
    split = jax.shard_map(
        lambda a: a @ B, mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec("data")
    )
    assert flops(split, A) == PRODUCT
