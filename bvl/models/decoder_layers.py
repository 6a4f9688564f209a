"""Blocks of a text decoder: attention that can go on token by token, cross-attention, rotary positions, gated MLP.

A block sees its sequence in two ways with the same parameters: whole (`__call__`, for training and for the prefix of
a generation) and one token at a time (`step`). While generating, what all continuations of an image share (keys and
values of the prefix and of the visual tokens) is kept once an image, and only the generated tokens' keys and values
are kept for each continuation.
"""

from __future__ import annotations

from typing import Any, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from bvl.models.dropout import RowKeys, dropout, fold
from bvl.models.layers import Activation, Dense, LayerNorm, Mlp, constant_init
from bvl.models.rotary import RopeScaling, rotate

Norm = Literal["layer", "rms"]


@flax.struct.dataclass
class KeysValues:
    """Keys and values of one attention, each as its product reads it; otherwise XLA copies them for every token."""

    keys: Float[Array, "*rows h c s"]
    values: Float[Array, "*rows h s c"]


@flax.struct.dataclass
class LayerContext:
    """What the continuations of one image share in a block: keys and values of the prefix and of the visual tokens."""

    prefix: KeysValues
    visual: KeysValues | None


class RmsNorm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon) * scale over the last axis, in float32 (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    epsilon: float = 1e-6
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        scale = self.param("scale", constant_init(1.0, "norm"), (x.shape[-1],))
        x = x.astype(jnp.float32)
        return (x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.epsilon) * scale).astype(
            self.dtype
        )


def make_norm(kind: Norm, epsilon: float, dtype: Any) -> nn.Module:
    """The norm module of a decoder."""
    return (LayerNorm if kind == "layer" else RmsNorm)(epsilon, dtype=dtype)


class SelfAttention(nn.Module):
    """Self-attention with grouped heads (Ainslie et al. 2023, arXiv:2305.13245) and, with `rope_theta`, rotary positions."""

    width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool
    out_bias: bool
    rope_theta: float | None = None
    rope_scaling: RopeScaling | None = None
    dtype: Any = jnp.float32

    def setup(self):
        def dense(features: int, names: tuple[str, str], bias: bool) -> Dense:
            return Dense(features, names=names, use_bias=bias, dtype=self.dtype)

        self.query = dense(self.num_heads * self.head_dim, ("embed", "heads"), self.qkv_bias)
        self.key = dense(self.num_kv_heads * self.head_dim, ("embed", "heads"), self.qkv_bias)
        self.value = dense(self.num_kv_heads * self.head_dim, ("embed", "heads"), self.qkv_bias)
        self.out = dense(self.width, ("heads", "embed"), self.out_bias)

    def _heads(self, x: Float[Array, "*rows l d"], positions: Int[Array, "*rows l"]):
        def split(y: jax.Array) -> jax.Array:
            return y.reshape(*y.shape[:-1], -1, self.head_dim)

        q, k, v = split(self.query(x)), split(self.key(x)), split(self.value(x))
        if self.rope_theta is not None:
            q, k = (rotate(y, positions, self.rope_theta, self.rope_scaling) for y in (q, k))
        return q, k, v

    def __call__(
        self, x: Float[Array, "c l d"], mask: Bool[Array, "c l l"], positions: Int[Array, "c l"]
    ) -> tuple[Float[Array, "c l d"], KeysValues]:
        """(output, the keys and values)."""
        q, k, v = self._heads(x, positions)
        mixed = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None])
        own = KeysValues(rearrange(k, "c l h d -> c h d l"), rearrange(v, "c l h d -> c h l d"))
        return self.out(rearrange(mixed, "c l h d -> c l (h d)")), own

    def step(
        self,
        x: Float[Array, "c k d"],
        prefix: KeysValues,
        prefix_mask: Bool[Array, "c s"],
        generated: KeysValues,
        t: Int[Array, ""],
        positions: Int[Array, "c k"],
    ) -> tuple[Float[Array, "c k d"], KeysValues]:
        """Of the t-th generated token of k continuations; (output, `generated` with its keys and values)."""
        q, k, v = (y[:, :, 0] for y in self._heads(x[:, :, None], positions[:, :, None]))
        generated = KeysValues(
            _write(generated.keys, k[..., None], t, axis=4),
            _write(generated.values, v[..., None, :], t, axis=3),
        )
        k_beams, length = x.shape[1], prefix_mask.shape[1]
        q = rearrange(q, "c k (h g) d -> c k h g d", h=self.num_kv_heads) * q.shape[-1] ** -0.5
        # The continuations of a row ask for the same keys: one product for all of them.
        together = _einsum("chnd,chds->chns", rearrange(q, "c k h g d -> c h (k g) d"), prefix.keys)
        seen = jnp.arange(generated.keys.shape[4]) <= t
        scores = jnp.concatenate(
            [
                _masked(
                    rearrange(together, "c h (k g) s -> c k h g s", k=k_beams),
                    prefix_mask[:, None, None, None],
                ),
                _masked(_einsum("ckhgd,ckhds->ckhgs", q, generated.keys), seen),
            ],
            axis=-1,
        )
        share = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
        together = _einsum(
            "chns,chsd->chnd", rearrange(share[..., :length], "c k h g s -> c h (k g) s"), prefix.values
        )
        mixed = rearrange(together, "c h (k g) d -> c k h g d", k=k_beams) + _einsum(
            "ckhgs,ckhsd->ckhgd", share[..., length:], generated.values
        )
        return self.out(rearrange(mixed.astype(self.dtype), "c k h g d -> c k (h g d)")), generated


