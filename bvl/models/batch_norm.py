"""Batch norm (Ioffe & Szegedy 2015, arXiv:1502.03167) over the global batch, or with fixed statistics."""

from __future__ import annotations

import functools
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bvl.models.layers import constant_init, zeros_init

BatchNormMode = Literal["synced", "frozen"]


def _latest(_: Any, new: Any) -> Any:
    return new


Statistics = tuple[Float[Array, " c"], Float[Array, " c"]]


def normalize_naive(
    x: Float[Array, "b h w c"], scale: Float[Array, " c"], bias: Float[Array, " c"], epsilon: float
) -> tuple[Float[Array, "b h w c"], Statistics]:
    """Equation for a batch (Ioffe & Szegedy 2015, algorithm 1): (output, (mean, biased variance))."""
    axes = tuple(range(x.ndim - 1))
    wide = x.astype(jnp.float32)
    mean = wide.mean(axes)
    variance = jnp.square(wide - mean).mean(axes)
    factor = scale * jax.lax.rsqrt(variance + epsilon)
    return ((wide - mean) * factor + bias).astype(x.dtype), (mean, variance)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalize(
    x: Float[Array, "b h w c"], scale: Float[Array, " c"], bias: Float[Array, " c"], epsilon: float
) -> tuple[Float[Array, "b h w c"], Statistics]:
    """`normalize_naive` with the closed form of its gradient, which keeps x alone and reads it twice.

    No gradient flows through the statistics that are returned.
    """
    return normalize_naive(x, scale, bias, epsilon)


def _forward(x, scale, bias, epsilon):
    y, (mean, variance) = normalize_naive(x, scale, bias, epsilon)
    return (y, (mean, variance)), (x, scale, bias, mean, jax.lax.rsqrt(variance + epsilon))


def _backward(epsilon, residuals, gradients):
    x, scale, bias, mean, inverse = residuals
    axes = tuple(range(x.ndim - 1))
    dy = gradients[0].astype(jnp.float32)
    unit = (x.astype(jnp.float32) - mean) * inverse
    dbias, dscale = dy.sum(axes), (dy * unit).sum(axes)
    count = x.size // x.shape[-1]
    dx = scale * inverse * (dy - dbias / count - unit * (dscale / count))
    return dx.astype(x.dtype), dscale, dbias


normalize.defvjp(_forward, _backward)


class BatchNorm(nn.Module):
    """Normalise each channel by mean and variance, then scale and shift; statistics in float32.

    mode "synced": in training, the statistics of the global batch (of all devices: under `jit` the batch is one
    array), and the running ones move towards them by `momentum`; in evaluation, the running ones.
    Rows that hold no image count like any other. Where only some stages of a tower are frozen, the statistics of all
    still move, as in torch.
    mode "frozen": always the running ones, which never change; scale and bias still learn. With these two in
    `optim.freeze` as well it is torchvision's FrozenBatchNorm2d.

    The running statistics lie among the parameters as `running_mean` and `running_var` and take no gradient. In
    training the new ones are sown into the collection "statistics" under the same path; the training step puts
    them in place. As in torch, the running variance is the unbiased one.
    """

    mode: BatchNormMode = "synced"
    momentum: float = 0.1
    epsilon: float = 1e-5
    # Residual branches start as zero with zeros here (Goyal et al. 2017, arXiv:1706.02677, section 5.1).
    zero_scale: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], *, training: bool) -> Float[Array, "b h w c"]:
        shape = (x.shape[-1],)
        scale = self.param("scale", constant_init(0.0 if self.zero_scale else 1.0, "norm"), shape)
        bias = self.param("bias", zeros_init("norm"), shape)
        running_mean = jax.lax.stop_gradient(self.param("running_mean", zeros_init("norm"), shape))
        running_var = jax.lax.stop_gradient(self.param("running_var", constant_init(1.0, "norm"), shape))
        if not training or self.mode == "frozen":
            factor = scale * jax.lax.rsqrt(running_var + self.epsilon)
            return ((x.astype(jnp.float32) - running_mean) * factor + bias).astype(self.dtype)
        y, (mean, variance) = normalize(x.astype(self.dtype), scale, bias, self.epsilon)
        count = x.size // x.shape[-1]
        unbiased = variance * (count / max(count - 1, 1))
        for name, old, new in (("mean", running_mean, mean), ("var", running_var, unbiased)):
            moved = jax.lax.stop_gradient(old + self.momentum * (new - old))
            self.sow("statistics", f"running_{name}", moved, reduce_fn=_latest)
        return y
