"""What a text decoder sees of an image."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from bvl.models.layers import Attention, Dense, LayerNorm, normal_init


class VisualTokens(nn.Module):
    """Image tokens -> what the decoder sees of the image: all or pooled tokens, or the null token, at its width.

    queries: 0 = all tokens, n = so many, pooled by attention.
    learned_null: the null that stands for no image is one learned token, and the other places are masked (Kornblith
      et al. 2023, arXiv:2307.16686, section 3); False: a token of zeros.
    """

    width: int
    queries: int = 0
    learned_null: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, tokens: Float[Array, "b l d"], dropped: Bool[Array, " b"]
    ) -> tuple[Float[Array, "b s w"], Bool[Array, "b s"]]:
        """(visual tokens, which of them are there); rows that are `dropped` are the null."""
        count, width = self.queries, tokens.shape[-1]
        if count:
            queries = self.param("queries", normal_init(width**-0.5, None, "embed"), (count, width))
            queries = jnp.broadcast_to(queries.astype(self.dtype), (len(tokens), count, width))
            heads = max(width // 64, 1)
            heads = heads if width % heads == 0 else 1
            tokens = Attention(heads, dtype=self.dtype, name="pool")(queries, tokens)
            tokens = LayerNorm(dtype=self.dtype, name="pool_norm")(tokens)
        first = jnp.arange(tokens.shape[1]) == 0
        # Masked places are zeroed, so that nothing of a dropped image can be seen.
        replaced = jnp.zeros(tokens.shape[1:], tokens.dtype)
        if self.learned_null:
            null = self.param("null", normal_init(0.02, "embed"), (width,)).astype(tokens.dtype)
            replaced = jnp.where(first[:, None], null, replaced)
        tokens = jnp.where(dropped[:, None, None], replaced, tokens)
        if width != self.width:
            tokens = Dense(self.width, names=("embed", None), dtype=self.dtype, name="project")(tokens)
        return tokens, first | ~dropped[:, None]
