"""Exact top k of long rows, in two stages.

A row is cut into chunks. The m largest elements lie in the m chunks with the largest maxima, so only those are
searched. Plain maxima are several times as fast as lax.top_k on a CPU. Equal elements are ordered
by index, as in lax.top_k: a chunk left out has m maxima before it that are larger, or equal and of lower index.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

CHUNK = 64


def top_k(x: Float[Array, "... n"], k: int) -> tuple[Float[Array, "... k"], Int[Array, "... k"]]:
    """Values and indices of lax.top_k over the last axis. Needs k <= n."""
    n = x.shape[-1]
    if n <= 4 * k * CHUNK:
        return lax.top_k(x, k)
    chunks = chunked(x, -jnp.inf)
    _, chosen = lax.top_k(chunks.max(-1), k)
    chosen = jnp.sort(chosen, axis=-1)
    found = jnp.take_along_axis(chunks, chosen[..., None], axis=-2)
    values, place = lax.top_k(found.reshape(*x.shape[:-1], k * CHUNK), k)
    return values, jnp.take_along_axis(chosen, place // CHUNK, axis=-1) * CHUNK + place % CHUNK


def chunked(x: Float[Array, "... n"], fill: float) -> Float[Array, "... chunks CHUNK"]:
    """The last axis as rows of CHUNK, the last one filled up."""
    n = x.shape[-1]
    chunks = -(-n // CHUNK)
    if chunks * CHUNK != n:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, chunks * CHUNK - n)], constant_values=fill)
    return x.reshape(*x.shape[:-1], chunks, CHUNK)
