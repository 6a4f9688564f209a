"""Greedy search and sampling: one path a text, no beams to reorder."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key

from bvl.decode.options import DecodeOptions
from bvl.decode.state import Cache, Decoded, Merge, Step, advance, length_norm, log_softmax, spread
from bvl.decode.topk import chunked
from bvl.decode.truncation import truncate

Constrain = Callable[[Float[Array, "b k V"], Int[Array, "b k L"], Int[Array, ""]], Float[Array, "b k V"]]


def walk(
    logits: Float[Array, "c V"],
    cache: Cache,
    step: Step,
    *,
    options: DecodeOptions,
    end_id: int,
    pad_id: int,
    merge: Merge,
    constrain: Constrain,
    rng: Key[Array, ""] | Key[Array, " b"] | None,
) -> Decoded:
    """Greedy search, or `num_return` samples a row; arguments as in `bvl.decode.search.search`."""
    first = merge(logits[:, None])
    b, n, L = len(first), options.num_return, options.max_length
    copies = len(logits) // b
    keys = row_keys(rng, b, n) if options.sampling else None

    def write(log_probs, t, tokens, finished, total, lengths):
        log_probs = constrain(log_probs, tokens, t)
        if options.sampling:
            token = sample(log_probs, keys, t, options)
        else:
            token = jnp.argmax(log_probs, axis=-1).astype(jnp.int32)
        gain = jnp.take_along_axis(log_probs, token[..., None], axis=-1)[..., 0]
        # Where no token is possible the text ends here; its score, -inf, says so.
        token = jnp.where(gain == -jnp.inf, end_id, token)
        total = total + jnp.where(finished, 0.0, gain)
        lengths = lengths + ~finished
        token = jnp.where(finished, pad_id, token)
        tokens = lax.dynamic_update_slice_in_dim(tokens, token[..., None], t, axis=-1)
        return token, tokens, finished | (token == end_id), total, lengths

    def more(state):
        t, _, _, _, finished, _, _ = state
        return (t < L) & ~finished.all()

    def body(state):
        t, cache, token, tokens, finished, total, lengths = state
        logits, cache = advance(step, cache, token, t - 1, copies)
        token, *rest = write(merge(logits), t, tokens, finished, total, lengths)
        return t + 1, cache, token, *rest

    start = write(
        jnp.broadcast_to(first, (b, n, first.shape[-1])),
        jnp.int32(0),
        jnp.full((b, n, L), pad_id, jnp.int32),
        jnp.zeros((b, n), bool),
        jnp.zeros((b, n), jnp.float32),
        jnp.zeros((b, n), jnp.int32),
    )
    state = lax.while_loop(more, body, (jnp.int32(1), spread(cache, n), *start))
    tokens, total, lengths = state[3], state[5], state[6]
    return Decoded(tokens, lengths, total / length_norm(options)[lengths], total)


def row_keys(rng: Key[Array, ""] | Key[Array, " b"], b: int, n: int) -> Key[Array, "b n"]:
    """A key for each sample of each row, which no other row of the batch changes."""
    rows = jax.vmap(jax.random.fold_in, (None, 0))(rng, jnp.arange(b)) if rng.ndim == 0 else rng
    return jax.vmap(lambda key: jax.vmap(lambda j: jax.random.fold_in(key, j))(jnp.arange(n)))(rows)


def sample(
    log_probs: Float[Array, "b n V"], keys: Key[Array, "b n"], t: Int[Array, ""], options: DecodeOptions
) -> Int[Array, "b n"]:
    """Draw from the distribution that temperature, top_k and top_p leave, with the keys of position t."""
    log_probs = truncate(log_probs / options.temperature, top_k=options.top_k, top_p=options.top_p)
    probs = jnp.exp(log_softmax(log_probs))
    return jax.vmap(jax.vmap(lambda key, p: draw(jax.random.fold_in(key, t), p)))(keys, probs)


def draw(key: Key[Array, ""], probs: Float[Array, " V"]) -> Int[Array, ""]:
    """An index with probability in proportion to `probs`: a chunk by its sum, then an element of the chunk.

    Two random numbers instead of the V of jax.random.categorical, whose making takes longer than a small decoder.
    """
    chunks = chunked(probs, 0.0)
    uniform = jax.random.uniform(key, (2,))
    chunk = _invert(chunks.sum(-1), uniform[0])
    index = chunk * chunks.shape[-1] + _invert(chunks[chunk], uniform[1])
    return jnp.minimum(index, len(probs) - 1).astype(jnp.int32)


def _invert(mass: Float[Array, " n"], uniform: Float[Array, ""]) -> Int[Array, ""]:
    """The index at which the cumulated mass passes `uniform` of the whole; one with mass, whatever the rounding."""
    cumulated = jnp.cumsum(mass)
    passed = (cumulated > uniform * cumulated[-1]) & (mass > 0)
    return jnp.where(passed.any(), jnp.argmax(passed), jnp.argmax(mass))
