"""Supervised classification losses over rows that have labels."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def softmax_cross_entropy(
    logits: Float[Array, "b c"],
    labels: Float[Array, "b c"],
    *,
    valid: Bool[Array, " b"],
    class_weights: Float[Array, " c"] | None = None,
    label_smoothing: float = 0.0,
) -> Float[Array, ""]:
    """Mean over valid rows of -sum_c q_c log softmax(logits)_c, weighted by the row's class.

    q = (1 - e) labels + e / C. The mean divides by the sum of the rows' weights, so that weights change the
    balance between classes and not the size of the loss. 0 where no row is valid.
    """
    # Not only their losses: what stands in invalid rows must not reach the gradient either.
    log_p = jax.nn.log_softmax(jnp.where(valid[:, None], logits.astype(jnp.float32), 0.0))
    target = (1.0 - label_smoothing) * labels + label_smoothing / labels.shape[-1]
    weights = labels.sum(-1) if class_weights is None else labels @ class_weights
    weights = jnp.where(valid, weights, 0.0)
    losses = -jnp.sum(target * log_p, axis=-1)
    return jnp.sum(weights * losses) / jnp.maximum(weights.sum(), 1e-6)


def sigmoid_cross_entropy(
    logits: Float[Array, "b c"],
    labels: Float[Array, "b c"],
    *,
    valid: Bool[Array, "b c"],
    class_weights: Float[Array, " c"] | None = None,
    label_smoothing: float = 0.0,
) -> Float[Array, ""]:
    """Mean over valid (row, class) entries of the binary cross-entropy, each class times its weight.

    The target is (1 - e) label + e / 2. 0 where no entry is valid.
    """
    logits = jnp.where(valid, logits.astype(jnp.float32), 0.0)
    target = (1.0 - label_smoothing) * labels + 0.5 * label_smoothing
    losses = -target * jax.nn.log_sigmoid(logits) - (1.0 - target) * jax.nn.log_sigmoid(-logits)
    weights = (
        jnp.ones_like(losses) if class_weights is None else jnp.broadcast_to(class_weights, losses.shape)
    )
    weights = jnp.where(valid, weights, 0.0)
    return jnp.sum(weights * losses) / jnp.maximum(weights.sum(), 1e-6)
