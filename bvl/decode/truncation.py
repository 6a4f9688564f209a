"""Top-k and top-p (nucleus) truncation of a distribution, exact in every row."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from bvl.decode.state import log_softmax
from bvl.decode.topk import top_k as largest

# The bits of every float in [0, 2) are below 2**30.
BITS = 30


def truncate(log_probs: Float[Array, "*m V"], *, top_k: int = 0, top_p: float = 1.0) -> Float[Array, "*m V"]:
    """-inf for all but the top_k likeliest tokens (0: all stay) and, of what is left, for all but the nucleus.

    The log-probabilities need not be normalised. Of equally likely tokens those of lower id are kept.
    """
    if 0 < top_k < log_probs.shape[-1]:
        values, ids = largest(log_probs, top_k)
        values = truncate(values, top_p=top_p)
        return jnp.put_along_axis(jnp.full_like(log_probs, -jnp.inf), ids, values, axis=-1, inplace=False)
    if top_p < 1.0:
        return jnp.where(nucleus(jnp.exp(log_softmax(log_probs)), top_p), log_probs, -jnp.inf)
    return log_probs


def nucleus(probs: Float[Array, "*m V"], p: float) -> Bool[Array, "*m V"]:
    """The smallest set of likeliest tokens whose probability reaches p (Holtzman et al. 2020, arXiv:1904.09751).

    Nothing is sorted, which for a vocabulary takes longer than a small decoder. The set is all above a threshold,
    which is found by bisection over the bits of the probabilities: they rise with the value of a float that is
    not negative. Of the tokens at the threshold itself as many are taken as are still needed.
    """
    bits = lax.bitcast_convert_type(probs, jnp.int32)

    def mass_from(threshold: Int[Array, " *m"]) -> Float[Array, " *m"]:
        return jnp.where(bits >= threshold[..., None], probs, 0.0).sum(-1)

    def refine(i: Int[Array, ""], threshold: Int[Array, " *m"]) -> Int[Array, " *m"]:
        higher = threshold | (1 << (BITS - 1 - i))
        return jnp.where(mass_from(higher) >= p, higher, threshold)

    threshold = lax.fori_loop(0, BITS, refine, jnp.zeros(probs.shape[:-1], jnp.int32))
    above = mass_from(threshold + 1)[..., None]
    at_threshold = bits == threshold[..., None]
    ties = jnp.where(at_threshold, probs, 0.0)
    before = jnp.cumsum(ties, axis=-1) - ties
    return (bits > threshold[..., None]) | (at_threshold & (above + before < p))
