"""A decoder whose logits are a table indexed by a hash of the whole text, and numpy twins of the searches.

Its cache holds the text itself, so a beam that is given another beam's cache writes something else.
"""

from __future__ import annotations

import itertools

import jax.numpy as jnp
import numpy as np

END, PAD = 0, 1
BUCKETS = 997


class Toy:
    """`step` and `prefill` of the decode contract, and `log_probs` of one text, computed without a cache."""

    def __init__(self, vocabulary: int, length: int, *, seed: int = 0, spread: float = 1.5):
        rng = np.random.default_rng(seed)
        self.table = (rng.normal(size=(BUCKETS, vocabulary)) * spread).astype(np.float32)
        self.weights = rng.integers(1, BUCKETS, size=length)
        self.vocabulary, self.length = vocabulary, length

    def logits(self, row: int, text: tuple[int, ...]) -> np.ndarray:
        code = 31 * row + sum((token + 1) * int(w) for token, w in zip(text, self.weights, strict=False))
        return self.table[code % BUCKETS].astype(np.float64)

    def log_probs(self, row: int, text: tuple[int, ...]) -> np.ndarray:
        return log_softmax(self.logits(row, text))

    def prefill(self, rows):
        """Logits of the first token of `rows` (their numbers), and a cache of one beam."""
        rows = jnp.asarray(rows, jnp.int32)
        cache = {
            "row": rows[:, None],
            "text": jnp.full((len(rows), 1, self.length), -1, jnp.int32),
            "steps": jnp.zeros((len(rows), 1), jnp.int32),
        }
        return jnp.asarray(self.table)[31 * rows % BUCKETS], cache

    def step(self, cache, tokens, t):
        text = cache["text"].at[:, :, t].set(tokens)
        code = 31 * cache["row"] + ((text + 1) * jnp.asarray(self.weights, jnp.int32)).sum(-1)
        cache = {"row": cache["row"], "text": text, "steps": cache["steps"] + 1}
        return jnp.asarray(self.table)[code % BUCKETS], cache


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def guided(log_probs_of, null_of, scale):
    """log_probs_of and null_of(row, text) -> [V]; their guided combination."""

    def combined(row, text):
        return log_softmax((1 - scale) * null_of(row, text) + scale * log_probs_of(row, text))

    return combined


def greedy_twin(log_probs_of, row, options):
    """(text, sum) of the likeliest token at each position."""
    text, total = (), 0.0
    while len(text) < options.max_length and END not in text:
        log_probs = log_probs_of(row, text)
        token = int(log_probs.argmax())
        text, total = (*text, token), total + log_probs[token]
    return text, total


def brute_force_twin(log_probs_of, row, options, vocabulary):
    """(score, text) of every text there is, best first."""
    found = []
    for length in range(1, options.max_length + 1):
        for text in itertools.product(range(vocabulary), repeat=length):
            ends = text[-1] == END or length == options.max_length
            if END in text[:-1] or not ends:
                continue
            total = sum(log_probs_of(row, text[:i])[token] for i, token in enumerate(text))
            found.append((total / length**options.length_penalty, text))
    return sorted(found, reverse=True)


def beam_twin(log_probs_of, row, options):
    """(score, text) as beam search and diverse beam search return them, from lists of texts.

    Also gives the number of tokens after which the search stopped.
    """
    k, L, power = options.beams // options.groups, options.max_length, options.length_penalty
    running = [[(0.0, ())] for _ in range(options.groups)]
    kept = [[] for _ in range(options.groups)]
    t = 0
    while t < L and any(running):
        counts: dict[int, int] = {}
        for g in range(options.groups):
            ranked = []
            for total, text in running[g]:
                for token, value in enumerate(log_probs_of(row, text)):
                    if np.isfinite(value):
                        rank = total + value - options.diversity * counts.get(token, 0)
                        ranked.append((rank, total + value, (*text, token)))
            ranked.sort(key=lambda entry: -entry[0])
            for _, total, text in ranked[:k]:
                if text[-1] == END or t == L - 1:
                    kept[g].append((total / (t + 1) ** power, text))
            kept[g] = sorted(kept[g], key=lambda entry: -entry[0])[:k]
            going_on = [(total, text) for _, total, text in ranked[: 2 * k] if text[-1] != END][:k]
            for _, text in going_on:
                counts[text[-1]] = counts.get(text[-1], 0) + 1
            if going_on and len(kept[g]) == k:
                # Where the best length is not known, all that are still to come are tried.
                lengths = range(t + 2, L + 1) if options.exact_stop or power <= 0 else [t + 1]
                best = max(total for total, _ in going_on)
                if all(best / length**power <= kept[g][-1][0] for length in lengths):
                    going_on = []
            running[g] = going_on if t < L - 1 else []
        t += 1
    by_rank = itertools.zip_longest(*kept)
    ordered = [
        entry
        for entries in by_rank
        for entry in sorted((e for e in entries if e is not None), key=lambda entry: -entry[0])
    ]
    return ordered[: options.num_return], t


def texts(decoded, row):
    """The texts of one row, without what follows them; checks that only pads follow."""
    found = []
    for tokens, length in zip(np.asarray(decoded.tokens[row]), np.asarray(decoded.lengths[row]), strict=True):
        assert (tokens[length:] == PAD).all()
        found.append(tuple(int(token) for token in tokens[:length]))
    return found
