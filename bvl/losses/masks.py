"""Losses of predicted masks, one value a mask, and the focal loss of single logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def mask_bce(logits: Float[Array, "*n h w"], target: Bool[Array, "*n h w"]) -> Float[Array, "*n"]:
    """Mean over the pixels of a mask of the binary cross-entropy."""
    return -jax.nn.log_sigmoid(_of_target(logits, target)).mean((-2, -1))


def mask_dice_loss(logits: Float[Array, "*n h w"], target: Bool[Array, "*n h w"]) -> Float[Array, "*n"]:
    """1 - (2 sum p t + 1) / (sum p + sum t + 1) of a mask, p = sigmoid(logits) (Milletari et al. 2016).

    The denominator has p and not p^2, and both have 1 added, so that an empty mask predicted empty costs 0
    (Cheng et al. 2021, MaskFormer).
    """
    p, t = jax.nn.sigmoid(logits.astype(jnp.float32)), target.astype(jnp.float32)
    both, sizes = (p * t).sum((-2, -1)), (p + t).sum((-2, -1))
    return 1.0 - (2.0 * both + 1.0) / (sizes + 1.0)


def sigmoid_focal_loss(
    logits: Float[Array, "*n"], targets: Bool[Array, "*n"], *, alpha: float = 0.25, gamma: float = 2.0
) -> Float[Array, "*n"]:
    """-alpha_t (1 - p_t)^gamma log p_t of each logit (Lin et al. 2017, eq. 5).

    p_t is the probability of the true answer, alpha_t is alpha for true and 1 - alpha for false targets.
    """
    x = _of_target(logits, targets)
    # By logarithms: the gradient of a power of exactly 0 is infinite for gamma below 1.
    hardness = jnp.exp(gamma * jax.nn.log_sigmoid(-x))
    return -jnp.where(targets, alpha, 1.0 - alpha) * hardness * jax.nn.log_sigmoid(x)


def _of_target(logits: Float[Array, "*n"], targets: Bool[Array, "*n"]) -> Float[Array, "*n"]:
    """The logit of the true answer."""
    logits = logits.astype(jnp.float32)
    return jnp.where(targets, logits, -logits)
