"""Supervised classification of images by a linear head, single-label or multi-label."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

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
    label_smoothing: e in the target (1 - e) label + e / C (one softmax) or + e / 2 (sigmoids).
    """

    per_example: ClassVar[bool] = True
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
        return {"linear": Head(Dense(len(info.classes), names=("embed", "classes")), ((info.image_width,),))}

    def loss(self, ctx: Context) -> LossOutput:
        logits = ctx.heads["linear"](ctx.features["image"].pooled.astype(jnp.float32))
        labels, valid = ctx.batch["labels"], self._valid(ctx.batch)
        cross_entropy = sigmoid_cross_entropy if self.multi_label else softmax_cross_entropy
        loss = cross_entropy(
            logits,
            labels,
            valid=valid,
            class_weights=self._weights(ctx.info),
            label_smoothing=self.label_smoothing,
        )
        if self.multi_label:
            correct = (logits > 0) == (labels > 0)
        else:
            correct = logits.argmax(-1) == labels.argmax(-1)
        count = self.count(ctx.batch, ctx.info)
        accuracy = jnp.sum(correct & valid), valid.sum().astype(jnp.float32)
        return LossOutput(loss, {"loss": (loss * count, count), "accuracy": accuracy})

    def count(self, batch: dict[str, jax.Array], info: ModelInfo) -> Float[Array, ""]:
        weights = self._weights(info)
        if not self.multi_label:
            weights = batch["labels"] @ weights
        return jnp.where(self._valid(batch), weights, 0.0).sum()

    def _valid(self, batch: dict[str, jax.Array]) -> Bool[Array, "*rows"]:
        """Which (row, class) entries count; of single labels which rows."""
        valid = batch["label_valid"] & batch["image_valid"][:, None]
        return valid if self.multi_label else valid.all(-1) & (batch["labels"].sum(-1) == 1)

    def _weights(self, info: ModelInfo) -> Float[Array, " c"]:
        return jnp.asarray([self.class_weights.get(name, 1.0) for name in info.classes], jnp.float32)


def trained_task(components: Components, name: str) -> Classify:
    """The run's task `name`; ConfigError if it has no such task of type Classify."""
    task = components.config.tasks.get(name)
    if not isinstance(task, Classify):
        raise ConfigError(
            f"the run has no task {name!r} of type Classify; it has {', '.join(components.config.tasks)}"
        )
    return task


def predict(
    components: Components, pooled: Float[np.ndarray, "n d"], task_name: str
) -> Float[np.ndarray, "n c"]:
    """Class probabilities by the trained head of the task `task_name`; columns are `components.classes`.

    pooled: the image tower's pooled features. Raises ConfigError if the run has no such task.
    """
    squash = jax.nn.sigmoid if trained_task(components, task_name).multi_label else jax.nn.softmax
    head = components.params["heads"][task_name]["linear"]
    module = Dense(len(components.classes), names=("embed", "classes"))
    return np.asarray(squash(module.apply({"params": head}, jnp.asarray(pooled, jnp.float32))))
