"""Transformer parts shared by all towers: attention, MLP, block, the stack of blocks, attention pooling.

Parameters carry logical axis names (`bvl.mesh.LOGICAL_RULES` places them). Layer norms and softmax compute in
float32 whatever the compute dtype. `keys` is one random key an example (bvl/models/dropout.py), None in evaluation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float

from bvl.mesh import constrain_rows
from bvl.models.dropout import RowKeys, drop_path, dropout, fold

Dtype = Any
RematPolicy = Literal["none", "full", "dots"]
Activation = Literal[
    "gelu", "gelu_tanh", "quick_gelu", "relu", "silu", "swiglu", "geglu", "geglu_tanh", "reglu"
]
ProductImplementation = Literal["auto", "rows", "columns"]

# What the backward pass may keep instead of recomputing, by name.
REMAT_POLICIES: dict[str, Callable[..., Any] | None] = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def dense_init(*names: str | None) -> Callable[..., Any]:
    """Kernel initialiser (LeCun normal over the first axis) with logical axis names."""
    return nn.with_partitioning(nn.initializers.lecun_normal(), names)


def l2_normalize(x: Float[Array, "... d"]) -> Float[Array, "... d"]:
    """Unit norm along the last axis, in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-12))


@jax.custom_vjp
def at_most(x: Float[Array, "*n"], limit: float) -> Float[Array, "*n"]:
    """min(x, limit), whose gradient descent can come back from the limit: only steps further up are cut off."""
    return jnp.minimum(x, limit)


def _at_most_backward(saved, cotangent):
    x, limit = saved
    # Descent goes against the gradient, so a positive one leads down.
    return jnp.where((x < limit) | (cotangent > 0), cotangent, 0.0), None


at_most.defvjp(lambda x, limit: (jnp.minimum(x, limit), (x, limit)), _at_most_backward)


def zeros_init(*names: str | None) -> Callable[..., Any]:
    return nn.with_partitioning(nn.initializers.zeros_init(), names)


def normal_init(stddev: float, *names: str | None) -> Callable[..., Any]:
    return nn.with_partitioning(nn.initializers.normal(stddev), names)


def constant_init(value: float, *names: str | None) -> Callable[..., Any]:
    return nn.with_partitioning(nn.initializers.constant(value), names)


class Dense(nn.Module):
    """Affine map of the last axis, with logical names for both axes of the kernel."""

    features: int
    names: tuple[str | None, str | None]
    use_bias: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
        kernel = self.param("kernel", dense_init(*self.names), (x.shape[-1], self.features))
        # As a product of two matrices: with more axes XLA on CPU copies the operands of the backward pass.
        rows = x.astype(self.dtype).reshape(-1, x.shape[-1])
        y = product(rows, kernel.astype(self.dtype))
        if self.use_bias:
            y += self.param("bias", zeros_init(self.names[1]), (self.features,)).astype(self.dtype)
        return constrain_rows(y.reshape(*x.shape[:-1], self.features))


def product(
    rows: Float[Array, "m i"], kernel: Float[Array, "i o"], *, implementation: ProductImplementation = "auto"
) -> Float[Array, "m o"]:
    """rows @ kernel.

    implementation: "columns" hands the rows over transposed, so that XLA on CPU multiplies without packing the kernel,
    which for a few rows takes longer than the product; "auto" takes it on CPU for 2 to 16 rows, else "rows".
    """
    if implementation == "auto":
        few = 2 <= len(rows) <= 16 and jax.default_backend() == "cpu"
        implementation = "columns" if few else "rows"
    if implementation == "rows":
        return jnp.dot(rows, kernel)
    # The barrier keeps XLA from folding the transposition into the product.
    columns = jax.lax.optimization_barrier(rows.T)
    return jax.lax.dot_general(columns, kernel, (((0,), (0,)), ((), ())))


