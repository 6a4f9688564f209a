"""Towers and the dual encoder: shapes, equal values by any route, what depends on what, and bad configs."""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bvl.errors import ConfigError
from bvl.mesh import unbox
from bvl.models.conv_stem import _patches_3x3
from bvl.models.grid import resize_positions
from bvl.models.layers import Attention, Stack, product
from bvl.models.text import TextConfig, TextTransformer
from bvl.models.vit import VARIANTS, ViT, ViTConfig
from bvl.models.vlm import DualEncoder, DualEncoderConfig, l2_normalize, normalize_image

VOCAB, CONTEXT, END, PAD = 20, 8, 3, 0
WIDTH = 16
VIT = ViTConfig("Ti/8", pool="mean", width=WIDTH, depth=2, num_heads=2)
TEXT = TextConfig(width=WIDTH, depth=2, num_heads=2)
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(2, 16, 24, 3)).astype(np.float32)
TOKENS = np.array([[2, 5, 6, 7, END, 0, 0, 0], [2, 9, END, 0, 0, 0, 0, 0]], np.int32)
MASK = TOKENS != PAD
# These tests compile far longer than they compute.
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def random_params(module, *args, seed=0, **kwargs):
    """Parameters of the right shapes and of a size at which everything matters, without compiling `init`."""
    rng = np.random.default_rng(seed)
    abstract = unbox(jax.eval_shape(lambda: module.init(jax.random.key(0), *args, **kwargs)))["params"]
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), x.dtype), abstract)


def run(module, params, *args, **kwargs):
    return compiled(lambda p, *a: module.apply({"params": p}, *a, **kwargs))(params, *args)


@pytest.fixture(scope="module")
def dual():
    """(module, params, compiled encode_image, compiled encode_text) of a small dual encoder."""
    config = DualEncoderConfig(image=VIT, text=TEXT, embed_dim=12, init_bias=-5.0)
    module = DualEncoder(config, image_size=(16, 24), vocab_size=VOCAB, context_length=CONTEXT, end_id=END)
    params = random_params(module, IMAGES, TOKENS, MASK)
    need = frozenset({"embed", "pooled", "tokens"})
    image = compiled(lambda p, x: module.apply({"params": p}, x, need, method="encode_image"))
    text = compiled(lambda p, t, m: module.apply({"params": p}, t, m, need, method="encode_text"))
    return module, params, image, text


def test_shapes(dual):
    _, params, encode_image, encode_text = dual
    image = encode_image(params, IMAGES)
    assert image.embed.shape == (2, 12) and image.pooled.shape == (2, WIDTH)
    assert image.tokens.shape == (2, 6, WIDTH) and image.grid == (2, 3)
    text = encode_text(params, TOKENS, MASK)
    assert text.embed.shape == (2, 12) and text.pooled.shape == (2, WIDTH)
    assert text.tokens.shape == (2, CONTEXT, WIDTH) and text.mask.shape == (2, CONTEXT)
    for features in (image, text):
        np.testing.assert_allclose(np.linalg.norm(features.embed, axis=1), 1, rtol=1e-5)


def test_what_is_not_needed_is_none(dual):
    module, params, *_ = dual
    apply = functools.partial(module.apply, {"params": params})
    image = jax.eval_shape(lambda: apply(IMAGES, frozenset({"pooled"}), method="encode_image"))
    assert image.embed is None and image.tokens is None and image.pooled is not None
    text = jax.eval_shape(lambda: apply(TOKENS, MASK, frozenset({"embed"}), method="encode_text"))
    assert text.pooled is None and text.tokens is None and text.mask is None


def test_rows_do_not_see_each_other(dual):
    _, params, encode_image, encode_text = dual
    a = encode_image(params, IMAGES)
    b = encode_image(params, np.stack([IMAGES[0], IMAGES[1] + 1]))
    np.testing.assert_allclose(a.embed[0], b.embed[0], atol=1e-6)
    assert np.abs(a.embed[1] - b.embed[1]).max() > 1e-3
    text = encode_text(params, TOKENS, MASK)
    swapped = encode_text(params, TOKENS[::-1].copy(), MASK[::-1].copy())
    np.testing.assert_allclose(text.embed, swapped.embed[::-1], atol=1e-6)


