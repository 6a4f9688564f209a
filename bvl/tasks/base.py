"""What a task is. The training step knows this interface and no task by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from bvl.errors import ConfigError
from bvl.models.dropout import RowKeys

Features = Any  # ImageFeatures or TextFeatures
Metrics = dict[str, tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class View:
    """Something to be encoded: the batch's images or texts, by the trained model or a frozen one.

    need: fields of the features. encoder: "model", or a name from the config's `frozen`.
    input: batch key of the pixels or token ids, by default the kind; of texts `<input>_mask` is the mask.
    """

    kind: Literal["image", "text"]
    need: frozenset[str] = frozenset({"embed"})
    encoder: str = "model"
    input: str = ""

    def __post_init__(self):
        object.__setattr__(self, "input", self.input or self.kind)
        known = {"embed", "pooled", "tokens"}
        if self.kind == "image":
            known |= {"levels", "patch_embed", "visual", "regions"}
        if not self.need <= known:
            raise ConfigError(
                f"a view of {self.input!r} needs {', '.join(sorted(self.need - known))}; {self.kind} towers give "
                f"{', '.join(sorted(known))}"
            )


@dataclasses.dataclass(frozen=True)
class Head:
    """An extra module of a task and its inputs without the batch axis: shapes of float32, or shape and type."""

    module: nn.Module
    inputs: tuple[tuple[int, ...] | jax.ShapeDtypeStruct, ...]

    def init(self, key: jax.Array) -> Any:
        """Fresh parameters, boxed."""
        structs = (
            x if isinstance(x, jax.ShapeDtypeStruct) else jax.ShapeDtypeStruct(x, jnp.float32)
            for x in self.inputs
        )
        return self.module.init(key, *(jnp.zeros((1, *x.shape), x.dtype) for x in structs))["params"]


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """What a task may need to know to make its heads and to prepare its inputs.

    vocab_size, mask_id, special_ids: of the tokenizer; mask_id is None where its vocabulary has no mask token.
    dtype: what the towers compute in.
    """

    image_width: int
    text_width: int
    embed_dim: int
    classes: tuple[str, ...]
    vocab_size: int = 0
    mask_id: int | None = None
    special_ids: tuple[int, ...] = ()
    dtype: Any = jnp.float32


@dataclasses.dataclass(frozen=True)
class Context:
    """What a loss sees.

    features: a view's input -> features of the trained model; texts come as [B * K, ...].
    frozen: encoder name -> a view's input -> features, without gradient.
    heads: name -> the task's head with its parameters applied.
    model: (*arguments, method=name) -> what that method of the trained model gives, as of its decoder.
    scale, bias: of the contrastive logits. token_embed: the text tower's table, for heads tied to it; None without.
    rng: one key for the batch. keys: one for each row, the same however the batch is split. decoder_keys: these, or
    None where the decoder is frozen.
    """

    features: dict[str, Features]
    frozen: dict[str, dict[str, Features]]
    heads: dict[str, Callable[..., Any]]
    model: Callable[..., Any]
    scale: Float[Array, ""]
    bias: Float[Array, ""]
    token_embed: Float[Array, "v d"] | None
    batch: dict[str, jax.Array]
    extra: Any
    rng: jax.Array
    keys: RowKeys
    decoder_keys: RowKeys | None
    step: jax.Array
    mesh: Mesh
    info: ModelInfo


@dataclasses.dataclass(frozen=True)
class LossOutput:
    """`metrics`: name -> (total, count), summed before they are divided. `extra`: the task's new extra state."""

    loss: Float[Array, ""]
    metrics: Metrics = dataclasses.field(default_factory=dict)
    extra: Any = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """Base of all tasks: `weight` is the factor of its loss in the sum.

    per_example: the loss is a weighted mean over examples, so that a batch may be split into microbatches; False if
    it needs all rows at once.
    """

    per_example: ClassVar[bool] = False
    weight: float = 1.0

    def fields(self) -> frozenset[str]:
        """The batch keys the loss reads (bvl/data/batch.py)."""
        raise NotImplementedError

    def views(self) -> tuple[View, ...]:
        """What is to be encoded. Equal inputs are encoded once a step, for all tasks together."""
        raise NotImplementedError

    def check(self, model_config: Any) -> None:
        """Raise ConfigError, before any data is read, for a model that the loss cannot use."""

    def heads(self, info: ModelInfo) -> dict[str, Head]:
        """Extra modules; their parameters are trained with the model's."""
        return {}

    def init_extra(self, info: ModelInfo) -> Any:
        """Extra state that is not a parameter (moving averages, queues); checkpointed."""
        return None

    def prepare(self, batch: dict[str, jax.Array], keys: RowKeys, info: ModelInfo) -> dict[str, jax.Array]:
        """Further batch entries "<task>/<name>", made on the device before anything is encoded.

        Each row may depend on its own row and key alone, unless the task needs all rows at once. Such a task may also
        make images in any number; images of a row may have a further axis ([b, n, h, w, c] is encoded as b * n images).
        """
        return {}

    def loss(self, ctx: Context) -> LossOutput:
        raise NotImplementedError

    def count(self, batch: dict[str, jax.Array], info: ModelInfo) -> Float[Array, ""]:
        """What the loss over these (prepared) rows is divided by: the sum of its examples' weights.

        Tasks with `per_example` have it; microbatches are weighted by it.
        """
        raise NotImplementedError

    def after_update(self, extra: Any, params: Any) -> Any:
        """New extra state from the updated parameters (moving-average teachers); pure, inside the jit."""
        return extra
