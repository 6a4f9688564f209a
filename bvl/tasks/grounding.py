"""Phrase grounding: where in the image is what a phrase names, and is it there at all."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from bvl.errors import ConfigError
from bvl.losses.contrastive import softmax_loss
from bvl.losses.masks import mask_bce, mask_dice_loss, sigmoid_focal_loss
from bvl.losses.set_prediction import match_boxes
from bvl.losses.targets import same_text
from bvl.models.dropout import RowKeys, fold, keys_of_parts
from bvl.models.features import Located
from bvl.models.layers import l2_normalize
from bvl.models.roi_align import box_coverage, region_mean
from bvl.tasks.base import Context, LossOutput, ModelInfo, Task, View

# Boxes that are drawn at random beside the true one, and temperature of their softmax (Chen et al. 2023, section 3.3).
NUM_RANDOM_BOXES = 5
TACO_TEMPERATURE = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grounding(Task):
    """Find the boxes and the mask of phrases, some of which are absent, by the model's region decoder.

    Each candidate has a box and a score; a box of the phrase is matched to `positives` of them (Hungarian, on the
    device), which learn it, and all learn whether they were matched. The sum of

        l1, giou: of the matched boxes (Carion et al. 2020, arXiv:2005.12872, eq. 2)
        score: focal loss of which candidates are matched
        bce, dice: of the mask, where the record has one
        presence: binary cross-entropy of whether the image shows what the phrase names
        contrast: cross-entropy of the located embedding over all phrases of the batch; equal phrases share the target
          (Zhao et al. 2024, BiomedParse, arXiv:2405.12971)
        taco: cross-entropy of the phrase over its true box and random ones, by pooled patch embeddings to all of which
          the phrase's context in the image is added (MedRPG: Chen et al. 2023, arXiv:2303.07618, eq. 4 to 7)

    is weighted by these fields and is a mean over phrases.

    phrases: "text" reads them by the text tower; "decoder" takes the text decoder's hidden state at the marked word, as
    model.region_decoder.phrases says.
    """

    l1: float = 5.0
    giou: float = 2.0
    score: float = 2.0
    bce: float = 2.0
    dice: float = 2.0
    presence: float = 1.0
    contrast: float = 0.0
    taco: float = 0.0
    positives: int = 3
    phrases: Literal["text", "decoder"] = "text"

    def __post_init__(self):
        for name in ("l1", "giou", "score", "bce", "dice", "presence", "contrast", "taco"):
            if getattr(self, name) < 0:
                raise ConfigError(f"grounding {name}={getattr(self, name)}: a weight must not be negative")
        if self.positives < 1:
            raise ConfigError(f"grounding positives={self.positives}: must be at least 1")

    @property
    def per_example(self) -> bool:
        return not self.contrast

    def check(self, model_config: Any) -> None:
        if model_config.region_decoder is None:
            raise ConfigError(
                "grounding needs a region decoder: set model.region_decoder, for example RegionDecoderConfig()"
            )
        if model_config.region_decoder.phrases != self.phrases:
            raise ConfigError(
                f"grounding phrases={self.phrases!r}, but model.region_decoder.phrases="
                f"{model_config.region_decoder.phrases!r}: set both to the same"
            )
        if (self.contrast or self.taco) and not model_config.embeds_text:
            raise ConfigError(
                "grounding contrast and taco compare regions with texts: the model needs a text tower"
            )
        check_all_patches(model_config, "grounding")

    def fields(self) -> frozenset[str]:
        keys = {"image", "image_valid", "object_box", "object_valid", "phrase", "phrase_mask", "phrase_valid"}
        keys |= {"phrase_present", "phrase_known", "phrase_object", "phrase_pixels", "phrase_pixels_valid"}
        if self.contrast:
            keys |= {"phrase_id"}
        if self.phrases == "decoder":
            keys |= {"phrase_mark"}
        return frozenset(keys)

    def views(self) -> tuple[View, ...]:
        image = View("image", frozenset({"regions", "patch_embed"} if self.taco else {"regions"}))
        need = {"embed"} if self.contrast or self.taco else set()
        if self.phrases == "text":
            need |= {"pooled", "tokens"}
        return (image, View("text", frozenset(need), input="phrase")) if need else (image,)

    def count(self, batch: dict[str, jax.Array], info: ModelInfo) -> Float[Array, ""]:
        return valid_phrases(batch).sum().astype(jnp.float32)

    def loss(self, ctx: Context) -> LossOutput:
        batch, image = ctx.batch, ctx.features["image"]
        valid = valid_phrases(batch)
        known = valid & batch["phrase_known"]
        found: Located = ctx.model(
            image.tokens,
            image.levels,
            image.grid,
            *encode_phrases(ctx, self.phrases),
            method="ground",
        )
        boxes = batch["object_box"]
        named = batch["phrase_object"] & batch["object_valid"][:, None] & valid[..., None]
        fit = match_boxes(
            found.boxes,
            jax.nn.sigmoid(found.scores)[..., None],
            boxes[:, None],
            named,
            repeats=self.positives,
        )
        boxed = named.any(-1)
        present = batch["phrase_present"] & known
        # What is there but has no box must not teach that it is nowhere.
        scored = boxed | (known & ~present)
        pixels = batch["phrase_pixels"]
        masked = known & batch["phrase_pixels_valid"]
        logits = at_size(found.mask_logits, pixels.shape[-2:])
        terms = {
            "l1": (fit.l1, boxed),
            "giou": (fit.giou, boxed),
            "score": (sigmoid_focal_loss(found.scores, fit.matched).sum(-1) / fit.count, scored),
            "bce": (mask_bce(logits, pixels), masked),
            "dice": (mask_dice_loss(logits, pixels), masked),
            "presence": (binary_cross_entropy(found.presence, present), known),
        }
        if self.taco:
            terms["taco"] = (self._taco(ctx, boxes, named), boxed)
        loss, metrics = sum_terms(self, terms, valid)
        if self.contrast:
            value = self._contrast(ctx, found, valid, present)
            loss = loss + self.contrast * value
            metrics["contrast"] = (value, jnp.ones(()))
        best = jnp.take_along_axis(fit.iou, found.scores.argmax(-1)[..., None], axis=-1)[..., 0]
        metrics["accuracy_at_50"] = ((boxed & (best >= 0.5)).sum(), boxed.sum())
        right = ((found.presence > 0) == present) & known
        metrics["presence_accuracy"] = (right.sum(), known.sum())
        return LossOutput(loss, metrics)

    def _contrast(self, ctx: Context, found: Located, valid, present) -> Float[Array, ""]:
        """Cross-entropy of the present phrases' embeddings over all phrases of the batch."""
        ids = ctx.batch["phrase_id"].reshape(-1)
        return softmax_loss(
            rearrange(found.embed, "b p e -> (b p) e"),
            ctx.features["phrase"].embed,
            scale=ctx.scale,
            targets=same_text(ids, ids),
            direction_weights=(1.0, 0.0),
            image_valid=present.reshape(-1),
            text_valid=valid.reshape(-1),
            mesh=ctx.mesh,
        )

    def _taco(
        self, ctx: Context, boxes: Float[Array, "b m 4"], named: Bool[Array, "b p m"]
    ) -> Float[Array, "b p"]:
        image, count = ctx.features["image"], named.shape[1]
        patches = image.patch_embed
        text = rearrange(ctx.features["phrase"].embed, "(b p) e -> b p e", p=count)
        true = jnp.take_along_axis(boxes, named.argmax(-1)[..., None], axis=1)

        def random_boxes(key: jax.Array) -> Float[Array, "n 4"]:
            corners = jax.random.uniform(key, (NUM_RANDOM_BOXES, 2, 2))
            return jnp.concatenate([corners.min(1), corners.max(1)], axis=-1)

        others = jax.vmap(random_boxes)(fold(ctx.keys, 0))
        others = jnp.broadcast_to(others[:, None], (*true.shape[:2], NUM_RANDOM_BOXES, 4))
        weights = box_coverage(jnp.concatenate([true[:, :, None], others], axis=2), image.grid)
        regions = region_mean(patches, rearrange(weights, "b p n h w -> b (p n) (h w)"))
        regions = rearrange(regions, "b (p n) e -> b p n e", p=count)
        attention = jax.nn.softmax(jnp.einsum("bpe,ble->bpl", text, patches) / TACO_TEMPERATURE, axis=-1)
        context = jnp.einsum("bpl,ble->bpe", attention, patches)
        cosine = jnp.einsum(
            "bpne,bpe->bpn", l2_normalize(regions + context[:, :, None]), l2_normalize(text + context)
        )
        return -jax.nn.log_softmax(cosine / TACO_TEMPERATURE, axis=-1)[..., 0]


