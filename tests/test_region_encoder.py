"""Regions as visual tokens: mixed kinds, rows that know nothing of each other, the null, and what each kind reads."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import fast_compilation  # noqa: F401

from bvl.errors import ConfigError
from bvl.mesh import unbox
from bvl.models.features import RegionPrompts
from bvl.models.layers import Block
from bvl.models.region_encoder import RegionEncoder, RegionEncoderConfig, point_squares
from bvl.models.roi_align import box_coverage, mask_coverage

pytestmark = pytest.mark.usefixtures("fast_compilation")

IMAGES, REGIONS, GRID, WIDTH, DECODER = 2, 3, (2, 4), 8, 6
KINDS = ("box_token", "roi_align", "mask_embedding", "mask_channel")
# roi_align also reads a finer map.
OPTIONS = {"width": 8, "output_size": 3, "num_heads": 2}


def a_config(kind):
    return RegionEncoderConfig(kind=kind, levels=(0, -1) if kind == "roi_align" else (), **OPTIONS)


def a_batch(seed=0):
    """(tokens, levels, prompts): a box, a point and a mask in each image, in another order in the second."""
    rng = np.random.default_rng(seed)
    tokens = rng.normal(size=(IMAGES, GRID[0] * GRID[1], WIDTH))
    levels = rng.normal(size=(IMAGES, 4, 8, 5)), rng.normal(size=(IMAGES, *GRID, WIDTH))
    corners = np.sort(rng.random((IMAGES, REGIONS, 2, 2)), axis=2)
    box, mask = corners.reshape(IMAGES, REGIONS, 4), rng.random((IMAGES, REGIONS, 4, 8)) < 0.4
    kind = np.array([[0, 1, 2], [2, 0, 1]], np.int8)
    point = (box[..., :2] + box[..., 2:]) / 2
    box = np.where((kind == 1)[..., None], np.tile(point, 2), box)
    prompts = RegionPrompts(jnp.float32(box), jnp.float32(point), jnp.asarray(mask), jnp.asarray(kind))
    return jnp.float32(tokens), tuple(map(jnp.float32, levels)), prompts


def given(kind, tokens):
    """Kind "mask_channel" has tokens of each region's own image."""
    return jnp.repeat(tokens, REGIONS, axis=0) if kind == "mask_channel" else tokens


@functools.cache
def build(kind):
    """(module, random parameters, jitted call): no parameter is zero, so that everything shows."""
    module = RegionEncoder(a_config(kind), DECODER)
    tokens, levels, prompts = a_batch()
    init = functools.partial(module.init, jax.random.key(0))
    args = given(kind, tokens), levels, GRID, prompts, jnp.zeros(IMAGES * REGIONS, bool)
    shapes = unbox(
        jax.eval_shape(lambda t, lv, p, d: init(t, lv, GRID, p, d), args[0], levels, prompts, args[4])
    )
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 0.5, s.shape), s.dtype), shapes["params"])

    @jax.jit
    def call(params, tokens, levels, prompts, dropped):
        return module.apply({"params": params}, tokens, levels, GRID, prompts, dropped)

    return module, params, call


def encode(kind, tokens, levels, prompts, dropped=None, params=None):
    _, random, call = build(kind)
    dropped = jnp.zeros(len(prompts.kind.reshape(-1)), bool) if dropped is None else jnp.asarray(dropped)
    out, mask = call(params or random, given(kind, tokens), levels, prompts, dropped)
    return np.asarray(out), np.asarray(mask)


def replaced(prompts, image, region, other):
    """`prompts` with one region taken from another batch."""
    return jax.tree.map(lambda a, b: a.at[image, region].set(b[image, region]), prompts, other)


