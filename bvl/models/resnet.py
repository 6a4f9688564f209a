"""Residual networks (He et al. 2016, arXiv:1512.03385): those of CLIP and those of torchvision."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce
from jaxtyping import Array, Float

from bvl.errors import ConfigError
from bvl.models.batch_norm import BatchNorm, BatchNormMode
from bvl.models.convolution import Conv
from bvl.models.dropout import RowKeys, check_rates, drop_path, fold
from bvl.models.features import ImageFeatures
from bvl.models.grid import grid_of, resize_positions
from bvl.models.layers import Dense, normal_init
from bvl.models.variants import check_variant

# The map of the last stage is smaller than the image by this much.
STRIDE = 32


@dataclasses.dataclass(frozen=True)
class _Variant:
    width: int
    stages: tuple[int, ...]
    bottleneck: bool = True
    clip: bool = False


# RN: Radford et al. 2021 (arXiv:2103.00020), table 19; ResNet: He et al. 2016, table 1.
VARIANTS: dict[str, _Variant] = {
    "RN50": _Variant(64, (3, 4, 6, 3), clip=True),
    "RN101": _Variant(64, (3, 4, 23, 3), clip=True),
    "RN50x4": _Variant(80, (4, 6, 10, 6), clip=True),
    "RN50x16": _Variant(96, (6, 8, 18, 8), clip=True),
    "RN50x64": _Variant(128, (3, 15, 36, 10), clip=True),
    "ResNet18": _Variant(64, (2, 2, 2, 2), bottleneck=False),
    "ResNet34": _Variant(64, (3, 4, 6, 3), bottleneck=False),
    "ResNet50": _Variant(64, (3, 4, 6, 3)),
    "ResNet101": _Variant(64, (3, 4, 23, 3)),
    "ResNet152": _Variant(64, (3, 8, 36, 3)),
}


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """`variant`: RN50, RN101, RN50x4, RN50x16, RN50x64 (CLIP) or ResNet18 to ResNet152 (torchvision).

    CLIP's have a stem of three 3x3 convolutions and average before every stride (Radford et al. 2021, section 2.4);
    torchvision's a 7x7 stem, and the stride in the bottleneck's 3x3 convolution.
    pool: "attention" asks the mean of the map with multi-head attention, `pooled` being the heads side by side; CLIP's
      map after it is `DualEncoderConfig.image_projection="linear_bias"`. "mean" averages the map. None: attention
      for CLIP's, mean for torchvision's.
    norm: "synced" or "frozen", see `BatchNorm`; frozen is for small batches and trained weights.
    drop_path: stochastic depth, the rate of the last block; it rises linearly from 0 at the first.
    width, stages: channels of the first stage and blocks of each stage, instead of the variant's.
    pool_heads: heads of the attention pooling; None = 64 channels each.
    """

    variant: str = "RN50"
    pool: Literal["attention", "mean"] | None = None
    norm: BatchNormMode = "synced"
    drop_path: float = 0.0
    width: int | None = None
    stages: tuple[int, ...] | None = None
    pool_heads: int | None = None

    def __post_init__(self):
        check_variant("image", self.variant, VARIANTS)
        width, stages = self.sizes
        if len(stages) != 4 or min(stages) < 1:
            raise ConfigError(f"image stages={stages}: give the blocks of 4 stages, each at least 1")
        if width < 2 or width % 2:
            raise ConfigError(f"image width={width}: must be even and at least 2")
        if self.pool_heads is not None and self.pool_heads < 1:
            raise ConfigError(f"image pool_heads={self.pool_heads}: must be at least 1")
        if self.pooling == "attention" and self.output_width % self.num_heads:
            raise ConfigError(
                f"image width={width} makes maps of {self.output_width} channels, which {self.num_heads} attention "
                "heads do not divide"
            )
        check_rates("image", drop_path=self.drop_path)

    @property
    def sizes(self) -> tuple[int, tuple[int, ...]]:
        """(width, stages) with the overrides applied."""
        table = VARIANTS[self.variant]
        return (
            table.width if self.width is None else self.width,
            table.stages if self.stages is None else self.stages,
        )

    @property
    def output_width(self) -> int:
        """Width of `pooled`."""
        return self.sizes[0] * (32 if VARIANTS[self.variant].bottleneck else 8)

    @property
    def num_heads(self) -> int:
        """Heads of the attention pooling."""
        return max(self.output_width // 64, 1) if self.pool_heads is None else self.pool_heads

    @property
    def pooling(self) -> Literal["attention", "mean"]:
        return self.pool or ("attention" if VARIANTS[self.variant].clip else "mean")

    def grid(self, image_size: tuple[int, int], what: str = "image") -> tuple[int, int]:
        """Rows and columns of the last map of an image (height, width); raises ConfigError if 32 does not divide."""
        return grid_of(image_size, STRIDE, what=what, divisor=f"stride {STRIDE} of {self.variant}")

    def make(self, *, image_size: tuple[int, int], dtype: Any) -> ResNet:
        """The tower, with the attention pooling's positions for images of `image_size` (height, width)."""
        return ResNet(self, image_size, dtype=dtype)


def average_2x2(x: Float[Array, "b h w c"]) -> Float[Array, "b h/2 w/2 c"]:
    """Means of the 2x2 squares."""
    return reduce(x, "b (h p) (w q) c -> b h w c", "mean", p=2, q=2)


