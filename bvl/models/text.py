"""Text transformers of the CLIP type (causal, pooled at the end token; Radford et al. 2021, arXiv:2103.00020) and
of the SigLIP type (bidirectional, pooled at the last position; Zhai et al. 2023, arXiv:2303.15343)."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from bvl.errors import ConfigError
from bvl.models.dropout import RowKeys, check_rates, dropout, fold
from bvl.models.features import TextFeatures
from bvl.models.layers import Activation, LayerNorm, RematPolicy, Stack, normal_init
from bvl.models.variants import check_sizes

TextPool = Literal["end", "mean", "max", "last", "cls", "highest"]


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Vocabulary and context length are the tokenizer's, so they are not repeated here.

    CLIP: causal=True, pool="end". SigLIP: causal=False, pool="last", attend_padding=True, activation="gelu_tanh",
    norm_epsilon=1e-6.
    pool: "end" takes the token at the first end id, "mean" and "max" run over the text tokens, "last" takes the
    last position whatever stands there, "cls" the first, "highest" the token with the highest id (the end token, as
    OpenAI's CLIP looks for it).
    attend_padding: padding is read as if it were text, as SigLIP's towers do.
    qk_norm: layer norm of queries and keys. layer_scale: initial factor of the residual branches.
    dropout: of the embeddings and of both branches of each block; drop_path: stochastic depth.
    token_std, position_std: of the initial embeddings (CLIP's values).
    """

    width: int = 384
    depth: int = 6
    num_heads: int = 6
    mlp_hidden: int | None = None
    causal: bool = True
    pool: TextPool = "end"
    attend_padding: bool = False
    activation: Activation = "gelu"
    norm_epsilon: float = 1e-5
    qk_norm: bool = False
    layer_scale: float | None = None
    dropout: float = 0.0
    drop_path: float = 0.0
    token_std: float = 0.02
    position_std: float = 0.01
    scan: bool = False
    remat: RematPolicy = "none"

    def __post_init__(self):
        check_sizes("text", self.sizes)
        check_rates("text", dropout=self.dropout, drop_path=self.drop_path)
        if self.causal and self.pool == "cls":
            raise ConfigError("text pool='cls': under a causal mask the first token sees no other; use 'end'")
        if self.pool == "last" and not self.attend_padding:
            raise ConfigError(
                "text pool='last' reads the last position, which is padding for most texts: it needs "
                "attend_padding=True; for the last text token use pool='end'"
            )

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """(width, depth, num_heads, mlp_hidden)."""
        hidden = 4 * self.width if self.mlp_hidden is None else self.mlp_hidden
        return self.width, self.depth, self.num_heads, hidden

    def make(
        self, *, vocab_size: int, context_length: int, pad_id: int, end_id: int, dtype: Any = jnp.float32
    ) -> TextTransformer:
        """The tower for a tokenizer's vocabulary and context."""
        del pad_id  # The mask says what is padding.
        return TextTransformer(self, vocab_size, context_length, end_id, dtype)


class TextTransformer(nn.Module):
    """Token ids and their mask -> TextFeatures(pooled, tokens, mask)."""

    config: TextConfig
    vocab_size: int
    context_length: int
    end_id: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "b t"], mask: Bool[Array, "b t"], *, keys: RowKeys | None = None
    ) -> TextFeatures:
        config = self.config
        check_length(tokens, self.context_length)
        table = self.param(
            "token_embed", normal_init(config.token_std, "vocab", "embed"), (self.vocab_size, config.width)
        )
        positions = self.param(
            "positions",
            normal_init(config.position_std, "position", "embed"),
            (self.context_length, config.width),
        )
        x = table[tokens].astype(self.dtype) + positions[: tokens.shape[1]].astype(self.dtype)
        x = dropout(x, config.dropout, fold(keys, 0))
        # Under a causal mask no text token sees the padding behind it.
        key_mask = None if config.causal or config.attend_padding else mask
        x = Stack(
            depth=config.depth,
            num_heads=config.num_heads,
            mlp_hidden=config.sizes[3],
            causal=config.causal,
            activation=config.activation,
            norm_epsilon=config.norm_epsilon,
            qk_norm=config.qk_norm,
            layer_scale=config.layer_scale,
            dropout=config.dropout,
            drop_path=config.drop_path,
            scan=config.scan,
            remat=config.remat,
            dtype=self.dtype,
            name="stack",
        )(x, key_mask, keys=fold(keys, 1))
        x = LayerNorm(epsilon=config.norm_epsilon, dtype=self.dtype, name="norm")(x)
        return TextFeatures(
            pooled=pool_tokens(x, tokens, mask, config.pool, self.end_id), tokens=x, mask=mask
        )


def pool_tokens(
    x: Float[Array, "b t d"], tokens: Int[Array, "b t"], mask: Bool[Array, "b t"], pool: TextPool, end_id: int
) -> Float[Array, "b d"]:
    """One vector a text; "mean" and "max" of a row without any text are 0. See TextConfig for the kinds."""
    if pool == "cls":
        return x[:, 0]
    if pool == "last":
        return x[:, -1]
    if pool == "mean":
        weights = mask[..., None].astype(jnp.float32)
        return ((x * weights).sum(1) / jnp.maximum(weights.sum(1), 1.0)).astype(x.dtype)
    if pool == "max":
        highest = jnp.where(mask[..., None], x, jnp.finfo(x.dtype).min).max(1)
        return jnp.where(mask.any(1, keepdims=True), highest, 0)
    place = jnp.argmax(tokens if pool == "highest" else tokens == end_id, axis=1)
    return jnp.take_along_axis(x, place[:, None, None], axis=1)[:, 0]


def check_length(tokens: Int[Array, "b t"], context_length: int) -> None:
    """Raise ConfigError for texts longer than a tower was made for."""
    if tokens.shape[1] > context_length:
        raise ConfigError(f"{tokens.shape[1]} tokens, but the text tower was made for {context_length}")