# --- Text -------------------------------------------------------------------------------------------------


def test_text_is_pooled_at_the_first_end_token(dual):
    _, params, _, encode_text = dual
    text = encode_text(params, TOKENS, MASK)
    np.testing.assert_array_equal(text.pooled[0], text.tokens[0, 4])
    np.testing.assert_array_equal(text.pooled[1], text.tokens[1, 2])
    # Whatever stands behind it, more end tokens included, changes nothing.
    other = TOKENS.copy()
    other[0, 5:] = [END, 8, END]
    other[1, 3:] = [4, 4, END, 11, 12]
    np.testing.assert_allclose(encode_text(params, other, other != PAD).embed, text.embed, atol=1e-6)


def test_later_tokens_do_not_change_earlier_states(dual):
    _, params, _, encode_text = dual
    base = encode_text(params, TOKENS, MASK).tokens
    changed = TOKENS.copy()
    changed[:, 2] = 13
    new = encode_text(params, changed, MASK).tokens
    np.testing.assert_allclose(new[:, :2], base[:, :2], atol=1e-6)
    assert np.abs(new[0, 2:] - base[0, 2:]).max(-1).min() > 1e-4


def test_mean_pooled_text_without_causality_ignores_padding():
    config = dataclasses.replace(TEXT, causal=False, pool="mean", depth=1)
    module = TextTransformer(config, VOCAB, CONTEXT, END)
    params = random_params(module, TOKENS, MASK)
    f = compiled(lambda p, t, m: module.apply({"params": p}, t, m))
    out = f(params, TOKENS, MASK)
    pooled, states = out.pooled, out.tokens
    np.testing.assert_allclose(pooled[1], states[1, :3].mean(0), atol=1e-5)
    other = np.where(MASK, TOKENS, 17)
    np.testing.assert_allclose(f(params, other, MASK).pooled, pooled, atol=1e-6)
    changed = TOKENS.copy()
    changed[0, 3] = 13
    assert np.abs(f(params, changed, MASK).tokens[0, 0] - states[0, 0]).max() > 1e-4


def test_too_many_tokens():
    module = TextTransformer(TEXT, VOCAB, CONTEXT, END)
    tokens = np.zeros((1, CONTEXT + 1), np.int32)
    with pytest.raises(ConfigError, match="9 tokens.*made for 8"):
        jax.eval_shape(lambda: module.init(jax.random.key(0), tokens, tokens == 0))


# --- Image ------------------------------------------------------------------------------------------------


def test_pooling_modes():
    outputs = {}
    for pool in ("cls", "mean", "map"):
        module = ViT(dataclasses.replace(VIT, pool=pool, depth=1, pre_norm=pool == "cls"), (16, 24))
        params = random_params(module, IMAGES)
        out = run(module, params, IMAGES)
        pooled, tokens = out.pooled, out.tokens
        assert pooled.shape == (2, WIDTH) and tokens.shape == (2, 6, WIDTH)
        assert ("cls" in params, "pool" in params) == (pool == "cls", pool == "map")
        outputs[pool] = pooled, tokens
    np.testing.assert_allclose(outputs["mean"][0], outputs["mean"][1].mean(1), atol=1e-5)
    assert np.abs(outputs["cls"][0] - outputs["cls"][1].mean(1)).max() > 1e-3


