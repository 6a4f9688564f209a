"""What a text may not say, against loops over lists, and in the searches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import fast_compilation  # noqa: F401
from toy_decoder import END, PAD, Toy, beam_twin, brute_force_twin, greedy_twin, texts

from bvl.decode.constraints import Constraints, block_ngrams, penalize_repetition
from bvl.decode.guidance import guided_merge
from bvl.decode.options import DecodeOptions
from bvl.decode.search import search

pytestmark = pytest.mark.usefixtures("fast_compilation")

ROWS = (0, 1, 2)
TOY = Toy(5, 8, seed=2, spread=2.5)


def constrained(log_probs_of, options, *, forbidden=(), forced=None):
    """The twin of Constraints, on one text. `forced[row]`: the token of each position, or None."""

    def apply(row, text):
        log_probs = log_probs_of(row, text).copy()
        if forbidden:
            log_probs[list(forbidden)] = -np.inf
            log_probs -= np.log(np.exp(log_probs).sum())
        for token in set(text):
            log_probs[token] *= options.repetition_penalty
        n = options.no_repeat_ngram
        if n:
            grams = {text[i : i + n] for i in range(len(text) - n + 1)}
            for token in range(len(log_probs)):
                if (*text[len(text) - n + 1 :], token) in grams:
                    log_probs[token] = -np.inf
        if len(text) < options.min_length:
            log_probs[END] = -np.inf
        if forced is not None and len(text) < len(forced[row]) and forced[row][len(text)] is not None:
            log_probs[:] = -np.inf
            log_probs[forced[row][len(text)]] = 0.0
        return log_probs

    return apply


@functools.partial(jax.jit, static_argnames=("options", "guidance", "end_id"))
def decode(rows, options, forbidden=None, forced=None, forced_mask=None, guidance=None, end_id=END):
    copies = jnp.concatenate([rows, rows + 100]) if guidance else rows
    logits, cache = TOY.prefill(copies)
    return search(
        logits,
        cache,
        TOY.step,
        options=options,
        end_id=end_id,
        pad_id=PAD,
        rng=jax.random.key(0),
        merge=guided_merge(guidance) if guidance else None,
        forbidden=forbidden,
        forced=forced,
        forced_mask=forced_mask,
    )


def run(options, **arrays):
    return jax.tree.map(np.asarray, decode(jnp.asarray(ROWS), options, **arrays))


def assert_follows(decoded, log_probs_of, options):
    for row in ROWS:
        if options.beams == 1:
            text, total = greedy_twin(log_probs_of, row, options)
            expected = [(total / len(text) ** options.length_penalty, text)]
        else:
            expected, _ = beam_twin(log_probs_of, row, options)
        assert texts(decoded, row)[: len(expected)] == [text for _, text in expected]
        np.testing.assert_allclose(
            decoded.scores[row, : len(expected)], [score for score, _ in expected], rtol=1e-5
        )


@pytest.mark.parametrize("n", [1, 2, 3])
def test_ngrams_against_a_set_of_them(n):
    rng = np.random.default_rng(n)
    history = rng.integers(0, 4, size=(3, 2, 9))
    log_probs = rng.normal(size=(3, 2, 4)).astype(np.float32) - 5
    blocked = jax.jit(functools.partial(block_ngrams, n=n))
    seen = 0
    for t in range(10):
        found = np.asarray(blocked(log_probs, history, t))
        for i, j in np.ndindex(3, 2):
            text = tuple(history[i, j, :t])
            twin = constrained(
                lambda row, text, own=log_probs[i, j]: own, DecodeOptions(max_length=9, no_repeat_ngram=n)
            )
            np.testing.assert_array_equal(found[i, j], twin(0, text))
            seen += np.isinf(found[i, j]).sum()
    assert seen > 0


def test_an_ngram_longer_than_the_text_blocks_nothing():
    log_probs, history = np.zeros((1, 1, 4), np.float32), np.zeros((1, 1, 3), np.int32)
    np.testing.assert_array_equal(block_ngrams(log_probs, history, 2, 4), log_probs)


@pytest.mark.parametrize("penalty", [0.5, 3.0])
def test_repetition_makes_a_token_less_likely_once(penalty):
    log_probs = np.array([[[-1.0, -2.0, -np.inf, 0.0, -4.0]]], np.float32)
    history = np.array([[[1, 1, 2, 3, 4, 0]]])
    found = np.asarray(penalize_repetition(jnp.asarray(log_probs), history, 4, penalty))
    np.testing.assert_allclose(found[0, 0], [-1.0, -2.0 * penalty, -np.inf, 0.0, -4.0])


@pytest.mark.parametrize(
    "options",
    [
        DecodeOptions(max_length=8, no_repeat_ngram=1),
        DecodeOptions(max_length=8, no_repeat_ngram=2, min_length=7),
        DecodeOptions(max_length=8, no_repeat_ngram=2, min_length=5, beams=3, num_return=3),
        DecodeOptions(max_length=8, repetition_penalty=30.0, min_length=3),
        DecodeOptions(max_length=8, repetition_penalty=1.8, beams=4, groups=2, num_return=4, diversity=0.9),
    ],
)
def test_searches_keep_the_rules(options):
    decoded = run(options)
    assert_follows(decoded, constrained(TOY.log_probs, options), options)
    unbound = run(DecodeOptions(max_length=8, beams=options.beams))
    assert (decoded.tokens[:, 0] != unbound.tokens[:, 0]).any(), "the rules changed nothing"
    n = options.no_repeat_ngram
    for row in ROWS:
        for text in texts(decoded, row):
            grams = [text[i : i + n] for i in range(len(text) - n + 1)] if n else []
            assert len(set(grams)) == len(grams)
            assert END not in text[: options.min_length]


@pytest.mark.parametrize("options", [DecodeOptions(max_length=6), DecodeOptions(max_length=6, beams=3)])
def test_forbidden_tokens_are_never_written(options):
    forbidden = np.isin(np.arange(5), [2, 3])
    decoded = run(options, forbidden=forbidden)
    assert_follows(decoded, constrained(TOY.log_probs, options, forbidden=(2, 3)), options)
    assert not np.isin(decoded.tokens, [2, 3]).any()


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_forbidden_tokens_leave_their_guided_probability_to_the_others(scale):
    """However likely they are: what may be written has probability 1 in all, on each side and after the mix."""
    options, kept = DecodeOptions(max_length=1, beams=2, num_return=2), [0, 4]
    assert END in kept
    decoded = run(options, forbidden=~np.isin(np.arange(5), kept), guidance=scale)
    np.testing.assert_allclose(np.exp(decoded.log_probs).sum(-1), 1.0, rtol=1e-5)
    for row in ROWS:
        conditional, null = (TOY.log_probs(number, ())[kept] for number in (row, row + 100))
        mixed = scale * conditional + (1 - scale) * null
        mixed -= np.log(np.exp(mixed).sum())
        np.testing.assert_allclose(decoded.log_probs[row], np.sort(mixed)[::-1], rtol=1e-4, atol=1e-6)


# Prefixes of three lengths; the last also leaves its first place free, and ends the text.
FORCED = [(4, 3, 2), (2,), (None, 0)]


@pytest.mark.parametrize(
    "options",
    [
        DecodeOptions(max_length=6),
        DecodeOptions(max_length=6, beams=3, num_return=3, length_penalty=0.0),
        DecodeOptions(max_length=6, beams=4, groups=2, num_return=4),
        DecodeOptions(max_length=6, temperature=1.0, num_return=4),
    ],
)
def test_forced_prefixes(options):
    forced = np.zeros((3, 3), np.int32)
    mask = np.zeros((3, 3), bool)
    for row, prefix in enumerate(FORCED):
        for t, token in enumerate(prefix):
            if token is not None:
                forced[row, t], mask[row, t] = token, True
    # What is forced comes before what is forbidden.
    arrays = {"forced": forced, "forced_mask": mask, "forbidden": np.arange(5) == 4}
    decoded = run(options, **arrays)
    if not options.sampling:
        twin = constrained(TOY.log_probs, options, forbidden=(4,), forced=FORCED)
        assert_follows(decoded, twin, options)
    for row, prefix in enumerate(FORCED):
        for text, score in zip(texts(decoded, row), decoded.scores[row], strict=True):
            if score > -np.inf and text[0] != END:
                agrees = [token in (None, text[t]) for t, token in enumerate(prefix)]
                assert all(agrees) and 4 not in text[len(prefix) :]


def test_without_a_mask_every_place_is_forced():
    forced = np.array([[4, 3], [2, 2], [3, 4]])
    np.testing.assert_array_equal(run(DecodeOptions(max_length=3), forced=forced).tokens[:, 0, :2], forced)


@pytest.mark.parametrize(
    "options",
    [
        DecodeOptions(max_length=4),
        DecodeOptions(max_length=4, beams=3, num_return=3),
        DecodeOptions(max_length=4, temperature=1.0, top_p=0.5, num_return=3),
    ],
)
def test_where_nothing_may_be_written_scores_are_minus_infinity(options):
    decoded = run(options, forbidden=np.ones(5, bool), end_id=4)
    assert (decoded.scores == -np.inf).all() and (decoded.log_probs == -np.inf).all()
    assert np.isin(decoded.tokens, [4, PAD]).all()
    assert (decoded.lengths <= 1).all()


def test_with_enough_beams_nothing_is_missed_under_guidance_and_rules():
    """Beams, guidance, blocked n-grams and a least length at once, against every text there is."""
    options = DecodeOptions(max_length=3, beams=25, num_return=25, no_repeat_ngram=1, min_length=1)
    decoded = run(options, guidance=2.0)

    def guided_of(row, text):
        both = 2.0 * TOY.log_probs(row, text) - TOY.log_probs(row + 100, text)
        return both - np.log(np.exp(both - both.max()).sum()) - both.max()

    for row in ROWS:
        expected = brute_force_twin(constrained(guided_of, options), row, options, 5)
        expected = [(score, text) for score, text in expected if np.isfinite(score)][:25]
        found = texts(decoded, row)[: len(expected)]
        np.testing.assert_allclose(decoded.scores[row, : len(expected)], [s for s, _ in expected], rtol=1e-4)
        assert found == [text for _, text in expected]
        assert not np.isnan(decoded.scores).any()


def test_options_that_are_off_leave_the_values_alone():
    log_probs = jnp.ones((1, 1, 5)) * -2
    off = Constraints(options=DecodeOptions(max_length=4), end_id=END)
    assert off(log_probs, jnp.zeros((1, 1, 4), jnp.int32), 0) is log_probs
