"""Text transformer of the CLIP type (Radford et al. 2021, arXiv:2103.00020): causal, pooled at the end token."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from bvl.errors import ConfigError
from bvl.models.layers import LayerNorm, RematPolicy, Stack, normal_init


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Vocabulary and context length are the tokenizer's, so they are not repeated here.

    pool: "end" takes the token at the first end id, "mean" the average over text tokens.
    """

    width: int = 384
    depth: int = 6
    num_heads: int = 6
    mlp_hidden: int | None = None
    causal: bool = True
    pool: Literal["end", "mean"] = "end"
    scan: bool = False
    remat: RematPolicy = "none"

    def __post_init__(self):
        if min(self.width, self.depth, self.num_heads, self.mlp_hidden or 1) < 1:
            raise ConfigError("text width, depth, num_heads and mlp_hidden must be at least 1")
        if self.width % self.num_heads:
            raise ConfigError(f"text width {self.width} is not divisible by num_heads {self.num_heads}")


class TextTransformer(nn.Module):
    """Returns (pooled [b, d], tokens [b, t, d])."""

    config: TextConfig
    vocab_size: int
    context_length: int
    end_id: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "b t"], mask: Bool[Array, "b t"]
    ) -> tuple[Float[Array, "b d"], Float[Array, "b t d"]]:
        config = self.config
        if tokens.shape[1] > self.context_length:
            raise ConfigError(
                f"{tokens.shape[1]} tokens, but the text tower was made for {self.context_length}"
            )
        # Initial scales of CLIP: 0.02 for tokens, 0.01 for positions.
        table = self.param(
            "token_embed", normal_init(0.02, "vocab", "embed"), (self.vocab_size, config.width)
        )
        positions = self.param(
            "positions", normal_init(0.01, "position", "embed"), (self.context_length, config.width)
        )
        x = table[tokens].astype(self.dtype) + positions[: tokens.shape[1]].astype(self.dtype)
        # Under a causal mask no text token sees the padding behind it.
        key_mask = None if config.causal else mask
        x = Stack(
            depth=config.depth,
            num_heads=config.num_heads,
            mlp_hidden=config.mlp_hidden or 4 * config.width,
            causal=config.causal,
            scan=config.scan,
            remat=config.remat,
            dtype=self.dtype,
            name="stack",
        )(x, key_mask)
        x = LayerNorm(dtype=self.dtype, name="norm")(x)
        if config.pool == "mean":
            weights = mask[..., None].astype(jnp.float32)
            pooled = (x * weights).sum(1) / jnp.maximum(weights.sum(1), 1.0)
            return pooled.astype(self.dtype), x
        first_end = jnp.argmax(tokens == self.end_id, axis=1)
        return jnp.take_along_axis(x, first_end[:, None, None], axis=1)[:, 0], x