class ResidualBlock(nn.Module):
    """Three convolutions (1x1, 3x3, 1x1), or two of 3x3, and a residual; `features` are those of the 3x3."""

    features: int
    stride: int
    bottleneck: bool
    average: bool
    norm: BatchNormMode
    drop_path: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w i"], keys: RowKeys | None = None
    ) -> Float[Array, "b h/s w/s o"]:
        def conv_norm(name: str, x: jax.Array, features: int, kernel_size: int, stride: int = 1, last=False):
            x = Conv(features, kernel_size, stride, dtype=self.dtype, name=f"{name}_conv")(x)
            norm = BatchNorm(self.norm, zero_scale=last, dtype=self.dtype, name=f"{name}_norm")
            return norm(x, training=keys is not None)

        width = self.features * (4 if self.bottleneck else 1)
        stride, averaged = (1, self.stride > 1) if self.average else (self.stride, False)
        residual = x
        if self.stride > 1 or x.shape[-1] != width:
            residual = average_2x2(x) if averaged else x
            residual = conv_norm("shortcut", residual, width, 1, stride)
        if self.bottleneck:
            y = nn.relu(conv_norm("reduce", x, self.features, 1))
            y = nn.relu(conv_norm("middle", y, self.features, 3, stride))
            y = conv_norm("expand", average_2x2(y) if averaged else y, width, 1, last=True)
        else:
            y = nn.relu(conv_norm("first", x, width, 3, stride))
            y = conv_norm("second", y, width, 3, last=True)
        if self.drop_path:
            y = drop_path(y, self.drop_path, keys)
        return nn.relu(residual + y)


class Stem(nn.Module):
    """To a quarter of the image's size: three 3x3 convolutions and an average, or one 7x7 and a maximum."""

    width: int
    clip: bool
    norm: BatchNormMode
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, image: Float[Array, "b h w 3"], *, training: bool) -> Float[Array, "b h/4 w/4 c"]:
        half = self.width // 2
        layers = [(half, 3, 2), (half, 3, 1), (self.width, 3, 1)] if self.clip else [(self.width, 7, 2)]
        x = image
        for i, (features, kernel_size, stride) in enumerate(layers):
            x = Conv(features, kernel_size, stride, dtype=self.dtype, name=f"conv_{i}")(x)
            norm = BatchNorm(self.norm, dtype=self.dtype, name=f"norm_{i}")
            x = nn.relu(norm(x, training=training))
        if self.clip:
            return average_2x2(x)
        return nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))


class MeanAttentionPool(nn.Module):
    """The mean of a map asks all of it and itself by multi-head attention (Radford et al. 2021, section 2.4)."""

    num_heads: int
    # Rows and columns the positions are made for.
    trained: tuple[int, int]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w d"], alone: bool = False) -> tuple[jax.Array, jax.Array | None]:
        """(pooled [b, d], and with `alone` what each cell of the map would give if it were attended to alone [b, l, d])."""
        grid, width = x.shape[1:3], x.shape[-1]
        shape = (1 + self.trained[0] * self.trained[1], width)
        positions = self.param("positions", normal_init(width**-0.5, "position", "embed"), shape)
        x = rearrange(x, "b h w d -> b (h w) d")
        mean = x.astype(jnp.float32).mean(axis=1, keepdims=True).astype(self.dtype)
        x = jnp.concatenate([mean, x], axis=1)
        x = x + resize_positions(positions, self.trained, grid).astype(self.dtype)

        def heads(name: str, x: jax.Array) -> jax.Array:
            y = Dense(width, names=("embed", "heads"), dtype=self.dtype, name=name)(x)
            return rearrange(y, "b l (h c) -> b l h c", h=self.num_heads)

        values = heads("value", x)
        pooled = jax.nn.dot_product_attention(heads("query", x[:, :1]), heads("key", x), values)
        return rearrange(pooled, "b 1 h c -> b (h c)"), (
            rearrange(values[:, 1:], "b l h c -> b l (h c)") if alone else None
        )


class ResNet(nn.Module):
    """`levels` are the maps after the four stages, at 1/4, 1/8, 1/16 and 1/32 of the image; tokens the last of them."""

    config: ResNetConfig
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
        config, variant = self.config, VARIANTS[self.config.variant]
        trained = config.grid(self.image_size, "data.preprocess.image_size")
        grid = config.grid(image.shape[1:3])
        width, stages = config.sizes

        x = Stem(width, variant.clip, config.norm, dtype=self.dtype, name="stem")(
            image, training=keys is not None
        )
        rates = iter(np.linspace(0.0, config.drop_path, sum(stages)))
        maps, place = [], 0
        for i, depth in enumerate(stages):
            for j in range(depth):
                block = ResidualBlock(
                    features=width * 2**i,
                    stride=2 if i and not j else 1,
                    bottleneck=variant.bottleneck,
                    average=variant.clip,
                    norm=config.norm,
                    drop_path=float(next(rates)),
                    dtype=self.dtype,
                    name=f"stage_{i}_block_{j}",
                )
                x = block(x, fold(keys, place))
                place += 1
            maps.append(x)
        if config.pooling == "attention":
            pool = MeanAttentionPool(config.num_heads, trained, dtype=self.dtype, name="pool")
            pooled, alone = pool(x, patches)
        else:
            pooled = x.astype(jnp.float32).mean(axis=(1, 2)).astype(self.dtype)
            alone = rearrange(x, "b h w d -> b (h w) d")
        return ImageFeatures(
            pooled=pooled,
            tokens=rearrange(x, "b h w d -> b (h w) d"),
            levels=tuple(maps) if levels else None,
            patches=alone if patches else None,
            grid=grid,
        )
