"""The text decoder: generation with its cache equals full recomputation, padding and the null change nothing else."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import fast_compilation  # noqa: F401

from bvl.errors import ConfigError
from bvl.mesh import unbox
from bvl.models.decoder import Decoder, DecoderConfig
from bvl.models.rotary import RopeScaling, rotate
from bvl.models.visual_tokens import VisualTokens

# These tests compile far longer than they compute.
pytestmark = pytest.mark.usefixtures("fast_compilation")

VOCAB, PREFIX, NEW, VISUAL = 23, 4, 5, 6
BASE = DecoderConfig(width=16, depth=2, num_heads=4)
LAYOUTS = {
    "gpt2": BASE,
    "coca": dataclasses.replace(BASE, layout="coca", tied_head=False),
    "prefix": dataclasses.replace(BASE, layout="prefix", num_kv_heads=2, qkv_bias=True, tied_head=False),
}
# As imported models have them.
IMPORTED = {
    "language model": dataclasses.replace(BASE, activation="relu", tied_head=False),
    "llama": dataclasses.replace(
        LAYOUTS["prefix"], head_dim=6, out_bias=True, mlp_bias=True, activation="geglu",
        rope_scaling=RopeScaling(kind="llama3", factor=4.0, original_context=16),
    ),
    "open_clip": dataclasses.replace(
        LAYOUTS["coca"], depth=3, unimodal_depth=1, unimodal_heads=2, unimodal_mlp_hidden=24, text_class=True,
        cross_mlp=True, null=False,
    ),
}  # fmt: skip


@functools.cache
def made(layout: str):
    """(decoder, random parameters, visual tokens, their mask, tokens, mask) with two rows of different prefixes."""
    config = (LAYOUTS | IMPORTED)[layout]
    decoder = Decoder(config, VOCAB, PREFIX + NEW + 1, sees_images=layout != "language model")
    rng = np.random.default_rng(0)
    visual = jnp.asarray(rng.normal(size=(2, VISUAL, 16)), jnp.float32)
    visual_mask = jnp.asarray([[True] * VISUAL, [True] + [False] * (VISUAL - 1)])
    tokens = jnp.asarray(rng.integers(5, VOCAB, (2, PREFIX + NEW)))
    mask = jnp.asarray([[True] * (PREFIX + NEW), [False, False] + [True] * (PREFIX + NEW - 2)])
    if not decoder.sees_images:
        visual = visual_mask = None

    def touch(module):
        if config.layout == "coca":
            module.embed_text(tokens, mask)
        return module(visual, visual_mask, tokens, mask)

    def init(key):
        return decoder.init(key, method=touch)["params"]

    shapes = unbox(jax.eval_shape(init, jax.random.key(0)))
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 0.3, s.shape), s.dtype), shapes)
    return decoder, params, visual, visual_mask, tokens, mask


@functools.cache
def applied(layout: str, method: str | None = None, **options):
    """A method of the decoder with its parameters, compiled."""
    decoder, params, *_ = made(layout)
    run = jax.jit(lambda params, *args: decoder.apply({"params": params}, *args, **options, method=method))
    return functools.partial(run, params)


@functools.cache
def prefilled(layout: str):
    """(logits, context, cache) after the prefix."""
    _, _, visual, visual_mask, tokens, mask = made(layout)
    prefix = tokens[:, :PREFIX], mask[:, :PREFIX]
    return applied(layout, "prefill", max_new=NEW)(visual, visual_mask, *prefix)


@functools.cache
def all_logits(layout: str) -> np.ndarray:
    """After every token, by recomputation of the whole sequence."""
    _, params, visual, visual_mask, tokens, mask = made(layout)
    hidden = applied(layout)(visual, visual_mask, tokens, mask)
    table = params["head"] if "head" in params else params["token_embed"]
    return np.asarray(hidden @ table.T)


@pytest.mark.parametrize("layout", LAYOUTS | IMPORTED)
def test_cached_decoding_equals_full_recomputation(layout):
    """Tolerance 1e-5: sums are ordered differently. Three equal continuations see what one would."""
    _, _, visual, visual_mask, tokens, mask = made(layout)
    expected = all_logits(layout)
    logits, context, cache = prefilled(layout)
    np.testing.assert_allclose(logits, expected[:, PREFIX - 1], atol=1e-5)
    cache = jax.tree.map(lambda x: jnp.repeat(x, 3, axis=1), cache)
    for t in range(NEW):
        fed = jnp.repeat(tokens[:, PREFIX + t, None], 3, axis=1)
        logits, cache = applied(layout, "step")(context, cache, fed, jnp.asarray(t))
        for beam in range(3):
            np.testing.assert_allclose(logits[:, beam], expected[:, PREFIX + t], atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_continuations_of_a_row_do_not_mix(layout):
    _, context, cache = prefilled(layout)

    def run(words):
        state = jax.tree.map(lambda x: jnp.repeat(x, words.shape[1], axis=1), cache)
        for t in range(2):
            logits, state = applied(layout, "step")(context, state, words[:, :, t], jnp.asarray(t))
        return logits

    words = jnp.asarray(np.random.default_rng(1).integers(5, VOCAB, (2, 3, 2)))
    together = run(words)
    for beam in range(3):
        np.testing.assert_allclose(together[:, beam], run(words[:, beam : beam + 1])[:, 0], atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_padding_in_front_changes_nothing(layout):
    decoder, params, visual, visual_mask, tokens, mask = made(layout)
    expected = all_logits(layout)[1, 2:]
    hidden = applied(layout)(visual[1:], visual_mask[1:], tokens[1:, 2:], mask[1:, 2:])
    table = params["head"] if "head" in params else params["token_embed"]
    np.testing.assert_allclose(hidden[0] @ table.T, expected, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_token_sees_a_later_one_and_every_one_sees_the_image(layout):
    _, _, visual, visual_mask, tokens, mask = made(layout)
    apply = applied(layout)
    hidden = apply(visual, visual_mask, tokens, mask)
    other = apply(visual, visual_mask, tokens.at[:, 5].set(1), mask)
    # Row 1 begins with two places of padding, of which nobody reads the states.
    np.testing.assert_array_equal(hidden[0, :5], other[0, :5])
    np.testing.assert_array_equal(hidden[1, 2:5], other[1, 2:5])
    assert np.abs(np.asarray(hidden - other)[0, 5:]).max(-1).min() > 1e-4
    moved = apply(visual.at[:, 0].add(1.0), visual_mask, tokens, mask)
    assert np.abs(np.asarray(hidden - moved)[0]).max(-1).min() > 1e-4


def test_visual_tokens_that_are_masked_are_not_seen():
    for layout in LAYOUTS:
        decoder, params, visual, visual_mask, tokens, mask = made(layout)
        apply = applied(layout)
        hidden = apply(visual, visual_mask, tokens, mask)
        moved = apply(visual.at[:, 1:].add(1.0), visual_mask, tokens, mask)
        np.testing.assert_allclose(hidden[1, 2:], moved[1, 2:], atol=1e-6)


def test_unimodal_half_of_coca_does_not_see_the_image_and_is_the_same_for_text_alone():
    decoder, params, _, _, tokens, mask = made("coca")
    embed = applied("coca", "embed_text")
    hidden, _ = embed(tokens, mask)
    again, _ = embed(tokens[1:, 2:], mask[1:, 2:])
    np.testing.assert_allclose(hidden[1, 2:], again[0], atol=1e-5)
    assert "cross" not in params["block_0"] and "cross" in params["block_1"]


def test_the_class_token_behind_a_text_sees_it_and_one_place_more():
    """As open_clip's does: itself only where the text fills the context. Nobody else sees it."""
    decoder, params, _, _, tokens, _ = made("open_clip")
    length = tokens.shape[1]
    mask = jnp.arange(length) < jnp.asarray([[length], [length - 3]])

    @jax.jit
    def embed(params, tokens):
        return decoder.apply({"params": params}, tokens, mask, method="embed_text")

    def moved(pooled):
        return np.abs(np.asarray(pooled - embed(params, tokens)[1])).max(-1) > 1e-4

    for place, seen in ((length - 4, [True, True]), (length - 3, [True, True]), (length - 2, [True, False])):
        assert moved(embed(params, tokens.at[:, place].set(1))[1]).tolist() == seen
    other = embed({**params, "text_class": params["text_class"].at[0].add(1.0)}, tokens)
    assert moved(other[1]).all(), "it is the query"
    np.testing.assert_array_equal(other[0], embed(params, tokens)[0])


