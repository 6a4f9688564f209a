"""The region decoder: phrases that know nothing of each other, boxes near their patches, masks from finer maps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import fast_compilation  # noqa: F401

from bvl.errors import ConfigError
from bvl.mesh import unbox
from bvl.models.decoder import DecoderConfig
from bvl.models.region_decoder import RegionDecoder, RegionDecoderConfig
from bvl.models.text import TextConfig
from bvl.models.vit import ViTConfig
from bvl.models.vlm import DualEncoder, DualEncoderConfig

pytestmark = pytest.mark.usefixtures("fast_compilation")

IMAGES, PHRASES, WORDS, GRID, SIZE, EMBED, NUM_QUERIES = 2, 3, 4, (2, 3), (16, 24), 5, 2
PATCHES = GRID[0] * GRID[1]


def a_config(**changes):
    options = {
        "width": 8,
        "depth": 1,
        "num_heads": 2,
        "num_queries": NUM_QUERIES,
        "mask_stride": 2,
        "pixel_width": 6,
    }
    return RegionDecoderConfig(**(options | changes))


def inputs(seed=0):
    """(tokens, levels, phrase vectors, words, mask of words); the finer map has 4 x 6 cells."""
    rng = np.random.default_rng(seed)
    tokens, levels = rng.normal(size=(IMAGES, PATCHES, 7)), (rng.normal(size=(IMAGES, 4, 6, 3)),)
    phrase, words = rng.normal(size=(IMAGES, PHRASES, 4)), rng.normal(size=(IMAGES, PHRASES, WORDS, 4))
    mask = np.arange(WORDS) < rng.integers(1, WORDS, (IMAGES, PHRASES))[..., None]
    return jax.tree.map(jnp.float32, (tokens, levels, phrase, words)) + (jnp.asarray(mask),)


def both(module, tokens, levels, *phrase):
    return module.ground(tokens, levels, GRID, *phrase), module.detect(tokens, levels, GRID)


def initialise(module, args):
    """Parameters as they are at first."""

    def every(module, *args):
        found, objects = both(module, *args)
        return module.detection_logits(objects.embed, found.embed)

    return unbox(jax.jit(lambda *a: module.init(jax.random.key(0), *a, method=every))(*args))["params"]


@functools.cache
def build(config, dtype=jnp.float32):
    """(module, parameters, jitted (ground, detect))."""
    module = RegionDecoder(config, SIZE, EMBED, dtype=dtype)
    # The same in any precision.
    params = initialise(module, inputs()) if dtype == jnp.float32 else build(config)[1]
    return module, params, jax.jit(lambda params, *args: module.apply({"params": params}, *args, method=both))


def run(args, config=None, params=None, dtype=jnp.float32):
    """(ground, detect) as numpy."""
    _, own, call = build(config or a_config(), dtype)
    return jax.tree.map(np.asarray, call(params or own, *args))


def test_shapes_and_ranges():
    found, objects = run(inputs())
    assert found.boxes.shape == (IMAGES, PHRASES, PATCHES, 4) and found.scores.shape == (
        IMAGES,
        PHRASES,
        PATCHES,
    )
    assert found.mask_logits.shape == (IMAGES, PHRASES, 8, 12) and found.presence.shape == (IMAGES, PHRASES)
    assert found.embed.shape == (IMAGES, PHRASES, EMBED)
    assert objects.boxes.shape == (IMAGES, PATCHES, 4) and objects.presence.shape == (IMAGES, PATCHES)
    assert objects.scores is None and objects.mask_logits is None
    for embed in (found.embed, objects.embed):
        np.testing.assert_allclose(np.linalg.norm(embed, axis=-1), 1.0, rtol=1e-4)
    for boxes in (found.boxes, objects.boxes):
        centre = (boxes[..., :2] + boxes[..., 2:]) / 2
        assert (boxes[..., 2:] > boxes[..., :2]).all() and (centre > 0).all() and (centre < 1).all()
    _, params, call = build(a_config(instance_masks=True))
    _, objects = jax.eval_shape(call, params, *inputs())
    assert objects.mask_logits.shape == (IMAGES, PATCHES, 8, 12)


def changes(a, b):
    """Which [image, phrase] differ in anything."""
    return np.any(
        [np.abs(x - y).reshape(IMAGES, PHRASES, -1).max(-1) > 0 for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)],
        axis=0,
    )  # fmt: skip


def test_a_phrase_knows_nothing_of_the_others_nor_of_padding():
    args = inputs()
    tokens, levels, phrase, words, mask = args
    _, _, others, other_words, other_mask = inputs(seed=7)
    found, objects = run(args)
    one = np.arange(IMAGES * PHRASES).reshape(IMAGES, PHRASES) == 1
    vector = jnp.where(one[..., None], others, phrase)
    assert (changes(run((tokens, levels, vector, words, mask))[0], found) == one).all()
    changed = jnp.where(one[..., None, None], other_words, words)
    new_mask = jnp.where(one[..., None], other_mask, mask)
    assert (changes(run((tokens, levels, phrase, changed, new_mask))[0], found) == one).all()
    beyond = jnp.where(mask[..., None], words, 100.0)
    assert not changes(run((tokens, levels, phrase, beyond, mask))[0], found).any()
    shown = jnp.where(mask[..., None], words + 1.0, words)
    assert changes(run((tokens, levels, phrase, shown, mask))[0], found).all()
    second = tokens.at[1].add(jnp.arange(7.0))
    moved, moved_objects = run((second, levels, phrase, words, mask))
    assert changes(moved, found).tolist() == [[False] * PHRASES, [True] * PHRASES]
    np.testing.assert_array_equal(moved_objects.boxes[0], objects.boxes[0])


def test_a_phrase_alone_is_as_among_others():
    tokens, levels, phrase, words, mask = inputs()
    module, params, _ = build(a_config())
    found, _ = run(inputs())
    alone = jax.jit(functools.partial(module.apply, method="ground"), static_argnums=3)(
        {"params": params}, tokens, levels, GRID, phrase[:, 1:2], words[:, 1:2], mask[:, 1:2]
    )
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(a[:, 0], b[:, 1], rtol=1e-4, atol=1e-5)


def test_boxes_lie_at_their_patches():
    """Exactly without what is learned; at first near them."""
    _, params, _ = build(a_config())
    y, x = np.divmod(np.arange(PATCHES), GRID[1])
    centre = np.stack([(x + 0.5) / GRID[1], (y + 0.5) / GRID[0]], -1)
    size = np.array([0.5, 0.5])  # two cells, at most half of the image
    silent = params | {"box_out": jax.tree.map(jnp.zeros_like, params["box_out"])}
    for located in run(inputs(), params=silent):
        expected = np.broadcast_to(
            np.concatenate([centre - size / 2, centre + size / 2], -1), located.boxes.shape
        )
        np.testing.assert_allclose(located.boxes, expected, atol=1e-5)
    for located in run(inputs()):
        found = (located.boxes[..., :2] + located.boxes[..., 2:]) / 2
        distance = np.linalg.norm(found[..., :, None, :] - centre, axis=-1)
        assert (distance.argmin(-1) == np.arange(PATCHES)).mean() > 0.5


def test_learned_queries_are_the_candidates():
    config = a_config(queries="learned", instance_masks=True)
    found, objects = run(inputs(), config)
    assert found.boxes.shape == (IMAGES, PHRASES, NUM_QUERIES, 4)
    assert found.scores.shape == (IMAGES, PHRASES, NUM_QUERIES)
    assert objects.boxes.shape == (IMAGES, NUM_QUERIES, 4)
    assert objects.mask_logits.shape == (IMAGES, NUM_QUERIES, 8, 12)
    # Each is one of its own.
    assert np.abs(found.boxes[:, :, 0] - found.boxes[:, :, 1]).max() > 1e-4


@pytest.mark.parametrize("reads", [True, False])
def test_masks_read_the_finer_maps(reads):
    module, params, _ = build(a_config(reads_levels=reads))
    args = inputs()
    weights = jnp.float32(np.random.default_rng(1).normal(size=(IMAGES, PHRASES, 8, 12)))

    def masks(levels):
        found = module.apply({"params": params}, args[0], levels, GRID, *args[2:], method="ground")
        return (weights * found.mask_logits).sum()

    (slope,) = jax.jit(jax.grad(masks))(args[1])
    assert np.isfinite(slope).all() and (np.abs(slope).max((1, 2, 3)) > 1e-6).all() == reads


def test_the_stem_of_an_image_tower_is_read():
    """By a whole model: what is fine enough for the masks is in the levels, and the decoder's words can be phrases."""
    config = DualEncoderConfig(
        image=ViTConfig("XXS/8", stem="conv", pool="mean", width=8, depth=1, num_heads=2),
        text=TextConfig(width=8, depth=1, num_heads=2),
        decoder=DecoderConfig(width=8, depth=1, num_heads=2),
        region_decoder=a_config(phrases="decoder"),
        embed_dim=EMBED,
    )
    model = DualEncoder(config, SIZE, 9, WORDS, 2)
    image, tokens = jnp.zeros((1, *SIZE, 3)), jnp.zeros((1, WORDS), jnp.int32)
    shapes = unbox(jax.eval_shape(model.init, jax.random.key(0), image, tokens, tokens == 0)["params"])
    fine = [
        name for name in shapes["region_decoder"]["pixels"] if name.startswith("fine_") and "norm" not in name
    ]
    assert len(fine) == 2, "both maps of the stem, of 1/2 and 1/4 of the image"
    features = jax.eval_shape(
        lambda p, x: model.apply({"params": p}, x, frozenset({"regions"}), method="encode_image"),
        shapes,
        image,
    )
    assert [x.shape[1:3] for x in features.levels] == [(8, 12), (4, 6), (2, 3)]
    phrase, words = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, PHRASES, 8), (1, PHRASES, WORDS, 8)))
    found = jax.eval_shape(
        lambda p, f, v, w: model.apply(
            {"params": p}, f.tokens, f.levels, f.grid, v, w, jnp.ones(w.shape[:3], bool), method="ground"
        ),
        shapes, features, phrase, words,
    )  # fmt: skip
    assert found.mask_logits.shape == (1, PHRASES, 8, 12)


