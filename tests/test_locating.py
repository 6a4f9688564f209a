"""Phrases, objects and heat maps found by a run: the way back to the original image, batching, calibration, errors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import tiny_components
from tiny_run import fast_compilation  # noqa: F401

from bvl.data.phrases import encode_phrases
from bvl.data.transforms import Preprocess
from bvl.errors import ConfigError, UserError
from bvl.mesh import unbox
from bvl.models.decoder import DecoderConfig
from bvl.models.features import ImageFeatures
from bvl.models.region_decoder import RegionDecoderConfig
from bvl.models.vit import ViTConfig
from bvl.runs import Components, Encoder, build_model
from bvl.tasks import locating
from bvl.tasks.contrastive import embed_texts
from bvl.tasks.detection import Detection
from bvl.tasks.grounding import Grounding
from bvl.tasks.locating import PHRASES_AT_ONCE, detect, ground, heat_maps, least_negatives, segment

pytestmark = pytest.mark.usefixtures("fast_compilation")

BATCH = 2
HEIGHT, WIDTH = 40, 80
WORDS = "normal chest x-ray with a nodule in the left upper right lower lung zone no finding effusion".split()


def region_components(phrases="text"):
    """The tiny dual encoder with a region decoder, of random weights."""
    base = tiny_components()
    config = dataclasses.replace(
        base.config,
        model=dataclasses.replace(
            base.config.model,
            image=ViTConfig("XXS/8", pool="mean", width=16, depth=1, num_heads=2),
            decoder=DecoderConfig(width=16, depth=1, num_heads=2) if phrases == "decoder" else None,
            region_decoder=RegionDecoderConfig(
                width=16, depth=1, num_heads=2, num_queries=2, mask_stride=4, pixel_width=8, phrases=phrases
            ),
        ),
        tasks={**base.config.tasks, "grounding": Grounding(phrases=phrases), "detection": Detection()},
    )
    model = build_model(config, base.tokenizer)
    tokens, pixels = jnp.zeros((1, base.tokenizer.context_length), jnp.int32), jnp.zeros((1, 32, 32, 3))
    shapes = unbox(jax.eval_shape(model.init, jax.random.key(0), pixels, tokens, tokens == 0)["params"])
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 0.3, s.shape), s.dtype), shapes)
    encoder = Encoder(model, config.data.preprocess, base.encoder.mesh)
    params = {"model": params, "heads": {}}
    return dataclasses.replace(base, model=model, params=params, config=config, encoder=encoder)


@pytest.fixture(scope="module")
def components():
    return region_components()


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8) for _ in range(3)]


def seen_as(components, resize):
    """The same weights behind another view of images."""
    preprocess = Preprocess(image_size=32, resize=resize)
    encoder = Encoder(components.model, preprocess, components.encoder.mesh)
    return dataclasses.replace(components, preprocess=preprocess, encoder=encoder)


BOX = (0.25, 0.125, 0.625, 0.875)
# 40 x 80: "shortest_crop" sees the middle half, "pad" has a quarter of the side above and below.
ORIGINAL = {
    "shortest_crop": (0.375, 0.125, 0.5625, 0.875),
    "squash": BOX,
    "pad": (0.25, 0.0, 0.625, 1.0),
}


def knows_the_box(params, tokens, levels, phrases, **options):
    """In place of the compiled function: every phrase is at BOX."""
    rows, count = phrases["tokens"].shape[:2]
    masks = np.full((rows, count, 8, 8), -20.0, np.float32)
    masks[:, :, 1:7, 2:5] = 20.0
    return np.full((rows, count, 4), BOX, np.float32), np.full((rows, count), 0.5, np.float32), masks


@pytest.mark.parametrize("resize", list(ORIGINAL))
def test_boxes_and_masks_go_back_to_the_original(components, images, monkeypatch, resize):
    monkeypatch.setattr(locating, "_ground", knows_the_box)
    run = seen_as(components, resize)
    (found,) = ground(run, images[:1], ["nodule"], batch_size=BATCH)
    x0, y0, x1, y1 = ORIGINAL[resize]
    np.testing.assert_allclose(found.boxes, [[x0, y0, x1, y1]], atol=1e-6)
    (mask,) = segment(run, images[:1], ["nodule"], batch_size=BATCH)
    assert mask.shape == (1, HEIGHT, WIDTH) and mask.dtype == np.float32
    y, x = np.meshgrid((np.arange(HEIGHT) + 0.5) / HEIGHT, (np.arange(WIDTH) + 0.5) / WIDTH, indexing="ij")
    expected = (x > x0) & (x < x1) & (y > y0) & (y < y1)
    # Interpolated: the border may be a pixel away.
    assert ((mask[0] > 0.5) != expected).sum() <= 2 * (HEIGHT + WIDTH)
    assert mask[0][expected].mean() > 0.9 and mask[0][~expected].mean() < 0.05
    if resize == "shortest_crop":
        assert not mask[0][:, :20].any() and not mask[0][:, 60:].any(), "not seen"


def same(a, b):
    for name in ("boxes", "scores"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=1e-3, atol=1e-4)


def test_a_phrase_alone_and_among_others(components, images):
    """Lists of different lengths, more than are looked for at a time, in batches that are not full."""
    many = [f"{a} {b}" for a in WORDS[:5] for b in WORDS[5:9]][: 2 * PHRASES_AT_ONCE + 1]
    lists = [["nodule"], many, ["effusion", "nodule", "effusion"]]
    found = ground(components, images, lists, batch_size=BATCH)
    assert [x.boxes.shape for x in found] == [(len(row), 4) for row in lists]
    assert [x.scores.shape for x in found] == [x.found.shape for x in found] == [(len(row),) for row in lists]
    masks = segment(components, images, lists, batch_size=BATCH)
    assert [x.shape for x in masks] == [(len(row), HEIGHT, WIDTH) for row in lists]
    for image, place in ((0, 0), (1, 3), (1, 2 * PHRASES_AT_ONCE), (2, 1)):
        (alone,) = ground(components, [images[image]], [lists[image][place]], batch_size=BATCH)
        whole = found[image]
        same(alone, dataclasses.replace(whole, boxes=whole.boxes[place : place + 1], scores=whole.scores[place : place + 1]))  # fmt: skip
    np.testing.assert_array_equal(found[2].scores[0], found[2].scores[2])
    assert np.ptp(found[1].scores) > 1e-4 and abs(found[0].scores[0] - found[2].scores[1]) > 1e-5
    assert (found[1].boxes >= 0).all() and (found[1].boxes <= 1).all()
    # One list for all images, and one string an image.
    for phrases, rows in ((["nodule"], 3), ([["nodule"]] * 3, 3)):
        shared = ground(components, images, phrases, batch_size=BATCH)
        assert len(shared) == rows
        same(shared[0], found[0])


def test_an_image_is_encoded_once(components, images, monkeypatch):
    calls, texts = [], []

    def counted(self, pixels, need, batch_size=64, method=Components.encode_images):
        pixels = list(pixels)
        calls.append(len(pixels))
        return method(self, pixels, need, batch_size)

    def counted_texts(self, batch, need, batch_size=64, method=Components.encode_texts):
        batch = list(batch)
        texts.extend(batch)
        return method(self, batch, need, batch_size)

    monkeypatch.setattr(Components, "encode_images", counted)
    monkeypatch.setattr(Components, "encode_texts", counted_texts)
    phrases = [f"{a} {b}" for a in WORDS[:5] for b in WORDS[5:9]]
    assert len(phrases) == 20
    ground(components, images, phrases, batch_size=BATCH)
    assert calls == [2, 1] and texts == phrases


@pytest.mark.parametrize(("alpha", "least"), [(0.1, 9), (0.05, 19), (0.07, 14), (0.01, 99), (0.9, 1)])
def test_the_least_calibration(alpha, least):
    assert least_negatives(alpha) == least and 1 / (1 + least) <= alpha < 1 / least


def test_what_a_run_has_not_learnt_is_refused(components, images):
    def trained_without(*fields):
        task = Grounding(**dict.fromkeys(fields, 0.0))
        return dataclasses.replace(
            components, config=dataclasses.replace(components.config, tasks={"find": task})
        )

    with pytest.raises(ConfigError, match=r"without boxes of phrases \(tasks.find.l1=0, "):
        ground(trained_without("l1", "giou", "score"), images, ["nodule"])
    with pytest.raises(ConfigError, match=r"without masks of phrases \(tasks.find.bce=0"):
        segment(trained_without("bce", "dice"), images, ["nodule"])


def test_calibration_decides_what_is_found(components, images, caplog):
    phrases = ["nodule", "left lung", "effusion", "right lung"]
    (plain,) = ground(components, images[:1], phrases, batch_size=BATCH)
    assert np.isnan(plain.p_values).all()
    np.testing.assert_array_equal(plain.found, plain.scores >= 0.5)
    logits = np.log(plain.scores / (1 - plain.scores)).astype(np.float64)
    middle = np.sort(logits)[1:3].mean()
    calibration = {"negatives": [middle - 1e3] * 19 + [middle], "weights_hash": components.weights_hash()}
    run = dataclasses.replace(components, calibration=calibration)
    (found,) = ground(run, images[:1], phrases, alpha=0.06, batch_size=BATCH)
    np.testing.assert_allclose(found.p_values, np.where(logits > middle, 1, 2) / 21, rtol=1e-5)
    np.testing.assert_array_equal(found.found, logits > middle)
    same(found, plain)
    # 20 absent phrases cannot tell a twenty-fifth.
    with caplog.at_level("WARNING"):
        (strict,) = ground(run, images[:1], phrases, alpha=0.04, batch_size=BATCH)
    assert "at least 24 absent phrases, and calibration.json has 20" in caplog.text
    np.testing.assert_array_equal(strict.p_values, found.p_values)
    np.testing.assert_array_equal(strict.found, plain.found)
    stale = dataclasses.replace(components, calibration={**calibration, "weights_hash": "other"})
    assert np.isnan(ground(stale, images[:1], phrases, batch_size=BATCH)[0].p_values).all()


def test_objects_by_name(components, images, monkeypatch):
    """Best first, the better of two that overlap, none below the threshold nor on the padding."""
    boxes = [(0.1, 0.3, 0.4, 0.6), (0.11, 0.3, 0.4, 0.6), (0.6, 0.4, 0.9, 0.7), (0.2, 0.0, 0.4, 0.2)]
    scores = [[0.7, 0.5], [0.8, 0.2], [0.1, 0.9], [0.95, 0.95]]

    def objects(params, tokens, levels, names, **options):
        assert names.shape[0] == 2
        return np.float32([boxes] * len(tokens)), np.float32([scores] * len(tokens)), None

    monkeypatch.setattr(locating, "_detect", objects)
    run = seen_as(components, "pad")
    found, _ = detect(run, images[:2], ["nodule", "mass"], batch_size=BATCH)
    assert found.names == ["mass", "nodule", "mass"]
    np.testing.assert_allclose(found.scores, [0.9, 0.8, 0.5])
    expected = [(x0, 2 * y0 - 0.5, x1, 2 * y1 - 0.5) for x0, y0, x1, y1 in (boxes[2], boxes[1], boxes[0])]
    np.testing.assert_allclose(found.boxes, expected, atol=1e-6)
    (twice,) = detect(run, images[:1], ["*nodule*", "mass", "nodule"], batch_size=BATCH)
    assert twice.names == found.names
    (few,) = detect(run, images[:1], ["nodule", "mass"], batch_size=BATCH, max_detections=1)
    assert few.names == ["mass"]
    (strict,) = detect(run, images[:1], ["nodule", "mass"], batch_size=BATCH, threshold=0.85)
    assert strict.names == ["mass"]
    (loose,) = detect(run, images[:1], ["nodule", "mass"], batch_size=BATCH, iou_threshold=0.99)
    assert loose.names == ["mass", "nodule", "nodule", "mass"]
    (none,) = detect(run, images[:1], ["nodule", "mass"], batch_size=BATCH, threshold=0.97)
    assert none.boxes.shape == (0, 4) and none.names == [] and none.scores.shape == (0,)


def test_objects_by_the_model(components, images):
    found = detect(
        components, images, ["nodule", "left lung"], threshold=0.0, iou_threshold=1.0, batch_size=BATCH
    )
    for one in found:
        assert len(one.names) == len(one.scores) == len(one.boxes) and (np.diff(one.scores) <= 0).all()
        assert set(one.names) == {"nodule", "left lung"}
    (alone,) = detect(
        components, images[2:], ["left lung"], threshold=0.0, iou_threshold=1.0, batch_size=BATCH
    )
    chosen = [name == "left lung" for name in found[2].names]
    np.testing.assert_allclose(alone.scores, found[2].scores[chosen], rtol=1e-3, atol=1e-5)


def test_heat_maps_against_another_phrase(components, images):
    """The difference of the two phrases' maps; tolerance of f32 sums."""
    options = {"sigma": 0.0, "batch_size": BATCH}
    (single,) = heat_maps(components, images[:1], ["nodule", "left lung"], **options)
    (found,) = heat_maps(components, images[:1], ["nodule"], against=["left lung"], **options)
    np.testing.assert_allclose(found[0], single[0] - single[1], atol=1e-5)
    with pytest.raises(UserError, match="one phrase for each"):
        heat_maps(components, images[:1], ["nodule"], against=["left lung", "right lung"], **options)