def shifted(x, place):
    """By another number in each channel, which no layer norm undoes."""
    return x.at[place].add(jnp.arange(1.0, 1.0 + x.shape[-1]) ** 2 / 10)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_know_nothing_of_each_other(kind):
    tokens, levels, prompts = a_batch()
    out, mask = encode(kind, tokens, levels, prompts)
    count = GRID[0] * GRID[1] if kind == "mask_channel" else 1
    assert out.shape == (IMAGES * REGIONS, count, DECODER) and mask.shape == out.shape[:2] and mask.all()
    assert np.isfinite(out).all()
    _, _, others = a_batch(seed=5)
    if kind != "mask_channel":
        for image, region in np.ndindex(IMAGES, REGIONS):
            changed, _ = encode(kind, tokens, levels, replaced(prompts, image, region, others))
            rows = np.abs(changed - out).max((1, 2))
            assert np.flatnonzero(rows).tolist() == [image * REGIONS + region]
    # What there is of the second image is nothing to the first.
    changed, _ = encode(kind, shifted(tokens, np.s_[1]), tuple(shifted(x, np.s_[1]) for x in levels), prompts)
    rows = np.abs(changed - out).max((1, 2))
    assert not rows[:REGIONS].any() and (kind == "box_token" or rows[REGIONS:].all())


@pytest.mark.parametrize("kind", KINDS)
def test_a_dropped_row_is_the_null_without_a_trace(kind):
    tokens, levels, prompts = a_batch()
    whole, _ = encode(kind, tokens, levels, prompts)
    dropped = np.array([False, True, False, True, False, False])
    out, mask = encode(kind, tokens, levels, prompts, dropped)
    np.testing.assert_array_equal(out[~dropped], whole[~dropped])
    null = build(kind)[1]["null"]
    for row in np.flatnonzero(dropped):
        np.testing.assert_array_equal(out[row, 0], null)
        assert not out[row, 1:].any() and mask[row].tolist() == [True] + [False] * (mask.shape[1] - 1)

    def total(tokens, prompts):
        found, _ = build(kind)[2](build(kind)[1], given(kind, tokens), levels, prompts, jnp.ones(6, bool))
        return found.sum()

    assert not np.asarray(jax.jit(jax.grad(total))(tokens, prompts)).any()


@pytest.mark.parametrize("kind", KINDS[:3])
def test_what_a_region_is_shows(kind):
    """A box, the point in it and its mask differ, and so do two masks of one box where masks keep their form."""
    tokens, levels, _ = a_batch()
    box = jnp.broadcast_to(jnp.float32([0.1, 0.1, 0.9, 0.8]), (IMAGES, REGIONS, 4))
    point = (box[..., :2] + box[..., 2:]) / 2
    left = jnp.zeros((IMAGES, REGIONS, 4, 8), bool).at[..., 1:3, 1:4].set(True)
    kinds = jnp.broadcast_to(jnp.int8([0, 1, 2]), (IMAGES, REGIONS))
    out, _ = encode(kind, tokens, levels, RegionPrompts(box, point, left, kinds))
    assert all(np.abs(out[a] - out[b]).max() > 1e-3 for a, b in ((0, 1), (0, 2), (1, 2)))
    right, _ = encode(kind, tokens, levels, RegionPrompts(box, point, left[..., ::-1], kinds))
    assert (np.abs(right[2] - out[2]).max() > 1e-3) == (kind != "box_token")


def test_roi_align_of_a_mask_reads_what_the_mask_covers():
    tokens, levels, _ = a_batch()
    box = jnp.broadcast_to(jnp.float32([0.0, 0.0, 1.0, 1.0]), (IMAGES, REGIONS, 4))
    left = jnp.zeros((IMAGES, REGIONS, 4, 8), bool).at[..., :2].set(True)
    kinds = jnp.broadcast_to(jnp.int8([0, 2, 2]), (IMAGES, REGIONS))
    prompts = RegionPrompts(box, box[..., :2], left, kinds)
    out, _ = encode("roi_align", tokens, levels, prompts)
    # The last column of every map lies far from the mask.
    grid = shifted(tokens.reshape(IMAGES, *GRID, WIDTH), np.s_[:, :, -1])
    fine, coarse = shifted(levels[0], np.s_[:, :, -2:]), shifted(levels[1], np.s_[:, :, -1])
    changed, _ = encode("roi_align", grid.reshape(tokens.shape), (fine, coarse), prompts)
    rows = np.abs(changed - out).max((1, 2)).reshape(IMAGES, REGIONS)
    assert (rows[:, 0] > 1e-3).all() and (rows[:, 1:] < 1e-6).all()


