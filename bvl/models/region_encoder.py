"""Regions in: boxes, points and masks of an image as visual tokens of the text decoder."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int8

from bvl.errors import ConfigError
from bvl.models.features import RegionPrompts
from bvl.models.layers import Block, Dense, LayerNorm, gelu, normal_init, zeros_init
from bvl.models.roi_align import box_coverage, mask_coverage, region_mean, roi_align

NUM_KINDS = 3
# Waves of 1, 2, 4, ... half periods over the image: the last one tells apart a 64th of its side.
NUM_FREQUENCIES = 7


@dataclasses.dataclass(frozen=True)
class RegionEncoderConfig:
    """How the decoder is told which region of the image is meant. All kinds take boxes, points and masks.

    kind: "box_token": the coordinates of the box (of a mask its tight box, of a point the point) become one token beside
      the image's (FlexCap: Dwibedi et al. 2024, arXiv:2403.12026).
      "roi_align": the features inside the box become one token (GPT4RoI: Zhang et al. 2023, arXiv:2307.03601); inside a
      mask they count by how much of them it covers; a point stands for a square around it.
      "mask_embedding": a learned vector, zero at first, is added to the image's tokens by how much of each the region
      covers, a transformer block follows, and the region's token is their mean over the region; free-form masks keep
      their form, and a point stands for a square around it. Costs a block over all tokens for each region.
      "mask_channel": the image tower encodes the image once more for each region, with its mask as fourth channel
      (FINECAPTION: Hua et al. 2024, arXiv:2411.15411); all tokens of it become the region's. Regions of an image
      then share no encoding. Needs model.image.mask_channel=True.
    levels: feature maps that "roi_align" reads, by their number in the tower's `ImageFeatures.levels` (negative from
      the end); () = the tower's tokens alone.
    output_size: cells of RoIAlign along each side. sampling_ratio: points a cell along each side.
    point_extent: side of the square around a point, as a share of the image's ("roi_align", "mask_embedding").
    """

    kind: Literal["box_token", "roi_align", "mask_embedding", "mask_channel"] = "roi_align"
    width: int = 128
    levels: tuple[int, ...] = ()
    output_size: int = 7
    sampling_ratio: int = 2
    point_extent: float = 0.15
    num_heads: int = 4

    def __post_init__(self):
        kinds = ("box_token", "roi_align", "mask_embedding", "mask_channel")
        if self.kind not in kinds:
            raise ConfigError(f"region_encoder kind={self.kind!r}: choose {', '.join(kinds)}")
        for name in ("width", "output_size", "sampling_ratio", "num_heads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"region_encoder {name}={getattr(self, name)}: must be at least 1")
        if not 0 < self.point_extent <= 1:
            raise ConfigError(f"region_encoder point_extent={self.point_extent}: must lie in (0, 1]")
        if self.levels and self.kind != "roi_align":
            raise ConfigError(f"region_encoder levels belong to kind='roi_align', not {self.kind!r}")

    @property
    def reads_levels(self) -> bool:
        """Whether it needs the image tower's feature maps, beside the tokens."""
        return bool(self.levels)


