"""Contrastive image-text pretraining, and the predictions that its model can make."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from bvl.config import Config
from bvl.data.long_texts import LongTexts, split_to_context
from bvl.errors import ConfigError
from bvl.losses.contrastive import sigmoid_loss, softmax_loss
from bvl.losses.groups import draw_groups, into_groups
from bvl.losses.targets import Targets, diagonal, label_similarity, same_labels, same_text
from bvl.runs import Components
from bvl.tasks.base import Context, LossOutput, Task, View


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contrastive(Task):
    """Pull an image and its text together, push others apart.

    loss: "softmax" (CLIP) or "sigmoid" (SigLIP), see bvl/losses/contrastive.py.
    targets: what counts as a positive beside an image's own texts: nothing ("diagonal"), equal texts
    ("same_text"), equal label sets ("same_labels"), overlapping ones by their share ("overlapping_labels"), or all
    pairs by the softmax of the cosines of their labels over target_temperature ("label_similarity").
    direction_weights: of image-to-text and text-to-image (softmax).
    "same_text" matters to the sigmoid loss; the softmax loss it changes only where equal texts are embedded
    differently, as under dropout, since equal logits share a target without cost.
    chunk_size: columns of logits held at once, None = chosen by size.
    groups: the batch is divided at random into as many groups, anew at every step, and only images and texts of one
    group are compared (grouped aggregation, M2-Encoder: Guo et al. 2024, arXiv:2401.15896); the loss is the mean over
    groups, weighted by their numbers of pairs, and 1 compares all. Groups are drawn from rows of the whole batch, so
    that another number of devices changes nothing. Of n devices, each passes its texts on to n / groups devices instead
    of n, and first sends every row to the row's group, once; with as many groups as devices, nothing else is sent.
    """

    loss_type: Literal["softmax", "sigmoid"] = "softmax"
    targets: Literal["diagonal", "same_text", "same_labels", "overlapping_labels", "label_similarity"] = (
        "same_text"
    )
    target_temperature: float = 1.0
    label_smoothing: float = 0.0
    direction_weights: tuple[float, float] = (0.5, 0.5)
    chunk_size: int | None = None
    groups: int = 1

    def __post_init__(self):
        if self.groups < 1:
            raise ConfigError(f"groups={self.groups}: must be at least 1")
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(f"label_smoothing={self.label_smoothing}: must lie in [0, 1)")
        if self.loss_type == "sigmoid" and (self.label_smoothing or self.direction_weights != (0.5, 0.5)):
            raise ConfigError("label_smoothing and direction_weights belong to loss_type='softmax'")
        if min(self.direction_weights) < 0 or sum(self.direction_weights) <= 0:
            raise ConfigError(
                f"direction_weights={self.direction_weights}: give two weights, none below 0 and not both 0"
            )
        if self.target_temperature <= 0:
            raise ConfigError(f"target_temperature={self.target_temperature}: must be above 0")
        if self.loss_type == "sigmoid" and self.targets == "label_similarity":
            raise ConfigError(
                "targets='label_similarity' makes every pair a positive: use loss_type='softmax'"
            )
        if self.target_temperature != 1.0 and self.targets != "label_similarity":
            raise ConfigError("target_temperature belongs to targets='label_similarity'")

    def check(self, model_config: Any) -> None:
        if self.loss_type == "sigmoid" and model_config.init_bias is None:
            raise ConfigError(
                "loss_type='sigmoid' needs a bias of the logits: set for example model.init_bias=-10 "
                "model.init_temperature=0.1 (SigLIP's values)"
            )

    def fields(self) -> frozenset[str]:
        keys = {"image", "image_valid", "text", "text_mask", "text_valid"}
        if self.targets == "same_text":
            keys |= {"text_id"}
        if "label" in self.targets:
            keys |= {"labels", "label_valid"}
        return frozenset(keys)

    def views(self) -> tuple[View, ...]:
        return View("image"), View("text")

    def loss(self, ctx: Context) -> LossOutput:
        batch = ctx.batch
        image, text = ctx.features["image"].embed, ctx.features["text"].embed
        # A pair counts only where both halves are there.
        text_valid = (batch["text_valid"] & batch["image_valid"][:, None]).reshape(-1)
        image_valid = batch["image_valid"] & batch["text_valid"].any(1)
        targets = self._targets(batch)
        rows, cols = (image, image_valid, targets.rows), (text, text_valid, targets.cols)
        if self.groups > 1:
            order = draw_groups(ctx.rng, len(image), self.groups)
            rows = into_groups(rows, order, mesh=ctx.mesh)
            cols = into_groups(cols, order, mesh=ctx.mesh, each=batch["text_valid"].shape[1])
        image, image_valid, of_images = rows
        text, text_valid, of_texts = cols
        options: dict[str, Any] = dict(
            targets=dataclasses.replace(targets, rows=of_images, cols=of_texts),
            image_valid=image_valid,
            text_valid=text_valid,
            mesh=ctx.mesh,
            chunk_size=self.chunk_size,
            groups=self.groups,
        )
        if self.loss_type == "softmax":
            loss = softmax_loss(
                image,
                text,
                scale=ctx.scale,
                label_smoothing=self.label_smoothing,
                direction_weights=self.direction_weights,
                **options,
            )
        else:
            loss = sigmoid_loss(image, text, scale=ctx.scale, bias=ctx.bias, **options)
        pairs = image_valid.sum().astype(jnp.float32)
        one = jnp.ones(())
        metrics = {"loss": (loss * pairs, pairs), "pairs": (pairs, one), "scale": (ctx.scale, one)}
        if self.loss_type == "sigmoid":
            metrics["bias"] = (ctx.bias, one)
        return LossOutput(loss, metrics)

    def _targets(self, batch: dict[str, jax.Array]) -> Targets:
        if self.targets == "diagonal":
            return diagonal(len(batch["text_valid"]), batch["text_valid"].size)
        if self.targets == "same_text":
            return same_text(batch["text_id"], batch["text_id"].reshape(-1))
        # A record without labels is unknown, which is not the same as free of findings.
        labels = jnp.where(batch["label_valid"].any(1, keepdims=True), batch["labels"], jnp.nan)
        of_texts = jnp.repeat(labels, batch["text_valid"].shape[1], axis=0)
        if self.targets == "label_similarity":
            return label_similarity(labels, of_texts, temperature=self.target_temperature)
        return same_labels(labels, of_texts, soft=self.targets == "overlapping_labels")


def has_contrastive(config: Config) -> bool:
    """Whether a task of the run has trained its embeddings of images and texts to be compared."""
    return any(isinstance(task, Contrastive) for task in config.tasks.values())


def embed_images(
    components: Components, images: Iterable[Any], *, batch_size: int = 64
) -> Float[np.ndarray, "n d"]:
    """Unit-norm embeddings of images (paths, PIL images or arrays)."""
    return _stack(
        (f.embed for f in components.encode_images(images, frozenset({"embed"}), batch_size)), components
    )


def embed_texts(
    components: Components,
    texts: Sequence[str],
    *,
    long: LongTexts = "cut",
    batch_size: int = 64,
) -> Float[np.ndarray, "n d"]:
    """Unit-norm embeddings of texts.

    long: what becomes of texts longer than the tower's context. "cut" reads their beginning, as training does.
    "chunks" reads all of it: the text is taken apart into pieces of whole sentences that fit (`split_to_context`),
    each is embedded, and the text's embedding is the mean of theirs weighted by their numbers of tokens,
    normalised again. Texts that fit come out the same either way.
    Raises ConfigError for another `long`.
    """
    if long not in ("cut", "chunks"):
        raise ConfigError(f"long={long!r}: texts beyond the context are 'cut' or read in 'chunks'")
    texts = list(texts)
    whole = [[text] for text in texts]
    pieces = whole if long == "cut" else [split_to_context(text, components.tokenizer) for text in texts]
    flat = [piece for parts in pieces for piece in parts]
    embed = _stack(
        (f.embed for f in components.encode_texts(flat, frozenset({"embed"}), batch_size)), components
    )
    if len(flat) == len(texts):
        return embed
    weights = np.maximum(components.tokenizer.lengths(flat), 1).astype(np.float32)
    starts = np.cumsum([0, *(len(parts) for parts in pieces[:-1])])
    sums = np.add.reduceat(embed * weights[:, None], starts)
    return sums / np.linalg.norm(sums, axis=1, keepdims=True)


def embed_prompts(components: Components, prompts: Sequence[str | Sequence[str]]) -> Float[np.ndarray, "c d"]:
    """One unit-norm vector a class: the mean over its prompts' embeddings, normalised again (prompt ensemble)."""
    groups = [[p] if isinstance(p, str) else list(p) for p in prompts]
    if not groups or not all(groups):
        raise ValueError("give at least one prompt for every class")
    flat = embed_texts(components, [p for group in groups for p in group])
    bounds = np.cumsum([0, *(len(g) for g in groups)])
    means = np.stack([flat[a:b].mean(0) for a, b in zip(bounds[:-1], bounds[1:], strict=True)])
    return means / np.linalg.norm(means, axis=1, keepdims=True)