@pytest.mark.parametrize("resize", list(ORIGINAL))
def test_heat_maps(components, images, monkeypatch, resize):
    """A patch that is like the phrase is the peak, where it lies in the original image."""
    run = seen_as(components, resize)
    (real,) = heat_maps(run, images[:1], ["nodule", "left lung"], batch_size=BATCH)
    assert real.shape == (2, HEIGHT, WIDTH) and real.dtype == np.float32
    seen = np.ones((HEIGHT, WIDTH), bool)
    if resize == "shortest_crop":
        seen[:, :20] = seen[:, 60:] = False
    np.testing.assert_array_equal(np.isnan(real), np.broadcast_to(~seen, real.shape))
    assert np.nanmax(np.abs(real)) <= 1 + 1e-4 and np.nanstd(real[0]) > 1e-3

    text = embed_texts(run, ["nodule"])[0]
    patches = np.tile(-text, (1, 16, 1))
    patches[0, 4 * 1 + 2] = text  # second row, third column of 4 x 4
    monkeypatch.setattr(
        Components, "encode_images", lambda *_: iter([ImageFeatures(patch_embed=patches, grid=(4, 4))])
    )
    y, x = {"shortest_crop": (0.375, 0.5625), "squash": (0.375, 0.625), "pad": (0.25, 0.625)}[resize]
    for sigma in (0.0, 0.5):
        ((found,),) = heat_maps(run, images[:1], ["*nodule*"], sigma=sigma, batch_size=BATCH)
        peak = np.unravel_index(np.nanargmax(found), found.shape)
        assert abs((peak[0] + 0.5) / HEIGHT - y) < 0.05 and abs((peak[1] + 0.5) / WIDTH - x) < 0.05
        assert (np.nanmax(found) > 0.8) == (sigma == 0)


