"""Greedy search, sampling, beam and diverse beam search against searches written with lists."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import fast_compilation  # noqa: F401
from toy_decoder import END, PAD, Toy, beam_twin, brute_force_twin, greedy_twin, texts

from bvl.decode.beam import beam_search
from bvl.decode.options import DecodeOptions
from bvl.decode.sampling import draw
from bvl.decode.search import search
from bvl.decode.state import log_softmax
from bvl.errors import UserError

pytestmark = pytest.mark.usefixtures("fast_compilation")

ROWS = (0, 1, 2, 3)
TOY = Toy(6, 8)
FEW = Toy(3, 8)
SMALL = Toy(3, 4, seed=3)


@functools.partial(jax.jit, static_argnames=("options", "toy"))
def decode(toy, rows, options, rng=None):
    logits, cache = toy.prefill(rows)
    return search(logits, cache, toy.step, options=options, end_id=END, pad_id=PAD, rng=rng)


def run(options, *, rows=ROWS, toy=TOY, rng=None):
    return jax.tree.map(np.asarray, decode(toy, jnp.asarray(rows), options, rng))


def assert_same_texts(decoded, row, expected, options):
    """`expected`: (score, text) of each text of the row."""
    assert texts(decoded, row)[: len(expected)] == [text for _, text in expected]
    lengths = np.array([len(text) for _, text in expected])
    scores = [score for score, _ in expected]
    np.testing.assert_allclose(decoded.scores[row, : len(expected)], scores, rtol=1e-5)
    sums = np.array(scores) * lengths**options.length_penalty
    np.testing.assert_allclose(decoded.log_probs[row, : len(expected)], sums, rtol=1e-5)


def test_greedy_takes_the_likeliest_token():
    options = DecodeOptions(max_length=8, length_penalty=0.5)
    decoded = run(options)
    for row in ROWS:
        text, total = greedy_twin(TOY.log_probs, row, options)
        assert_same_texts(decoded, row, [(total / len(text) ** 0.5, text)], options)
    lengths = decoded.lengths[:, 0]
    assert lengths.min() < lengths.max(), "rows of one length would not show what follows END"


@pytest.mark.parametrize("toy, penalty", [(TOY, 1.0), (TOY, 0.0), (FEW, -1.0), (TOY, 2.0)])
def test_beam_search_follows_its_rules(toy, penalty):
    """On many rows, since a wrong rule for stopping changes the texts of few."""
    options = DecodeOptions(max_length=8, beams=3, num_return=3, length_penalty=penalty)
    rows = range(32)
    decoded = run(options, rows=rows, toy=toy)
    for row in rows:
        expected, _ = beam_twin(toy.log_probs, row, options)
        assert_same_texts(decoded, row, expected, options)


def test_the_early_stop_of_the_present_length():
    options = DecodeOptions(max_length=8, beams=3, num_return=3, exact_stop=False)
    decoded = run(options)
    stopped = []
    for row in ROWS:
        expected, steps = beam_twin(TOY.log_probs, row, options)
        assert_same_texts(decoded, row, expected, options)
        stopped.append(steps)
    assert min(stopped) < 8


@pytest.mark.parametrize("penalty", [1.0, 0.0, -0.5])
def test_with_enough_beams_nothing_is_missed(penalty):
    options = DecodeOptions(max_length=4, beams=27, num_return=27, length_penalty=penalty)
    decoded = run(options, toy=SMALL)
    for row in ROWS:
        expected = brute_force_twin(SMALL.log_probs, row, options, 3)
        assert_same_texts(decoded, row, expected[:27], options)


def test_free_places_are_empty_texts_of_score_minus_infinity():
    options = DecodeOptions(max_length=2, beams=8, num_return=8)
    decoded = run(options, toy=SMALL)
    expected = brute_force_twin(SMALL.log_probs, 0, options, 3)
    assert len(expected) == 7
    assert_same_texts(decoded, 0, expected, options)
    assert texts(decoded, 0)[7] == () and decoded.scores[0, 7] == -np.inf


@pytest.mark.parametrize("beams, groups", [(4, 2), (6, 3), (3, 3)])
def test_diverse_beam_search_follows_its_rules(beams, groups):
    options = DecodeOptions(max_length=8, beams=beams, groups=groups, num_return=beams, diversity=1.1)
    decoded = run(options)
    for row in ROWS:
        expected, _ = beam_twin(TOY.log_probs, row, options)
        assert_same_texts(decoded, row, expected, options)
    distinct = [len(set(texts(decoded, row))) for row in ROWS]
    assert sum(distinct) > len(ROWS) * beams // groups, "diversity did nothing"


def test_without_diversity_every_group_is_the_beam_search_of_its_size():
    plain = run(DecodeOptions(max_length=8, beams=2, num_return=2))
    groups = run(DecodeOptions(max_length=8, beams=4, groups=2, num_return=4, diversity=0.0))
    one = run(DecodeOptions(max_length=8, beams=2, groups=1, num_return=2, diversity=0.0))
    np.testing.assert_array_equal(groups.tokens, np.repeat(plain.tokens, 2, axis=1))
    np.testing.assert_array_equal(one.tokens, plain.tokens)
    np.testing.assert_array_equal(one.scores, plain.scores)


def test_one_beam_is_greedy():
    """Also in the code of beam search, where a text that ends is set aside: it then stops at once, since with
    no penalty for the length no longer text can score more."""
    options = DecodeOptions(max_length=8, length_penalty=0.0)

    @jax.jit
    def one_beam(rows):
        logits, cache = TOY.prefill(rows)
        keep = lambda log_probs, history, t: log_probs  # noqa: E731
        return beam_search(
            logits,
            cache,
            TOY.step,
            options=options,
            end_id=END,
            pad_id=PAD,
            merge=log_softmax,
            constrain=keep,
        )

    greedy, beam = run(options), one_beam(jnp.asarray(ROWS))
    np.testing.assert_array_equal(greedy.tokens, beam.tokens)
    np.testing.assert_array_equal(greedy.lengths, beam.lengths)
    np.testing.assert_allclose(greedy.scores, beam.scores, rtol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        DecodeOptions(max_length=8, length_penalty=0.5),
        DecodeOptions(max_length=8, beams=4, groups=2, num_return=4, diversity=1.1),
        DecodeOptions(max_length=8, temperature=1.0, top_p=0.8, num_return=2),
    ],
)
def test_other_rows_of_the_batch_change_nothing(options):
    rng = jax.random.key(3)
    all_rows, some = run(options, rng=rng), run(options, rows=(0, 1, 9, 9), rng=rng)
    for whole, part in zip(all_rows, some, strict=True):
        np.testing.assert_array_equal(whole[:2], part[:2])


def test_samples_follow_the_distribution():
    options = DecodeOptions(max_length=2, temperature=0.7, num_return=2000)
    decoded = run(options, rows=(5,), rng=jax.random.key(0))
    first = np.bincount(decoded.tokens[0, :, 0], minlength=6) / 2000
    expected = np.exp(TOY.log_probs(5, ()) / 0.7)
    np.testing.assert_allclose(first, expected / expected.sum(), atol=0.035)
    for text, total, score in zip(
        texts(decoded, 0)[:20], decoded.log_probs[0], decoded.scores[0], strict=False
    ):
        value = sum(TOY.log_probs(5, text[:i])[token] for i, token in enumerate(text))
        np.testing.assert_allclose([total, score], [value, value / len(text)], rtol=1e-5)


def test_a_draw_has_the_probabilities_asked_for():
    """Over several chunks, most of them without any probability, and the last one not full."""
    probs = np.zeros(1000, np.float32)
    probs[[3, 4, 70, 640, 999]] = [0.1, 0.2, 0.3, 0.15, 0.25]
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = np.asarray(jax.jit(jax.vmap(draw, (0, None)))(keys, probs))
    np.testing.assert_allclose(np.bincount(drawn, minlength=1000) / 4000, probs, atol=0.03)
    assert set(drawn.tolist()) == {3, 4, 70, 640, 999}


def test_a_key_a_row_makes_a_row_independent_of_its_place():
    options = DecodeOptions(max_length=8, temperature=1.0, top_p=0.8, num_return=2)
    keys = jax.random.split(jax.random.key(1), 4)
    there = run(options, rng=keys)
    back = run(options, rows=ROWS[::-1], rng=keys[::-1])
    np.testing.assert_array_equal(there.tokens, back.tokens[::-1])


def test_tiny_nucleus_is_greedy():
    greedy = run(DecodeOptions(max_length=8, length_penalty=0.5))
    nucleus = run(DecodeOptions(max_length=8, temperature=1.0, top_p=1e-6), rng=jax.random.key(0))
    np.testing.assert_array_equal(greedy.tokens, nucleus.tokens)


def test_sampling_without_a_key_is_refused():
    with pytest.raises(UserError, match="give `rng`"):
        run(DecodeOptions(max_length=8, temperature=1.0))


@pytest.mark.parametrize("kind", ["greedy", "beams", "last token"])
def test_no_step_is_run_that_is_not_needed(kind):
    """A counter outside the search sees every step that is really executed."""
    seen = []

    def step(cache, tokens, t):
        jax.debug.callback(lambda: seen.append(1))
        return TOY.step(cache, tokens, t)

    options = {
        "greedy": DecodeOptions(max_length=8),
        "beams": DecodeOptions(max_length=8, beams=3, length_penalty=0.0),
        "last token": DecodeOptions(max_length=3, min_length=2),
    }[kind]

    @jax.jit
    def counted(rows):
        logits, cache = TOY.prefill(rows)
        return search(logits, cache, step, options=options, end_id=END, pad_id=PAD)

    # A row that ends early, by itself: its batch stops when it does.
    row = {"greedy": min(ROWS, key=lambda r: len(greedy_twin(TOY.log_probs, r, options)[0]))}.get(kind, 0)
    jax.block_until_ready(counted(jnp.asarray([row])))
    jax.effects_barrier()
    if kind == "greedy":
        tokens = len(greedy_twin(TOY.log_probs, row, options)[0])
    elif kind == "beams":
        tokens = beam_twin(TOY.log_probs, row, options)[1]
    else:
        tokens = 3
    assert len(seen) == tokens - 1
    assert kind == "last token" or tokens < 8, "nothing to stop early"