def test_parallel_rows_see_both_ways_and_padding_but_not_the_padding_of_the_prefix():
    decoder, params, visual, visual_mask, tokens, mask = made("gpt2")
    mask = mask.at[:, -2:].set(False)
    parallel = jnp.asarray([False, True])
    apply = applied("gpt2")
    hidden = apply(visual, visual_mask, tokens, mask, parallel)
    other = apply(visual, visual_mask, tokens.at[:, -1].set(1), mask, parallel)
    np.testing.assert_array_equal(hidden[0, :-2], other[0, :-2])
    assert np.abs(np.asarray(hidden - other)[1, 2:]).max(-1).min() > 1e-4
    other = apply(visual, visual_mask, tokens.at[:, 0].set(1), mask, parallel)
    np.testing.assert_array_equal(hidden[1, 2:], other[1, 2:])


@pytest.mark.parametrize("queries", [0, 3])
def test_a_dropped_image_is_one_null_token_whatever_the_image_is(queries):
    module = VisualTokens(16, queries)
    tokens = jnp.asarray(np.random.default_rng(0).normal(size=(2, VISUAL, 8)), jnp.float32)
    dropped = jnp.asarray([False, True])
    params = unbox(jax.jit(module.init)(jax.random.key(0), tokens, dropped)["params"])
    apply = jax.jit(lambda p, tokens: module.apply({"params": p}, tokens, dropped))
    visual, mask = apply(params, tokens)
    assert visual.shape == (2, queries or VISUAL, 16)
    assert mask.tolist() == [[True] * (queries or VISUAL), [True] + [False] * ((queries or VISUAL) - 1)]
    again, _ = apply(params, 2 * tokens)
    np.testing.assert_array_equal(visual[1], again[1])
    assert np.abs(np.asarray(visual[0] - again[0])).max() > 1e-3
    gradient = jax.jit(jax.grad(lambda p: apply(p, tokens)[0][1, 0].sum()))(params)
    assert np.abs(gradient["null"]).max() > 0