def test_the_marked_word_is_the_query(images):
    """A run whose phrases the text decoder reads: another mark is another query, of the same words."""
    run = region_components("decoder")
    ids, _, marks = encode_phrases(run.tokenizer, ["a *nodule* left", "a nodule *left*", "a nodule left"])
    np.testing.assert_array_equal(ids, np.broadcast_to(ids[:1], ids.shape))
    assert marks[0] < marks[1] == marks[2]
    (found,) = ground(
        run, images[:1], ["a *nodule* left", "a nodule *left*", "a nodule left"], batch_size=BATCH
    )
    np.testing.assert_allclose(found.scores[1], found.scores[2], rtol=1e-5)
    assert abs(found.scores[0] - found.scores[1]) > 1e-5
    assert len({round(float(x), 6) for x in ground(run, images, ["nodule"], batch_size=BATCH)[1].scores}) == 1


def test_bad_input(components, images):
    run, every = components, (ground, segment, heat_maps, detect)
    for function in every:
        with pytest.raises(UserError, match="no images"):
            function(run, [], ["nodule"])
        with pytest.raises(UserError, match="one text; give a list"):
            function(run, images, "nodule")
        with pytest.raises(UserError, match="no phrases|no names"):
            function(run, images[:1], [])
        for empty in ("", "  "):
            with pytest.raises(UserError, match="not empty"):
                function(run, images[:1], ["nodule", empty])
        with pytest.raises(UserError, match="tokens; this run reads up to 14"):
            function(run, images[:1], [" ".join(WORDS * 3)])
        with pytest.raises(UserError, match="batch_size=0"):
            function(run, images, ["nodule"], batch_size=0)
    for function in every[:3]:
        with pytest.raises(UserError, match="2 lists of phrases for 3 images"):
            function(run, images, [["nodule"], ["left"]])
        with pytest.raises(UserError, match="no phrases for image 1"):
            function(run, images[:2], [["nodule"], []])
    for alpha in (0.0, 1.0, -1):
        with pytest.raises(UserError, match="alpha"):
            ground(run, images, ["nodule"], alpha=alpha)
    with pytest.raises(UserError, match="sigma"):
        heat_maps(run, images, ["nodule"], sigma=-1.0)
    plain = tiny_components()
    for function, kind in ((ground, "Grounding"), (segment, "Grounding"), (detect, "Detection")):
        with pytest.raises(ConfigError, match=f"no task of type {kind}, only contrastive"):
            function(plain, images, ["nodule"])
    captioner = tiny_components(captions=True, contrastive=False)
    with pytest.raises(ConfigError, match="no task of this run has trained"):
        heat_maps(captioner, images, ["nodule"])


