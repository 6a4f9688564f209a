"""Transformer parts shared by all towers: attention, MLP, block, the stack of blocks, attention pooling.

Parameters carry logical axis names (`bvl.mesh.LOGICAL_RULES` places them). Layer norms and softmax compute in
float32 whatever the compute dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float

Dtype = Any
RematPolicy = Literal["none", "full", "dots"]

# What the backward pass may keep instead of recomputing, by name.
REMAT_POLICIES: dict[str, Callable[..., Any] | None] = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def dense_init(*names: str | None) -> Callable[..., Any]:
    """Kernel initialiser (LeCun normal over the first axis) with logical axis names."""
    return nn.with_partitioning(nn.initializers.lecun_normal(), names)


def zeros_init(*names: str | None) -> Callable[..., Any]:
    return nn.with_partitioning(nn.initializers.zeros_init(), names)


def normal_init(stddev: float, *names: str | None) -> Callable[..., Any]:
    return nn.with_partitioning(nn.initializers.normal(stddev), names)


class Dense(nn.Module):
    """Affine map of the last axis, with logical names for both axes of the kernel."""

    features: int
    names: tuple[str | None, str | None]
    use_bias: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
        kernel = self.param("kernel", dense_init(*self.names), (x.shape[-1], self.features))
        y = jnp.dot(x.astype(self.dtype), kernel.astype(self.dtype))
        if self.use_bias:
            y += self.param("bias", zeros_init(self.names[1]), (self.features,)).astype(self.dtype)
        return y


class LayerNorm(nn.Module):
    """Layer norm over the last axis, computed in float32."""

    epsilon: float = 1e-5
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        scale = self.param(
            "scale", nn.with_partitioning(nn.initializers.ones_init(), ("norm",)), (x.shape[-1],)
        )
        bias = self.param("bias", zeros_init("norm"), (x.shape[-1],))
        x = x.astype(jnp.float32)
        mean = x.mean(-1, keepdims=True)
        variance = jnp.square(x - mean).mean(-1, keepdims=True)
        return ((x - mean) * jax.lax.rsqrt(variance + self.epsilon) * scale + bias).astype(self.dtype)


class Attention(nn.Module):
    """Multi-head attention of `queries` over `keys` (the queries themselves when absent)."""

    num_heads: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        queries: Float[Array, "b q d"],
        keys: Float[Array, "b k d"] | None = None,
        *,
        key_mask: Bool[Array, "b k"] | None = None,
        causal: bool = False,
    ) -> Float[Array, "b q d"]:
        width = queries.shape[-1]
        keys = queries if keys is None else keys

        def heads(name: str, x: jax.Array) -> jax.Array:
            y = Dense(width, names=("embed", "heads"), dtype=self.dtype, name=name)(x)
            return rearrange(y, "b l (h c) -> b l h c", h=self.num_heads)

        mask = None if key_mask is None else key_mask[:, None, None, :]
        mixed = jax.nn.dot_product_attention(
            heads("query", queries), heads("key", keys), heads("value", keys), mask=mask, is_causal=causal
        )
        return Dense(width, names=("heads", "embed"), dtype=self.dtype, name="out")(
            rearrange(mixed, "b l h c -> b l (h c)")
        )


def gelu(x: Float[Array, "*dims"]) -> Float[Array, "*dims"]:
    """x times the normal distribution function at x (Hendrycks & Gimpel 2016, arXiv:1606.08415), exactly.

    Written with erf: the erfc of `jax.nn.gelu(approximate=False)` costs a twentieth of a training step on CPU.
    """
    return 0.5 * x * (1.0 + jax.lax.erf(x * np.sqrt(0.5).astype(x.dtype)))


class Mlp(nn.Module):
    """Two affine maps with a GELU between."""

    hidden: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        h = Dense(self.hidden, names=("embed", "mlp"), dtype=self.dtype, name="up")(x)
        return Dense(x.shape[-1], names=("mlp", "embed"), dtype=self.dtype, name="down")(gelu(h))


class Block(nn.Module):
    """Pre-norm transformer block."""

    num_heads: int
    mlp_hidden: int
    causal: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b l d"], key_mask: Bool[Array, "b l"] | None = None
    ) -> Float[Array, "b l d"]:
        h = LayerNorm(dtype=self.dtype, name="attention_norm")(x)
        x = x + Attention(self.num_heads, dtype=self.dtype, name="attention")(
            h, key_mask=key_mask, causal=self.causal
        )
        h = LayerNorm(dtype=self.dtype, name="mlp_norm")(x)
        return x + Mlp(self.mlp_hidden, dtype=self.dtype, name="mlp")(h)


class Stack(nn.Module):
    """`depth` blocks: a Python loop, or one `nn.scan` over stacked parameters; rematerialised by policy."""

    depth: int
    num_heads: int
    mlp_hidden: int
    causal: bool = False
    scan: bool = False
    remat: RematPolicy = "none"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b l d"], key_mask: Bool[Array, "b l"] | None = None
    ) -> Float[Array, "b l d"]:
        block = Block
        if self.remat != "none":
            block = nn.remat(Block, prevent_cse=not self.scan, policy=REMAT_POLICIES[self.remat])
        options = dict(
            num_heads=self.num_heads, mlp_hidden=self.mlp_hidden, causal=self.causal, dtype=self.dtype
        )
        if not self.scan:
            for i in range(self.depth):
                x = block(**options, name=f"block_{i}")(x, key_mask)
            return x
        scanned = nn.scan(
            lambda module, carry, _: (module(carry, key_mask), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return scanned(block(**options, name="blocks"), x, None)[0]


class AttentionPool(nn.Module):
    """Pooling by one learned query (the SigLIP "map" head): attention, then a residual MLP."""

    num_heads: int
    mlp_hidden: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b d"]:
        width = x.shape[-1]
        probe = self.param("probe", normal_init(width**-0.5, None, None, "embed"), (1, 1, width))
        probe = jnp.broadcast_to(probe, (x.shape[0], 1, width)).astype(self.dtype)
        x = Attention(self.num_heads, dtype=self.dtype, name="attention")(probe, x)
        h = LayerNorm(dtype=self.dtype, name="mlp_norm")(x)
        return (x + Mlp(self.mlp_hidden, dtype=self.dtype, name="mlp")(h))[:, 0]
