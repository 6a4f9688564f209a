"""Batch norm (Ioffe & Szegedy 2015, arXiv:1502.03167) over the global batch, or with fixed statistics."""

from __future__ import annotations

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bvl.models.layers import zeros_init

BatchNormMode = Literal["synced", "frozen"]


def _ones_init(*names: str | None):
    return nn.with_partitioning(nn.initializers.ones_init(), names)


def last(_: Any, new: Any) -> Any:
    return new


class BatchNorm(nn.Module):
    """Normalise each channel by mean and variance, then scale and shift; statistics in float32.

    mode "synced": in training, the statistics of the global batch (of all devices: under `jit` the batch is one
    array), and the running ones move towards them by `momentum`; in evaluation, the running ones.
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
        scale = self.param("scale", (zeros_init if self.zero_scale else _ones_init)("norm"), shape)
        bias = self.param("bias", zeros_init("norm"), shape)
        running_mean = jax.lax.stop_gradient(self.param("running_mean", zeros_init("norm"), shape))
        running_var = jax.lax.stop_gradient(self.param("running_var", _ones_init("norm"), shape))
        x = x.astype(jnp.float32)
        mean, variance = running_mean, running_var
        if training and self.mode == "synced":
            mean = x.mean((0, 1, 2))
            variance = jnp.square(x - mean).mean((0, 1, 2))
            count = x.size // x.shape[-1]
            unbiased = variance * (count / max(count - 1, 1))
            for name, old, new in (("mean", running_mean, mean), ("var", running_var, unbiased)):
                moved = old + self.momentum * (jax.lax.stop_gradient(new) - old)
                self.sow("statistics", f"running_{name}", moved, reduce_fn=last)
        factor = scale * jax.lax.rsqrt(variance + self.epsilon)
        return ((x - mean) * factor + bias).astype(self.dtype)
