"""Open-vocabulary detection: the objects of an image, each with a name out of any list of names."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from bvl.errors import ConfigError
from bvl.losses.boxes import box_iou
from bvl.losses.masks import mask_bce, mask_dice_loss, sigmoid_focal_loss
from bvl.losses.set_prediction import match_boxes
from bvl.models.features import Located
from bvl.tasks.base import Context, LossOutput, ModelInfo, Task, View
from bvl.tasks.grounding import at_size, check_all_patches, sum_terms


@dataclasses.dataclass(frozen=True, kw_only=True)
class Detection(Task):
    """Find every boxed object and what it is called, by the model's region decoder (OWL-ViT: arXiv:2205.06230).

    Each candidate of an image has a box, an embedding in the space of the texts, and a presence. Objects are matched to
    `positives` candidates each (Hungarian, on the device). The sum, weighted by the fields and a mean over images, of

        l1, giou: of the matched boxes
        name: focal loss of each candidate's likeness to each phrase of its image (data.regions.phrases), present and
          absent ones; a candidate's positives are the phrases that name its object
        presence: focal loss of whether a candidate is matched, whatever the object is called
        bce, dice: of the objects' masks, with masks=True and model.region_decoder.instance_masks

    The masks are of all matched candidates, each its own object's, and a mean over those whose object has one. `name` and
    `presence` are divided by the number of matched candidates. What is visible but has no box counts as
    background.
    """

    per_example: ClassVar[bool] = True
    l1: float = 5.0
    giou: float = 2.0
    name: float = 2.0
    presence: float = 1.0
    bce: float = 2.0
    dice: float = 2.0
    positives: int = 3
    masks: bool = False

    def __post_init__(self):
        for field in ("l1", "giou", "name", "presence", "bce", "dice"):
            if getattr(self, field) < 0:
                raise ConfigError(f"detection {field}={getattr(self, field)}: a weight must not be negative")
        if self.positives < 1:
            raise ConfigError(f"detection positives={self.positives}: must be at least 1")

    def check(self, model_config: Any) -> None:
        if model_config.region_decoder is None:
            raise ConfigError(
                "detection needs a region decoder: set model.region_decoder, for example RegionDecoderConfig()"
            )
        if not model_config.embeds_text:
            raise ConfigError("detection compares objects with names: the model needs a text tower")
        if self.masks and not model_config.region_decoder.instance_masks:
            raise ConfigError("detection masks=True needs model.region_decoder.instance_masks=True")
        check_all_patches(model_config, "detection")

    def fields(self) -> frozenset[str]:
        keys = {"image", "image_valid", "object_box", "object_valid", "phrase", "phrase_mask", "phrase_valid"}
        keys |= {"phrase_known", "phrase_object", "object_known"}
        return frozenset(keys | ({"object_mask", "object_mask_valid"} if self.masks else set()))

    def views(self) -> tuple[View, ...]:
        return View("image", frozenset({"regions"})), View("text", input="phrase")

    def count(self, batch: dict[str, jax.Array], info: ModelInfo) -> Float[Array, ""]:
        return (batch["image_valid"] & batch["object_known"]).sum().astype(jnp.float32)

    def loss(self, ctx: Context) -> LossOutput:
        batch, image = ctx.batch, ctx.features["image"]
        valid = batch["image_valid"] & batch["object_known"]
        found: Located = ctx.model(image.tokens, image.levels, image.grid, method="detect")
        names = rearrange(ctx.features["phrase"].embed, "(b p) e -> b p e", b=len(valid))
        logits = ctx.model(found.embed, names, method="detection_logits")

        objects = batch["object_valid"] & valid[:, None]
        known = batch["phrase_valid"] & batch["phrase_known"]
        named = batch["phrase_object"] & known[..., None] & objects[:, None]
        # An object that no phrase of this image names is looked for by its place and presence alone.
        likeness = jnp.einsum("bqp,bpm->bqm", jax.nn.sigmoid(logits), named.astype(jnp.float32))
        likeness = likeness / jnp.maximum(named.sum(1), 1)[:, None]
        fit = match_boxes(found.boxes, likeness, batch["object_box"], objects, repeats=self.positives)

        own = jnp.maximum(fit.assigned, 0)
        targets = jnp.take_along_axis(named, own[:, None], axis=2) & fit.matched[:, None]
        per_pair = jnp.where(known[:, None], sigmoid_focal_loss(logits, targets.swapaxes(1, 2)), 0.0)
        terms = {
            "l1": (fit.l1, valid),
            "giou": (fit.giou, valid),
            "name": (per_pair.sum((1, 2)) / fit.count, valid),
            "presence": (sigmoid_focal_loss(found.presence, fit.matched).sum(-1) / fit.count, valid),
        }
        if self.masks:
            terms |= self._mask_terms(batch, found, own, fit.matched, valid)
        loss, metrics = sum_terms(self, terms, valid)
        iou = jnp.take_along_axis(box_iou(found.boxes, batch["object_box"]), own[..., None], axis=-1)[..., 0]
        metrics["iou"] = (jnp.where(fit.matched, iou, 0.0).sum(), fit.matched.sum())
        return LossOutput(loss, metrics)

    def _mask_terms(
        self,
        batch: dict[str, jax.Array],
        found: Located,
        own: Int[Array, "b q"],
        matched: Bool[Array, "b q"],
        valid: Bool[Array, " b"],
    ) -> dict[str, Any]:
        """Losses of the matched candidates' masks, means over those whose object, `own`, has a mask."""
        counted = matched & jnp.take_along_axis(batch["object_mask_valid"], own, axis=1)
        target = jnp.take_along_axis(batch["object_mask"], own[..., None, None], axis=1)
        logits = at_size(found.mask_logits, target.shape[-2:])

        def mean(values: Float[Array, "b q"]) -> Float[Array, " b"]:
            return jnp.where(counted, values, 0.0).sum(1) / jnp.maximum(counted.sum(1), 1)

        masked = valid & counted.any(1)
        return {
            "bce": (mean(mask_bce(logits, target)), masked),
            "dice": (mean(mask_dice_loss(logits, target)), masked),
        }
