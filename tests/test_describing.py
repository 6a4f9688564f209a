"""Texts of regions by a whole model: against full recomputation, what guidance leaves out, and shared encodings."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import PHANTOMS, tiny_components
from tiny_run import fast_compilation  # noqa: F401

from bvl.data.phantoms import PhantomSource
from bvl.data.region_prompts import prompts_of
from bvl.data.transforms import apply
from bvl.decode.options import DecodeOptions
from bvl.errors import ConfigError, UserError
from bvl.mesh import unbox
from bvl.models.features import RegionPrompts
from bvl.models.region_encoder import RegionEncoderConfig
from bvl.models.vit import ViTConfig
from bvl.models.vlm import normalize_image
from bvl.runs import Encoder, build_model
from bvl.tasks import writing_rows
from bvl.tasks.describing import describe, describing_task_of, encode_for_regions
from bvl.tasks.region_caption import RegionCaption

pytestmark = pytest.mark.usefixtures("fast_compilation")

GREEDY = DecodeOptions(max_length=4)
SIZE = PHANTOMS.image_size


def region_components(**changes):
    """The tiny captioner with a region encoder; `changes` are its fields. What it sees decides what it writes."""
    base = tiny_components(captions=True)
    encoder = RegionEncoderConfig(**{"width": 16, "output_size": 2, "num_heads": 2, **changes})
    channel = encoder.kind == "mask_channel"
    image = ViTConfig("XXS/8", pool="mean", width=16, depth=1, num_heads=2, mask_channel=channel)
    config = dataclasses.replace(
        base.config,
        model=dataclasses.replace(base.config.model, image=image, region_encoder=encoder),
        tasks={**base.config.tasks, "region_caption": RegionCaption(mask_channel=channel)},
    )
    model = build_model(config, base.tokenizer)
    tokens = jnp.zeros((1, base.tokenizer.context_length), jnp.int32)
    pixels = jnp.zeros((1, SIZE, SIZE, 3))
    shapes = unbox(jax.eval_shape(model.init, jax.random.key(0), pixels, tokens, tokens == 0)["params"])
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 0.3, s.shape), s.dtype), shapes)
    cross = params["decoder"]["block_0"]["cross"]
    for name in ("key", "value", "out"):
        cross[name]["kernel"] = 8.0 * cross[name]["kernel"]
    return dataclasses.replace(
        base,
        model=model,
        params={"model": params, "heads": {}},
        config=config,
        encoder=Encoder(model, config.data.preprocess, base.encoder.mesh),
    )


@pytest.fixture(scope="module")
def components():
    return region_components(kind="roi_align", levels=(0,))


@pytest.fixture(scope="module")
def images():
    source = PhantomSource(PHANTOMS)
    return [source[i]["image"] for i in range(3)]


def box(x0, y0, x1, y1):
    return {"box": [x0, y0, x1, y1]}


def blob():
    pixels = np.zeros((SIZE, SIZE), bool)
    pixels[8:20, 4:12] = True
    pixels[12:16, 4:28] = True
    return {"mask": pixels}


MIXED = [
    [box(0, 0, 0.5, 0.5), {"point": [0.8, 0.2]}],
    [],
    [blob(), box(0.5, 0.25, 1, 1), {"point": [0.1, 0.9]}],
]


def texts(components, images, regions, *, options=GREEDY, **changes):
    found = describe(components, images, regions, options=options, **{"batch_size": 4, **changes})
    return [[candidates[0].tokens for candidates in some] for some in found]


@functools.cache
def _whole(model):
    @jax.jit
    def logits(params, features, pixels4, prompts, image_dropped, region_dropped, row, mask):
        bound = functools.partial(model.apply, {"params": params})
        tokens = features.tokens
        if pixels4 is not None:
            tokens = bound(pixels4, frozenset({"tokens"}), method="encode_image").tokens
        image, image_mask = bound(features.tokens, image_dropped[None], method="visual_tokens")
        levels, grid = features.levels, features.grid
        region, region_mask = bound(
            tokens, levels, grid, prompts, region_dropped[None], method="region_tokens"
        )
        visual, seen = jnp.concatenate([image, region], 1), jnp.concatenate([image_mask, region_mask], 1)
        return (
            bound(visual, seen, row[None], mask[None], method="decode_train")[0]
            @ bound(method="vocabulary").T
        )

    return logits


def recomputed(components, image, region, *, scale=None, null=None, **controls):
    """The greedy text of one region, each word from the whole sequence read anew; guidance in numpy."""
    model, tokenizer, pre = components.model, components.tokenizer, components.preprocess
    params = components.params["model"]
    shown = apply(image, preprocess=pre)
    found = prompts_of(shown, image_size=image.shape[:2], mask_size=(8, 8), regions=[region])
    names = ("region_box", "region_point", "region_mask", "region_kind")
    prompts = RegionPrompts(*(found[name][None] for name in names))
    pixels = normalize_image(jnp.asarray(shown.image)[None], pre.mean, pre.std, jnp.float32)
    features = model.apply(
        {"params": params}, pixels, frozenset({"tokens", "regions"}), method="encode_image"
    )
    pixels4 = None
    if components.config.model.region_encoder.kind == "mask_channel":
        large = np.kron(found["region_mask"][0], np.ones((SIZE // 8, SIZE // 8)))
        pixels4 = jnp.concatenate([pixels, jnp.asarray(large, jnp.float32)[None, ..., None]], -1)
    prefix, prefix_mask = components.config.data.controls.prefix(tokenizer, **controls)
    no_words = {*tokenizer.special_ids, tokenizer.mask_id, tokenizer.unknown_id} - {tokenizer.end_id}
    words = []

    def logits(image_dropped, region_dropped):
        row = np.concatenate([prefix, np.resize([*words, 0], GREEDY.max_length)]).astype(np.int32)
        mask = np.concatenate([prefix_mask, np.arange(GREEDY.max_length) < len(words)])
        dropped = (jnp.asarray(image_dropped), jnp.asarray(region_dropped))
        value = _whole(model)(params, features, pixels4, prompts, *dropped, row, mask)
        return np.array(value, np.float64)[len(prefix) + len(words) - 1]

    while len(words) < GREEDY.max_length and (not words or words[-1] != tokenizer.end_id):
        value = logits(False, False)
        if scale is not None:
            value = (1 - scale) * logits(null != "region", null != "image") + scale * value
        value[list(no_words)] = -np.inf
        words.append(int(value.argmax()))
    return tuple(words)


def test_greedy_texts_of_mixed_regions_equal_full_recomputation(components, images):
    written = texts(components, images, MIXED, controls={"length": 5})
    assert written == [
        [recomputed(components, image, region, length=5) for region in some]
        for image, some in zip(images, MIXED, strict=True)
    ]
    assert len({text for some in written for text in some}) > 2, "the regions make a difference"


@pytest.mark.parametrize("null", ["image", "region", "both"])
def test_guided_texts_equal_full_recomputation(components, images, null):
    how = dict(guidance=2.5, guidance_null=null)
    regions = [MIXED[0][:1], MIXED[2][:1]]
    written = texts(components, images[::2], regions, controls={"length": 5}, **how)
    assert written == [
        [recomputed(components, image, some[0], scale=2.5, null=null, length=5)]
        for image, some in zip(images[::2], regions, strict=True)
    ]


def test_scale_one_is_plain_and_scale_zero_is_the_null(components, images):
    """At scale 0 the null rows alone are heard: no trace of the region, or of image and region."""
    plain = texts(components, images, MIXED)
    assert texts(components, images, MIXED, guidance=1.0, always_guided=True) == plain
    by_image = texts(components, images, MIXED, guidance=0.0, guidance_null="region")
    assert all(len(set(some)) <= 1 for some in by_image) and by_image[0][0] != by_image[2][0]
    nothing = texts(components, images, MIXED, guidance=0.0, guidance_null="both")
    assert len({text for some in nothing for text in some}) == 1
    scales = [[1.0, 0.0], [], [1.0, 0.0, 1.0]]
    mixed = texts(components, images, MIXED, guidance=scales, guidance_null="both")
    assert mixed == [[plain[0][0], nothing[0][1]], [], [plain[2][0], nothing[2][1], plain[2][2]]]


def test_a_null_image_is_seen_through_the_region_alone(images):
    """Coordinates say nothing of the pixels, so at scale 0 without the image equal boxes have equal texts."""
    components = region_components(kind="box_token")
    regions = [[box(0, 0, 0.5, 0.5), box(0.5, 0.25, 1, 1)]] * 3

    def log_probs(**how):
        found = describe(components, images, regions, options=GREEDY, batch_size=8, **how)
        return [[candidates[0].log_prob for candidates in some] for some in found]

    found = log_probs(guidance=0.0, guidance_null="image")
    np.testing.assert_allclose(found, [found[0]] * 3, rtol=1e-6)
    assert abs(found[0][0] - found[0][1]) > 1e-3
    assert np.ptp([some[0] for some in log_probs()]) > 1e-3


def counted(monkeypatch, components):
    """([batch size of each encoding], [rows of each decoding])."""
    encoded, decoded = [], []
    encoder, generate = components.encoder.image, writing_rows.generate

    def image(params, pixels, *, need):
        encoded.append(len(pixels))
        return encoder(params, pixels, need=need)

    def decode(params, visual, *args, rng, **how):
        decoded.append(len(rng))
        return generate(params, visual, *args, rng=rng, **how)

    monkeypatch.setattr(components.encoder, "image", image)
    monkeypatch.setattr(writing_rows, "generate", decode)
    return encoded, decoded


def test_regions_share_their_image_and_are_decoded_together(components, images, monkeypatch):
    encoded, decoded = counted(monkeypatch, components)
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 0.4, (32, 4)) + [0, 0, 0.5, 0.5]
    regions = [box(*corner) for corner in corners.tolist()]
    (all_texts,) = texts(components, images[:1], [regions], batch_size=32)
    assert encoded == [1] and decoded == [32] and len(all_texts) == 32
    # More regions than the batch: split, and none is dropped.
    encoded.clear(), decoded.clear()
    assert texts(components, images[:1], [regions[:10]])[0] == all_texts[:10]
    assert encoded == [1] and decoded == [4, 4, 4]
    # Images without regions are not encoded.
    encoded.clear(), decoded.clear()
    several = [MIXED[0], [], MIXED[2]]
    together = texts(components, images, several)
    assert encoded == [2] and decoded == [4, 4]
    encoded.clear()
    shown = encode_for_regions(components, images, batch_size=2)
    assert encoded == [2, 2]
    assert texts(components, shown, several) == together and encoded == [2, 2]
    assert texts(components, images, several, image_batch_size=1) == together
    assert [len(some) for some in together] == [2, 0, 3]


def test_numbers_of_regions_decide_what_is_drawn(components, images):
    options = DecodeOptions(max_length=4, temperature=1.0)
    together = texts(components, images, MIXED, options=options, seed=3)
    later = texts(components, images[2:], MIXED[2:], options=options, seed=3, first_row=2)
    assert later == together[2:]
    chosen = texts(components, images[2:], [MIXED[2][::2]], options=options, seed=3, first_row=[[2, 4]])
    assert chosen == [together[2][::2]]
    assert texts(components, images, MIXED, options=options, seed=4) != together


def test_controls_and_first_words_one_a_region(components, images):
    lengths = [[3, 5], [], [5, 3, 9]]
    each = texts(components, images, MIXED, controls={"length": lengths})
    assert each == texts(components, images, MIXED, controls={"length": [3, 5, 5, 3, 9]})
    fives = texts(components, images, MIXED, controls={"length": 5})
    assert each[0][1] == fives[0][1] and each[2][0] == fives[2][0]
    begun = texts(components, images, MIXED, begin=[["a", ""], [], ["", "no", ""]])
    assert list(begun[0][0][:1]) == components.tokenizer.ids("a")
    assert list(begun[2][1][:1]) == components.tokenizer.ids("no")


def test_each_region_has_its_own_masked_image(images, monkeypatch):
    components = region_components(kind="mask_channel")
    encoded, decoded = counted(monkeypatch, components)
    regions = [[box(0, 0, 0.5, 0.5), blob()]]
    found = texts(components, images[:1], regions, guidance=2.5, guidance_null="region")
    assert encoded == [1, 4] and decoded == [4]
    assert found == [
        [recomputed(components, images[0], region, scale=2.5, null="region") for region in regions[0]]
    ]


def test_a_language_model_as_the_null(components, images):
    """At scale 0 nothing of the image and the region is left."""
    found = texts(components, images, MIXED, guidance=0.0, language_model=components)
    assert len({text for some in found for text in some}) == 1


def test_a_null_that_training_never_showed_is_named(components, images, caplog):
    tasks = {"region_caption": RegionCaption(region_dropout=0.0)}
    config = dataclasses.replace(components.config, workdir="made/regions", tasks=tasks)
    other = dataclasses.replace(components, config=config)
    texts(other, images, MIXED, guidance=2.0, guidance_null="image")
    assert not caplog.records
    for _ in range(2):
        texts(other, images, MIXED, guidance=2.0, guidance_null="both")
    assert [r.message for r in caplog.records] == [
        "guidance: this run was trained with region_dropout=0, so its null region means nothing; train with "
        "tasks.region_caption.region_dropout=0.1"
    ]


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(options=DecodeOptions(max_length=16)), "up to 15"),
        (dict(guidance_null="controls"), "choose image, region or both"),
        (dict(guidance=[1.0, 2.0]), r"shape \(2,\) for 5 regions"),
        (
            dict(guidance=[[1.0], [], [1.0, 2.0, 3.0]]),
            r"guidance: lists of \[1, 0, 3\] values .* \[2, 0, 3\]",
        ),
        (dict(controls={"length": [1, 2]}), "2 values for 5 regions"),
        (dict(controls={"section": "caption"}), "section='caption': .* one control, their length"),
        (dict(first_row=[0, 1]), "for 5 regions"),
        (dict(batch_size=0), "batch_size=0"),
        (dict(regions=[[], [], []]), "no regions"),
        (dict(regions=MIXED[:2]), "regions of 2 images for 3"),
        (dict(regions=[[], [], [box(0.5, 0, 0.2, 1)]]), r"images\[2\], regions\[0\]"),
        (dict(images=[], regions=[]), "no images"),
    ],
)
def test_values_that_cannot_be_used_are_named(components, images, changes, words):
    given = {"images": images, "regions": MIXED, **changes}
    with pytest.raises(UserError, match=words):
        texts(components, given.pop("images"), given.pop("regions"), **given)


def test_a_run_without_the_task_is_told_what_to_train():
    with pytest.raises(ConfigError, match=r"no task of type RegionCaption.*model\.region_encoder"):
        describing_task_of(tiny_components(captions=True).config)
