"""Next-token cross-entropy over a large vocabulary, without ever holding the logits of all of it.

The logits [tokens, vocabulary] are by far the largest array of a captioner's step. Here they are made in chunks of
the vocabulary, forward and again backward, where each chunk's softmax follows from the saved log-sum-exp:

    loss_i        = lse_i - (1 - e) l_i[target_i] - e mean_v l_i[v]
    d loss / d l  = softmax(l) - (1 - e) onehot(target) - e / V
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bvl.errors import ConfigError

# Logits in one chunk by default: 2^22 are 16 MiB of f32. Below 1024 columns the products starve.
CHUNK_LOGITS = 2**22
_MIN_CHUNK = 1024


def next_token_loss(
    hidden: Float[Array, "n d"],
    table: Float[Array, "V d"],
    targets: Int[Array, " n"],
    weights: Float[Array, " n"],
    *,
    bias: Float[Array, " V"] | None = None,
    label_smoothing: float = 0.0,
    chunk_size: int | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(sum of weights * losses, sum of weights where the most probable token is the target); see `token_losses`.

    Rows of weight 0 count for nothing, whatever their target is.
    """
    losses, correct = token_losses(
        hidden, table, targets, bias=bias, label_smoothing=label_smoothing, chunk_size=chunk_size
    )
    weights = weights.astype(jnp.float32)
    return jnp.sum(weights * losses), jnp.sum(weights * correct)


