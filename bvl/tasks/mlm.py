"""Masked language modelling: words are hidden from the text tower, and a head names them."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from bvl.data.text import ROLES
from bvl.errors import ConfigError
from bvl.losses.caption import next_token_loss
from bvl.models.bert import MlmTransform, VocabularyBias
from bvl.models.dropout import RowKeys
from bvl.models.layers import ACTIVATIONS, Activation
from bvl.tasks.base import Context, Head, LossOutput, ModelInfo, Task, View


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedLanguageModel(Task):
    """Name the words hidden from the text (Devlin et al. 2019, arXiv:1810.04805, section 3.1).

    Of each text round(mask_fraction * words) tokens are chosen, at least one; 80 % of them are replaced by the mask
    token, 10 % by a random token, 10 % stay. The loss is the cross-entropy of the chosen ones. The decoder is tied
    to the text tower's token embedding.

    norm_epsilon, activation: of the head, those of BERT's where none are given.
    """

    mask_fraction: float = 0.15
    norm_epsilon: float = 1e-12
    activation: Activation = "gelu"
    per_example: ClassVar[bool] = True

    def __post_init__(self):
        if not 0 < self.mask_fraction < 1:
            raise ConfigError(f"mask_fraction={self.mask_fraction}: must lie between 0 and 1")
        if self.activation not in ACTIVATIONS:
            raise ConfigError(f"activation={self.activation!r}: choose one of {', '.join(ACTIVATIONS)}")

    def check(self, model_config: Any) -> None:
        if model_config.text is None:
            raise ConfigError("masked language modelling needs a text tower: set model.text, which is None")
        if model_config.text.causal:
            raise ConfigError(
                "masked language modelling needs a text tower that reads in both directions: set "
                "model.text.causal=False, or take a BertConfig as model.text"
            )

    def fields(self) -> frozenset[str]:
        return frozenset({"text", "text_mask", "text_valid"})

    def views(self) -> tuple[View, ...]:
        return (View("text", frozenset({"tokens"}), input="mlm/text"),)

    def heads(self, info: ModelInfo) -> dict[str, Head]:
        if info.mask_id is None:
            raise ConfigError(
                f"masked language modelling: the tokenizer has no mask token; looked for "
                f"{', '.join(ROLES['mask'])}. Add one to its file, or let bvl train a tokenizer"
            )
        return {
            "transform": Head(
                MlmTransform(self.norm_epsilon, self.activation, dtype=info.dtype), ((info.text_width,),)
            ),
            "bias": Head(VocabularyBias(), ((info.vocab_size,),)),
        }

    def prepare(self, batch: dict[str, jax.Array], keys: RowKeys, info: ModelInfo) -> dict[str, jax.Array]:
        """The texts with hidden words. "mlm/slots" are the chosen positions, as many for every text; where a text
        has fewer, "mlm/chosen" is False. "mlm/targets" are the tokens that stood there."""
        tokens, mask = batch["text"], batch["text_mask"]
        words = mask & batch["text_valid"][..., None] & ~jnp.isin(tokens, jnp.asarray(info.special_ids))
        prepared = jax.vmap(functools.partial(self._hide, info))(keys, tokens, words)
        return {"mlm/text_mask": mask, **prepared}

    def _hide(
        self, info: ModelInfo, key: jax.Array, tokens: Int[Array, "k t"], words: Bool[Array, "k t"]
    ) -> dict[str, jax.Array]:
        """`prepare` for one example."""
        which, how, other = jax.random.split(key, 3)
        # A fixed number of slots, so that the logits have one shape: [texts, slots, vocabulary].
        num_slots = max(1, round(self.mask_fraction * tokens.shape[-1]))
        wanted = jnp.maximum(jnp.round(self.mask_fraction * words.sum(-1)), 1)
        scores = jnp.where(words, jax.random.uniform(which, tokens.shape), -1.0)
        best, slots = jax.lax.top_k(scores, num_slots)
        chosen = (best >= 0) & (jnp.arange(num_slots) < wanted[:, None])
        targets = jnp.take_along_axis(tokens, slots, axis=-1)
        draw = jax.random.uniform(how, slots.shape)
        random = jax.random.randint(other, slots.shape, 0, info.vocab_size, tokens.dtype)
        hidden = jnp.where(draw < 0.8, info.mask_id, jnp.where(draw < 0.9, random, targets))
        text = jnp.put_along_axis(
            tokens, slots, jnp.where(chosen, hidden, targets).astype(tokens.dtype), axis=-1, inplace=False
        )
        return {"mlm/text": text, "mlm/slots": slots, "mlm/chosen": chosen, "mlm/targets": targets}

    def count(self, batch: dict[str, jax.Array], info: ModelInfo) -> Float[Array, ""]:
        return batch["mlm/chosen"].sum().astype(jnp.float32)

    def loss(self, ctx: Context) -> LossOutput:
        slots = rearrange(ctx.batch["mlm/slots"], "b k s -> (b k) s")
        hidden = jnp.take_along_axis(ctx.features["mlm/text"].tokens, slots[..., None], axis=1)
        hidden = rearrange(ctx.heads["transform"](hidden), "n s d -> (n s) d")
        chosen = ctx.batch["mlm/chosen"].reshape(-1).astype(jnp.float32)
        bias = ctx.heads["bias"](jnp.zeros(len(ctx.token_embed)))
        total, correct = next_token_loss(
            hidden, ctx.token_embed, ctx.batch["mlm/targets"].reshape(-1), chosen, bias=bias
        )
        count = chosen.sum()
        return LossOutput(
            total / jnp.maximum(count, 1.0), {"loss": (total, count), "accuracy": (correct, count)}
        )
