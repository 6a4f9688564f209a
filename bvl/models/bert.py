"""Text encoder of the BERT type (Devlin et al. 2019, arXiv:1810.04805) and its masked-language-model head."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from bvl.errors import ConfigError
from bvl.models.dropout import RowKeys, check_rates, dropout, fold
from bvl.models.features import TextFeatures
from bvl.models.layers import (
    ACTIVATIONS,
    Activation,
    Dense,
    LayerNorm,
    RematPolicy,
    Stack,
    normal_init,
    zeros_init,
)
from bvl.models.text import check_length, pool_tokens
from bvl.models.variants import check_sizes, check_variant, override_sizes

# name: (width, depth, num_heads, mlp_hidden). base, large: Devlin et al. 2019. pubmedbert: Gu et al. 2020
# (arXiv:2007.15779), uncased vocabulary of 30,522; clinicalbert: Alsentzer et al. 2019 (arXiv:1904.03323), cased
# vocabulary of 28,996; both have BERT-base's shape. minilm: Wang et al. 2020 (arXiv:2002.10957). tiny and small
# are ours, for laptops.
VARIANTS: dict[str, tuple[int, int, int, int]] = {
    "tiny": (96, 2, 3, 384),
    "small": (256, 4, 4, 1024),
    "minilm-l6": (384, 6, 12, 1536),
    "minilm-l12": (384, 12, 12, 1536),
    "base": (768, 12, 12, 3072),
    "pubmedbert": (768, 12, 12, 3072),
    "clinicalbert": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
}


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """`variant` names a row of VARIANTS; hidden_size, depth, num_heads and mlp_hidden override it.

    max_positions: length of the table of positions; the tokenizer's context may be shorter.
    pool: "cls" takes the first token, "pooler" sends it through a dense layer and tanh (as BERT's own classifier
    does), "mean" and "max" run over the text tokens.
    pool_layers: pool the mean of the states behind these blocks, counted from 1 or from the end (-1 the last);
    FLAIR and MedCLIP use (1, 2, -1). Empty = the last alone.
    dropout: of the embeddings and of both branches of each block; drop_path: stochastic depth.
    """

    variant: str = "base"
    hidden_size: int | None = None
    depth: int | None = None
    num_heads: int | None = None
    mlp_hidden: int | None = None
    max_positions: int = 512
    type_vocab_size: int = 2
    pool: Literal["cls", "mean", "max", "pooler"] = "cls"
    pool_layers: tuple[int, ...] = ()
    activation: Activation = "gelu"
    norm_epsilon: float = 1e-12
    dropout: float = 0.1
    drop_path: float = 0.0
    scan: bool = False
    remat: RematPolicy = "none"

    def __post_init__(self):
        check_variant("text", self.variant, VARIANTS)
        check_sizes("text", self.sizes)
        check_rates("text", dropout=self.dropout, drop_path=self.drop_path)
        if min(self.max_positions, self.type_vocab_size) < 1:
            raise ConfigError("max_positions and type_vocab_size must be at least 1")
        depth = self.sizes[1]
        if any(not 1 <= abs(layer) <= depth for layer in self.pool_layers):
            raise ConfigError(
                f"pool_layers={self.pool_layers}: blocks are numbered 1 to {depth} or -{depth} to -1"
            )

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """(width, depth, num_heads, mlp_hidden) with the overrides applied."""
        given = (self.hidden_size, self.depth, self.num_heads, self.mlp_hidden)
        return override_sizes(VARIANTS[self.variant], given)

    @property
    def width(self) -> int:
        return self.sizes[0]

    @property
    def causal(self) -> bool:
        return False

    def make(
        self, *, vocab_size: int, context_length: int, pad_id: int, end_id: int, dtype: Any = jnp.float32
    ) -> Bert:
        """The tower for a tokenizer's vocabulary and context.

        Raises ConfigError for a context longer than the table of positions.
        """
        del pad_id, end_id  # The mask says what is padding, and no pooling looks for the end.
        if context_length > self.max_positions:
            raise ConfigError(
                f"data.tokenizer.context_length={context_length} is longer than the text tower allows: "
                f"model.text.max_positions={self.max_positions}; lower the one or raise the other"
            )
        return Bert(self, vocab_size, context_length, dtype)


class Bert(nn.Module):
    """Token ids and their mask -> TextFeatures(pooled, tokens, mask). Token types are 0 where none are given."""

    config: BertConfig
    vocab_size: int
    context_length: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "b t"],
        mask: Bool[Array, "b t"],
        *,
        types: Int[Array, "b t"] | None = None,
        keys: RowKeys | None = None,
    ) -> TextFeatures:
        config = self.config
        width, depth, num_heads, mlp_hidden = config.sizes
        check_length(tokens, self.context_length)

        def table(name: str, rows: int, axis: str | None) -> Array:
            return self.param(name, normal_init(0.02, axis, "embed"), (rows, width))

        words = table("token_embed", self.vocab_size, "vocab")[tokens]
        positions = table("positions", config.max_positions, "position")[: tokens.shape[1]]
        kinds = table("token_types", config.type_vocab_size, None)
        kinds = kinds[0] if types is None else kinds[types]
        x = LayerNorm(epsilon=config.norm_epsilon, dtype=self.dtype, name="embed_norm")(
            words + positions + kinds
        )
        x = dropout(x, config.dropout, fold(keys, 0))
        x, levels = Stack(
            depth=depth,
            num_heads=num_heads,
            mlp_hidden=mlp_hidden,
            norm="post",
            norm_epsilon=config.norm_epsilon,
            activation=config.activation,
            dropout=config.dropout,
            drop_path=config.drop_path,
            scan=config.scan,
            remat=config.remat,
            dtype=self.dtype,
            name="stack",
        ).run(
            x,
            mask,
            keys=fold(keys, 1),
            levels=tuple(layer - 1 if layer > 0 else depth + layer for layer in config.pool_layers),
        )
        states = sum(levels) / len(levels) if levels else x
        if config.pool == "pooler":
            pooled = jnp.tanh(
                Dense(width, names=("embed", None), dtype=self.dtype, name="pooler")(states[:, 0])
            )
        else:
            pooled = pool_tokens(states, tokens, mask, config.pool, end_id=-1)
        return TextFeatures(pooled=pooled, tokens=x, mask=mask)


class MlmTransform(nn.Module):
    """What stands between a hidden state and the decoder tied to the token embedding: dense, activation, layer norm."""

    norm_epsilon: float = 1e-12
    activation: Activation = "gelu"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        x = Dense(x.shape[-1], names=("embed", None), dtype=self.dtype, name="dense")(x)
        return LayerNorm(epsilon=self.norm_epsilon, dtype=self.dtype, name="norm")(
            ACTIVATIONS[self.activation](x)
        )


class VocabularyBias(nn.Module):
    """The bias of the tied decoder: one number a token of the vocabulary."""

    @nn.compact
    def __call__(self, logits: Float[Array, "... v"]) -> Float[Array, "... v"]:
        return logits + self.param("bias", zeros_init("vocab"), (logits.shape[-1],))
