"""What a text may not say: log-probabilities with -inf where a token is ruled out.

`without` rules out tokens for good, before log-probabilities are made. All else is applied to merged log-probabilities,
so with guidance to the guided ones, and nothing is renormalised.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from bvl.decode.options import DecodeOptions
from bvl.decode.state import Merge


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constraints:
    """Row i's t-th token is forced[i, t] where forced_mask[i, t]."""

    options: DecodeOptions
    end_id: int
    forced: Int[Array, "b F"] | None = None
    forced_mask: Bool[Array, "b F"] | None = None

    def __call__(
        self, log_probs: Float[Array, "b k V"], history: Int[Array, "b k L"], t: int | Int[Array, ""]
    ) -> Float[Array, "b k V"]:
        """Log-probabilities of token t, given that history[..., :t] is written. A forced token comes before all
        other rules and adds 0 to a text's score: it is given, not chosen."""
        options = self.options
        if options.repetition_penalty != 1.0:
            log_probs = penalize_repetition(log_probs, history, t, options.repetition_penalty)
        if options.no_repeat_ngram:
            log_probs = block_ngrams(log_probs, history, t, options.no_repeat_ngram)
        if options.min_length:
            ends = jnp.arange(log_probs.shape[-1]) == self.end_id
            log_probs = jnp.where(ends & (t < options.min_length), -jnp.inf, log_probs)
        if self.forced is not None:
            log_probs = force(log_probs, self.forced, self.forced_mask, t)
        return log_probs


def without(merge: Merge, forbidden: Bool[Array, " V"] | None) -> Merge:
    """`merge` of logits in which token v is impossible where forbidden[v]."""
    if forbidden is None:
        return merge
    return lambda logits: merge(jnp.where(forbidden, -jnp.inf, logits))


def penalize_repetition(
    log_probs: Float[Array, "b k V"],
    history: Int[Array, "b k L"],
    t: int | Int[Array, ""],
    penalty: float,
) -> Float[Array, "b k V"]:
    """Multiply the log-probabilities of tokens in history[..., :t] by `penalty`, once however often they occur.

    Keskar et al. 2019 (arXiv:1909.05858, section 4.1) divide logits, which favours a token whose logit is below
    0. Log-probabilities are never above 0, so a penalty above 1 always makes a token less likely.
    """
    b, k, V = log_probs.shape
    written = _written(history, t, V)
    values = jnp.take_along_axis(log_probs, jnp.minimum(written, V - 1), axis=-1) * penalty
    return _put(log_probs, written, values)


def block_ngrams(
    log_probs: Float[Array, "b k V"], history: Int[Array, "b k L"], t: int | Int[Array, ""], n: int
) -> Float[Array, "b k V"]:
    """-inf for each token that would complete an n-gram of history[..., :t] a second time (Paulus et al. 2017,
    arXiv:1705.04304, section 2.5).

    The last n - 1 tokens are compared with every window of the history at once; nothing of size V is made for
    a window.
    """
    num_windows = history.shape[-1] - n + 1
    if num_windows < 1:
        return log_probs
    V = log_probs.shape[-1]
    followers = _written(history, t, V)[..., n - 1 :]
    repeats = jnp.ones(followers.shape, bool)
    if n > 1:
        last = lax.dynamic_slice_in_dim(history, t - n + 1, n - 1, axis=-1)
        for j in range(n - 1):
            repeats &= history[..., j : j + num_windows] == last[..., j : j + 1]
    return _put(log_probs, jnp.where(repeats, followers, V), -jnp.inf)


def force(
    log_probs: Float[Array, "b k V"],
    forced: Int[Array, "b F"],
    mask: Bool[Array, "b F"] | None,
    t: int | Int[Array, ""],
) -> Float[Array, "b k V"]:
    """0 for the token a row is forced to write at position t, -inf for all others; other rows unchanged."""
    length = forced.shape[-1]
    if length == 0:
        return log_probs
    place = jnp.minimum(t, length - 1)
    here = jnp.asarray(t < length) if mask is None else (t < length) & mask[:, place, None, None]
    wanted = forced[:, place, None, None] == jnp.arange(log_probs.shape[-1])
    return jnp.where(here, jnp.where(wanted, 0.0, -jnp.inf), log_probs)


def _written(history: Int[Array, "b k L"], t: int | Int[Array, ""], V: int) -> Int[Array, "b k L"]:
    """The history with V, which is no token and scattered nowhere, from position t on."""
    return jnp.where(jnp.arange(history.shape[-1]) < t, history, V)


def _put(x: Float[Array, "b k V"], tokens: Int[Array, "b k m"], values) -> Float[Array, "b k V"]:
    b, k, V = x.shape
    rows = jnp.arange(b)[:, None, None]
    return x.at[rows, jnp.arange(k)[None, :, None], tokens].set(values, mode="drop")
