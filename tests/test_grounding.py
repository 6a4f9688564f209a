"""Losses of grounding and detection against loops over every image, phrase and candidate, and learning two images."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import linear_sum_assignment
from tiny_run import fast_compilation  # noqa: F401

from bvl.errors import ConfigError
from bvl.losses.set_prediction import match_boxes
from bvl.mesh import unbox
from bvl.models.decoder import DecoderConfig
from bvl.models.features import ImageFeatures, Located, TextFeatures
from bvl.models.region_decoder import RegionDecoderConfig
from bvl.models.text import TextConfig
from bvl.models.vit import ViTConfig
from bvl.models.vlm import DualEncoder, DualEncoderConfig
from bvl.tasks.base import ModelInfo
from bvl.tasks.detection import Detection
from bvl.tasks.grounding import Grounding

pytestmark = pytest.mark.usefixtures("fast_compilation")

IMAGES, PHRASES, OBJECTS, QUERIES, WORDS, EMBED, MASK = 3, 4, 3, 8, 3, 5, (4, 6)
INFO = ModelInfo(8, 8, EMBED, ())


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def some_boxes(rng, *shape):
    return np.sort(rng.random((*shape, 2, 2)), axis=-2).reshape(*shape, 4)


def a_batch():
    """Phrases of several objects, of one, absent, unknown, without mask, without box, padding; the last image is none."""
    rng = np.random.default_rng(0)
    batch = {
        "image_valid": np.array([True, True, False]),
        "object_box": some_boxes(rng, IMAGES, OBJECTS),
        "object_valid": np.array([[True, True, True], [True, False, False], [True, True, True]]),
        "object_known": np.ones(IMAGES, bool),
        "object_mask": rng.random((IMAGES, OBJECTS, *MASK)) < 0.5,
        "object_mask_valid": np.array([[True, False, True], [True, True, True], [True, True, True]]),
        "phrase": rng.integers(3, 9, (IMAGES, PHRASES, WORDS)),
        "phrase_mask": np.ones((IMAGES, PHRASES, WORDS), bool),
        "phrase_valid": np.array([[True] * 4, [True, True, True, False], [True] * 4]),
        "phrase_id": np.array([[5, 6, 7, 5], [5, 8, 9, 0], [5, 6, 7, 8]], np.uint32),
        "phrase_present": np.array([[True, True, False, True], [True, False, True, True], [True] * 4]),
        # The fourth of the first image is unknown, yet names an object; the third of the second has neither box nor mask.
        "phrase_known": np.array([[True, True, True, False], [True, True, True, True], [True] * 4]),
        "phrase_object": np.zeros((IMAGES, PHRASES, OBJECTS), bool),
        "phrase_pixels": rng.random((IMAGES, PHRASES, *MASK)) < 0.5,
        "phrase_pixels_valid": np.array([[True, False, False, True], [True, False, False, True], [True] * 4]),
        "phrase_mark": np.zeros((IMAGES, PHRASES), np.int32),
    }
    named = batch["phrase_object"]
    named[0, 0, [0, 2]] = named[0, 1, 1] = named[0, 3, 2] = True
    # The second object of the second image is padding.
    named[1, 0, [0, 1]] = named[1, 3, 0] = named[2, :, 0] = True
    return {name: jnp.asarray(x, jnp.float32 if x.dtype == np.float64 else None) for name, x in batch.items()}


def located(per_phrase):
    """What a model may give, of phrases or of whole images."""
    rng = np.random.default_rng(1)
    lead = (IMAGES, PHRASES) if per_phrase else (IMAGES,)
    many = lead if per_phrase else (IMAGES, QUERIES)
    arrays = dict(
        boxes=some_boxes(rng, *lead, QUERIES), presence=2 * rng.normal(size=many),
        embed=unit(rng.normal(size=(*many, EMBED))), mask_logits=2 * rng.normal(size=(*many, *MASK)),
        scores=2 * rng.normal(size=(*lead, QUERIES)) if per_phrase else None,
    )  # fmt: skip
    return Located(**{name: None if x is None else jnp.float32(x) for name, x in arrays.items()})


def context(batch, found, seed=0):
    rng = np.random.default_rng(2)
    names = jnp.float32(unit(rng.normal(size=(IMAGES * PHRASES, EMBED))))
    patches = jnp.float32(unit(rng.normal(size=(IMAGES, 6, EMBED))))

    def model(*args, method):
        if method == "detection_logits":
            return 4 * jnp.einsum("bqe,bne->bqn", *args) - 1
        return found

    text = TextFeatures(embed=names, pooled=names, tokens=jnp.zeros((IMAGES * PHRASES, WORDS, 4)))
    image = ImageFeatures(tokens=jnp.zeros((IMAGES, 6, 4)), grid=(2, 3), patch_embed=patches)
    return SimpleNamespace(
        batch=batch, model=model, info=INFO, features={"image": image, "phrase": text}, scale=jnp.float32(6.0),
        mesh=None, decoder_keys=None, keys=jax.random.split(jax.random.key(seed), IMAGES),
    )  # fmt: skip


def giou(a, b):
    def area(low, high):
        return np.prod(np.maximum(np.asarray(high) - low, 0))

    inter = area(np.maximum(a[:2], b[:2]), np.minimum(a[2:], b[2:]))
    union = area(a[:2], a[2:]) + area(b[:2], b[2:]) - inter
    hull = area(np.minimum(a[:2], b[:2]), np.maximum(a[2:], b[2:]))
    return inter / union - (hull - union) / hull, inter / union


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def cross_entropy(logit, target):
    return -np.log(sigmoid(logit) if target else 1 - sigmoid(logit))


def focal(logit, target):
    p = sigmoid(logit) if target else 1 - sigmoid(logit)
    return -(0.25 if target else 0.75) * (1 - p) ** 2 * np.log(p)


def dice(logits, target):
    p = sigmoid(logits)
    return 1 - (2 * (p * target).sum() + 1) / (p.sum() + target.sum() + 1)


def matched(boxes, probability, targets, repeats):
    """query -> number of its target; probability [q, m]."""
    if not len(targets):
        return {}
    cost = [
        [5 * np.abs(q - t).sum() - 2 * giou(q, t)[0] - 2 * probability[i, j] for j, t in enumerate(targets)]
        for i, q in enumerate(boxes)
    ]
    rows, columns = linear_sum_assignment(np.tile(cost, (1, repeats)))
    return {int(r): int(c) % len(targets) for r, c in zip(rows, columns, strict=True)}


def naive_grounding(task, batch, found):
    """(loss, sums of the terms, how many count) by loops."""
    b, f = jax.tree.map(np.asarray, (batch, found))
    sums = {name: [0.0, 0] for name in ("l1", "giou", "score", "bce", "dice", "presence")}

    def add(name, value):
        sums[name][0] += value
        sums[name][1] += 1

    count = 0
    for i, p in np.ndindex(IMAGES, PHRASES):
        if not (b["image_valid"][i] and b["phrase_valid"][i, p]):
            continue
        count += 1
        known, present = b["phrase_known"][i, p], b["phrase_present"][i, p]
        targets = b["object_box"][i][b["phrase_object"][i, p] & b["object_valid"][i]]
        probability = np.repeat(sigmoid(f.scores[i, p])[:, None], max(len(targets), 1), axis=1)
        pairs = matched(f.boxes[i, p], probability, targets, task.positives)
        if pairs:
            add("l1", np.mean([np.abs(f.boxes[i, p, q] - targets[t]).sum() for q, t in pairs.items()]))
            add("giou", np.mean([1 - giou(f.boxes[i, p, q], targets[t])[0] for q, t in pairs.items()]))
        if pairs or (known and not present):
            total = sum(focal(f.scores[i, p, q], q in pairs) for q in range(QUERIES))
            add("score", total / max(len(pairs), 1))
        if known and b["phrase_pixels_valid"][i, p]:
            pixels = list(zip(f.mask_logits[i, p].flat, b["phrase_pixels"][i, p].flat, strict=True))
            add("bce", np.mean([cross_entropy(x, t) for x, t in pixels]))
            add("dice", dice(f.mask_logits[i, p], b["phrase_pixels"][i, p]))
        if known:
            add("presence", cross_entropy(f.presence[i, p], present))
    return sum(getattr(task, name) * total for name, (total, _) in sums.items()) / count, sums, count


@pytest.mark.parametrize("positives", [1, 2])
def test_grounding_against_loops(positives):
    task = Grounding(positives=positives, l1=3.0, giou=1.5, score=0.7, bce=1.1, dice=0.9, presence=0.6)
    batch, found = a_batch(), located(True)
    output = jax.jit(lambda f: (lambda o: (o.loss, o.metrics))(task.loss(context(batch, f))))(found)
    loss, sums, count = naive_grounding(task, batch, found)
    assert float(output[0]) == pytest.approx(loss, rel=1e-4)
    assert float(task.count(batch, INFO)) == count == 7
    for name, (total, counted) in sums.items():
        np.testing.assert_allclose(output[1][name], [total, counted], rtol=1e-4, err_msg=name)
    # The unknown one has a box, and the one without a box is neither boxed nor absent.
    assert [sums[name][1] for name in ("l1", "score", "bce", "presence")] == [4, 6, 2, 6]


def naive_detection(task, batch, found, names):
    b, f = jax.tree.map(np.asarray, (batch, found))
    loss, count, overlaps = 0.0, 0, []
    for i in range(IMAGES):
        if not (b["image_valid"][i] and b["object_known"][i]):
            continue
        count += 1
        objects = np.flatnonzero(b["object_valid"][i])
        phrases = [p for p in range(PHRASES) if b["phrase_valid"][i, p] and b["phrase_known"][i, p]]
        logits = 4 * f.embed[i] @ names[i].T - 1
        naming = {m: [p for p in phrases if b["phrase_object"][i, p, m]] for m in objects}
        likeness = [
            [np.mean(sigmoid(logits[q, naming[m]])) if naming[m] else 0.0 for m in objects]
            for q in range(QUERIES)
        ]
        targets = b["object_box"][i][objects]
        pairs = matched(f.boxes[i], np.array(likeness), targets, task.positives)
        share = max(len(pairs), 1)
        for q, t in pairs.items():
            loss += task.l1 * np.abs(f.boxes[i, q] - targets[t]).sum() / share
            loss += task.giou * (1 - giou(f.boxes[i, q], targets[t])[0]) / share
        for q in range(QUERIES):
            loss += task.presence * focal(f.presence[i, q], q in pairs) / share
            for p in phrases:
                hit = q in pairs and p in naming[objects[pairs[q]]]
                loss += task.name * focal(logits[q, p], hit) / share
        masked = [(q, objects[t]) for q, t in pairs.items() if b["object_mask_valid"][i, objects[t]]]
        for q, m in masked if task.masks else ():
            target = b["object_mask"][i, m]
            pixels = zip(f.mask_logits[i, q].flat, target.flat, strict=True)
            loss += task.bce * np.mean([cross_entropy(x, t) for x, t in pixels]) / len(masked)
            loss += task.dice * dice(f.mask_logits[i, q], target) / len(masked)
        overlaps += [giou(f.boxes[i, q], targets[t])[1] for q, t in pairs.items()]
    return loss / max(count, 1), count, sum(overlaps) / max(len(overlaps), 1)


@pytest.mark.parametrize("masks, positives", [(False, 1), (True, 2)])
def test_detection_against_loops(masks, positives):
    task = Detection(
        masks=masks, positives=positives, l1=3.0, giou=1.5, name=0.7, presence=0.6, bce=1.1, dice=0.9
    )
    batch, found = a_batch(), located(False)
    ctx = context(batch, found)
    names = np.asarray(ctx.features["phrase"].embed).reshape(IMAGES, PHRASES, EMBED)

    @jax.jit
    def loss(found, batch):
        output = task.loss(context(batch, found))
        return output.loss, output.metrics["iou"]

    expected, count, _ = naive_detection(task, batch, found, names)
    assert float(loss(found, batch)[0]) == pytest.approx(expected, rel=1e-4)
    assert float(task.count(batch, INFO)) == count == 2
    silent = batch | {"object_known": jnp.array([False, True, True])}
    expected, count, overlap = naive_detection(task, silent, found, names)
    value, (total, matches) = loss(found, silent)
    assert float(value) == pytest.approx(expected, rel=1e-4) and count == 1
    assert float(total / matches) == pytest.approx(overlap, rel=1e-4), "each with its own target"


@pytest.mark.parametrize("task", [Grounding(contrast=1.0, taco=1.0), Detection(masks=True)])
def test_a_batch_without_anything_valid(task):
    """Nothing is learned, and nothing broken; also where images are there but name and show nothing."""
    found = located(isinstance(task, Grounding))
    no_image = a_batch() | {"image_valid": jnp.zeros(IMAGES, bool)}
    nothing = {
        name: jnp.zeros_like(a_batch()[name]) for name in ("phrase_valid", "object_known", "object_valid")
    }

    @jax.jit
    @jax.value_and_grad
    def loss(found, batch):
        return task.loss(context(batch, found)).loss

    for batch in (no_image, a_batch() | nothing):
        value, slopes = loss(found, batch)
        assert float(value) == 0 and float(task.count(batch, INFO)) == 0
        assert not any(np.asarray(x).any() for x in jax.tree.leaves(slopes))
    if isinstance(task, Detection):
        # Known to show nothing at all: every candidate is background.
        empty = a_batch() | {"object_valid": jnp.zeros((IMAGES, OBJECTS), bool)}
        value, slopes = loss(found, empty)
        assert float(value) > 0 and all(np.isfinite(x).all() for x in jax.tree.leaves(slopes))


def test_matched_boxes():
    boxes = jnp.float32([[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1], [0, 0, 0.5, 0.4]])
    targets = jnp.float32([[0, 0, 0.5, 0.5], [0.1, 0.1, 0.2, 0.2]])
    fitted = jax.jit(match_boxes)
    fit = fitted(boxes, jnp.zeros((3, 1)), targets, jnp.array([True, False]))
    assert fit.assigned.tolist() == [0, -1, -1] and fit.matched.tolist() == [True, False, False]
    assert float(fit.l1) == float(fit.giou) == 0 and int(fit.count) == 1
    np.testing.assert_allclose(fit.iou, [1, 0, 0.8], atol=1e-6)
    none = fitted(boxes, jnp.zeros((3, 1)), targets, jnp.zeros(2, bool))
    assert none.assigned.tolist() == [-1] * 3 and float(none.l1) == float(none.giou) == 0
    assert int(none.count) == 1 and not none.iou.any()


def test_equal_phrases_share_the_contrast():
    """Cross-entropy of each present phrase over all valid ones of the batch, where equal texts share the target."""
    batch, found = a_batch(), located(True)
    weights = dict.fromkeys(("l1", "giou", "score", "bce", "dice", "presence"), 0.0)
    ctx = context(batch, found)
    task = Grounding(contrast=1.0, **weights)
    value = float(jax.jit(lambda found: task.loss(context(batch, found)).loss)(found))
    text, b = np.asarray(ctx.features["phrase"].embed), jax.tree.map(np.asarray, batch)
    valid = (b["phrase_valid"] & b["image_valid"][:, None]).reshape(-1)
    ids, losses = b["phrase_id"].reshape(-1), []
    for row in np.flatnonzero(valid & (b["phrase_present"] & b["phrase_known"]).reshape(-1)):
        logits = 6.0 * np.asarray(found.embed).reshape(-1, EMBED)[row] @ text[valid].T
        log_p = logits - np.log(np.exp(logits).sum())
        losses.append(-log_p[ids[valid] == ids[row]].mean())
    assert value == pytest.approx(np.mean(losses), rel=1e-4)
    assert len(losses) == 4


@jax.jit
def taco(patches, seed, batch):
    """(loss, metric) of this term alone."""
    weights = dict.fromkeys(("l1", "giou", "score", "bce", "dice", "presence"), 0.0)
    ctx = context(batch, located(True), seed)
    ctx.features["image"] = ImageFeatures(tokens=jnp.zeros((IMAGES, 64, 4)), grid=(8, 8), patch_embed=patches)
    output = Grounding(taco=1.0, **weights).loss(ctx)
    return output.loss, output.metrics["taco"]


def test_taco_prefers_the_true_box():
    """Patches like the phrase inside its box, and unlike it outside, cost less than the other way round."""
    batch = a_batch() | {"image_valid": jnp.array([True, False, False])}
    only = jnp.zeros((IMAGES, PHRASES), bool).at[0, 1].set(True)
    batch |= {
        "phrase_valid": only,
        "object_box": batch["object_box"].at[0, 1].set(jnp.array([0.5, 0.25, 0.75, 0.5])),
    }
    text = np.asarray(context(batch, located(True)).features["phrase"].embed)[1]
    inside = np.zeros((8, 8), bool)
    inside[2:4, 4:6] = True
    patches = {
        name: jnp.float32(np.where((inside ^ flip).reshape(1, 64, 1), text, -text) * np.ones((IMAGES, 1, 1)))
        for name, flip in (("right", False), ("wrong", True))
    }
    values = {
        name: np.mean([float(taco(x, seed, batch)[0]) for seed in range(5)]) for name, x in patches.items()
    }
    assert values["right"] < 0.7 * values["wrong"], values
    loss, (value, count) = taco(patches["right"], 0, batch)
    assert float(count) == 1 and float(value) == pytest.approx(float(loss))


def test_taco_has_a_finite_gradient():
    patches = jnp.float32(unit(np.random.default_rng(0).normal(size=(IMAGES, 64, EMBED))))
    slopes = jax.jit(jax.grad(lambda x: taco(x, 0, a_batch())[0]))(patches)
    assert np.isfinite(slopes).all() and np.abs(slopes[:2]).max((1, 2)).all() and not slopes[2].any()


SIZE = 16


@functools.cache
def tiny_model(phrases="text"):
    """(model, how it is initialised)."""
    config = DualEncoderConfig(
        image=ViTConfig("XXS/4", stem="conv", pool="mean", width=24, depth=1, num_heads=2),
        text=TextConfig(width=16, depth=1, num_heads=2),
        decoder=DecoderConfig(width=16, depth=1, num_heads=2) if phrases == "decoder" else None,
        region_decoder=RegionDecoderConfig(
            width=24, depth=1, num_heads=2, num_queries=2, mask_stride=2, pixel_width=8, phrases=phrases
        ),
        embed_dim=8,
    )
    model = DualEncoder(config, (SIZE, SIZE), 8, WORDS, 2)
    image, tokens = jnp.zeros((1, SIZE, SIZE, 3)), jnp.zeros((1, WORDS), jnp.int32)
    return model, lambda key: unbox(model.init(key, image, tokens, tokens == 0)["params"])


def two_images():
    """A red and a green square somewhere in each; the phrases are "red", "green" and, nowhere, "blue"."""
    boxes = np.array([[[2, 2, 8, 8], [9, 6, 15, 12]], [[10, 1, 16, 7], [1, 9, 7, 15]]])
    pixels, masks = np.zeros((2, SIZE, SIZE, 3)), np.zeros((2, 3, SIZE, SIZE), bool)
    for image, colour in np.ndindex(2, 2):
        x0, y0, x1, y1 = boxes[image, colour]
        pixels[image, y0:y1, x0:x1, colour] = 3.0
        masks[image, colour, y0:y1, x0:x1] = True
    phrase = np.broadcast_to(np.array([[1, 3 + p, 2] for p in range(3)]), (2, 3, 3))
    yes = np.ones((2, 3), bool)
    batch = {
        "image_valid": yes[:, 0], "object_box": boxes / SIZE, "object_valid": yes[:, :2], "object_known": yes[:, 0],
        "phrase": phrase, "phrase_mask": phrase > 0, "phrase_valid": yes, "phrase_known": yes,
        "phrase_present": np.array([[True, True, False]] * 2),
        "phrase_object": np.broadcast_to(np.eye(3, 2, dtype=bool), (2, 3, 2)), "phrase_mark": np.ones((2, 3), np.int32),
        "phrase_pixels": masks[:, :, 1::2, 1::2], "phrase_pixels_valid": np.array([[True, True, False]] * 2),
    }  # fmt: skip
    return jnp.float32(pixels), {
        k: jnp.asarray(v, jnp.float32 if v.dtype == float else None) for k, v in batch.items()
    }


def loss_of(task, model, params, pixels, batch):
    bound = functools.partial(model.apply, {"params": params})
    texts = (x.reshape(-1, WORDS) for x in (batch["phrase"], batch["phrase_mask"]))
    features = {
        "image": bound(pixels, frozenset({"regions"}), method="encode_image"),
        "phrase": bound(*texts, frozenset({"embed", "pooled", "tokens"}), method="encode_text"),
    }
    ctx = SimpleNamespace(
        batch=batch, model=bound, info=INFO, features=features, decoder_keys=None, mesh=None
    )
    return task.loss(ctx)


def test_learning_two_images():
    """Every box, mask and answer right after some steps of both tasks."""
    model, init = tiny_model()
    params = jax.jit(init)(jax.random.key(0))
    pixels, batch = two_images()
    tasks = Grounding(), Detection()
    optimizer = optax.adam(optax.warmup_cosine_decay_schedule(0.0, 5e-3, 10, 150))

    def loss(params):
        outputs = [loss_of(task, model, params, pixels, batch) for task in tasks]
        return sum(output.loss for output in outputs), [output.metrics for output in outputs]

    @jax.jit
    def some_steps(carry):
        def step(carry, _):
            params, state = carry
            (value, metrics), slopes = jax.value_and_grad(loss, has_aux=True)(params)
            updates, state = optimizer.update(slopes, state)
            return (optax.apply_updates(params, updates), state), (value, metrics)

        return jax.lax.scan(step, carry, None, length=150)

    _, (values, (ground, detect)) = some_steps((params, optimizer.init(params)))
    last = jax.tree.map(lambda x: float(x[0][-1] / x[1][-1]), ground, is_leaf=lambda x: isinstance(x, tuple))
    assert values[-1] < 0.2 * values[0], (values[0], values[-1])
    assert last["accuracy_at_50"] == 1 and last["presence_accuracy"] == 1 and last["dice"] < 0.25, last
    assert float(detect["iou"][0][-1] / detect["iou"][1][-1]) > 0.6


def test_the_marked_word_is_what_is_looked_for():
    """Phrases by the text decoder: its state at the mark is the query, with the image in view."""
    model, init = tiny_model("decoder")
    pixels, batch = two_images()
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(init, jax.random.key(0))
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.4, x.shape), x.dtype), shapes)
    seen = {}

    def loss(params, pixels, marks):
        bound = functools.partial(model.apply, {"params": params})

        def spy(*args, method, **options):
            if method == "ground":
                seen["phrase"], seen["words"] = args[3], args[4]
            return bound(*args, method=method, **options)

        features = {"image": bound(pixels, frozenset({"regions"}), method="encode_image")}
        ctx = SimpleNamespace(batch=batch | {"phrase_mark": marks}, model=spy, info=INFO, features=features,
                              decoder_keys=None, mesh=None)  # fmt: skip
        return Grounding(phrases="decoder").loss(ctx).loss, dict(seen)

    marks = jnp.array([[1, 0, 2], [1, 1, 1]], jnp.int32)
    (value, found), slopes = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, pixels, marks)
    assert np.isfinite(value)
    for image, phrase in np.ndindex(2, 3):
        expected = found["words"][image, phrase, marks[image, phrase]]
        np.testing.assert_array_equal(found["phrase"][image, phrase], expected)
    assert np.abs(slopes["decoder"]["token_embed"]).max() > 0
    assert np.abs(found["words"][0] - found["words"][1]).max() > 1e-4, "the image is in view"


def test_wrong_configs_are_refused():
    config = tiny_model()[0].config
    Grounding(contrast=1.0, taco=1.0).check(config)
    Detection().check(config)
    for task in (Grounding(), Detection()):
        with pytest.raises(ConfigError, match="set model.region_decoder"):
            task.check(dataclasses.replace(config, region_decoder=None))
        image = dataclasses.replace(config.image, patch_dropout=0.5)
        with pytest.raises(ConfigError, match=r"model\.image\.patch_dropout=0"):
            task.check(dataclasses.replace(config, image=image))
    with pytest.raises(ConfigError, match="phrases='decoder', but model.region_decoder.phrases='text'"):
        Grounding(phrases="decoder").check(config)
    with pytest.raises(ConfigError, match="instance_masks=True"):
        Detection(masks=True).check(config)
    captioner = dataclasses.replace(tiny_model("decoder")[0].config, text=None)
    Grounding(phrases="decoder").check(captioner)
    for task in (Grounding(phrases="decoder", taco=1.0), Detection()):
        with pytest.raises(ConfigError, match="needs a text tower"):
            task.check(captioner)
    for wrong in ({"l1": -1.0}, {"positives": 0}):
        for kind in (Grounding, Detection):
            with pytest.raises(ConfigError, match=next(iter(wrong))):
                kind(**wrong)
