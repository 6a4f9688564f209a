"""ViTamin (Chen et al. 2024, arXiv:2404.02132): two convolutional stages, then transformer blocks with gated MLPs."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

from bvl.errors import ConfigError
from bvl.models.convolution import Conv
from bvl.models.dropout import RowKeys, check_rates, drop_path, fold
from bvl.models.features import ImageFeatures
from bvl.models.grid import grid_of, resize_positions
from bvl.models.layers import Attention, Dense, LayerNorm, gelu, normal_init
from bvl.models.variants import check_variant

# The transformer's grid is smaller than the image by this much.
STRIDE = 16
EPSILON = 1e-6

# name: (channels of the two convolutional stages and of the transformer, depths of the same, heads).
# S, B, L: Chen et al. 2024, table 5. Ti is ours, for laptops.
VARIANTS: dict[str, tuple[tuple[int, int, int], tuple[int, int, int], int]] = {
    "ViTamin-Ti": ((32, 64, 192), (1, 2, 6), 3),
    "ViTamin-S": ((64, 128, 384), (2, 4, 14), 6),
    "ViTamin-B": ((128, 256, 768), (2, 4, 14), 12),
    "ViTamin-L": ((160, 320, 1024), (2, 4, 31), 16),
}


@dataclasses.dataclass(frozen=True)
class HybridConfig:
    """`variant`: ViTamin-Ti, -S, -B or -L; widths, depths and num_heads override its numbers.

    positions: learned position embeddings, resampled for other image sizes; without, the convolutions alone tell
      where things are (as the paper's largest model does).
    drop_path: stochastic depth, the rate of the last block; it rises linearly from 0 at the first.
    """

    variant: str = "ViTamin-S"
    widths: tuple[int, int, int] | None = None
    depths: tuple[int, int, int] | None = None
    num_heads: int | None = None
    positions: bool = True
    drop_path: float = 0.0

    def __post_init__(self):
        check_variant("image", self.variant, VARIANTS)
        widths, depths, num_heads = self.sizes
        if len(widths) != 3 or len(depths) != 3 or min(*widths, *depths, num_heads) < 1:
            raise ConfigError(f"image widths={widths}, depths={depths}: give 3 numbers each, at least 1")
        if widths[2] % num_heads:
            raise ConfigError(f"image widths={widths}: the last is not divisible by num_heads={num_heads}")
        check_rates("image", drop_path=self.drop_path)

    @property
    def sizes(self) -> tuple[tuple[int, int, int], tuple[int, int, int], int]:
        """(widths, depths, num_heads) with the overrides applied."""
        given = (self.widths, self.depths, self.num_heads)
        widths, depths, num_heads = (
            t if g is None else g for t, g in zip(VARIANTS[self.variant], given, strict=True)
        )
        return widths, depths, num_heads

    @property
    def output_width(self) -> int:
        """Width of `pooled`."""
        return self.sizes[0][2]

    def grid(self, image_size: tuple[int, int], what: str = "image") -> tuple[int, int]:
        """Rows and columns of tokens of an image (height, width); raises ConfigError if 16 does not divide."""
        return grid_of(image_size, STRIDE, what=what, divisor=f"stride {STRIDE} of a hybrid tower")

    def make(self, *, image_size: tuple[int, int], dtype: Any) -> Hybrid:
        """The tower, with position embeddings for images of `image_size` (height, width)."""
        return Hybrid(self, image_size, dtype=dtype)


def average_3x3(x: Float[Array, "b h w c"]) -> Float[Array, "b h/2 w/2 c"]:
    """Means over 3x3 neighbourhoods at stride 2, of what lies inside the image."""
    # Flax divides by counts in float32.
    return nn.avg_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)), count_include_pad=False).astype(x.dtype)


class InvertedBottleneck(nn.Module):
    """Layer norm, then 1x1 to four times the width, depthwise 3x3 and 1x1, beside a residual (MBConv-LN)."""

    features: int
    stride: int
    drop_path: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w i"], keys: RowKeys | None = None
    ) -> Float[Array, "b h/s w/s o"]:
        options = dict(use_bias=True, dtype=self.dtype)
        residual = average_3x3(x) if self.stride > 1 else x
        if x.shape[-1] != self.features:
            residual = Conv(self.features, 1, name="shortcut", **options)(residual)
        hidden = 4 * self.features
        y = LayerNorm(EPSILON, dtype=self.dtype, name="norm")(x)
        y = gelu(Conv(hidden, 1, names=("embed", "mlp"), name="expand", **options)(y))
        y = Conv(hidden, 3, self.stride, hidden, names=(None, "mlp"), name="depthwise", **options)(y)
        y = Conv(self.features, 1, names=("mlp", "embed"), name="reduce", **options)(gelu(y))
        if self.drop_path:
            y = drop_path(y, self.drop_path, keys)
        return residual + y


class GatedBlock(nn.Module):
    """Pre-norm transformer block; its MLP multiplies a GELU of one map with another (Shazeer 2020, arXiv:2002.05202).

    The MLP, twice as wide as the block, has a layer norm of its own after the branch's, as ViTamin's weights have.
    """

    num_heads: int
    drop_path: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"], keys: RowKeys | None = None) -> Float[Array, "b l d"]:
        def norm(name: str, x: jax.Array) -> jax.Array:
            return LayerNorm(EPSILON, dtype=self.dtype, name=name)(x)

        def drop(y: jax.Array, place: int) -> jax.Array:
            return drop_path(y, self.drop_path, fold(keys, place)) if self.drop_path else y

        width = x.shape[-1]
        attention = Attention(self.num_heads, dtype=self.dtype, name="attention")
        x = x + drop(attention(norm("attention_norm", x)), 0)
        h = norm("gate_norm", norm("mlp_norm", x))
        gate = Dense(2 * width, names=("embed", "mlp"), dtype=self.dtype, name="gate")(h)
        up = Dense(2 * width, names=("embed", "mlp"), dtype=self.dtype, name="up")(h)
        down = Dense(width, names=("mlp", "embed"), dtype=self.dtype, name="down")
        return x + drop(down(gelu(gate) * up), 1)


class Hybrid(nn.Module):
    """`levels`: the maps of the two convolutional stages at 1/4 and 1/8 of the image, and the tokens at 1/16.

    `pooled` is the mean of the tokens, then a layer norm; the tokens are those before the norm.
    """

    config: HybridConfig
    image_size: tuple[int, int]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        image: Float[Array, "b h w 3"],
        *,
        keys: RowKeys | None = None,
        levels: bool = False,
        patches: bool = False,
    ) -> ImageFeatures:
        config = self.config
        trained = config.grid(self.image_size, "data.preprocess.image_size")
        grid = config.grid(image.shape[1:3])
        widths, depths, num_heads = config.sizes
        rates = np.linspace(0.0, config.drop_path, sum(depths)).tolist()
        options = dict(use_bias=True, dtype=self.dtype)

        x = Conv(widths[0], 3, 2, name="stem_0", **options)(image)
        x = gelu(LayerNorm(EPSILON, dtype=self.dtype, name="stem_norm")(x))
        x = Conv(widths[0], 3, name="stem_1", **options)(x)
        place, maps = 0, []
        for i in range(2):
            for j in range(depths[i]):
                block = InvertedBottleneck(
                    widths[i],
                    stride=1 if j else 2,
                    drop_path=rates[place],
                    dtype=self.dtype,
                    name=f"stage_{i}_block_{j}",
                )
                x = block(x, fold(keys, place))
                place += 1
            maps.append(x)
        x = LayerNorm(EPSILON, dtype=self.dtype, name="patch_norm")(x)
        x = Conv(widths[2], 3, 2, name="patch_embed", **options)(x)

        x = rearrange(x, "b h w d -> b (h w) d")
        if config.positions:
            shape = (trained[0] * trained[1], widths[2])
            positions = self.param("positions", normal_init(0.02, "position", "embed"), shape)
            x = x + resize_positions(positions, trained, grid).astype(self.dtype)
        for j in range(depths[2]):
            block = GatedBlock(num_heads, rates[place], dtype=self.dtype, name=f"stage_2_block_{j}")
            x = block(x, fold(keys, place))
            place += 1
        maps.append(rearrange(x, "b (h w) d -> b h w d", h=grid[0]))
        pooled = x.astype(jnp.float32).mean(axis=1)
        norm = LayerNorm(EPSILON, dtype=self.dtype, name="norm")
        return ImageFeatures(
            pooled=norm(pooled),
            patches=norm(x) if patches else None,
            tokens=x,
            levels=tuple(maps) if levels else None,
            grid=grid,
        )
