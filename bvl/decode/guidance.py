"""Classifier-free guidance of a text decoder: two sets of logits, with and without the condition, in one step.

Kornblith et al. 2023, "Guiding image captioning models toward more specific captions" (arXiv:2307.16686).
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from bvl.decode.state import Cache, Merge, Step, log_softmax
from bvl.errors import UserError

Scale = float | Float[Array, ""] | Float[Array, " b"]


def guide(
    conditional: Float[Array, "b ... V"], null: Float[Array, "b ... V"], scale: Scale
) -> Float[Array, "b ... V"]:
    """Normalised (1 - g) log p_null + g log p_conditional (equation 3 of the paper) from logits, in f32.

    `scale` g is one number or one a row, and may be traced. A token that is -inf on either side is -inf in the
    result, at every g, and nothing is NaN. At g = 1 the result
    is exactly log_softmax(conditional), at g = 0 log_softmax(null), of the tokens possible on both sides.
    """
    possible = jnp.isfinite(conditional) & jnp.isfinite(null)
    g = jnp.asarray(scale, jnp.float32)
    g = g.reshape(g.shape + (1,) * (conditional.ndim - 1)) if g.ndim else g
    # Logits less their maximum differ from log-probabilities by a constant, which the normalisation takes out; so
    # one log_softmax is enough. At g = 1 it gets (1 - g) * finite + conditional, to the last bit.
    mixed = (1 - g) * _below_top(null, possible) + g * _below_top(conditional, possible)
    # 0 * -inf is NaN in `mixed`, but only where the token is impossible.
    return log_softmax(jnp.where(possible, mixed, -jnp.inf))


def _below_top(logits: Float[Array, "b ... V"], possible: Bool[Array, "b ... V"]) -> Float[Array, "b ... V"]:
    """Logits less the maximum of the possible ones; what is impossible may be NaN."""
    logits = logits.astype(jnp.float32)
    top = jnp.where(possible, logits, -jnp.inf).max(-1, keepdims=True)
    return logits - top


def guided_merge(scale: Scale) -> Merge:
    """`merge` of a search over doubled rows: conditional rows first, then the null rows."""

    def merge(logits: Float[Array, "2*b k V"]) -> Float[Array, "b k V"]:
        conditional, null = jnp.split(logits, 2)
        return guide(conditional, null, scale)

    return merge


def join_steps(step_a: Step, step_b: Step) -> Step:
    """One step of two models with b rows each, for an external language model as the null.

    Caches lie side by side as (cache_a, cache_b) and logits one below the other. Start it from
    jnp.concatenate([logits_a, logits_b]) and (cache_a, cache_b). Raises UserError if the models' vocabularies
    differ in size.
    """

    def step(
        cache: tuple[Cache, Cache], tokens: Int[Array, "2*b k"], t: Int[Array, ""]
    ) -> tuple[Float[Array, "2*b k V"], tuple[Cache, Cache]]:
        tokens_a, tokens_b = jnp.split(tokens, 2)
        logits_a, cache_a = step_a(cache[0], tokens_a, t)
        logits_b, cache_b = step_b(cache[1], tokens_b, t)
        if logits_a.shape[-1] != logits_b.shape[-1]:
            raise UserError(
                f"guidance between vocabularies of {logits_a.shape[-1]} and {logits_b.shape[-1]} tokens: "
                "use a language model with the captioner's tokenizer"
            )
        return jnp.concatenate([logits_a, logits_b]), (cache_a, cache_b)

    return step


def check_guidance(
    scale: float | Sequence[float] | np.ndarray, count: int, *, noun: str = "image"
) -> np.ndarray:
    """The guidance scale as f32, one number or one for each of `count` images (or whatever the `noun` says).

    Raises UserError if it cannot be used.
    """
    try:
        scales = np.asarray(scale, np.float32)
    except (TypeError, ValueError) as error:
        raise UserError(f"guidance={scale!r}: give a number, or one for each {noun}") from error
    if scales.ndim > 1 or (scales.ndim == 1 and len(scales) != count):
        raise UserError(
            f"guidance of shape {scales.shape} for {count} {noun}s: give one number, or one for each {noun}"
        )
    wrong = scales[~(np.isfinite(scales) & (scales >= 0))]
    if wrong.size:
        raise UserError(
            f"guidance={wrong.flat[0]}: must be a finite number of at least 0; 1 is plain decoding, "
            "2 makes captions more specific"
        )
    return scales