def naive_next_token_loss(
    hidden: Float[Array, "n d"],
    table: Float[Array, "V d"],
    targets: Int[Array, " n"],
    weights: Float[Array, " n"],
    *,
    bias: Float[Array, " V"] | None = None,
    label_smoothing: float = 0.0,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """What `next_token_loss` computes, from all logits at once."""
    losses, correct = _from_all_logits(hidden, table, bias, targets, label_smoothing)
    weights = weights.astype(jnp.float32)
    return jnp.sum(weights * losses), jnp.sum(weights * correct)


def token_losses(
    hidden: Float[Array, "n d"],
    table: Float[Array, "V d"],
    targets: Int[Array, " n"],
    *,
    bias: Float[Array, " V"] | None = None,
    label_smoothing: float = 0.0,
    chunk_size: int | None = None,
) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """(cross-entropy of each row's target under softmax(hidden @ table.T + bias), whether it is the most probable).

    With label smoothing e the loss is (1 - e) nll(target) + e mean_v nll(v) (Szegedy et al. 2016, arXiv:1512.00567,
    section 7). Products are of hidden's type, everything else is float32. chunk_size: columns of the vocabulary that
    exist at once; by default about 2^22 logits, and no chunks where that is all of them. Raises ConfigError for a
    chunk_size below 1 or a label_smoothing outside [0, 1).
    """
    if not 0 <= label_smoothing < 1:
        raise ConfigError(f"label_smoothing={label_smoothing}: must lie in [0, 1)")
    if chunk_size is None:
        chunk_size = max(CHUNK_LOGITS // max(len(hidden), 1), _MIN_CHUNK)
    elif chunk_size < 1:
        raise ConfigError(f"chunk_size={chunk_size}: give at least 1, or None for the default")
    if chunk_size >= len(table):
        return _from_all_logits(hidden, table, bias, targets, label_smoothing)
    # As many chunks as asked for, but all of about the same width.
    chunk_size = -(-len(table) // -(-len(table) // chunk_size))
    return _chunked(hidden, table, bias, targets, label_smoothing, chunk_size)


def _from_all_logits(hidden, table, bias, targets, label_smoothing):
    logits = _logits(hidden, table, bias)
    is_target = targets[:, None] == jnp.arange(logits.shape[-1])
    expected = (1.0 - label_smoothing) * jnp.where(is_target, logits, 0.0).sum(-1)
    if label_smoothing:
        expected += label_smoothing * logits.mean(-1)
    losses = jax.nn.logsumexp(logits, axis=-1) - expected
    return losses, (logits.argmax(-1) == targets).astype(jnp.float32)


def _logits(hidden, table, bias):
    logits = jnp.einsum("nd,vd->nv", hidden, table.astype(hidden.dtype), preferred_element_type=jnp.float32)
    return logits if bias is None else logits + bias.astype(jnp.float32)


def _chunk(table, bias, targets, index, size):
    """Rows index * size ... of table and bias: (start, table rows, bias rows, is target [n, size], is new [size]).

    The last chunk begins early enough to be as wide as the others; what the one before it has seen is not new.
    """
    start = jnp.minimum(index * size, len(table) - size)
    rows = jax.lax.dynamic_slice_in_dim(table, start, size)
    biases = None if bias is None else jax.lax.dynamic_slice_in_dim(bias, start, size)
    token = start + jnp.arange(size)
    new = token >= index * size
    return start, rows, biases, (targets[:, None] == token) & new, new


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _chunked(hidden, table, bias, targets, label_smoothing, size):
    return _forward(hidden, table, bias, targets, label_smoothing, size)[0]


def _forward(hidden, table, bias, targets, label_smoothing, size):
    zeros = jnp.zeros(len(hidden), jnp.float32)

    def chunk(state, index):
        highest, best, normaliser, expected = state
        start, rows, biases, is_target, new = _chunk(table, bias, targets, index, size)
        logits = _logits(hidden, rows, biases)
        seen = jnp.where(new, logits, -jnp.inf)
        top = seen.max(-1)
        # The first of equal ones, as argmax has it.
        best = jnp.where(top > highest, start + seen.argmax(-1), best)
        raised = jnp.maximum(top, highest)
        normaliser = normaliser * jnp.exp(highest - raised) + jnp.exp(seen - raised[:, None]).sum(-1)
        expected += (1.0 - label_smoothing) * jnp.where(is_target, logits, 0.0).sum(-1)
        if label_smoothing:
            expected += label_smoothing / len(table) * jnp.where(new, logits, 0.0).sum(-1)
        return (raised, best, normaliser, expected), None

    start = (zeros - jnp.inf, jnp.zeros_like(targets), zeros, zeros)
    (highest, best, normaliser, expected), _ = jax.lax.scan(chunk, start, jnp.arange(_count(table, size)))
    lse = highest + jnp.log(normaliser)
    outputs = lse - expected, (best == targets).astype(jnp.float32)
    return outputs, (hidden, table, bias, targets, lse)


def _backward(label_smoothing, size, saved, cotangents):
    hidden, table, bias, targets, lse = saved
    scale = cotangents[0].astype(jnp.float32)[:, None]

    def chunk(state, index):
        d_hidden, d_table, d_bias = state
        start, rows, biases, is_target, new = _chunk(table, bias, targets, index, size)
        probs = jnp.exp(_logits(hidden, rows, biases) - lse[:, None])
        wanted = jnp.where(is_target, 1.0 - label_smoothing, 0.0) + label_smoothing / len(table)
        d_logits = jnp.where(new, scale * (probs - wanted), 0.0)
        if bias is not None:
            d_bias = _add(d_bias, d_logits.sum(0), start)
        d_logits = d_logits.astype(hidden.dtype)
        product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        d_hidden += product("nv,vd->nd", d_logits, rows.astype(hidden.dtype))
        return (d_hidden, _add(d_table, product("nv,nd->vd", d_logits, hidden), start), d_bias), None

    start = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (hidden, table, bias))
    grads, _ = jax.lax.scan(chunk, start, jnp.arange(_count(table, size)))
    d_hidden, d_table, d_bias = jax.tree.map(lambda g, x: g.astype(x.dtype), grads, (hidden, table, bias))
    return d_hidden, d_table, d_bias, None


def _count(table, size):
    return -(-len(table) // size)


def _add(whole, part, start):
    """`whole` with `part` added to its rows from `start` on."""
    there = jax.lax.dynamic_slice_in_dim(whole, start, len(part))
    return jax.lax.dynamic_update_slice_in_dim(whole, there + part, start, axis=0)


_chunked.defvjp(_forward, _backward)
