"""Top-k and top-p (nucleus) truncation of a distribution, exact in every row and without sorting it.

The likeliest tokens whose weight reaches a target, where a token weighs 1 for top-k and its probability for top-p,
are those above a threshold. It is found by bisection over the bits of the probabilities, which for floats that are not
negative rise with their value: 30 sums over the vocabulary, a tenth to a twentieth of the time of a sort on a CPU.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from bvl.decode.state import log_softmax

# The bits of every float in [0, 2) are below 2**30.
BITS = 30


def truncate(log_probs: Float[Array, "*m V"], *, top_k: int = 0, top_p: float = 1.0) -> Float[Array, "*m V"]:
    """-inf for all but the top_k likeliest tokens (0: all stay) and, of what is left, for all but the nucleus.

    The nucleus is the smallest set of likeliest tokens whose probability reaches top_p (Holtzman et al. 2020,
    arXiv:1904.09751); it has at least one token. Of equally likely tokens those of lower id are kept. The
    log-probabilities need not be normalised.
    """
    if 0 < top_k < log_probs.shape[-1]:
        probs = jnp.exp(log_softmax(log_probs))
        log_probs = jnp.where(_likeliest(probs, jnp.ones_like(probs), top_k), log_probs, -jnp.inf)
    if top_p < 1.0:
        probs = jnp.exp(log_softmax(log_probs))
        log_probs = jnp.where(_likeliest(probs, probs, top_p), log_probs, -jnp.inf)
    return log_probs


def _likeliest(
    probs: Float[Array, "*m V"], weights: Float[Array, "*m V"], target: float
) -> Bool[Array, "*m V"]:
    """The smallest set of likeliest tokens whose weights sum to at least `target`."""
    bits = lax.bitcast_convert_type(probs, jnp.int32)

    def weight_from(threshold: Int[Array, " *m"]) -> Float[Array, " *m"]:
        return jnp.where(bits >= threshold[..., None], weights, 0.0).sum(-1)

    def refine(i: Int[Array, ""], threshold: Int[Array, " *m"]) -> Int[Array, " *m"]:
        higher = threshold | (1 << (BITS - 1 - i))
        return jnp.where(weight_from(higher) >= target, higher, threshold)

    threshold = lax.fori_loop(0, BITS, refine, jnp.zeros(probs.shape[:-1], jnp.int32))
    above = weight_from(threshold + 1)[..., None]
    # Of the tokens at the threshold itself, only as many as the target still needs.
    ties = jnp.where(bits == threshold[..., None], weights, 0.0)
    before = jnp.cumsum(ties, axis=-1) - ties
    return (bits > threshold[..., None]) | ((bits == threshold[..., None]) & (above + before < target))
