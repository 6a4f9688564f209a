"""Pooling by several learned queries, whose outputs a text decoder reads (CoCa: Yu et al. 2022, arXiv:2205.01917)."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from bvl.errors import ConfigError
from bvl.models.layers import Attention, LayerNorm, normal_init


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionalPool:
    """open_clip's pooler: `queries` learned vectors of `width` attend to all tokens of a ViT, class token included."""

    width: int
    queries: int = 256
    num_heads: int = 8

    def __post_init__(self):
        if self.queries < 2:
            raise ConfigError(
                f"attentional_pool queries={self.queries}: one is pooled, and a decoder reads the others"
            )
        if self.width < 1 or self.num_heads < 1 or self.width % self.num_heads:
            raise ConfigError(
                f"attentional_pool width={self.width} is not divisible by num_heads={self.num_heads}"
            )


class AttentionalPooler(nn.Module):
    """Norms of queries and tokens, then attention; no residual and no MLP."""

    config: AttentionalPool
    dtype: Any = jnp.float32

    def setup(self):
        config = self.config
        self.queries = self.param("queries", normal_init(1.0, None, "embed"), (config.queries, config.width))
        # open_clip gives these two the epsilon of torch whatever the tower's is.
        self.query_norm, self.token_norm = (LayerNorm(dtype=self.dtype) for _ in range(2))
        self.attention = Attention(config.num_heads, dtype=self.dtype)

    def __call__(self, tokens: Float[Array, "b l d"]) -> tuple[Float[Array, "b q w"], Float[Array, "b l d"]]:
        """(a vector for each query, the tokens as they are attended to)."""
        normed = self.token_norm(tokens)
        queries = self.query_norm(self.queries.astype(self.dtype))
        queries = jnp.broadcast_to(queries, (len(tokens), *queries.shape))
        return self.attention(queries, normed), normed

    def alone(self, tokens: Float[Array, "b l d"]) -> Float[Array, "b l w"]:
        """What each token alone would give any query: attention to one token gives its value."""
        single = rearrange(self.token_norm(tokens), "b l d -> (b l) 1 d")
        query = jnp.zeros((len(single), 1, self.config.width), self.dtype)
        return rearrange(self.attention(query, single), "(b l) 1 w -> b l w", b=len(tokens))