class RegionEncoder(nn.Module):
    """Visual tokens of regions at the decoder's width; regions of one image share its features."""

    config: RegionEncoderConfig
    decoder_width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "b l d"],
        levels: tuple[Float[Array, "b h w c"], ...] | None,
        grid: tuple[int, int],
        prompts: RegionPrompts,
        dropped: Bool[Array, " br"],
    ) -> tuple[Float[Array, "br s w"], Bool[Array, "br s"]]:
        """(visual tokens, which of them are there) of the images' regions, row by row; dropped rows are the null.

        tokens: of the image tower, on a `grid` of (rows, columns); for kind "mask_channel" those of the images with
        their masks, one row a region.
        """
        config = self.config
        if config.kind == "mask_channel":
            place = Dense(config.width, names=("embed", None), dtype=self.dtype, name="features")(tokens)
        else:
            place = CoordinateEmbedding(config.width, dtype=self.dtype, name="coordinates")(
                prompts.box, prompts.kind
            )
            if config.kind == "roi_align":
                place = place + self._aligned(tokens, levels, grid, prompts)
            elif config.kind == "mask_embedding":
                place = place + self._masked(tokens, grid, prompts)
            place = rearrange(place, "b r d -> (b r) 1 d")
        place = gelu(LayerNorm(dtype=self.dtype, name="norm")(place))
        out = Dense(self.decoder_width, names=("embed", None), dtype=self.dtype, name="out")(place)
        null = self.param("null", normal_init(0.02, "embed"), (self.decoder_width,)).astype(self.dtype)
        first = jnp.arange(out.shape[1]) == 0
        # Masked places are zeroed, so that nothing of a dropped region can be seen.
        replaced = jnp.where(first[:, None], null, jnp.zeros_like(null))
        out = jnp.where(dropped[:, None, None], replaced, out)
        return out, first | ~dropped[:, None]

    def _aligned(self, tokens, levels, grid, prompts: RegionPrompts) -> Float[Array, "b r d"]:
        """The region's features: RoIAlign of each level, cell by cell with a learned place, and their mean."""
        config = self.config
        size, ratio = (config.output_size,) * 2, config.sampling_ratio
        maps = [rearrange(tokens, "b (h w) d -> b h w d", h=grid[0])]
        if config.levels:
            count = len(levels or ())
            if any(not -count <= i < count for i in config.levels):
                raise ConfigError(
                    f"region_encoder levels={config.levels}: the image tower gives {count} feature maps, numbered from 0"
                )
            maps += [levels[i] for i in config.levels]
        boxes = point_squares(prompts, config.point_extent)
        # Boxes and points have all of their square; a mask has what it covers.
        own = roi_align(
            rearrange(prompts.mask, "b r h w -> (b r) h w 1").astype(jnp.float32),
            rearrange(boxes, "b r c -> (b r) 1 c"),
            output_size=size,
            sampling_ratio=ratio,
        )
        own = rearrange(own, "(b r) 1 i j 1 -> b r i j", r=boxes.shape[1])
        weights = jnp.where((prompts.kind == 2)[..., None, None], own, 1.0)
        weights = weights / jnp.maximum(weights.sum((2, 3), keepdims=True), 1e-6)
        cells = self.param("cells", normal_init(0.02, None, None, "embed"), (*size, config.width))
        total = cells.astype(self.dtype)
        for i, features in enumerate(maps):
            aligned = roi_align(features, boxes, output_size=size, sampling_ratio=ratio)
            aligned = LayerNorm(dtype=self.dtype, name=f"level_{i}_norm")(aligned)
            project = Dense(config.width, names=("embed", None), dtype=self.dtype, name=f"level_{i}")
            total = total + project(aligned)
        total = gelu(total)
        mean = jnp.einsum("brij,brijd->brd", weights, total.astype(jnp.float32)).astype(self.dtype)
        return Dense(config.width, names=("embed", None), dtype=self.dtype, name="features")(mean)

    def _masked(self, tokens, grid, prompts: RegionPrompts) -> Float[Array, "b r d"]:
        """The mean over the region of the image's tokens, once they know of the region."""
        config = self.config
        squares = box_coverage(point_squares(prompts, config.point_extent), grid)
        covered = jnp.where((prompts.kind == 1)[..., None, None], squares, mask_coverage(prompts.mask, grid))
        covered = rearrange(covered, "b r h w -> b r (h w)")
        mark = self.param("mask", zeros_init("embed"), (tokens.shape[-1],)).astype(self.dtype)
        x = tokens[:, None] + covered[..., None].astype(self.dtype) * mark
        count = x.shape[1]
        width = x.shape[-1]
        heads = config.num_heads if width % config.num_heads == 0 else 1
        block = Block(heads, 2 * width, dtype=self.dtype, name="block")
        x = block(rearrange(x, "b r l d -> (b r) l d"))
        pooled = region_mean(x, rearrange(covered, "b r l -> (b r) 1 l"))
        pooled = rearrange(pooled, "(b r) 1 d -> b r d", r=count)
        pooled = LayerNorm(dtype=self.dtype, name="pooled_norm")(pooled)
        return Dense(config.width, names=("embed", None), dtype=self.dtype, name="features")(pooled)


class CoordinateEmbedding(nn.Module):
    """Waves of each coordinate of a box, then two affine maps; a vector for each kind of region is added."""

    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, box: Float[Array, "b r 4"], kind: Int8[Array, "b r"]) -> Float[Array, "b r d"]:
        angles = box[..., None].astype(jnp.float32) * (np.pi * 2.0 ** np.arange(NUM_FREQUENCIES))
        size = jnp.stack([box[..., 2] - box[..., 0], box[..., 3] - box[..., 1]], axis=-1)
        waves = rearrange(jnp.stack([jnp.sin(angles), jnp.cos(angles)], -1), "b r c f s -> b r (c f s)")
        x = jnp.concatenate([waves, box, size], axis=-1).astype(self.dtype)
        kinds = self.param("kinds", normal_init(0.02, None, "embed"), (NUM_KINDS, self.width))
        x = gelu(Dense(self.width, names=(None, "mlp"), dtype=self.dtype, name="hidden")(x))
        x = Dense(self.width, names=("mlp", "embed"), dtype=self.dtype, name="out")(x)
        return x + kinds[kind].astype(self.dtype)


def point_squares(prompts: RegionPrompts, extent: float) -> Float[Array, "b r 4"]:
    """The boxes of the regions, with a square of side `extent` around each point."""
    half = jnp.full((2,), extent / 2)
    square = jnp.concatenate([prompts.point - half, prompts.point + half], axis=-1)
    return jax.lax.select(
        jnp.broadcast_to((prompts.kind == 1)[..., None], square.shape),
        square,
        prompts.box.astype(square.dtype),
    )
