"""What every search shares: the step function, its cache, the rows of a batch, and what comes out."""

from __future__ import annotations

import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from bvl.decode.options import DecodeOptions

# Every leaf has leading axes [c, k, ...]: c = copies * b rows (copy j of row i at j * b + i) and k beams.
Cache = PyTree[Array]
# step(cache, tokens [c, k], t) -> (logits [c, k, V], cache), where `tokens` are the t-th generated ones.
Step = Callable[[Cache, Int[Array, "c k"], Int[Array, ""]], tuple[Float[Array, "c k V"], Cache]]
# merge(logits [c, k, V]) -> log-probabilities [b, k, V].
Merge = Callable[[Float[Array, "c k V"]], Float[Array, "b k V"]]


class Decoded(typing.NamedTuple):
    """n texts a row, best first (samples: as drawn).

    `tokens` are followed by pad; `lengths` count END. `log_probs` are sums over the tokens, after guidance and
    constraints but without temperature or diversity; `scores` are log_probs / lengths**length_penalty. A text
    that the constraints made impossible has score -inf.
    """

    tokens: Int[Array, "b n L"]
    lengths: Int[Array, "b n"]
    scores: Float[Array, "b n"]
    log_probs: Float[Array, "b n"]


def log_softmax(logits: Float[Array, "... V"]) -> Float[Array, "... V"]:
    """log_softmax in f32 over the last axis; all -inf, where jax.nn's has NaN, if all logits are."""
    logits = logits.astype(jnp.float32)
    top = logits.max(-1, keepdims=True)
    shifted = logits - jnp.where(jnp.isfinite(top), top, 0.0)
    total = jnp.exp(shifted).sum(-1, keepdims=True)
    return shifted - jnp.log(jnp.where(total > 0, total, 1.0))


def spread(cache: Cache, k: int) -> Cache:
    """A cache of one beam, [c, 1, ...], as one of k equal beams."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (x.shape[0], k, *x.shape[2:])), cache)


def reorder(cache: Cache, parents: Int[Array, "b k"]) -> Cache:
    """Beam p of a row's result is its beam parents[p], in every copy of the row."""
    b, k = parents.shape

    def take(x: Array) -> Array:
        rows = x.shape[0]
        start = jnp.arange(rows)[:, None] * k
        index = (start + jnp.tile(parents, (rows // b, 1))).reshape(-1)
        # Whole rows copied by flat index are the fastest form on a CPU; parents are always beams of the row.
        flat = x.reshape(rows * k, *x.shape[2:])
        return flat.at[index].get(mode="promise_in_bounds").reshape(x.shape)

    return jax.tree.map(take, cache)


def advance(
    step: Step, cache: Cache, tokens: Int[Array, "b k"], t: Int[Array, ""], copies: int
) -> tuple[Float[Array, "c k V"], Cache]:
    """Run the step with every copy of a row reading the row's tokens."""
    return step(cache, jnp.tile(tokens, (copies, 1)), t)


def length_norm(options: DecodeOptions) -> Float[Array, " L+1"]:
    """length**length_penalty for lengths 0 (taken as 1) .. max_length."""
    lengths = jnp.maximum(jnp.arange(options.max_length + 1, dtype=jnp.float32), 1.0)
    return lengths**options.length_penalty
