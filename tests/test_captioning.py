"""Captions by a whole model: against full recomputation without a cache, and what guidance and prefixes do to them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import PHANTOMS, tiny_components
from tiny_run import fast_compilation  # noqa: F401

from bvl.data.phantoms import PhantomSource
from bvl.decode.options import DecodeOptions
from bvl.errors import UserError
from bvl.models.vlm import normalize_image
from bvl.tasks.caption import Caption
from bvl.tasks.captioning import encode_for_captions, write_captions
from bvl.tasks.writing_rows import generate

# These tests compile far longer than they compute.
pytestmark = pytest.mark.usefixtures("fast_compilation")

GREEDY = DecodeOptions(max_length=6)


@pytest.fixture(scope="module")
def components():
    made = tiny_components(captions=True)
    # Random weights hardly look at the image; these do.
    cross = made.params["model"]["decoder"]["block_0"]["cross"]
    for name in ("key", "value", "out"):
        cross[name]["kernel"] = 8.0 * cross[name]["kernel"]
    return made


@pytest.fixture(scope="module")
def images():
    source = PhantomSource(PHANTOMS)
    return [source[i]["image"] for i in range(3)]


def captions(components, images, *, options=GREEDY, **changes):
    rows = write_captions(components, images, options=options, batch_size=4, **changes)
    return [row[0].tokens for row in rows]


def full_recomputation(components, image, prefix, *, scale=None, null_prefix=None):
    """words -> log-probabilities of the next one, from the whole sequence read anew, and in numpy what guidance does."""
    model, tokenizer, pre = components.model, components.tokenizer, components.preprocess
    apply = functools.partial(model.apply, {"params": components.params["model"]})
    pixels = normalize_image(jnp.asarray(components.pixels(image))[None], pre.mean, pre.std, jnp.float32)
    tokens = apply(pixels, frozenset({"tokens"}), method="encode_image").tokens
    table = np.asarray(apply(method="vocabulary"))
    banned = [
        i for i in (*tokenizer.special_ids, tokenizer.mask_id, tokenizer.unknown_id) if i != tokenizer.end_id
    ]

    @jax.jit
    def logits_of(dropped, row, mask):
        visual = apply(tokens, dropped[None], method="visual_tokens")
        return apply(*visual, row[None], mask[None], method="decode_train")[0] @ table.T

    def share_of_allowed(values):
        values[banned] = -np.inf
        return values - np.log(np.exp(values - values.max()).sum()) - values.max()

    def logits_after(dropped, prefix, words):
        # Always one length, so that it is compiled once.
        after = np.arange(GREEDY.max_length) < len(words)
        row = np.concatenate([prefix[0], np.resize([*words, 0], GREEDY.max_length)]).astype(np.int32)
        logits = logits_of(jnp.asarray(dropped), row, np.concatenate([prefix[1], after]))
        return np.array(logits, np.float64)[len(prefix[0]) + len(words) - 1]

    def merged(words):
        value = logits_after(False, prefix, words)
        if scale is not None:
            value = (1 - scale) * logits_after(True, null_prefix or prefix, words) + scale * value
        return share_of_allowed(value)

    return merged


def recomputed(components, *args, **changes):
    """Greedy captions from `full_recomputation`."""
    log_probs_of, words = full_recomputation(components, *args, **changes), []
    while len(words) < GREEDY.max_length and (not words or words[-1] != components.tokenizer.end_id):
        words.append(int(log_probs_of(words).argmax()))
    return tuple(words)


def prefix_of(components, **controls):
    return components.config.data.controls.prefix(components.tokenizer, **controls)


@pytest.mark.parametrize("controls", [{}, {"length": 5, "section": "caption", "prompt": "frontal"}])
def test_greedy_captions_equal_full_recomputation(components, images, controls):
    written = captions(components, images, controls=controls)
    prefix = prefix_of(components, **controls)
    assert written == [recomputed(components, image, prefix) for image in images]
    assert len(set(written)) > 1, "the images make a difference"


@pytest.mark.parametrize("null", ["image", "both"])
def test_guided_captions_equal_full_recomputation(components, images, null):
    controls = {"length": 5, "quality": 2}
    written = captions(components, images, controls=controls, guidance=2.5, guidance_null=null)
    prefix, plain = prefix_of(components, **controls), prefix_of(components)
    null_prefix = prefix if null == "image" else plain
    expected = [recomputed(components, i, prefix, scale=2.5, null_prefix=null_prefix) for i in images]
    assert written == expected
    assert written != captions(components, images, controls=controls)


def test_scale_one_is_plain_and_scale_zero_does_not_see_the_image(components, images):
    plain = captions(components, images)
    assert captions(components, images, guidance=1.0, always_guided=True) == plain
    assert len(set(captions(components, images, guidance=0.0))) == 1
    mixed = captions(components, images, guidance=[1.0, 0.0, 1.0])
    assert mixed[0] == plain[0] and mixed[2] == plain[2]
    assert mixed[1] == captions(components, images, guidance=0.0)[1]


def test_null_without_controls_keeps_the_image(components, images):
    """At scale 0 the null rows alone are heard: the image, without what was asked."""
    asked = {"length": 5, "quality": 2}
    null = captions(components, images, controls=asked, guidance=0.0, guidance_null="controls")
    assert null == captions(components, images)


def test_a_sweep_compiles_once(components, images):
    options = DecodeOptions(max_length=4)
    before = generate._cache_size()
    for scale in (0.0, 0.5, 1.0, [1.0, 2.0, 3.0]):
        captions(components, images, options=options, guidance=scale, always_guided=True)
    assert generate._cache_size() == before + 1


def test_rows_that_fill_a_batch_change_nothing(components, images):
    options = DecodeOptions(max_length=6, temperature=1.0)
    together = captions(components, images, options=options, seed=3)
    for size in (1, 2):
        rows = write_captions(components, images, options=options, batch_size=size, seed=3)
        assert [row[0].tokens for row in rows] == together
    assert together != captions(components, images, options=options, seed=4)


def test_numbers_of_images_decide_what_is_drawn(components, images):
    """Neither chunks nor images left out change what the others get; nor does encoding them beforehand."""
    options = DecodeOptions(max_length=6, temperature=1.0)
    together = captions(components, images, options=options, seed=3)
    encoded = encode_for_captions(components, images, batch_size=4)
    assert captions(components, encoded, options=options, seed=3) == together
    assert captions(components, images[1:], options=options, seed=3, first_row=1) == together[1:]
    chosen = captions(components, images[::2], options=options, seed=3, first_row=[0, 2])
    assert chosen == together[::2]
    assert captions(components, images, options=options, seed=3, first_row=100) != together


def test_a_null_that_training_never_showed_is_named_once_a_run(components, images, caplog):
    def run_of(workdir, image_dropout, dropout):
        data = components.config.data
        data = dataclasses.replace(data, controls=dataclasses.replace(data.controls, dropout=dropout))
        tasks = {"caption": Caption(image_dropout=image_dropout)}
        config = dataclasses.replace(components.config, workdir=workdir, tasks=tasks, data=data)
        return dataclasses.replace(components, config=config)

    first, second, third = (
        run_of("made/first", 0.0, 0.1),
        run_of("made/second", 0.2, 0.0),
        run_of("made/third", 0.2, 0.1),
    )
    captions(first, images, guidance=1.0, always_guided=True)
    captions(first, images, guidance=2.0, guidance_null="controls")
    captions(second, images, guidance=2.0)
    captions(third, images, guidance=2.0, guidance_null="both")
    assert not caplog.records
    for scale in (2.0, 3.0):
        captions(first, images, guidance=scale)
    assert [r.message for r in caplog.records if "image_dropout=0" in r.message] == [
        caplog.records[0].message
    ]
    for null in ("controls", "both", "both"):
        captions(second, images, guidance=2.0, guidance_null=null)
    assert sum("data.controls.dropout=0.1" in r.message for r in caplog.records) == 2
    assert len(caplog.records) == 3


def test_a_language_model_as_the_null(components, images):
    """The captioner itself, without image and controls, is the null that guidance_null="both" has."""
    how = dict(controls={"length": 5}, guidance=2.5)
    expected = captions(components, images, guidance_null="both", **how)
    assert captions(components, images, language_model=components, **how) == expected
    other = tiny_components(captions=True)
    other.params["model"] = jax.tree.map(lambda x: -x, other.params["model"])
    assert captions(components, images, language_model=other, **how) != expected


def test_a_language_model_of_shorter_texts_is_refused(components, images):
    """Its positions would end before the captions do."""
    config = components.config
    tokenizer = dataclasses.replace(config.data.tokenizer, context_length=6)
    data = dataclasses.replace(config.data, tokenizer=tokenizer)
    other = dataclasses.replace(components, config=dataclasses.replace(config, data=data))
    with pytest.raises(UserError, match="language model was trained on texts of up to 5 tokens"):
        captions(components, images, guidance=2.0, language_model=other)


def test_captions_begin_as_told(components, images):
    tokenizer = components.tokenizer
    begin = ["no nodule", "", "a"]
    written = captions(components, images, begin=begin)
    for text, tokens in zip(begin, written, strict=True):
        ids = tokenizer.ids(text)
        assert list(tokens[: len(ids)]) == ids
    with pytest.raises(UserError, match="begin"):
        captions(components, images, begin="no nodule is seen in the left lung of this patient")


@pytest.mark.parametrize("scale", [None, 2.5])
def test_log_probabilities_are_those_of_the_texts(components, images, scale):
    """The probability of what may not be written is shared among the others. Tolerance 1e-4: sums of six in f32."""
    options = DecodeOptions(max_length=6, beams=3, num_return=3)
    rows = write_captions(components, images, options=options, batch_size=4, guidance=scale or 1.0)
    for image, candidates in zip(images, rows, strict=True):
        log_probs_of = full_recomputation(components, image, prefix_of(components), scale=scale)
        for c in candidates:
            total = sum(log_probs_of(c.tokens[:t])[token] for t, token in enumerate(c.tokens))
            assert c.log_prob == pytest.approx(total, rel=1e-4)
        scores = [c.score for c in candidates]
        assert scores == sorted(scores, reverse=True)
        assert len({c.tokens for c in candidates}) == 3
        for c in candidates:
            assert c.score == pytest.approx(c.log_prob / len(c.tokens), rel=1e-4)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(options=DecodeOptions(max_length=16)), "up to 15"),
        (dict(guidance_null="nothing"), "guidance_null"),
        (dict(controls={"tone": 1}), "unknown control tone"),
        (dict(controls={"length": [1, 2]}), "2 values for 3"),
        (dict(controls={"quality": 3}), "0 .worst. to 2"),
        (dict(guidance=float("nan")), "finite"),
        (dict(begin=["a", 3, ""]), "begin: 3 is no text"),
        (dict(first_row=[0, 1]), "for 3 images"),
        (dict(first_row=-1), "first_row=-1"),
    ],
)
def test_values_that_cannot_be_used_are_named(components, images, changes, words):
    with pytest.raises(UserError, match=words):
        captions(components, images, **changes)


def test_batches_and_images_that_are_none_are_named(components, images):
    for call in (encode_for_captions, functools.partial(write_captions, options=GREEDY)):
        with pytest.raises(UserError, match="batch_size=0"):
            call(components, images, batch_size=0)
        with pytest.raises(UserError, match="no images"):
            call(components, [])