def check_all_patches(model_config: Any, what: str) -> None:
    """ConfigError for an image tower that leaves patches out, for tasks that need to know where each one lies."""
    if getattr(model_config.image, "patch_dropout", 0):
        raise ConfigError(f"{what} looks at all patches of an image: set model.image.patch_dropout=0")


def valid_phrases(batch: dict[str, jax.Array]) -> Bool[Array, "b p"]:
    """The phrases of images that are there."""
    return batch["phrase_valid"] & batch["image_valid"][:, None]


def encode_phrases(
    ctx: Context, source: Literal["text", "decoder"]
) -> tuple[Float[Array, "b p e"], Float[Array, "b p t d"], Bool[Array, "b p t"]]:
    """(vector, tokens, token mask) of the batch's phrases, as `DualEncoder.ground` takes them.

    source: "text", the text tower; "decoder", the text decoder with the image in view, whose state at the marked word
    is the vector.
    """
    batch = ctx.batch
    mask, count = batch["phrase_mask"], batch["phrase"].shape[1]
    if source == "text":
        phrase = ctx.features["phrase"]
        vector, words = phrase.pooled, phrase.tokens
    else:
        keys = keys_of_parts(ctx.decoder_keys, count)
        tokens = ctx.features["image"].tokens
        return *phrases_by_decoder(ctx.model, tokens, batch["phrase"], mask, batch["phrase_mark"], keys), mask
    return (
        rearrange(vector, "(b p) d -> b p d", p=count),
        rearrange(words, "(b p) t d -> b p t d", p=count),
        mask,
    )