class LayerNorm(nn.Module):
    """Layer norm over the last axis, computed in float32."""

    epsilon: float = 1e-5
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        scale = self.param("scale", constant_init(1.0, "norm"), (x.shape[-1],))
        bias = self.param("bias", zeros_init("norm"), (x.shape[-1],))
        x = x.astype(jnp.float32)
        mean = x.mean(-1, keepdims=True)
        variance = jnp.square(x - mean).mean(-1, keepdims=True)
        return ((x - mean) * jax.lax.rsqrt(variance + self.epsilon) * scale + bias).astype(self.dtype)


class Attention(nn.Module):
    """Multi-head attention of `queries` over `keys` (the queries themselves when absent).

    qk_norm: layer norm of every head's queries and keys, which keeps the logits small (Dehghani et al. 2023,
    arXiv:2302.05442, section 2). qkv_bias: of the maps to queries, keys and values.
    """

    num_heads: int
    qk_norm: bool = False
    norm_epsilon: float = 1e-5
    qkv_bias: bool = True
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
            names = ("embed", "heads")
            y = Dense(width, names=names, use_bias=self.qkv_bias, dtype=self.dtype, name=name)(x)
            y = rearrange(y, "b l (h c) -> b l h c", h=self.num_heads)
            if self.qk_norm and name != "value":
                y = LayerNorm(self.norm_epsilon, dtype=self.dtype, name=f"{name}_norm")(y)
            return y

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


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": gelu,
    # The tanh formula of the same paper, which SigLIP's So400m was trained with.
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    # x * sigmoid(1.702 x), the same paper's cruder formula, which OpenAI's CLIP was trained with.
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}
# Activations of an MLP with a gate -> that of the gate (Shazeer 2020, arXiv:2002.05202).
GATED: dict[str, str] = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu"}


class Mlp(nn.Module):
    """Two affine maps with an activation between.

    Those of GATED have a third map, as "swiglu": down(silu(gate(x)) * up(x)).
    """

    hidden: int
    activation: Activation = "gelu"
    use_bias: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        def dense(features: int, names: tuple[str, str], name: str) -> Dense:
            return Dense(features, names=names, use_bias=self.use_bias, dtype=self.dtype, name=name)

        h = dense(self.hidden, ("embed", "mlp"), "up")(x)
        if self.activation in GATED:
            gate = ACTIVATIONS[GATED[self.activation]]
            h = gate(dense(self.hidden, ("embed", "mlp"), "gate")(x)) * h
        else:
            h = ACTIVATIONS[self.activation](h)
        return dense(x.shape[-1], ("mlp", "embed"), "down")(h)


class LayerScale(nn.Module):
    """A learned factor for every channel of a residual branch (Touvron et al. 2021, arXiv:2103.17239)."""

    initial: float
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        return x * self.param("scale", constant_init(self.initial, "norm"), x.shape[-1:]).astype(self.dtype)


class Block(nn.Module):
    """Transformer block; norm: "pre" normalises what enters a branch, "post" the sum after it (BERT).

    dropout: of both branches' outputs. drop_path: stochastic depth, used where the call gives no rate of its own.
    """

    num_heads: int
    mlp_hidden: int
    causal: bool = False
    norm: Literal["pre", "post"] = "pre"
    norm_epsilon: float = 1e-5
    activation: Activation = "gelu"
    qk_norm: bool = False
    qkv_bias: bool = True
    layer_scale: float | None = None
    dropout: float = 0.0
    drop_path: float = 0.0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b l d"],
        key_mask: Bool[Array, "b l"] | None = None,
        keys: RowKeys | None = None,
        drop_path_rate: Float[Array, ""] | float | None = None,
    ) -> Float[Array, "b l d"]:
        attention = Attention(
            self.num_heads,
            self.qk_norm,
            self.norm_epsilon,
            self.qkv_bias,
            dtype=self.dtype,
            name="attention",
        )
        mlp = Mlp(self.mlp_hidden, self.activation, dtype=self.dtype, name="mlp")
        rate = self.drop_path if drop_path_rate is None else drop_path_rate

        def branch(name: str, place: int, x: jax.Array, function: Callable[[jax.Array], jax.Array]):
            norm = LayerNorm(self.norm_epsilon, dtype=self.dtype, name=f"{name}_norm")
            y = function(norm(x) if self.norm == "pre" else x)
            if self.layer_scale is not None:
                y = LayerScale(self.layer_scale, dtype=self.dtype, name=f"{name}_scale")(y)
            y = dropout(y, self.dropout, fold(keys, 2 * place))
            if self.drop_path:
                y = drop_path(y, rate, fold(keys, 2 * place + 1))
            return x + y if self.norm == "pre" else norm(x + y)

        x = branch("attention", 0, x, lambda h: attention(h, key_mask=key_mask, causal=self.causal))
        return branch("mlp", 1, x, mlp)


