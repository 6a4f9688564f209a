"""Options of the vision transformer and the random regularisation of the blocks."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bvl.errors import ConfigError
from bvl.models.dropout import drop_path, dropout, fold, random_subset
from bvl.models.grid import resize_positions
from bvl.models.layers import ACTIVATIONS, Attention, Block, Stack
from bvl.models.text import TextConfig
from bvl.models.vit import ViTConfig
from bvl.models.vlm import DualEncoder, DualEncoderConfig

WIDTH = 8
TINY = ViTConfig("XXS/8", width=WIDTH, depth=2, num_heads=2, mlp_hidden=12, pool="mean")
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(3, 16, 24, 3)).astype(np.float32)
KEYS = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.arange(3))


def params_of(module, *inputs, **options):
    """Random values for every parameter, so that none is zero by its initialiser."""
    shapes = jax.eval_shape(lambda: nn.unbox(module.init(jax.random.key(0), *inputs, **options)))["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda s: rng.normal(0.0, 0.3, s.shape).astype(np.float32), shapes)


def tower(config: ViTConfig):
    module = config.make(image_size=(16, 24), dtype=jnp.float32)
    return module, params_of(module, IMAGES)


@pytest.fixture(scope="module")
def everything():
    config = dataclasses.replace(
        TINY, pool="cls", pre_norm=True, qk_norm=True, layer_scale=0.1, registers=3, activation="quick_gelu",
        patch_bias=False, dropout=0.5, drop_path=0.5,
    )  # fmt: skip
    return tower(config)


def test_all_options_together(everything):
    module, params = everything
    out = module.apply({"params": params}, IMAGES, levels=True)
    assert out.pooled.shape == (3, WIDTH) and out.tokens.shape == (3, 6, WIDTH) and out.grid == (2, 3)
    assert [m.shape for m in out.levels] == [(3, 2, 3, WIDTH)] * 2
    assert params["positions"].shape == (7, WIDTH) and params["registers"].shape == (3, WIDTH)
    assert "bias" not in params["patch_embed"]
    block = params["stack"]["block_0"]
    assert {"query_norm", "key_norm"} <= block["attention"].keys() and "attention_scale" in block


@pytest.mark.parametrize("name", ["registers", "cls"])
def test_extra_tokens_are_read_by_the_others(everything, name):
    module, params = everything
    before = module.apply({"params": params}, IMAGES).tokens
    after = module.apply({"params": {**params, name: -params[name]}}, IMAGES).tokens
    assert np.abs(after - before).max() > 1e-3


def test_keys_mean_training_and_each_row_has_its_own_mask(everything):
    module, params = everything
    f = jax.jit(lambda image, keys: module.apply({"params": params}, image, keys=keys).pooled)
    evaluated = f(IMAGES, None)
    trained = f(IMAGES, KEYS)
    assert np.abs(trained - evaluated).max(1).min() > 1e-3
    # A row's result depends on its own key alone, so a batch may be split anywhere.
    order = np.array([2, 0, 1])
    np.testing.assert_allclose(f(IMAGES[order], KEYS[order]), trained[order], atol=1e-5)
    np.testing.assert_array_equal(f(IMAGES, KEYS), trained)


def test_patch_dropout_keeps_a_share_of_the_patches():
    module, params = tower(dataclasses.replace(TINY, patch_dropout=0.5))
    out = module.apply({"params": params}, IMAGES, keys=KEYS)
    assert out.tokens.shape == (3, 3, WIDTH) and out.grid is None
    assert module.apply({"params": params}, IMAGES).tokens.shape == (3, 6, WIDTH)
    with pytest.raises(ConfigError, match="patch_dropout leaves holes"):
        module.apply({"params": params}, IMAGES, keys=KEYS, levels=True)


def test_levels_are_the_outputs_of_blocks():
    scanned, params = tower(dataclasses.replace(TINY, scan=True, levels=(0, 1)))
    blocks = params["stack"]["blocks"]
    looped = dataclasses.replace(scanned.config, scan=False).make(image_size=(16, 24), dtype=jnp.float32)
    unstacked = {f"block_{i}": jax.tree.map(lambda x, i=i: x[i], blocks) for i in range(2)}
    for keys in (None, KEYS):
        a = scanned.apply({"params": params}, IMAGES, levels=True, keys=keys)
        b = looped.apply({"params": {**params, "stack": unstacked}}, IMAGES, levels=True, keys=keys)
        for x, y in zip(a.levels, b.levels, strict=True):
            np.testing.assert_allclose(x, y, atol=1e-4)
    assert np.abs(a.levels[0] - a.levels[1]).max() > 1e-2
    # The last level is what the final norm reads.
    last = a.levels[1].reshape(3, 6, WIDTH)
    centred = last - last.mean(-1, keepdims=True)
    normed = centred / np.sqrt(last.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(normed * params["norm"]["scale"] + params["norm"]["bias"], a.tokens, atol=1e-4)


def test_drop_path_zeroes_whole_rows_and_rises_with_depth():
    x = jnp.ones((3, 4, 2))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(3), jnp.arange(400))
    dropped = drop_path(jnp.ones((400, 4, 2)), 0.25, keys)
    by_row = np.asarray(dropped).reshape(400, -1)
    assert set(np.unique(by_row)) == {0.0, np.float32(1 / 0.75)} and (by_row.std(1) == 0).all()
    assert 0.15 < (by_row[:, 0] == 0).mean() < 0.35
    assert drop_path(x, 0.5, None) is x
    # The first block is never dropped: with the rate rising from 0 to 0.9 most rows equal its output.
    stack = Stack(depth=2, num_heads=2, mlp_hidden=8, drop_path=0.9)
    x = RNG.normal(size=(400, 2, 4)).astype(np.float32)
    params = params_of(stack, x)
    out, (first,) = stack.apply({"params": params}, x, keys=keys, levels=(0,), method="run")
    unchanged = np.abs(out - first).max((1, 2)) == 0
    assert 0.7 < unchanged.mean() < 0.9  # both branches dropped: 0.81
    assert np.abs(first - x).max((1, 2)).min() > 0


def test_dropout_keeps_the_mean():
    keys = fold(KEYS, 1)
    x = jnp.ones((3, 1000))
    y = np.asarray(dropout(x, 0.2, keys))
    assert set(np.unique(y)) == {0.0, np.float32(1.25)} and abs(y.mean() - 1) < 0.05
    assert (y[0] != y[1]).any() and dropout(x, 0.2, None) is x and dropout(x, 0.0, keys) is x
    subset = np.asarray(random_subset(KEYS, 10, 4))
    assert (np.diff(subset, axis=1) > 0).all() and subset.min() >= 0 and subset.max() < 10
    assert (subset[0] != subset[1]).any()


def test_scan_remat_and_loop_draw_the_same_masks():
    x = RNG.normal(size=(3, 2, 4)).astype(np.float32)
    options = dict(depth=2, num_heads=2, mlp_hidden=8, dropout=0.3, drop_path=0.4)
    scanned = Stack(scan=True, **options)
    params = params_of(scanned, x)
    unstacked = {f"block_{i}": jax.tree.map(lambda v, i=i: v[i], params["blocks"]) for i in range(2)}
    expected = Stack(**options).apply({"params": unstacked}, x, keys=KEYS)
    for remat in ("none", "full"):
        stack = Stack(scan=True, remat=remat, **options)

        @jax.jit
        def output_and_gradient(params, stack=stack):
            def loss(params):
                y = stack.apply({"params": params}, x, keys=KEYS)
                return jnp.square(y).sum(), y

            return jax.grad(loss, has_aux=True)(params)

        gradient, output = output_and_gradient(params)
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))
        np.testing.assert_allclose(output, expected, atol=1e-5)


def test_post_norm_block():
    x = RNG.normal(size=(1, 3, 4)).astype(np.float32)
    block = Block(num_heads=2, mlp_hidden=8, norm="post")
    params = params_of(block, x)

    def norm(p, x):
        y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return y * p["scale"] + p["bias"]

    h = x + Attention(num_heads=2).apply({"params": params["attention"]}, x)
    h = norm(params["attention_norm"], np.asarray(h))
    up = h @ params["mlp"]["up"]["kernel"] + params["mlp"]["up"]["bias"]
    down = (
        np.asarray(ACTIVATIONS["gelu"](up)) @ params["mlp"]["down"]["kernel"] + params["mlp"]["down"]["bias"]
    )
    expected = norm(params["mlp_norm"], h + down)
    np.testing.assert_allclose(block.apply({"params": params}, x), expected, atol=1e-4)


def test_qk_norm_bounds_the_logits():
    x = RNG.normal(size=(1, 3, 4)).astype(np.float32)
    module = Attention(num_heads=2, qk_norm=True)
    params = params_of(module, x)
    no_bias = jax.tree.map(jnp.asarray, params)
    for name in ("query", "key"):
        no_bias[name]["bias"] = jnp.zeros_like(no_bias[name]["bias"])
    # Scaling queries and keys changes nothing once they are normalised (up to epsilon).
    louder = {
        **no_bias,
        **{n: {**no_bias[n], "kernel": no_bias[n]["kernel"] * 100} for n in ("query", "key")},
    }
    loud = {**no_bias, **{n: {**no_bias[n], "kernel": no_bias[n]["kernel"] * 50} for n in ("query", "key")}}
    a, b = (module.apply({"params": p}, x) for p in (loud, louder))
    np.testing.assert_allclose(a, b, atol=1e-3)


def test_activations():
    x = jnp.linspace(-3, 3, 7)
    np.testing.assert_allclose(ACTIVATIONS["quick_gelu"](x), x / (1 + np.exp(-1.702 * x)), atol=1e-6)
    np.testing.assert_allclose(ACTIVATIONS["gelu"](x), jax.nn.gelu(x, approximate=False), atol=1e-6)
    assert 0 < np.abs(ACTIVATIONS["gelu_tanh"](x) - ACTIVATIONS["gelu"](x)).max() < 1e-3


def test_positions_of_class_token_stay():
    positions = RNG.normal(size=(1 + 6, 4)).astype(np.float32)
    resized = resize_positions(positions, (2, 3), (4, 6))
    assert resized.shape == (25, 4)
    np.testing.assert_array_equal(resized[0], positions[0])


@pytest.mark.parametrize("kind", ["linear_bias", "mlp", "none"])
def test_projections(kind):
    config = DualEncoderConfig(
        image=TINY, text=TextConfig(width=WIDTH, depth=1, num_heads=2), embed_dim=WIDTH, image_projection=kind
    )
    module = DualEncoder(config, (16, 24), vocab_size=9, context_length=4, end_id=3)
    tokens = np.zeros((3, 4), np.int32)
    params = params_of(module, IMAGES, tokens, tokens == 0)
    need = frozenset({"embed", "pooled"})
    out = module.apply({"params": params}, IMAGES, need, method="encode_image")
    assert out.tokens is None and out.levels is None
    pooled, p = np.asarray(out.pooled), params.get("image_projection")
    if kind == "none":
        expected = pooled
    elif kind == "linear_bias":
        expected = pooled @ p["kernel"] + p["bias"]
    else:
        expected = np.asarray(ACTIVATIONS["gelu"](pooled @ p["hidden"]["kernel"])) @ p["out"]["kernel"]
    expected = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(out.embed, expected, atol=1e-5)


def test_bad_options():
    with pytest.raises(ConfigError, match="patch_dropout=1.0"):
        ViTConfig(patch_dropout=1.0)
    with pytest.raises(ConfigError, match="blocks are numbered 0 to 11"):
        ViTConfig(levels=(12,))
    for option in ("width", "depth", "num_heads", "mlp_hidden"):
        with pytest.raises(ConfigError, match="must be at least 1"):
            ViTConfig(**{option: 0})
    assert ViTConfig("B/16", width=96, num_heads=3).sizes == (96, 12, 3, 384)
    with pytest.raises(ConfigError, match="needs embed_dim=384"):
        DualEncoderConfig(image_projection="none")
    with pytest.raises(ConfigError, match=r"nearest is \(224, 224\)"):
        ViTConfig("B/16").grid((225, 220))
