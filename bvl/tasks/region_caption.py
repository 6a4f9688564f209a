"""Captioning of regions: the next token of a region's text, given the image, the region and the prefix of controls."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from einops import repeat
from jaxtyping import Array, Bool, Float, Shaped

from bvl.errors import ConfigError
from bvl.models.dropout import RowKeys, fold, keys_of_parts
from bvl.models.features import RegionPrompts
from bvl.tasks.base import Context, LossOutput, ModelInfo, Task, View
from bvl.tasks.caption import drawn, predicted_tokens, text_loss

# Batch key of the images with the masks of their regions.
MASKED = "region_caption/masked"

Visual = tuple[Float[Array, "c s w"], Bool[Array, "c s"]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RegionCaption(Task):
    """Write the texts of an image's regions: mean cross-entropy of their tokens, END included, by the model's decoder.

    The decoder sees the image's tokens and behind them the region's (bvl/models/region_encoder.py; FlexCap: Dwibedi et
    al. 2024, arXiv:2403.12026, whose length control is `data.controls.lengths`). All regions of an image share its
    encoding.

    image_dropout: share of images, region_dropout: share of regions of which the decoder sees the learned null instead,
      which guidance needs (see `Caption`); both_dropout: share of images that are dropped together with their regions.
      The three are drawn independently of each other.
    label_smoothing: this share of the target's probability is spread evenly over the vocabulary.
    mask_channel: encode the image anew with the mask of each region, for a region encoder of kind "mask_channel".
    """

    image_dropout: float = 0.1
    region_dropout: float = 0.1
    both_dropout: float = 0.05
    label_smoothing: float = 0.0
    mask_channel: bool = False
    per_example: ClassVar[bool] = True

    def __post_init__(self):
        for name in ("image_dropout", "region_dropout", "both_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must lie in 0..1")
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(f"label_smoothing={self.label_smoothing}: must lie in [0, 1)")

    def check(self, model_config: Any) -> None:
        encoder = model_config.region_encoder
        if model_config.decoder is None or encoder is None:
            raise ConfigError(
                "describing regions needs a decoder and a region encoder: set model.decoder, for example "
                "DecoderConfig(width=256, depth=4), and model.region_encoder=RegionEncoderConfig()"
            )
        if (encoder.kind == "mask_channel") != self.mask_channel:
            raise ConfigError(
                f"region_encoder.kind={encoder.kind!r} needs RegionCaption(mask_channel={not self.mask_channel}): "
                "whether images are encoded anew for each of their regions"
            )
        if self.mask_channel and not getattr(model_config.image, "mask_channel", False):
            raise ConfigError(
                "region_encoder.kind='mask_channel' needs an image tower that reads masks: set "
                "model.image.mask_channel=true, of a ViT"
            )
        if getattr(model_config.image, "patch_dropout", 0) and encoder.kind in (
            "roi_align",
            "mask_embedding",
        ):
            raise ConfigError(
                f"region_encoder.kind={encoder.kind!r} looks for regions among all patches: set "
                "model.image.patch_dropout=0"
            )

    def fields(self) -> frozenset[str]:
        prompts = {f"region_{name}" for name in ("box", "point", "mask", "kind", "valid")}
        texts = {f"region_{name}" for name in ("text", "text_mask", "prompt", "prompt_mask")}
        return frozenset({"image", "image_valid"} | prompts | texts)

    def views(self) -> tuple[View, ...]:
        shared = View("image", frozenset({"tokens", "regions"}))
        return (
            (shared, View("image", frozenset({"tokens"}), input=MASKED)) if self.mask_channel else (shared,)
        )

    def prepare(self, batch: dict[str, jax.Array], keys: RowKeys, info: ModelInfo) -> dict[str, jax.Array]:
        return {MASKED: with_masks(batch["image"], batch["region_mask"])} if self.mask_channel else {}

    def count(self, batch: dict[str, jax.Array], info: ModelInfo) -> Float[Array, ""]:
        return predicted_tokens(batch["region_text_mask"], batch["region_valid"]).sum().astype(jnp.float32)

    def loss(self, ctx: Context) -> LossOutput:
        batch, image = ctx.batch, ctx.features["image"]
        num_regions = batch["region_valid"].shape[1]
        absent = ~batch["image_valid"]
        nothing = absent | drawn(fold(ctx.keys, 3), self.both_dropout)
        image_dropped = nothing | drawn(fold(ctx.keys, 0), self.image_dropout)
        region_keys = keys_of_parts(fold(ctx.keys, 2), num_regions)
        region_dropped = jnp.repeat(nothing, num_regions) | drawn(region_keys, self.region_dropout)
        prompts = RegionPrompts(*(batch[f"region_{name}"] for name in ("box", "point", "mask", "kind")))
        tokens = ctx.features[MASKED].tokens if self.mask_channel else image.tokens
        visual, visual_mask = behind_images(
            ctx.model(image.tokens, image_dropped, method="visual_tokens"),
            ctx.model(tokens, image.levels, image.grid, prompts, region_dropped, method="region_tokens"),
        )
        names = ("region_text", "region_text_mask", "region_valid", "region_prompt", "region_prompt_mask")
        return text_loss(
            ctx, visual, visual_mask, *(batch[name] for name in names), label_smoothing=self.label_smoothing
        )


def behind_images(image: Visual, regions: Visual) -> Visual:
    """Visual tokens and mask of regions behind those of their images, which have as many regions each, in order."""
    count = len(regions[0]) // len(image[0])
    repeated = (jnp.repeat(x, count, axis=0) for x in image)
    return tuple(jnp.concatenate(pair, axis=1) for pair in zip(repeated, regions, strict=True))


def with_masks(image: Shaped[Array, "b H W 3"], masks: Bool[Array, "b r h w"]) -> Shaped[Array, "b r H W 4"]:
    """The image with each of its masks, on a grid that divides the pixels, as a fourth channel of 0 or 255."""
    cell = image.shape[1] // masks.shape[2], image.shape[2] // masks.shape[3]
    channel = repeat(masks, "b r h w -> b r (h p) (w q) 1", p=cell[0], q=cell[1])
    pixels = repeat(image, "b h w c -> b r h w c", r=masks.shape[1])
    return jnp.concatenate([pixels, jnp.where(channel, 255, 0).astype(pixels.dtype)], axis=-1)