def test_positions_resize():
    grid = RNG.normal(size=(6, 4)).astype(np.float32)
    np.testing.assert_array_equal(resize_positions(grid, (2, 3), (2, 3)), grid)
    # A ramp stays a ramp between the borders, in each direction on its own.
    rows, columns = np.mgrid[0:4, 0:6].astype(np.float32)
    ramp = np.stack([rows.ravel(), columns.ravel()], -1)
    bigger = np.asarray(resize_positions(ramp, (4, 6), (8, 12))).reshape(8, 12, 2)
    np.testing.assert_allclose(bigger[3:5, 0, 0], [1.25, 1.75], atol=0.02)
    np.testing.assert_allclose(bigger[0, 5:7, 1], [2.25, 2.75], atol=0.02)
    np.testing.assert_allclose(bigger[:, :, 0], bigger[:, :1, 0].repeat(12, 1), atol=1e-5)


def test_other_image_sizes_and_aspects():
    module = ViT(dataclasses.replace(VIT, depth=1), (16, 24))
    params = random_params(module, IMAGES)
    trained = run(module, params, IMAGES)
    assert trained.grid == (2, 3)
    other = run(module, params, np.repeat(np.repeat(IMAGES, 2, 1), 2, 2)[:, :, :24])
    assert other.grid == (4, 3) and other.tokens.shape == (2, 12, WIDTH) and np.isfinite(other.pooled).all()
    # Positions matter: the same patches in another order are another image.
    flipped = run(module, params, np.concatenate([IMAGES[:, 8:], IMAGES[:, :8]], 1))
    assert np.abs(flipped.pooled - trained.pooled).max() > 1e-4


