"""Guided log-probabilities, and guidance under every search."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import fast_compilation  # noqa: F401
from toy_decoder import END, PAD, Toy, beam_twin, greedy_twin, guided, texts

from bvl.decode.guidance import check_guidance, guide, guided_merge, join_steps
from bvl.decode.options import DecodeOptions
from bvl.decode.search import search
from bvl.errors import UserError

pytestmark = pytest.mark.usefixtures("fast_compilation")

TOY = Toy(6, 8)
OTHER = Toy(6, 8, seed=1)
ROWS, NULLS = (0, 1, 2), (100, 101, 102)
GREEDY = DecodeOptions(max_length=8)
BEAMS = DecodeOptions(max_length=8, beams=3, num_return=3)
DIVERSE = DecodeOptions(max_length=8, beams=4, groups=2, num_return=4, diversity=1.0)
SAMPLES = DecodeOptions(max_length=8, temperature=1.0, top_k=3, num_return=2)
EVERY = [GREEDY, BEAMS, DIVERSE, SAMPLES]

traces = []


@functools.partial(jax.jit, static_argnames="options")
def decode(rows, nulls, scale, options):
    traces.append(options)
    logits, cache = TOY.prefill(jnp.concatenate([rows, nulls]))
    return search(
        logits,
        cache,
        TOY.step,
        options=options,
        end_id=END,
        pad_id=PAD,
        merge=guided_merge(scale),
        rng=jax.random.key(7),
    )


@functools.partial(jax.jit, static_argnames="options")
def plain(rows, options):
    logits, cache = TOY.prefill(rows)
    return search(logits, cache, TOY.step, options=options, end_id=END, pad_id=PAD, rng=jax.random.key(7))


def run(scale, options, *, rows=ROWS, nulls=NULLS):
    arrays = (jnp.asarray(rows), jnp.asarray(nulls), jnp.asarray(scale, jnp.float32))
    return jax.tree.map(np.asarray, decode(*arrays, options))


def naive_guide(conditional, null, scale):
    """Each row and token by itself, in f64."""
    result = np.full(conditional.shape, -np.inf)
    for index in np.ndindex(conditional.shape[:-1]):
        both = np.isfinite(conditional[index]) & np.isfinite(null[index])
        c, u = conditional[index][both].astype(np.float64), null[index][both].astype(np.float64)
        mixed = scale[index[0]] * (c - c.max()) + (1 - scale[index[0]]) * (u - u.max())
        result[index][both] = mixed - mixed.max() - np.log(np.exp(mixed - mixed.max()).sum())
    return result


@pytest.fixture
def logits():
    rng = np.random.default_rng(0)
    conditional, null = rng.normal(size=(2, 4, 3, 7)).astype(np.float32) * 4
    conditional[0, 0, :2] = -np.inf
    null[0, 0, 1:3] = -np.inf
    null[2, 1, 6] = -np.inf
    return conditional, null


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 2.0, 7.5])
def test_guided_log_probabilities(logits, scale):
    found = np.asarray(guide(*logits, scale))
    np.testing.assert_allclose(found, naive_guide(*logits, [scale] * 4), rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(np.exp(found).sum(-1), 1.0, rtol=1e-5)


def test_a_scale_a_row(logits):
    scales = np.array([0.0, 1.0, 1.7, 3.0], np.float32)
    found = np.asarray(guide(*logits, scales))
    np.testing.assert_allclose(found, naive_guide(*logits, scales), rtol=2e-5, atol=2e-5)
    np.testing.assert_array_equal(np.asarray(guide(*logits, 1.0))[1], found[1])


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_impossible_on_either_side_is_impossible_and_never_nan(logits, scale):
    conditional, null = logits
    found = np.asarray(guide(*logits, scale))
    np.testing.assert_array_equal(found == -np.inf, np.isinf(conditional) | np.isinf(null))
    nothing = np.asarray(guide(np.full((1, 4), -np.inf, np.float32), np.zeros((1, 4), np.float32), scale))
    assert (nothing == -np.inf).all()


def test_scales_0_and_1_are_exact():
    """To the last bit, so that no token can change."""
    rng = np.random.default_rng(1)
    conditional, null = jnp.asarray(rng.normal(size=(2, 64, 1000)) * 5, jnp.float32)
    at = jax.jit(guide)
    np.testing.assert_array_equal(at(conditional, null, 1.0), jax.jit(jax.nn.log_softmax)(conditional))
    np.testing.assert_array_equal(at(conditional, null, 0.0), jax.jit(jax.nn.log_softmax)(null))


@pytest.mark.parametrize("options", EVERY)
def test_scale_1_is_plain_and_scale_0_ignores_the_condition(options):
    alone = jax.tree.map(np.asarray, plain(jnp.asarray(ROWS), options))
    for found, expected in zip(run(1.0, options), alone, strict=True):
        np.testing.assert_array_equal(found, expected)
    null = jax.tree.map(np.asarray, plain(jnp.asarray(NULLS), options))
    for found, expected in zip(run(0.0, options), null, strict=True):
        np.testing.assert_array_equal(found, expected)
    for found, expected in zip(run(0.0, options, rows=(7, 8, 9)), null, strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("options", [GREEDY, BEAMS, DIVERSE])
def test_every_search_follows_the_guided_distribution(options):
    scales = (0.5, 1.5, 2.5)
    decoded = run(scales, options)
    for row, (scale, number, null) in enumerate(zip(scales, ROWS, NULLS, strict=True)):
        log_probs_of = guided(
            lambda _, text, number=number: TOY.log_probs(number, text),
            lambda _, text, null=null: TOY.log_probs(null, text),
            scale,
        )
        if options == GREEDY:
            text, total = greedy_twin(log_probs_of, row, options)
            expected = [(total / len(text), text)]
        else:
            expected, _ = beam_twin(log_probs_of, row, options)
        assert texts(decoded, row) == [text for _, text in expected]
        np.testing.assert_allclose(decoded.scores[row], [score for score, _ in expected], rtol=1e-5)


def test_a_sweep_compiles_once():
    options = DecodeOptions(max_length=7)
    traces.clear()
    found = [run(scale, options).tokens for scale in (0.5, 1.0, 2.0, 4.0)]
    assert len(traces) == 1
    assert any((tokens != found[1]).any() for tokens in found)


@pytest.mark.parametrize("options", [GREEDY, BEAMS])
def test_another_model_as_the_null(options):
    """Two caches side by side: each is reordered by the same beams."""

    @jax.jit
    def joined(rows, scale):
        (logits_a, cache_a), (logits_b, cache_b) = TOY.prefill(rows), OTHER.prefill(rows)
        return search(
            jnp.concatenate([logits_a, logits_b]),
            (cache_a, cache_b),
            join_steps(TOY.step, OTHER.step),
            options=options,
            end_id=END,
            pad_id=PAD,
            merge=guided_merge(scale),
        )

    decoded = jax.tree.map(np.asarray, joined(jnp.asarray(ROWS), 1.5))
    for row, number in enumerate(ROWS):
        log_probs_of = guided(TOY.log_probs, OTHER.log_probs, 1.5)
        if options == GREEDY:
            expected = [greedy_twin(log_probs_of, number, options)[0]]
        else:
            expected = [text for _, text in beam_twin(log_probs_of, number, options)[0]]
        assert texts(decoded, row) == expected


def test_models_of_different_vocabularies_are_refused():
    wide = Toy(9, 8)
    (_, cache_a), (_, cache_b) = TOY.prefill(jnp.zeros(1)), wide.prefill(jnp.zeros(1))
    with pytest.raises(UserError, match="vocabularies of 6 and 9 tokens"):
        join_steps(TOY.step, wide.step)((cache_a, cache_b), jnp.zeros((2, 1), jnp.int32), 0)


@pytest.mark.parametrize(
    "scale, said",
    [
        (-1.0, "guidance=-1.0: must be a finite number"),
        (float("nan"), "guidance=nan"),
        (float("inf"), "guidance=inf"),
        ([1.0, -2.0, 1.0], "guidance=-2.0"),
        ([1.0, 2.0], r"guidance of shape \(2,\) for 3 images"),
        ([[1.0, 2.0, 3.0]], r"guidance of shape \(1, 3\)"),
        ("strong", "give a number"),
        ([1.0, [2.0]], "give a number"),
    ],
)
def test_wrong_scales_are_refused(scale, said):
    with pytest.raises(UserError, match=said):
        check_guidance(scale, 3)


def test_good_scales_are_numbers_or_one_an_image():
    assert check_guidance(2, 3).shape == () and check_guidance(0.0, 3) == 0.0
    np.testing.assert_array_equal(check_guidance([1, 2, 3], 3), [1.0, 2.0, 3.0])