def classify(
    components: Components,
    images: Iterable[Any],
    prompts: Sequence[str | Sequence[str]] | Sequence[tuple[Sequence[str], Sequence[str]]],
    *,
    multi_label: bool = False,
    batch_size: int = 64,
) -> Float[np.ndarray, "n c"]:
    """Zero-shot class probabilities of images.

    Single label: softmax over the classes of scale * cosine. Multi label: each class on its own; where its
    prompt is a pair (positive, negative), the softmax of the two, else sigmoid(scale * cosine + bias), which is
    calibrated only for a model trained with the sigmoid loss.
    """
    image = embed_images(components, images, batch_size=batch_size)
    scale, bias = components.scale_and_bias()
    if not multi_label:
        logits = scale * image @ embed_prompts(components, prompts).T
        return np.asarray(jax.nn.softmax(logits, axis=-1), np.float32)
    if all(isinstance(p, tuple) and len(p) == 2 for p in prompts):
        positive = embed_prompts(components, [p[0] for p in prompts])
        negative = embed_prompts(components, [p[1] for p in prompts])
        return np.asarray(jax.nn.sigmoid(scale * image @ (positive - negative).T), np.float32)
    return np.asarray(jax.nn.sigmoid(scale * image @ embed_prompts(components, prompts).T + bias), np.float32)


def _stack(batches: Iterable[np.ndarray], components: Components) -> Float[np.ndarray, "n d"]:
    parts = list(batches)
    return np.concatenate(parts) if parts else np.zeros((0, components.model.config.embed_dim), np.float32)
