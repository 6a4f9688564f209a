"""Convolutional stem: pixels to the patch grid by small strided convolutions, for sets of few images."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from bvl.models.layers import Dense, LayerNorm, gelu


class ConvStem(nn.Module):
    """3x3 convolutions of stride 2 down to the patch grid, then a linear map (Xiao et al. 2021, arXiv:2106.14881).

    Each is followed by a layer norm over channels, which unlike batch norm does not tie the rows of a batch.
    """

    width: int
    patch_size: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, image: Float[Array, "b h w 3"]
    ) -> tuple[Float[Array, "b l d"], tuple[Float[Array, "b h w c"], ...]]:
        """(tokens of the patch grid, the maps that are finer than it)."""
        num_layers = self.patch_size.bit_length() - 1
        x, maps = image, []
        for i in range(num_layers):
            features = max(self.width >> (num_layers - 1 - i), 32)
            x = Dense(features, names=(None, "patch"), dtype=self.dtype, name=f"conv_{i}")(_patches_3x3(x))
            x = gelu(LayerNorm(dtype=self.dtype, name=f"norm_{i}")(x))
            maps.append(x)
        x = rearrange(x, "b h w c -> b (h w) c")
        return Dense(self.width, names=("patch", "embed"), dtype=self.dtype, name="out")(x), tuple(maps[:-1])


def _patches_3x3(x: Float[Array, "b h w c"]) -> Float[Array, "b h/2 w/2 9*c"]:
    """The 3x3 neighbourhoods at stride 2: a convolution becomes one matrix product, on CPU several times faster."""
    height, width = x.shape[1] // 2, x.shape[2] // 2
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    views = [x[:, i : i + 2 * height : 2, j : j + 2 * width : 2] for i in range(3) for j in range(3)]
    return jnp.concatenate(views, axis=-1)