def test_rotary_positions_are_relative():
    """The product of a turned query and key depends on the distance alone (RoFormer, equation 16)."""
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, 8)), jnp.float32) for _ in range(2))

    def product(i, j):
        at = [rotate(x, jnp.full((1, 1), p), 10000.0) for x, p in ((q, i), (k, j))]
        return float((at[0] * at[1]).sum())

    assert product(7, 4) == pytest.approx(product(3, 0), abs=1e-5)
    assert abs(product(7, 4) - product(7, 5)) > 1e-3
    np.testing.assert_array_equal(rotate(q, jnp.zeros((1, 1), int), 10000.0), q)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(layout="coca", depth=1), "at least one"),
        (dict(unimodal_depth=1), "coca"),
        (dict(num_kv_heads=2), "prefix"),
        (dict(rope_theta=5e5), "rope_theta=500000.0 belongs to layout='prefix'"),
        (dict(layout="prefix", num_heads=4, num_kv_heads=3), "multiple"),
        (dict(width=15), "divisible"),
        (dict(head_dim=8), "head_dim=8 belongs to layout='prefix'"),
        (dict(layout="prefix", head_dim=3), "even"),
        (dict(text_class=True), "text_class=True belongs to layout='coca'"),
        (dict(layout="coca", unimodal_heads=3), "divisible"),
        (dict(visual_queries=-1), "visual_queries"),
        (dict(dropout=1.0), "dropout"),
    ],
)
def test_options_that_make_no_decoder_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        dataclasses.replace(BASE, **options)