def test_the_asterisks_of_a_mark_take_no_room(components, images):
    """What fits without a mark fits with one."""
    longest = components.tokenizer.context_length - 2
    word = next(
        w
        for w in WORDS
        if components.tokenizer.lengths([f"{w} {w}"]) == [2 * components.tokenizer.lengths([w])[0]]
    )
    length = components.tokenizer.lengths([word])[0]
    words = [word] * (longest // length)
    ground(components, images[:1], [" ".join([f"*{word}*", *words[1:]])], batch_size=BATCH)


def test_boxes_of_candidates_that_agree_are_averaged():
    boxes = np.array([[0, 0, 0.4, 0.4], [0.04, 0, 0.44, 0.4], [0.6, 0.6, 0.9, 0.9], [0.1, 0.1, 0.3, 0.3]])
    scores = np.array([2.0, 0.0, 1.9, 1.0])
    weights = 1 / (1 + np.exp(-scores[:2]))
    found = jax.jit(locating.vote_box)(jnp.float32(boxes), jnp.float32(scores))
    np.testing.assert_allclose(found, np.average(boxes[:2], axis=0, weights=weights), rtol=1e-5, atol=1e-6)
    point = np.array([[0.5, 0.5, 0.5, 0.5], *boxes[1:]])
    found = jax.jit(locating.vote_box)(jnp.float32(point), jnp.float32(scores))
    np.testing.assert_allclose(found, point[0], rtol=1e-5, err_msg="without area it agrees with none")
