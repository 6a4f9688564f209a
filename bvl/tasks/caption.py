"""Captioning: the next token of a text, given an image and the prefix of controls."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from bvl.data.text import ROLES
from bvl.errors import ConfigError
from bvl.losses.caption import next_token_loss
from bvl.models.dropout import RowKeys, fold, keys_of_parts
from bvl.tasks.base import Context, LossOutput, ModelInfo, Task, View


@dataclasses.dataclass(frozen=True, kw_only=True)
class Caption(Task):
    """Write the texts of an image: mean cross-entropy of their tokens, END included, by the model's decoder.

    The prefix (start token, controls, prompt; bvl/data/controls.py) is read and not predicted, so a question as prompt
    and its answer as text is visual question answering. Beside `Contrastive` this is CoCa (Yu et al. 2022,
    arXiv:2205.01917); the losses are weighted by `weight`.

    image_dropout: share of images of which the decoder sees the learned null instead of all visual tokens, which
      classifier-free guidance needs (Kornblith et al. 2023, arXiv:2307.16686, section 3); the prefix stays. 1 trains a
      language model, without images, and is all that a model without an image tower can do.
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
        if model_config.image is None and self.reads_images:
            raise ConfigError(
                "captioning needs an image tower: set model.image; a language model alone is trained with "
                "image_dropout=1"
            )
        if model_config.image is not None and self.image_dropout and not model_config.decoder.null:
            raise ConfigError(
                f"image_dropout={self.image_dropout} shows the decoder a null image, and model.decoder.null=False: set "
                "it to true, which adds the parameter, or image_dropout=0"
            )

    def fields(self) -> frozenset[str]:
        image = {"image", "image_valid"} if self.reads_images else set()
        return frozenset({"text", "text_mask", "text_valid", "prompt", "prompt_mask"} | image)

    def views(self) -> tuple[View, ...]:
        return (View("image", frozenset({"visual"})),) if self.reads_images else ()

    def heads(self, info: ModelInfo) -> dict[str, Any]:
        if self.parallel and info.mask_id is None:
            raise ConfigError(
                f"caption parallel={self.parallel}: the tokenizer has no mask token; looked for "
                f"{', '.join(ROLES['mask'])}"
            )
        return {}

    def count(self, batch: dict[str, jax.Array], info: ModelInfo) -> Float[Array, ""]:
        return predicted_tokens(batch["text_mask"], batch["text_valid"]).sum().astype(jnp.float32)

    def loss(self, ctx: Context) -> LossOutput:
        num_texts = ctx.batch["text"].shape[1]
        visual, visual_mask = jax.tree.map(lambda x: jnp.repeat(x, num_texts, axis=0), self._visual(ctx))
        return text_loss(
            ctx,
            visual,
            visual_mask,
            *(ctx.batch[name] for name in ("text", "text_mask", "text_valid", "prompt", "prompt_mask")),
            parallel=self.parallel,
            label_smoothing=self.label_smoothing,
        )

    def _visual(self, ctx: Context) -> tuple[Float[Array, "b s w"] | None, Bool[Array, "b s"] | None]:
        """(visual tokens, mask): the null where there is no image and in `image_dropout` of the others.

        (None, None) for a model without an image tower.
        """
        if not ctx.info.image_width:
            return None, None
        if not self.reads_images:
            count = len(ctx.batch["text"])
            nothing = jnp.zeros((count, 1, ctx.info.image_width), ctx.info.dtype)
            return ctx.model(nothing, jnp.ones(count, bool), method="visual_tokens")
        dropped = ~ctx.batch["image_valid"] | drawn(fold(ctx.keys, 0), self.image_dropout)
        return ctx.model(ctx.features["image"].for_decoder, dropped, method="visual_tokens")


def drawn(keys: RowKeys, share: float) -> Bool[Array, " b"]:
    """Rows drawn with probability `share`, each by its own key."""
    return jax.vmap(lambda key: jax.random.bernoulli(key, share))(keys)


def predicted_tokens(
    text_mask: Bool[Array, "b k t"], text_valid: Bool[Array, "b k"]
) -> Bool[Array, "b k t-1"]:
    """Which tokens after the start token are predicted."""
    return text_mask[..., 1:] & text_valid[..., None]


def text_loss(
    ctx: Context,
    visual: Float[Array, "b*k s w"] | None,
    visual_mask: Bool[Array, "b*k s"] | None,
    text: Int[Array, "b k t"],
    text_mask: Bool[Array, "b k t"],
    text_valid: Bool[Array, "b k"],
    prompt: Int[Array, "b k p"],
    prompt_mask: Bool[Array, "b k p"],
    *,
    parallel: float = 0.0,
    label_smoothing: float = 0.0,
) -> LossOutput:
    """Mean cross-entropy of the valid texts' tokens, END included, by the decoder that sees visual tokens of each.

    parallel: share of the b rows all of whose texts are read as mask tokens that see each other.
    """
    num_texts, prefix = text.shape[1], prompt.shape[-1]
    # The start token stands in the prefix.
    tokens = rearrange(jnp.concatenate([prompt, text[..., 1:]], axis=-1), "b k l -> (b k) l")
    mask = rearrange(jnp.concatenate([prompt_mask, text_mask[..., 1:]], axis=-1), "b k l -> (b k) l")
    inputs, is_parallel = tokens[:, :-1], None
    if parallel:
        is_parallel = jnp.repeat(drawn(fold(ctx.keys, 1), parallel), num_texts)
        written = jnp.arange(inputs.shape[1]) >= prefix
        inputs = jnp.where(is_parallel[:, None] & written, ctx.info.mask_id, inputs)
    hidden = ctx.model(
        visual,
        visual_mask,
        inputs,
        mask[:, :-1],
        is_parallel,
        keys_of_parts(ctx.decoder_keys, num_texts),
        method="decode_train",
    )
    hidden = hidden[:, prefix - 1 :].astype(ctx.info.dtype)
    weights = rearrange(predicted_tokens(text_mask, text_valid), "b k t -> (b k t)").astype(jnp.float32)
    total, correct = next_token_loss(
        rearrange(hidden, "n t d -> (n t) d"),
        ctx.model(method="vocabulary").astype(ctx.info.dtype),
        rearrange(tokens[:, prefix:], "n t -> (n t)"),
        weights,
        label_smoothing=label_smoothing,
    )
    count = weights.sum()
    return LossOutput(total / jnp.maximum(count, 1.0), {"loss": (total, count), "accuracy": (correct, count)})
