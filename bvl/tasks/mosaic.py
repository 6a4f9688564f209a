"""Mosaic training: patch embeddings that know what lies where, from image-text pairs alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

from bvl.errors import ConfigError
from bvl.losses.contrastive import softmax_loss
from bvl.losses.targets import same_text
from bvl.models.dropout import RowKeys
from bvl.models.layers import l2_normalize
from bvl.models.roi_align import box_coverage, region_mean
from bvl.tasks.base import Context, LossOutput, ModelInfo, Task, View
from bvl.tasks.grounding import check_all_patches


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mosaic(Task):
    """Contrast the cells of mosaics of images with the texts of the images in them (CLIM: Wu et al. 2024, arXiv:2312.11376).

    Images of the batch are put together, 2 x 2, 3 x 3 and so on, on the device and shrunk to the model's size. The mean
    of the patch embeddings in a cell is to be like the text of its image: a pseudo region with a caption. Put it beside
    `Contrastive`, which sees the images whole; equal texts are each other's positives.

    grids: images along each side of the mosaics. A batch gives as many of each as it has images for, an image in at
      most one of them. freeze_texts: the text tower does not learn from mosaics.
    """

    grids: tuple[int, ...] = (2, 3, 4)
    freeze_texts: bool = True

    def __post_init__(self):
        object.__setattr__(self, "grids", tuple(self.grids))
        if not self.grids or min(self.grids) < 2 or len(set(self.grids)) < len(self.grids):
            raise ConfigError(
                f"mosaic grids={self.grids}: give different numbers of 2 or more, such as (2, 3, 4)"
            )

    def check(self, model_config: Any) -> None:
        check_all_patches(model_config, "mosaic")

    def fields(self) -> frozenset[str]:
        return frozenset({"image", "image_valid", "text", "text_mask", "text_valid", "text_id"})

    def views(self) -> tuple[View, ...]:
        return View("image", frozenset({"patch_embed"}), input="mosaic/image"), View("text")

    def prepare(self, batch: dict[str, jax.Array], keys: RowKeys, info: ModelInfo) -> dict[str, jax.Array]:
        return {"mosaic/image": make_mosaics(batch["image"], self.grids)}

    def loss(self, ctx: Context) -> LossOutput:
        batch, mosaics = ctx.batch, ctx.features["mosaic/image"]
        sets = len(mosaics.patch_embed) // len(self.grids)
        cells = []
        for i, k in enumerate(self.grids):
            patches = mosaics.patch_embed[i * sets : (i + 1) * sets]
            weights = rearrange(box_coverage(cell_boxes(k), mosaics.grid), "n h w -> 1 n (h w)")
            means = region_mean(patches, jnp.broadcast_to(weights, (sets, *weights.shape[1:])))
            cells.append(rearrange(means, "g n e -> (g n) e"))
        cells = l2_normalize(jnp.concatenate(cells))
        size, used = len(batch["image"]), len(cells)
        cells = jnp.pad(cells, ((0, size - used), (0, 0)))
        text = ctx.features["text"].embed
        shown = batch["image_valid"] & (jnp.arange(size) < used)
        # A text whose image is in no mosaic is still a negative.
        text_valid = batch["text_valid"] & batch["image_valid"][:, None]
        image_valid = shown & batch["text_valid"].any(1)
        loss = softmax_loss(
            cells,
            jax.lax.stop_gradient(text) if self.freeze_texts else text,
            scale=ctx.scale,
            targets=same_text(batch["text_id"], batch["text_id"].reshape(-1)),
            image_valid=image_valid,
            text_valid=text_valid.reshape(-1),
            mesh=ctx.mesh,
        )
        count = image_valid.sum().astype(jnp.float32)
        return LossOutput(loss, {"loss": (loss * count, count), "cells": (count, jnp.ones(()))})


def make_mosaics(images: Float[Array, "b h w c"], grids: tuple[int, ...]) -> Float[Array, "n h w c"]:
    """Mosaics of the size of one image: for each grid k in turn, of k * k images each, in the order of the batch.

    All are first placed side by side and then shrunk together, so that any k goes with any size. Raises ConfigError
    for a batch with fewer images than one mosaic of each grid takes.
    """
    size, height, width, channels = images.shape
    images_per_set = sum(k * k for k in grids)
    sets = size // images_per_set
    if not sets:
        raise ConfigError(
            f"mosaics of {', '.join(f'{k}x{k}' for k in grids)} images need a batch_size of at least "
            f"{images_per_set}; it is {size}: raise it, or set fewer grids"
        )
    out, start = [], 0
    for k in grids:
        group = images[start : start + sets * k * k].astype(jnp.float32)
        start += sets * k * k
        wide = rearrange(group, "(g k l) h w c -> g (k h) (l w) c", k=k, l=k)
        out.append(jax.image.resize(wide, (sets, height, width, channels), method="cubic", antialias=True))
    return jnp.clip(jnp.round(jnp.concatenate(out)), 0, 255).astype(images.dtype)


def cell_boxes(k: int) -> Float[Array, "n 4"]:
    """The boxes of a k x k mosaic's cells, row by row."""
    y, x = np.divmod(np.arange(k * k), k)
    return jnp.asarray(np.stack([x, y, x + 1, y + 1], axis=-1) / k, jnp.float32)