def test_patches_are_a_strided_convolution():
    module = ViT(dataclasses.replace(VIT, depth=1), (16, 24))
    params = random_params(module, IMAGES)
    _, state = run(module, params, IMAGES, capture_intermediates=True, mutable="intermediates")
    actual = state["intermediates"]["patch_embed"]["__call__"][0]
    kernel = params["patch_embed"]["kernel"].reshape(8, 8, 3, WIDTH)
    expected = jax.lax.conv_general_dilated(
        IMAGES, kernel, (8, 8), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    expected = expected.reshape(2, 6, WIDTH) + params["patch_embed"]["bias"]
    np.testing.assert_allclose(actual, expected, atol=1e-4)


def test_conv_stem():
    x = RNG.normal(size=(2, 6, 8, 3)).astype(np.float32)
    kernel = RNG.normal(size=(3, 3, 3, 5)).astype(np.float32)
    expected = jax.lax.conv_general_dilated(
        x, kernel, (2, 2), [(1, 1), (1, 1)], dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(_patches_3x3(x) @ kernel.reshape(27, 5), expected, atol=1e-4)
    module = ViT(dataclasses.replace(VIT, stem="conv", depth=1), (16, 24))
    out = run(module, random_params(module, IMAGES), IMAGES)
    assert out.pooled.shape == (2, WIDTH) and out.tokens.shape == (2, 6, WIDTH) and out.grid == (2, 3)
    with pytest.raises(ConfigError, match="power of two"):
        ViTConfig("B/14", stem="conv")


def test_image_that_does_not_fit_the_patches():
    with pytest.raises(ConfigError, match=r"image_size \(20, 24\) is not divisible by the patch size 8"):
        jax.eval_shape(lambda: ViT(VIT, (20, 24)).init(jax.random.key(0), IMAGES))
    with pytest.raises(ConfigError, match=r"image \(16, 20\) is not divisible"):
        jax.eval_shape(lambda: ViT(VIT, (16, 24)).init(jax.random.key(0), IMAGES[:, :, :20]))


@pytest.mark.parametrize(
    "options, match",
    [
        ({"variant": "b/16"}, "nearest is 'B/16'"),
        ({"variant": "So400/14"}, "nearest is 'So400m/14'"),
        ({"variant": "B"}, "nearest is 'B/16'"),
        ({"variant": "B/0"}, "NAME/PATCH"),
        ({"variant": "B/16", "num_heads": 5}, "not divisible"),
        ({"variant": "B/16", "depth": -1}, "at least 1"),
    ],
)
def test_bad_variants(options, match):
    with pytest.raises(ConfigError, match=match):
        ViTConfig(**options)


def test_variant_table():
    for name, (width, depth, heads, hidden) in VARIANTS.items():
        assert ViTConfig(f"{name}/14").sizes == (width, depth, heads, hidden) and width % heads == 0
    assert ViTConfig("B/16", width=384).sizes == (384, 12, 12, 1536)
    assert ViTConfig("So400m/14").sizes[3] == 4304 and ViTConfig("S/7").patch_size == 7


# --- Stacks: scan and remat -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stacks():
    """Inputs, parameters of the unrolled stack, and value with gradients of any variant of it."""
    x = RNG.normal(size=(2, 5, WIDTH)).astype(np.float32)
    options = dict(depth=2, num_heads=2, mlp_hidden=24, causal=True)
    params = random_params(Stack(**options), x)
    stacked = {"blocks": jax.tree.map(lambda *b: jnp.stack(b), *(params[f"block_{i}"] for i in range(2)))}

    @functools.cache
    def value_and_gradients(*, scan, remat):
        module = Stack(**options, scan=scan, remat=remat)

        def loss(p, x):
            return jnp.sum(jnp.sin(module.apply({"params": p}, x)))

        value, grads = compiled(jax.value_and_grad(loss, (0, 1)))(stacked if scan else params, x)
        if scan:
            blocks = grads[0]["blocks"]
            grads = {f"block_{i}": jax.tree.map(lambda g, i=i: g[i], blocks) for i in range(2)}, grads[1]
        return value, grads

    return value_and_gradients


@pytest.mark.parametrize(
    "scan, remat", [(True, "none"), (False, "full"), (False, "dots"), (True, "full"), (True, "dots")]
)
def test_scan_and_remat_change_nothing(stacks, scan, remat):
    expected, actual = stacks(scan=False, remat="none"), stacks(scan=scan, remat=remat)
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max() + 1e-6


def test_scanned_parameters_are_stacked_and_named():
    config = dataclasses.replace(VIT, scan=True)
    boxed = jax.eval_shape(lambda: ViT(config, (16, 24)).init(jax.random.key(0), IMAGES))["params"]
    kernel = boxed["stack"]["blocks"]["mlp"]["up"]["kernel"]
    assert kernel.value.shape == (2, WIDTH, 4 * WIDTH) and kernel.names == ("layers", "embed", "mlp")
    # Each layer starts from numbers of its own.
    stack, x = Stack(depth=2, num_heads=2, mlp_hidden=24, scan=True), jnp.zeros((1, 2, 4))
    params = compiled(lambda key: nn.unbox(stack.init(key, x)))(jax.random.key(0))["params"]
    first, second = params["blocks"]["mlp"]["up"]["kernel"]
    assert np.abs(first - second).max() > 0.01


def test_attention_masks():
    x = RNG.normal(size=(1, 4, WIDTH)).astype(np.float32)
    module = Attention(num_heads=2)
    params = random_params(module, x)
    mask = np.array([[True, True, False, True]])
    y = compiled(lambda p: module.apply({"params": p}, x, key_mask=mask))(params)
    kept = run(module, params, x, x[:, [0, 1, 3]])
    np.testing.assert_allclose(y, kept, atol=1e-5)


# --- Precision, temperature, sizes ------------------------------------------------------------------------


def test_bfloat16_keeps_parameters_and_embeddings_in_float32(dual):
    module, params, encode_image, _ = dual
    low = module.clone(dtype=jnp.bfloat16)
    boxed = jax.eval_shape(lambda: low.init(jax.random.key(0), IMAGES, TOKENS, MASK))
    assert {x.dtype for x in jax.tree.leaves(boxed)} == {jnp.dtype("float32")}
    need = frozenset({"embed", "pooled"})
    image = run(low, params, IMAGES, need=need, method="encode_image")
    assert image.embed.dtype == jnp.float32 and image.pooled.dtype == jnp.bfloat16
    full = encode_image(params, IMAGES)
    cosine = (image.embed * full.embed).sum(-1)
    assert (cosine > 0.99).all() and np.abs(image.embed - full.embed).max() > 0


def scale_of(module, value):
    def f(log_scale):
        params = {"log_scale": log_scale, "logit_bias": jnp.float32(-5.0)}
        return module.apply({"params": params}, method="logit_scale_and_bias")[0]

    return (
        f(jnp.float32(value)),
        jax.grad(f)(jnp.float32(value)),
        jax.grad(lambda v: -f(v))(jnp.float32(value)),
    )


def test_temperature(dual):
    module, params, *_ = dual
    scale, up, down = scale_of(module, math.log(10))
    np.testing.assert_allclose([scale, up, down], [10, 10, -10], rtol=1e-5)
    # At and above the clamp the scale is 100; a descent step may go back down (gradient above 0) but not up.
    for log_scale in (math.log(100) + 1e-4, 6.0):
        scale, up, down = scale_of(module, log_scale)
        np.testing.assert_allclose([scale, up, down], [100, 100, 0], rtol=1e-5)
    start = unbox(module.init(jax.random.key(0), method="logit_scale_and_bias"))["params"]
    scale, bias = module.apply({"params": start}, method="logit_scale_and_bias")
    np.testing.assert_allclose([scale, bias], [1 / 0.07, -5.0], rtol=1e-5)


def test_no_bias_parameter_unless_asked():
    config = DualEncoderConfig(image=VIT, text=TEXT)
    module = DualEncoder(config, image_size=(16, 24), vocab_size=VOCAB, context_length=CONTEXT, end_id=END)
    params = module.init(jax.random.key(0), method="logit_scale_and_bias")["params"]
    assert set(params) == {"log_scale"}
    assert float(module.apply({"params": params}, method="logit_scale_and_bias")[1]) == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda: DualEncoderConfig(init_temperature=0.0),
        lambda: DualEncoderConfig(init_temperature=-1.0),
        lambda: DualEncoderConfig(init_temperature=0.001),
        lambda: DualEncoderConfig(embed_dim=0),
        lambda: TextConfig(width=10, num_heads=3),
        lambda: TextConfig(num_heads=0),
    ],
)
def test_bad_model_configs(make):
    with pytest.raises(ConfigError):
        make()