def test_more_tokens_than_positions_are_refused():
    decoder, params, visual, visual_mask, _, _ = made("gpt2")
    tokens = jnp.zeros((2, PREFIX + NEW + 2), jnp.int32)
    with pytest.raises(ConfigError, match="made for 10"):
        decoder.apply({"params": params}, visual, visual_mask, tokens, tokens == 0)
    prefix = (tokens[:, :PREFIX], tokens[:, :PREFIX] == 0)
    with pytest.raises(ConfigError, match="4 tokens and 7 further ones.*made for 10"):
        decoder.apply({"params": params}, visual, visual_mask, *prefix, NEW + 2, method="prefill")


def test_cached_decoding_in_bfloat16():
    """Tolerance 0.1: logits up to about 4 with steps of 1/64 there, rounded differently in two blocks."""
    _, params, visual, visual_mask, tokens, mask = made("gpt2")
    decoder = Decoder(BASE, VOCAB, PREFIX + NEW + 1, dtype=jnp.bfloat16)

    @functools.partial(jax.jit, static_argnames=("max_new", "method"))
    def apply(*args, **options):
        return decoder.apply({"params": params}, *args, **options)

    hidden = apply(visual, visual_mask, tokens, mask)
    assert hidden.dtype == jnp.bfloat16
    expected = np.asarray(hidden, np.float32) @ np.asarray(params["token_embed"]).T
    logits, context, cache = apply(
        visual, visual_mask, tokens[:, :PREFIX], mask[:, :PREFIX], max_new=NEW, method="prefill"
    )
    assert logits.dtype == jnp.float32 and {x.dtype for x in jax.tree.leaves(cache)} == {
        jnp.dtype("bfloat16")
    }
    np.testing.assert_allclose(logits, expected[:, PREFIX - 1], atol=0.1)
    for t in range(2):
        logits, cache = apply(context, cache, tokens[:, PREFIX + t, None], jnp.asarray(t), method="step")
        np.testing.assert_allclose(logits[:, 0], expected[:, PREFIX + t], atol=0.1)
    assert np.abs(expected - all_logits("gpt2")).max() > 1e-3, "it was computed in bfloat16"


def test_dropout_differs_by_key_and_is_absent_without():
    plain, params, visual, visual_mask, tokens, mask = made("gpt2")
    dropping = Decoder(dataclasses.replace(BASE, dropout=0.5), VOCAB, PREFIX + NEW + 1)

    @functools.partial(jax.jit, static_argnums=0)
    def run(decoder, keys):
        return decoder.apply({"params": params}, visual, visual_mask, tokens, mask, None, keys)

    def hidden(decoder, *seeds):
        return np.asarray(run(decoder, jax.vmap(jax.random.key)(jnp.asarray(seeds)) if seeds else None))

    np.testing.assert_array_equal(hidden(dropping), hidden(plain))
    first, second = hidden(dropping, 0, 1), hidden(dropping, 0, 2)
    np.testing.assert_array_equal(first[0], second[0])
    assert (first[1, 2:] != second[1, 2:]).any() and (first != hidden(plain)).any()


def test_rematerialised_blocks_have_the_same_gradient():
    """Tolerance 1e-5: XLA may fuse the recomputed forward pass differently."""
    decoder, params, visual, visual_mask, tokens, mask = made("gpt2")

    def gradient(config):
        other = Decoder(config, VOCAB, PREFIX + NEW + 1)
        return jax.jit(
            jax.grad(
                lambda p: jnp.square(other.apply({"params": p}, visual, visual_mask, tokens, mask)).sum()
            )
        )(params)

    plain = gradient(BASE)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(gradient(dataclasses.replace(BASE, remat="full"))),
        jax.tree.leaves(plain),
        strict=True,
    ):
        scale = np.abs(b).max() or 1.0
        assert np.abs(np.asarray(a) - np.asarray(b)).max() / scale < 1e-5, jax.tree_util.keystr(path)
