"""Captioning: the next token of a text, given an image and the prefix of controls."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float

from bvl.data.text import ROLES
from bvl.errors import ConfigError
from bvl.losses.caption import next_token_loss
from bvl.models.dropout import fold, keys_of_parts
from bvl.tasks.base import Context, LossOutput, ModelInfo, Task, View


@dataclasses.dataclass(frozen=True, kw_only=True)
class Caption(Task):
    """Write the texts of an image: mean cross-entropy of their tokens, END included, by the model's decoder.

    The prefix (start token, controls, prompt; bvl/data/controls.py) is read and not predicted, so a question as prompt
    and its answer as text is visual question answering. Beside `Contrastive` this is CoCa (Yu et al. 2022,
    arXiv:2205.01917); the losses are weighted by `weight`.

    image_dropout: share of images of which the decoder sees the learned null instead of all visual tokens, which
      classifier-free guidance needs (Kornblith et al. 2023, arXiv:2307.16686, section 3); the prefix stays. 1 trains a
      language model, without images.
    parallel: share of images whose text is predicted all at once from mask tokens that see each other (CapPa:
      Tschannen et al. 2023, arXiv:2306.07915, section 3).
    label_smoothing: this share of the target's probability is spread evenly over the vocabulary.
    """

    image_dropout: float = 0.2
    parallel: float = 0.0
    label_smoothing: float = 0.0
    per_example: ClassVar[bool] = True

    def __post_init__(self):
        for name in ("image_dropout", "parallel"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must lie in 0..1")
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(f"label_smoothing={self.label_smoothing}: must lie in [0, 1)")

    @property
    def reads_images(self) -> bool:
        return self.image_dropout < 1

    def check(self, model_config: Any) -> None:
        if model_config.decoder is None:
            raise ConfigError(
                "captioning needs a decoder: set model.decoder, for example DecoderConfig(width=256, depth=4)"
            )

    def fields(self) -> frozenset[str]:
        image = {"image", "image_valid"} if self.reads_images else set()
        return frozenset({"text", "text_mask", "text_valid", "prompt", "prompt_mask"} | image)

    def views(self) -> tuple[View, ...]:
        return (View("image", frozenset({"tokens"})),) if self.reads_images else ()

    def heads(self, info: ModelInfo) -> dict[str, Any]:
        if self.parallel and info.mask_id is None:
            raise ConfigError(
                f"caption parallel={self.parallel}: the tokenizer has no mask token; looked for "
                f"{', '.join(ROLES['mask'])}"
            )
        return {}

    def count(self, batch: dict[str, jax.Array], info: ModelInfo) -> Float[Array, ""]:
        return self._predicted(batch).sum().astype(jnp.float32)

    def _predicted(self, batch: dict[str, jax.Array]) -> Bool[Array, "b k t"]:
        """Which tokens after the start token are predicted."""
        return batch["text_mask"][..., 1:] & batch["text_valid"][..., None]

    def loss(self, ctx: Context) -> LossOutput:
        batch = ctx.batch
        num_texts, prefix = batch["text"].shape[1], batch["prompt"].shape[-1]
        visual, visual_mask = self._visual(ctx)
        visual, visual_mask = (jnp.repeat(x, num_texts, axis=0) for x in (visual, visual_mask))
        # The start token stands in the prefix.
        tokens = rearrange(
            jnp.concatenate([batch["prompt"], batch["text"][..., 1:]], axis=-1), "b k l -> (b k) l"
        )
        mask = rearrange(
            jnp.concatenate([batch["prompt_mask"], batch["text_mask"][..., 1:]], axis=-1), "b k l -> (b k) l"
        )
        inputs, parallel = tokens[:, :-1], None
        if self.parallel:
            drawn = jax.vmap(lambda key: jax.random.bernoulli(key, self.parallel))(fold(ctx.keys, 1))
            parallel = jnp.repeat(drawn, num_texts)
            written = jnp.arange(inputs.shape[1]) >= prefix
            inputs = jnp.where(parallel[:, None] & written, ctx.info.mask_id, inputs)
        hidden = ctx.model(
            visual,
            visual_mask,
            inputs,
            mask[:, :-1],
            parallel,
            keys_of_parts(ctx.decoder_keys, num_texts),
            method="decode_train",
        )
        hidden = hidden[:, prefix - 1 :].astype(ctx.info.dtype)
        weights = rearrange(self._predicted(batch), "b k t -> (b k t)").astype(jnp.float32)
        total, correct = next_token_loss(
            rearrange(hidden, "n t d -> (n t) d"),
            ctx.model(method="vocabulary").astype(ctx.info.dtype),
            rearrange(tokens[:, prefix:], "n t -> (n t)"),
            weights,
            label_smoothing=self.label_smoothing,
        )
        count = weights.sum()
        return LossOutput(
            total / jnp.maximum(count, 1.0), {"loss": (total, count), "accuracy": (correct, count)}
        )

    def _visual(self, ctx: Context) -> tuple[Float[Array, "b s w"], Bool[Array, "b s"]]:
        """(visual tokens, mask): the null where there is no image and in `image_dropout` of the others."""
        if not self.reads_images:
            count = len(ctx.batch["text"])
            nothing = jnp.zeros((count, 1, ctx.info.image_width), ctx.info.dtype)
            return ctx.model(nothing, jnp.ones(count, bool), method="visual_tokens")
        dropped = ~ctx.batch["image_valid"]
        if self.image_dropout:
            draw = jax.vmap(lambda key: jax.random.bernoulli(key, self.image_dropout))
            dropped = dropped | draw(fold(ctx.keys, 0))
        return ctx.model(ctx.features["image"].tokens, dropped, method="visual_tokens")