class CrossAttention(nn.Module):
    """Attention of text over visual tokens, whose keys and values are computed once."""

    width: int
    num_heads: int
    dtype: Any = jnp.float32

    def setup(self):
        def dense(*names: str) -> Dense:
            return Dense(self.width, names=names, dtype=self.dtype)

        self.query, self.key, self.value = (dense("embed", "heads") for _ in range(3))
        self.out = dense("heads", "embed")

    def keys_values(self, visual: Float[Array, "c s d"]) -> KeysValues:
        return KeysValues(
            rearrange(self.key(visual), "c s (h d) -> c h d s", h=self.num_heads),
            rearrange(self.value(visual), "c s (h d) -> c h s d", h=self.num_heads),
        )

    def __call__(
        self, x: Float[Array, "c l d"], visual: KeysValues, visual_mask: Bool[Array, "c s"]
    ) -> Float[Array, "c l d"]:
        """The l queries of a row are tokens of one text or one token each of several continuations."""
        q = rearrange(self.query(x), "c l (h d) -> c h l d", h=self.num_heads)
        scores = _einsum("chld,chds->chls", q * q.shape[-1] ** -0.5, visual.keys)
        share = jax.nn.softmax(_masked(scores, visual_mask[:, None, None]), axis=-1).astype(x.dtype)
        mixed = _einsum("chls,chsd->chld", share, visual.values)
        return self.out(rearrange(mixed.astype(self.dtype), "c h l d -> c l (h d)"))


class DecoderBlock(nn.Module):
    """Self-attention, then cross-attention over visual tokens where the block has it, then an MLP; each with its norm
    in front and a residual.

    cross_mlp: the cross-attention stands behind the MLP, with a norm of the visual tokens and an MLP of its own.
    """

    width: int
    num_heads: int
    mlp_hidden: int
    num_kv_heads: int
    head_dim: int
    cross_attention: bool
    cross_mlp: bool = False
    norm: Norm = "layer"
    norm_epsilon: float = 1e-5
    activation: Activation = "gelu_tanh"
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    rope_theta: float | None = None
    rope_scaling: RopeScaling | None = None
    dropout: float = 0.0
    dtype: Any = jnp.float32

    def setup(self):
        def norm() -> nn.Module:
            return make_norm(self.norm, self.norm_epsilon, self.dtype)

        def mlp() -> nn.Module:
            return Mlp(self.mlp_hidden, self.activation, self.mlp_bias, dtype=self.dtype)

        self.attention = SelfAttention(
            self.width,
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            self.qkv_bias,
            self.out_bias,
            self.rope_theta,
            self.rope_scaling,
            dtype=self.dtype,
        )
        self.attention_norm, self.mlp_norm, self.mlp = norm(), norm(), mlp()
        if self.cross_attention:
            self.cross, self.cross_norm = CrossAttention(self.width, self.num_heads, dtype=self.dtype), norm()
            if self.cross_mlp:
                self.visual_norm, self.image_mlp_norm, self.image_mlp = norm(), norm(), mlp()

    def visual(self, visual: Float[Array, "c s d"] | None) -> KeysValues | None:
        """Keys and values of the visual tokens for `__call__` and `step`; None without cross-attention."""
        if not self.cross_attention:
            return None
        return self.cross.keys_values(self.visual_norm(visual) if self.cross_mlp else visual)

    def __call__(
        self,
        x: Float[Array, "c l d"],
        mask: Bool[Array, "c l l"],
        positions: Int[Array, "c l"],
        visual: KeysValues | None,
        visual_mask: Bool[Array, "c s"] | None,
        keys: RowKeys | None = None,
    ) -> tuple[Float[Array, "c l d"], KeysValues]:
        """(output, keys and values of the self-attention)."""
        y, own = self.attention(self.attention_norm(x), mask, positions)
        x = x + dropout(y, self.dropout, fold(keys, 0))
        return self._rest(x, visual, visual_mask, keys), own

    def step(
        self,
        x: Float[Array, "c k d"],
        context: LayerContext,
        prefix_mask: Bool[Array, "c p"],
        visual_mask: Bool[Array, "c s"] | None,
        generated: KeysValues,
        t: Int[Array, ""],
        positions: Int[Array, "c k"],
    ) -> tuple[Float[Array, "c k d"], KeysValues]:
        """`__call__` for the t-th generated token of k continuations; (output, `generated` with the token)."""
        y, generated = self.attention.step(
            self.attention_norm(x), context.prefix, prefix_mask, generated, t, positions
        )
        return self._rest(x + y, context.visual, visual_mask), generated

    def _rest(self, x, visual, visual_mask, keys: RowKeys | None = None):
        def mlp(x: jax.Array) -> jax.Array:
            return x + dropout(self.mlp(self.mlp_norm(x)), self.dropout, fold(keys, 2))

        if not self.cross_attention:
            return mlp(x)
        x = mlp(x) if self.cross_mlp else x
        x = x + dropout(self.cross(self.cross_norm(x), visual, visual_mask), self.dropout, fold(keys, 1))
        if not self.cross_mlp:
            return mlp(x)
        return x + dropout(self.image_mlp(self.image_mlp_norm(x)), self.dropout, fold(keys, 3))


def _write(old: jax.Array, new: jax.Array, t: Int[Array, ""], *, axis: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), t, axis=axis)


def _einsum(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """In float32, whatever the operands are."""
    return jnp.einsum(equation, a, b.astype(a.dtype), preferred_element_type=jnp.float32)


def _masked(scores: jax.Array, mask: jax.Array) -> jax.Array:
    # Not -inf: a row without any key (padding before the prefix) must give numbers, though nobody reads them.
    return jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