def test_roi_align_reads_each_of_its_levels():
    tokens, levels, prompts = a_batch()
    out, _ = encode("roi_align", tokens, levels, prompts)
    for i in range(2):
        changed, _ = encode(
            "roi_align",
            tokens,
            tuple(shifted(x, ...) if i == j else x for j, x in enumerate(levels)),
            prompts,
        )
        assert np.abs(changed - out).max((1, 2)).all()
    for wrong in ((2,), (-3,), (0, 5)):
        module = RegionEncoder(RegionEncoderConfig(levels=wrong, **OPTIONS), DECODER)
        for maps, count in ((levels, 2), (None, 0)):
            with pytest.raises(ConfigError, match=f"the image tower gives {count} feature maps"):
                jax.eval_shape(
                    lambda t, lv, p, module=module: module.init(
                        jax.random.key(0), t, lv, GRID, p, jnp.zeros(6, bool)
                    ),
                    tokens, maps, prompts,
                )  # fmt: skip


def test_the_mask_embedding_is_nothing_at_first():
    """The tokens behind the block are then those of the image alone, and a mask only decides what they are pooled by."""
    module, params, _ = build("mask_embedding")
    tokens, levels, prompts = a_batch()
    initial = jax.jit(lambda *args: module.init(jax.random.key(0), tokens, levels, GRID, *args)["params"])(
        prompts, jnp.zeros(6, bool)
    )
    initial = unbox(initial)
    assert not np.asarray(initial["mask"]).any()
    params = params | {"mask": initial["mask"]}
    _, seen = module.apply(
        {"params": params}, tokens, levels, GRID, prompts, jnp.zeros(6, bool),
        capture_intermediates=lambda m, _: m.name in ("block", "pooled_norm"), mutable=["intermediates"],
    )  # fmt: skip
    alone = Block(2, 2 * WIDTH).apply({"params": params["block"]}, tokens)
    (behind,) = seen["intermediates"]["block"]["__call__"]
    np.testing.assert_allclose(
        behind.reshape(IMAGES, REGIONS, -1, WIDTH), np.repeat(alone[:, None], REGIONS, 1), atol=1e-6
    )
    covered = np.asarray(mask_coverage(prompts.mask, GRID))
    # A point stands for a square around it.
    squares = np.asarray(box_coverage(point_squares(prompts, module.config.point_extent), GRID))
    covered = np.where((prompts.kind == 1)[..., None, None], squares, covered).reshape(IMAGES, REGIONS, -1)
    means = [[np.average(alone[i], 0, covered[i, r]) for r in range(REGIONS)] for i in range(IMAGES)]
    means = np.array(means)
    norm = params["pooled_norm"]
    expected = (means - means.mean(-1, keepdims=True)) / np.sqrt(means.var(-1, keepdims=True) + 1e-5)
    (pooled,) = seen["intermediates"]["pooled_norm"]["__call__"]
    np.testing.assert_allclose(pooled, expected * norm["scale"] + norm["bias"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_reaches_every_parameter(kind):
    tokens, levels, prompts = a_batch()
    _, params, call = build(kind)
    weights = jnp.float32(np.random.default_rng(3).normal(size=(DECODER,)))
    dropped = jnp.asarray([False] * 5 + [True])
    if kind == "mask_embedding":
        params = params | {"mask": jnp.zeros_like(params["mask"])}

    def loss(params):
        out, _ = call(params, given(kind, tokens), levels, prompts, dropped)
        return (jnp.sin(out) @ weights).sum()

    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(params)):
        # Keys of an attention have no bias that could matter: it adds the same to every logit of a query.
        if jax.tree_util.keystr(path).endswith("['key']['bias']"):
            continue
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 1e-6, jax.tree_util.keystr(path)


def test_wrong_options_are_refused():
    for options, message in (
        ({"kind": "circle"}, "choose box_token"),
        ({"width": 0}, "width=0"),
        ({"point_extent": 0.0}, "point_extent"),
        ({"kind": "box_token", "levels": (0,)}, "levels belong to kind='roi_align'"),
    ):
        with pytest.raises(ConfigError, match=message):
            RegionEncoderConfig(**options)