def test_normalize():
    x = np.array([[3.0, 4.0], [0.0, 0.0]], np.float32)
    np.testing.assert_allclose(l2_normalize(x), [[0.6, 0.8], [0, 0]], rtol=1e-6)
    assert np.isfinite(jax.grad(lambda x: l2_normalize(x).sum())(x)).all()
    pixels = np.array([0, 51, 255], np.uint8).reshape(1, 1, 1, 3)
    mean, std = (0.5, 0.2, 0.0), (0.5, 0.1, 1.0)
    out = normalize_image(pixels, mean, std, jnp.float32)
    np.testing.assert_allclose(out[0, 0, 0], [-1.0, 0.0, 1.0], atol=1e-6)
    assert normalize_image(pixels, mean, std, jnp.bfloat16).dtype == jnp.bfloat16


@pytest.mark.parametrize("count", [1, 5, 40])
def test_products_of_few_rows_have_the_same_values_and_gradients(count):
    """Tolerance 1e-5: sums are ordered differently."""
    rng = np.random.default_rng(0)
    rows, kernel, weights = (
        jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((count, 64), (64, 32), (count, 32))
    )

    def run(implementation):
        def total(rows, kernel):
            return (product(rows, kernel, implementation=implementation) * weights).sum()

        return product(rows, kernel, implementation=implementation), *jax.grad(total, (0, 1))(rows, kernel)

    for a, b in zip(run("columns"), run("rows"), strict=True):
        assert np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(b).max() < 1e-5
    for a, b in zip(run("auto"), run("rows"), strict=True):
        assert np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(b).max() < 1e-5