def phrases_by_decoder(
    model: Callable[..., Any],
    image_tokens: Float[Array, "b l d"],
    phrases: Int[Array, "b p t"],
    mask: Bool[Array, "b p t"],
    marks: Int[Array, "b p"],
    keys: RowKeys | None = None,
) -> tuple[Float[Array, "b p w"], Float[Array, "b p t w"]]:
    """(state at the marked word, all states) of phrases that the text decoder reads with the image in view."""
    rows, count = phrases.shape[:2]
    visual = model(image_tokens, jnp.zeros(rows, bool), method="visual_tokens")
    words = model(
        *(jnp.repeat(x, count, axis=0) for x in visual),
        rearrange(phrases, "b p t -> (b p) t"),
        rearrange(mask, "b p t -> (b p) t"),
        None,
        keys,
        method="decode_train",
    )
    words = rearrange(words, "(b p) t d -> b p t d", p=count)
    return jnp.take_along_axis(words, marks[..., None, None], axis=2)[:, :, 0], words


def sum_terms(
    task: Task,
    terms: dict[str, tuple[Float[Array, b * n], Bool[Array, b * n]]],
    valid: Bool[Array, b * n],
) -> tuple[Float[Array, ""], dict[str, tuple[jax.Array, jax.Array]]]:
    """(sum over terms, weighted by the task's fields of the same names, divided by the valid items; metrics).

    terms: name -> (value of each item, whether it counts). A metric is the mean over the items that count.
    """
    count = valid.sum().astype(jnp.float32)
    loss, metrics = jnp.zeros(()), {}
    for name, (values, counted) in terms.items():
        total = jnp.where(counted, values, 0.0).sum()
        loss = loss + getattr(task, name) * total / jnp.maximum(count, 1.0)
        metrics[name] = (total, counted.sum())
    return loss, {"loss": (loss * count, count), **metrics}


def at_size(logits: Float[Array, "b n i j"], size: tuple[int, int]) -> Float[Array, "b n h w"]:
    """Mask logits at the size of their targets."""
    return jax.image.resize(logits, (*logits.shape[:2], *size), method="bilinear")


def binary_cross_entropy(logits: Float[Array, "*n"], targets: Bool[Array, "*n"]) -> Float[Array, "*n"]:
    """-log of the probability of what is true."""
    return -jax.nn.log_sigmoid(jnp.where(targets, logits, -logits))
