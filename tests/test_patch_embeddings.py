"""What image towers give of regions: patches in the shared space, feature maps from the stem on, a mask as fourth channel."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import fast_compilation  # noqa: F401

from bvl.errors import ConfigError
from bvl.mesh import unbox
from bvl.models.hybrid import HybridConfig
from bvl.models.resnet import ResNetConfig
from bvl.models.text import TextConfig
from bvl.models.vit import ViTConfig
from bvl.models.vlm import DualEncoder, DualEncoderConfig, normalize_image

pytestmark = pytest.mark.usefixtures("fast_compilation")

SMALL = dict(width=8, depth=1, num_heads=2)
# tower, pixels to a cell
TOWERS = {
    "mean": (ViTConfig("XXS/8", pool="mean", **SMALL), 8),
    "map": (ViTConfig("XXS/8", pool="map", **SMALL), 8),
    "cls": (ViTConfig("XXS/8", pool="cls", **SMALL), 8),
    "clip_resnet": (ResNetConfig("RN50", width=4, stages=(1, 1, 1, 1)), 32),
    "resnet": (ResNetConfig("ResNet18", width=4, stages=(1, 1, 1, 1)), 32),
    "hybrid": (HybridConfig(widths=(4, 8, 16), depths=(1, 1, 1), num_heads=2), 16),
}
NEED = frozenset({"embed", "pooled", "tokens", "patch_embed"})


def random_params(module, *args):
    shapes = unbox(jax.eval_shape(module.init, jax.random.key(0), *args)["params"])
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: jnp.asarray(np.abs(rng.normal(0.0, 0.3, s.shape)) if s.ndim < 2 else rng.normal(0.0, 0.3, s.shape), s.dtype), shapes)  # fmt: skip


@functools.cache
def build(name, cells=(2, 3)):
    tower, stride = TOWERS[name]
    config = DualEncoderConfig(image=tower, text=TextConfig(**SMALL), embed_dim=5)
    model = DualEncoder(config, (cells[0] * stride, cells[1] * stride), 7, 4, 2)
    image, tokens = jnp.zeros((1, *model.image_size, 3)), jnp.zeros((1, 4), jnp.int32)
    return model, random_params(model, image, tokens, tokens == 0)


def pictures(size):
    return jnp.asarray(np.random.default_rng(1).normal(size=(2, *size, 3)), jnp.float32)


@pytest.mark.parametrize("name", TOWERS)
def test_patches_in_the_shared_space(name):
    """One of unit norm for each token, on the grid, and nothing else changes for it."""
    model, params = build(name)
    encode = jax.jit(functools.partial(model.apply, method="encode_image"), static_argnums=2)
    image = pictures(model.image_size)
    out, plain = (
        encode({"params": params}, image, NEED),
        encode({"params": params}, image, frozenset({"embed"})),
    )
    assert out.grid == (2, 3) and out.patch_embed.shape == (2, 6, 5) and out.patches is None
    np.testing.assert_allclose(np.linalg.norm(out.patch_embed, axis=-1), 1.0, rtol=1e-4)
    np.testing.assert_allclose(out.embed, plain.embed, rtol=1e-4, atol=1e-5)
    assert plain.patch_embed is None
    assert np.abs(np.diff(out.patch_embed, axis=1)).max((0, 2)).all()


@pytest.mark.parametrize("name", [name for name in TOWERS if name != "cls"])
def test_the_only_patch_is_the_image(name):
    """Each patch is what the tower would give if the image were nothing else."""
    model, params = build(name, (1, 1))
    if name == "clip_resnet":
        # The mean, which asks, has a position of its own.
        params = jax.tree.map(lambda x: x, params)
        params["image"]["pool"]["positions"] = jnp.zeros_like(params["image"]["pool"]["positions"])
    out = model.apply({"params": params}, pictures(model.image_size), NEED, method="encode_image")
    np.testing.assert_allclose(out.patch_embed[:, 0], out.embed, rtol=1e-3, atol=1e-4)


def test_the_mean_of_the_patches_is_the_image():
    tower, _ = TOWERS["mean"]
    module = tower.make(image_size=(16, 24), dtype=jnp.float32)
    image = pictures((16, 24))
    params = random_params(module, image)
    out = jax.jit(lambda p: module.apply({"params": p}, image, patches=True))(params)
    np.testing.assert_allclose(out.patches.mean(1), out.pooled, rtol=1e-4, atol=1e-5)


def test_levels_begin_with_the_stem():
    config = ViTConfig(
        "XXS/8", stem="conv", pool="map", width=8, depth=2, num_heads=2, levels=(0, 1), registers=2
    )
    module = config.make(image_size=(16, 24), dtype=jnp.float32)
    image = pictures((16, 24))
    params = random_params(module, image)
    run = jax.jit(lambda p, x: module.apply({"params": p}, x, levels=True))
    out = run(params, image)
    assert [x.shape[1:3] for x in out.levels] == [(8, 12), (4, 6), (2, 3), (2, 3)]
    # A change in one corner of the image reaches only that corner of the stem's maps, and all of the blocks'.
    moved = run(params, image.at[:, :4, :4].add(1.0))
    changed = [np.abs(a - b).max((0, 3)) > 0 for a, b in zip(moved.levels, out.levels, strict=True)]
    assert changed[0][:3, :3].all() and not changed[0][3:].any() and not changed[0][:, 3:].any()
    assert changed[1][:2, :2].all() and not changed[1][2:].any() and not changed[1][:, 2:].any()
    assert changed[2].all() and changed[3].all()
    assert jax.eval_shape(lambda p: module.apply({"params": p}, image), params).levels is None
    patch = dataclasses.replace(config, stem="patch").make(image_size=(16, 24), dtype=jnp.float32)
    shapes = jax.eval_shape(lambda x: patch.init_with_output(jax.random.key(0), x, levels=True)[0], image)
    assert [x.shape[1:3] for x in shapes.levels] == [(2, 3), (2, 3)]


@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_a_mask_as_fourth_channel(stem):
    """At first it is not seen, but learned from; then every patch knows of its own part."""
    config = ViTConfig("XXS/8", stem=stem, pool="mean", mask_channel=True, **SMALL)
    module = config.make(image_size=(16, 24), dtype=jnp.float32)
    image = pictures((16, 24))
    mask = jnp.zeros((2, 16, 24, 1)).at[:, 3:8, 8:14].set(1.0)
    both = jnp.concatenate([image, mask], -1)
    initial = unbox(jax.jit(lambda x: module.init(jax.random.key(0), x))(both))["params"]
    assert not np.asarray(initial["mask_embed"]).any()
    run = jax.jit(lambda p, x: module.apply({"params": p}, x))
    plain, marked = run(initial, image), run(initial, both)
    np.testing.assert_array_equal(plain.tokens, marked.tokens)
    slopes = jax.jit(jax.grad(lambda p: jnp.square(run(p, both).tokens[..., 0]).sum()))(initial)
    inside = np.asarray(mask)[0, :8, 8:16, 0].reshape(-1) > 0
    assert (np.abs(slopes["mask_embed"]).max(-1) > 0).tolist() == inside.tolist()
    learned = initial | {"mask_embed": jnp.ones_like(initial["mask_embed"]) * jnp.arange(8.0)}
    assert np.abs(run(learned, both).tokens - plain.tokens).max() > 1e-2
    np.testing.assert_array_equal(run(learned, image).tokens, plain.tokens)

    without = dataclasses.replace(config, mask_channel=False).make(image_size=(16, 24), dtype=jnp.float32)
    assert "mask_embed" not in jax.eval_shape(lambda: without.init(jax.random.key(0), image))["params"]
    with pytest.raises(ConfigError, match=r"images with 4 channels.*mask_channel=true"):
        jax.eval_shape(lambda: without.init(jax.random.key(0), both))
    with pytest.raises(ConfigError, match="images with 5 channels"):
        jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.concatenate([both, mask], -1)))


def test_a_mask_is_not_normalised_as_colour():
    pixels = jnp.asarray(np.random.default_rng(0).integers(0, 256, (1, 2, 2, 4)), jnp.uint8)
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    out = normalize_image(pixels, mean, std, jnp.float32)
    np.testing.assert_allclose(
        out[..., :3], normalize_image(pixels[..., :3], mean, std, jnp.float32), rtol=1e-6
    )
    np.testing.assert_allclose(out[..., 3], np.asarray(pixels)[..., 3] / 255, rtol=1e-6)
