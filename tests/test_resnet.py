"""ResNet towers: shapes, pooling, sizes, gradients, published parameter counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import fast_compilation  # noqa: F401

from bvl.errors import ConfigError
from bvl.mesh import unbox
from bvl.models.resnet import ResNetConfig

pytestmark = pytest.mark.usefixtures("fast_compilation")

# As in open_clip 3.3 (image tower without the map after the attention pool, 2048 x 1024 + 1024 of RN50) and
# torchvision 0.28 (without the classifier).
PUBLISHED = {
    "RN50": 38316896 - (2048 * 1024 + 1024),
    "RN101": 56259936 - (2048 * 512 + 512),
    "RN50x4": 87137080 - (2560 * 640 + 640),
    "RN50x16": 167328912 - (3072 * 768 + 768),
    "RN50x64": 420380352 - (4096 * 1024 + 1024),
    "ResNet18": 11176512,
    "ResNet34": 21284672,
    "ResNet50": 23508032,
    "ResNet101": 42500160,
    "ResNet152": 58143808,
}
IMAGE_SIZES = {"RN50x4": 288, "RN50x16": 384, "RN50x64": 448}
TINY = dict(width=4, stages=(1, 1, 1, 1))


def make(config, size=(64, 64)):
    model = config.make(image_size=size, dtype=jnp.float32)
    params = unbox(jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *size, 3))))
    return model, params


def test_parameter_counts_are_the_published_ones():
    for name, published in PUBLISHED.items():
        size = IMAGE_SIZES.get(name, 224)
        model = ResNetConfig(name).make(image_size=(size, size), dtype=jnp.float32)
        shapes = unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, size, size, 3))))
        leaves = jax.tree_util.tree_leaves_with_path(shapes)
        count = sum(leaf.size for path, leaf in leaves if "running_" not in jax.tree_util.keystr(path))
        assert count == published, name


@pytest.mark.parametrize("variant", ["RN50", "ResNet18", "ResNet50"])
def test_shapes_levels_and_other_sizes(variant):
    config = ResNetConfig(variant, **TINY)
    model = config.make(image_size=(64, 64), dtype=jnp.float32)
    params = unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3))))
    # Another size and aspect ratio than the positions were made for.
    image = jnp.zeros((2, 64, 96, 3))
    out = jax.eval_shape(lambda params: model.apply(params, image, levels=True), params)
    assert out.grid == (2, 3)
    assert out.pooled.shape == (2, config.output_width)
    assert out.tokens.shape == (2, 6, config.output_width)
    assert [level.shape[1:3] for level in out.levels] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    assert jax.eval_shape(lambda params: model.apply(params, image), params).levels is None


def test_training_step_reaches_every_parameter():
    config = ResNetConfig("RN50", drop_path=0.2, **TINY)
    model, params = make(config)
    # Residual branches start as zero, which hides what lies before their last scale.
    params = jax.tree.map(lambda p: jnp.where(jnp.all(p == 0), p + 0.1, p), params)
    image = jax.random.normal(jax.random.key(1), (4, 64, 64, 3))
    weights = jax.random.normal(jax.random.key(2), (4, config.output_width))

    @jax.jit
    def run(params, keys):
        def loss(params):
            out, state = model.apply(params, image, keys=keys, mutable=["statistics"])
            return (out.pooled * weights).sum(), (out.pooled, state["statistics"])

        return jax.grad(loss, has_aux=True)(params)

    keys = jax.random.split(jax.random.key(3), 4)
    grads, (pooled, statistics) = run(params, keys)
    for path, gradient in jax.tree_util.tree_leaves_with_path(grads["params"]):
        name = jax.tree_util.keystr(path)
        # Softmax does not see a constant added to all keys.
        if "running_" in name:
            assert not jnp.any(gradient), name
        elif "'key']['bias" not in name:
            assert jnp.any(gradient != 0), name
    # New statistics lie under the path of their parameters.
    flat = jax.tree_util.tree_leaves_with_path
    running = {jax.tree_util.keystr(path) for path, _ in flat(params["params"])}
    running = {name for name in running if "running_" in name}
    assert {jax.tree_util.keystr(path) for path, _ in flat(statistics)} == running
    np.testing.assert_array_equal(pooled, run(params, keys)[1][0])
    other = run(params, jax.random.split(jax.random.key(4), 4))[1][0]
    assert jnp.any(pooled != other), "stochastic depth drops nothing"


def test_frozen_norm_keeps_rows_apart():
    config = ResNetConfig("ResNet18", norm="frozen", **TINY)
    model, params = make(config)
    image = jax.random.normal(jax.random.key(1), (2, 64, 64, 3))
    keys = jax.random.split(jax.random.key(2), 2)
    run = jax.jit(lambda image: model.apply(params, image, keys=keys, levels=True))
    out, changed = run(image), run(image.at[1].add(1.0)).pooled
    np.testing.assert_allclose(changed[0], out.pooled[0], atol=1e-6)
    assert jnp.any(changed[1] != out.pooled[1])
    np.testing.assert_array_equal(out.levels[-1].reshape(out.tokens.shape), out.tokens)
    np.testing.assert_allclose(out.pooled, out.tokens.mean(1), rtol=1e-5)


def test_pool_of_either_kind():
    assert ResNetConfig("RN50").pooling == "attention"
    assert ResNetConfig("ResNet50").pooling == "mean"
    for variant, pool in (("RN50", "mean"), ("ResNet50", "attention")):
        config = ResNetConfig(variant, pool=pool, **TINY)
        model = config.make(image_size=(64, 64), dtype=jnp.float32)
        out, params = jax.eval_shape(model.init_with_output, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
        assert ("pool" in params["params"]) == (pool == "attention")
        assert out.pooled.shape == (1, config.output_width)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(variant="RN5O"), "nearest is 'RN50'"),
        (dict(variant="resnet-50"), "nearest is 'ResNet50'"),
        (dict(stages=(1, 2)), "4 stages"),
        (dict(width=3), "even"),
        (dict(width=0), "at least 2"),
        (dict(drop_path=1.0), "drop_path"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=message):
        ResNetConfig(**options)


def test_size_that_32_does_not_divide():
    with pytest.raises(ConfigError, match=r"image_size \(72, 64\).*nearest is \(64, 64\)"):
        make(ResNetConfig(**TINY), size=(72, 64))
