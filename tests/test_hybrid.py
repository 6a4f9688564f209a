"""Hybrid tower: shapes, sizes, gradients, published parameter counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import fast_compilation  # noqa: F401

from bvl.errors import ConfigError
from bvl.mesh import unbox
from bvl.models.hybrid import HybridConfig

pytestmark = pytest.mark.usefixtures("fast_compilation")

# The trunks of timm 1.0 without a head.
PUBLISHED = {"ViTamin-S": 21877696, "ViTamin-B": 87132032, "ViTamin-L": 332531616}
TINY = dict(widths=(4, 8, 16), depths=(1, 1, 2), num_heads=2)


def make(config, size=(32, 32)):
    model = config.make(image_size=size, dtype=jnp.float32)
    return model, unbox(jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *size, 3))))


def test_parameter_counts_are_the_published_ones():
    for name, published in PUBLISHED.items():
        model = HybridConfig(name).make(image_size=(224, 224), dtype=jnp.float32)
        shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
        assert sum(leaf.size for leaf in jax.tree.leaves(unbox(shapes))) == published, name


@pytest.mark.parametrize("positions", [True, False])
def test_shapes_levels_and_other_sizes(positions):
    config = HybridConfig(positions=positions, **TINY)
    model = config.make(image_size=(32, 32), dtype=jnp.float32)
    params = unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3))))
    assert ("positions" in params["params"]) == positions
    image = jnp.zeros((2, 32, 48, 3))
    out = jax.eval_shape(lambda params: model.apply(params, image, levels=True), params)
    assert out.grid == (2, 3)
    assert out.pooled.shape == (2, config.output_width) == (2, 16)
    assert out.tokens.shape == (2, 6, 16)
    assert [level.shape[1:] for level in out.levels] == [(8, 12, 4), (4, 6, 8), (2, 3, 16)]


def test_training_reaches_every_parameter_and_drops_paths():
    config = HybridConfig(drop_path=0.3, **TINY)
    model, params = make(config)
    image = jax.random.normal(jax.random.key(1), (4, 32, 32, 3))
    weights = jax.random.normal(jax.random.key(2), (4, 16))

    @jax.jit
    def run(keys):
        def loss(params):
            out = model.apply(params, image, keys=keys, levels=True)
            return (out.pooled * weights).sum(), out

        return jax.grad(loss, has_aux=True)(params)

    grads, out = run(jax.random.split(jax.random.key(3), 4))
    for path, gradient in jax.tree_util.tree_leaves_with_path(grads["params"]):
        name = jax.tree_util.keystr(path)
        # Softmax does not see a constant added to all keys.
        if "'key']['bias" not in name:
            assert jnp.any(gradient != 0), name
    assert jnp.any(out.pooled != run(jax.random.split(jax.random.key(4), 4))[1].pooled)
    np.testing.assert_array_equal(out.levels[-1].reshape(out.tokens.shape), out.tokens)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(variant="ViTaminB"), "nearest is 'ViTamin-B'"),
        (dict(variant="vitamin_s"), "nearest is 'ViTamin-S'"),
        (dict(num_heads=5), "num_heads=5"),
        (dict(depths=(1, 0, 1)), "at least 1"),
        (dict(num_heads=0), "at least 1"),
        (dict(drop_path=-0.1), "drop_path"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=message):
        HybridConfig(**options)


def test_size_that_16_does_not_divide():
    with pytest.raises(ConfigError, match=r"\(40, 32\) is not divisible"):
        make(HybridConfig(**TINY), size=(40, 32))