def test_half_precision_gives_results_in_float32():
    found, objects = run(inputs(), dtype=jnp.bfloat16)
    exact, exact_objects = run(inputs())
    for name in ("boxes", "scores", "mask_logits", "presence", "embed"):
        value, expected = getattr(found, name), getattr(exact, name)
        assert name == "embed" or value.dtype == np.float32, name
        np.testing.assert_allclose(
            np.float32(value), expected, atol=0.05 * max(np.abs(expected).max(), 1), err_msg=name
        )
    assert objects.boxes.dtype == objects.presence.dtype == np.float32
    np.testing.assert_allclose(objects.boxes, exact_objects.boxes, atol=0.05)


def test_likeness_to_names():
    module, params, _ = build(a_config())
    rng = np.random.default_rng(0)
    embed, names = (rng.normal(size=(IMAGES, n, EMBED)) for n in (4, 3))
    likeness = jax.jit(functools.partial(module.apply, method="detection_logits"))
    logits = likeness({"params": params}, jnp.float32(embed), jnp.float32(names))
    np.testing.assert_allclose(logits, 10 * np.einsum("bqe,bne->bqn", embed, names) - 2, rtol=1e-4, atol=1e-3)


def test_every_parameter_learns():
    module, params, _ = build(a_config(instance_masks=True))
    args = inputs()

    def loss(params):
        found, objects = module.apply({"params": params}, *args, method=both)
        logits = module.apply({"params": params}, objects.embed, found.embed, method="detection_logits")
        return sum(jnp.sin(3 * x + i).sum() for i, x in enumerate(jax.tree.leaves((found, objects, logits))))

    for path, slope in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(params)):
        name = jax.tree_util.keystr(path)
        if name.endswith("['key']['bias']"):  # adds the same to every logit of a query
            continue
        assert np.isfinite(slope).all() and np.abs(slope).max() > 1e-7, name


def test_wrong_options_are_refused():
    module = RegionDecoder(a_config(mask_stride=5), SIZE, EMBED)
    with pytest.raises(ConfigError, match="mask_stride=5 does not divide"):
        jax.eval_shape(lambda *a: module.init(jax.random.key(0), *a, method=both), *inputs())
    for options, message in (
        ({"depth": 0}, "depth=0"),
        ({"width": 9}, "multiple of num_heads=2"),
        ({"queries": "free"}, "choose patches or learned"),
        ({"phrases": "image"}, "choose text or decoder"),
    ):
        with pytest.raises(ConfigError, match=message):
            a_config(**options)
    with pytest.raises(ConfigError, match="set model.decoder"):
        DualEncoderConfig(region_decoder=RegionDecoderConfig(phrases="decoder"))
    with pytest.raises(ConfigError, match="reads phrases by the text tower"):
        DualEncoderConfig(text=None, decoder=DecoderConfig(), region_decoder=RegionDecoderConfig())
