"""The contrastive losses on 8 devices: equal to the naive twins, and within their memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_contrastive_loss import (
    BIAS,
    CASES,
    LOSSES,
    SCALE,
    assert_equal,
    features,
    make_case,
    make_inputs,
    value_and_gradients,
)

from bvl.errors import ConfigError
from bvl.losses.contrastive import sigmoid_loss, softmax_loss
from bvl.losses.ring import blocked_loop
from bvl.losses.targets import multi_text
from bvl.mesh import MeshConfig, batch_sharding, make_mesh, replicated

MIB = 2**20


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("case", CASES)
def test_eight_devices_equal_naive(loss, case):
    fast, naive = LOSSES[loss]
    mesh = make_mesh(MeshConfig((4, 2, 1)))
    m, options = make_case(case, 32)
    image, text = make_inputs(32, m, options)
    expected = value_and_gradients(naive, image, text, options)
    image, text = (jax.device_put(x, batch_sharding(mesh)) for x in (image, text))
    actual = value_and_gradients(fast, image, text, options | {"mesh": mesh, "chunk_size": 3})
    assert actual["image"].sharding.is_equivalent_to(batch_sharding(mesh), 2)
    assert_equal(actual, expected)
    if case == "all_invalid":
        assert all(np.all(np.asarray(x) == 0) for x in actual.values())


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    "shape, chunk_size", [((8, 1, 1), None), ((2, 2, 2), 5), ((1, 4, 2), 1), ((2, 1, 4), 16), ((1, 1, 8), 7)]
)
def test_any_mesh_and_chunk_size(loss, shape, chunk_size):
    fast, naive = LOSSES[loss]
    m, options = make_case("masks_and_weights", 32)
    image, text = make_inputs(32, m, options)
    actual = value_and_gradients(
        fast, image, text, options | {"mesh": make_mesh(MeshConfig(shape)), "chunk_size": chunk_size}
    )
    assert_equal(actual, value_and_gradients(naive, image, text, options))


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_reach_parameters_through_jit(loss):
    """Features from sharded parameters and inputs, as in a training step: nothing is lost or counted twice."""
    fast, naive = LOSSES[loss]
    mesh = make_mesh(MeshConfig((2, 2, 2)))
    x, y = features(0, 32, 12), features(1, 32, 12)
    params = {
        "image": jnp.asarray(features(2, 12, 16)),
        "text": jnp.asarray(features(3, 12, 16)),
        "log_scale": jnp.log(SCALE),
        "bias": jnp.float32(BIAS),
    }

    def objective(params, x, y, function, **options):
        def encode(w, inputs):
            z = inputs @ w
            return z / jnp.linalg.norm(z, axis=-1, keepdims=True)

        if loss == "sigmoid":
            options["bias"] = params["bias"]
        scale = jnp.exp(params["log_scale"])
        # The factor shows that a cotangent other than 1 arrives.
        return 3 * function(encode(params["image"], x), encode(params["text"], y), scale=scale, **options)

    def run(function, params, x, y, **options):
        step = jax.jit(jax.value_and_grad(lambda p, x, y: objective(p, x, y, function, **options)))
        value, gradients = step(params, x, y)
        return {"value": value, **gradients}

    expected = run(naive, params, x, y)
    sharded = jax.device_put(params, replicated(mesh))
    for name in ("image", "text"):  # as LOGICAL_RULES would place a projection
        spec = jax.sharding.PartitionSpec("fsdp", "tensor")
        sharded[name] = jax.device_put(params[name], jax.sharding.NamedSharding(mesh, spec))
    rows = [jax.device_put(rows, batch_sharding(mesh)) for rows in (x, y)]
    assert_equal(run(fast, sharded, *rows, mesh=mesh, chunk_size=3), expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_memory_at_a_global_batch_of_32768(loss):
    """Temporaries of value and gradients, compiled but not run (naive: more than 1,500 MiB)."""
    mesh, rows, dim = make_mesh(), 32_768, 512
    matrix = jax.ShapeDtypeStruct((rows, dim), jnp.float32, sharding=batch_sharding(mesh))
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(mesh))

    def call(image, text, scale, bias):
        if loss == "softmax":
            return softmax_loss(image, text, scale=scale, mesh=mesh)
        return sigmoid_loss(image, text, scale=scale, bias=bias, mesh=mesh)

    step = jax.jit(jax.value_and_grad(call, argnums=(0, 1, 2, 3)))
    memory = step.lower(matrix, matrix, scalar, scalar).compile().memory_analysis()
    # The numbers are those of one device: its share of the two feature arrays is 1/8 of 128 MiB.
    assert memory.argument_size_in_bytes == pytest.approx(2 * rows * dim * 4 / 8, rel=1e-3)
    assert memory.temp_size_in_bytes <= 120 * MIB


def test_blocked_loop_brings_columns_and_their_sums_home():
    """Every pair is visited once; sums stay with their row or column."""
    mesh = make_mesh(MeshConfig((4, 2, 1)))
    a, b = features(0, 16, 4), features(1, 24, 4)

    def block(rows, cols, row_sum, col_sum, factor):
        products = factor * rows @ cols.T
        return row_sum + products.sum(1), col_sum + (products**2).sum(0)

    state = dict(row_state=jnp.zeros(16), col_state=jnp.zeros(24), shared=jnp.float32(2))
    row_sum, col_sum = blocked_loop(block, rows=a, cols=b, **state, mesh=mesh, chunk_size=2)
    np.testing.assert_allclose(row_sum, (2 * a @ b.T).sum(1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(col_sum, ((2 * a @ b.T) ** 2).sum(0), rtol=1e-4, atol=1e-5)


def test_rows_that_do_not_split_evenly():
    mesh = make_mesh()
    with pytest.raises(ConfigError, match="12 rows cannot be split over 8"):
        softmax_loss(features(0, 12, 4), features(1, 24, 4), scale=1.0, mesh=mesh)
    targets = multi_text(np.arange(12) % 16, num_images=16)
    with pytest.raises(ConfigError, match="12 columns cannot be split over 8"):
        sigmoid_loss(features(0, 16, 4), features(1, 12, 4), scale=1.0, bias=0.0, targets=targets, mesh=mesh)
