"""Supervised classification of images by a linear head, single-label or multi-label."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from bvl.errors import ConfigError
from bvl.losses.classification import sigmoid_cross_entropy, softmax_cross_entropy
from bvl.models.layers import Dense
from bvl.runs import Components
from bvl.tasks.base import Context, Head, LossOutput, ModelInfo, Task, View


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classify(Task):
    """Cross-entropy of a linear head on the pooled image features.

    multi_label: a sigmoid for each class, else one softmax; single-label rows need exactly one label.
    class_weights: class name -> factor of its loss; classes not named have 1.
    """

    multi_label: bool = False
    class_weights: dict[str, float] = dataclasses.field(default_factory=dict)
    label_smoothing: float = 0.0

    def __post_init__(self):
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(f"label_smoothing={self.label_smoothing}: must lie in [0, 1)")

    def fields(self) -> frozenset[str]:
        return frozenset({"image", "image_valid", "labels", "label_valid"})

    def views(self) -> tuple[View, ...]:
        return (View("image", frozenset({"pooled"})),)

    def heads(self, info: ModelInfo) -> dict[str, Head]:
        if not info.classes:
            raise ConfigError("task classify: no record has labels, and data.classes names none")
        unknown = set(self.class_weights) - set(info.classes)
        if unknown:
            raise ConfigError(
                f"class_weights names {', '.join(sorted(unknown))}; classes are {', '.join(info.classes)}"
            )
        return {"linear": Head(Dense(len(info.classes), names=("embed", "classes")), (info.image_width,))}

    def loss(self, ctx: Context) -> LossOutput:
        logits = ctx.heads["linear"](ctx.features["image"].pooled.astype(jnp.float32))
        labels = ctx.batch["labels"]
        valid = ctx.batch["label_valid"] & ctx.batch["image_valid"][:, None]
        weights = jnp.asarray([self.class_weights.get(name, 1.0) for name in ctx.info.classes], jnp.float32)
        if self.multi_label:
            loss = sigmoid_cross_entropy(
                logits, labels, valid=valid, class_weights=weights, label_smoothing=self.label_smoothing
            )
            correct, count = jnp.sum(((logits > 0) == (labels > 0)) & valid), valid.sum()
        else:
            rows = valid.all(-1) & (labels.sum(-1) == 1)
            loss = softmax_cross_entropy(
                logits, labels, valid=rows, class_weights=weights, label_smoothing=self.label_smoothing
            )
            correct, count = jnp.sum((logits.argmax(-1) == labels.argmax(-1)) & rows), rows.sum()
        count = count.astype(jnp.float32)
        return LossOutput(loss, {"loss": (loss * count, count), "accuracy": (correct, count)})


def predict(
    components: Components, images: Iterable[Any], task_name: str, *, batch_size: int = 64
) -> Float[np.ndarray, "n c"]:
    """Class probabilities of images by the trained head of the task `task_name`; columns are `components.classes`.

    Raises ConfigError if the run has no such task.
    """
    task = components.config.tasks.get(task_name)
    if not isinstance(task, Classify):
        raise ConfigError(
            f"the run has no task {task_name!r} of type Classify; it has {', '.join(components.config.tasks)}"
        )
    head = components.params["heads"][task_name]["linear"]
    module = Dense(len(components.classes), names=("embed", "classes"))
    squash = jax.nn.sigmoid if task.multi_label else jax.nn.softmax
    parts = [
        np.asarray(squash(module.apply({"params": head}, features.pooled)))
        for features in components.encode_images(images, frozenset({"pooled"}), batch_size)
    ]
    return np.concatenate(parts) if parts else np.zeros((0, len(components.classes)), np.float32)