class Stack(nn.Module):
    """`depth` blocks: a Python loop, or one `nn.scan` over stacked parameters; rematerialised by policy.

    The fields between `depth` and `scan` are those of `Block`. drop_path is the rate of the last block; it rises
    linearly from 0 at the first (Huang et al. 2016, arXiv:1603.09382).
    """

    depth: int
    num_heads: int
    mlp_hidden: int
    causal: bool = False
    norm: Literal["pre", "post"] = "pre"
    norm_epsilon: float = 1e-5
    activation: Activation = "gelu"
    qk_norm: bool = False
    qkv_bias: bool = True
    layer_scale: float | None = None
    dropout: float = 0.0
    drop_path: float = 0.0
    scan: bool = False
    remat: RematPolicy = "none"
    dtype: Dtype = jnp.float32

    def __call__(
        self,
        x: Float[Array, "b l d"],
        key_mask: Bool[Array, "b l"] | None = None,
        *,
        keys: RowKeys | None = None,
    ) -> Float[Array, "b l d"]:
        return self.run(x, key_mask, keys=keys)[0]

    @nn.compact
    def run(
        self,
        x: Float[Array, "b l d"],
        key_mask: Bool[Array, "b l"] | None = None,
        *,
        keys: RowKeys | None = None,
        levels: tuple[int, ...] = (),
    ) -> tuple[Float[Array, "b l d"], tuple[Float[Array, "b l d"], ...]]:
        """(output, the outputs of the blocks numbered in `levels`)."""
        block = Block
        if self.remat != "none":
            block = nn.remat(Block, prevent_cse=not self.scan, policy=REMAT_POLICIES[self.remat])
        shared = {f.name for f in dataclasses.fields(Block)} - {"parent", "name"}
        options = {name: getattr(self, name) for name in shared}
        rates = np.linspace(0.0, self.drop_path, self.depth, dtype=np.float32)
        x = constrain_rows(x)
        if not self.scan:
            outputs = {}
            for i in range(self.depth):
                x = constrain_rows(block(**options, name=f"block_{i}")(x, key_mask, fold(keys, i), rates[i]))
                outputs[i] = x
            return x, tuple(outputs[i] for i in levels)

        def body(module: nn.Module, carry: jax.Array, layer: tuple[jax.Array, jax.Array]):
            i, rate = layer
            carry = constrain_rows(module(constrain_rows(carry), key_mask, fold(keys, i), rate))
            return carry, carry if levels else None

        scanned = nn.scan(
            body,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, outputs = scanned(block(**options, name="blocks"), x, (jnp.arange(self.depth), jnp.asarray(rates)))
        return x, tuple(outputs[i] for i in levels)


class AttentionPool(nn.Module):
    """Pooling by one learned query (the SigLIP "map" head): attention, then a residual MLP."""

    num_heads: int
    mlp_hidden: int
    activation: Activation = "gelu"
    norm_epsilon: float = 1e-5
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b d"]:
        width = x.shape[-1]
        probe = self.param("probe", normal_init(width**-0.5, None, None, "embed"), (1, 1, width))
        probe = jnp.broadcast_to(probe, (x.shape[0], 1, width)).astype(self.dtype)
        x = Attention(self.num_heads, dtype=self.dtype, name="attention")(probe, x)
        h = LayerNorm(self.norm_epsilon, dtype=self.dtype, name="mlp_norm")(x)
        return (x + Mlp(self.mlp_hidden, self.activation, dtype=self.dtype, name="mlp")(h))[:, 0]
