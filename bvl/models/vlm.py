"""The vision-language model put together: towers, projections to the shared space, temperature and bias."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from bvl.errors import ConfigError
from bvl.models.features import ImageFeatures, TextFeatures
from bvl.models.layers import Dense
from bvl.models.text import TextConfig, TextTransformer
from bvl.models.vit import ViT, ViTConfig


@dataclasses.dataclass(frozen=True)
class DualEncoderConfig:
    """An image tower and a text tower that meet in a space of `embed_dim`.

    The logits are `scale * cosine + bias`: scale = exp(a learned number), never above `max_scale`
    (CLIP: 0.07 and 100); `init_bias` is for the sigmoid loss (SigLIP: temperature 0.1, bias -10).
    """

    image: ViTConfig = ViTConfig()
    text: TextConfig = TextConfig()
    embed_dim: int = 512
    init_temperature: float = 0.07
    max_scale: float = 100.0
    init_bias: float | None = None

    def __post_init__(self):
        if self.embed_dim < 1:
            raise ConfigError(f"embed_dim={self.embed_dim}: must be at least 1")
        if self.init_temperature <= 0 or 1 / self.init_temperature > self.max_scale:
            raise ConfigError(
                f"init_temperature={self.init_temperature}: it must be above 0, and the scale 1 / temperature "
                f"at most max_scale={self.max_scale}"
            )


class DualEncoder(nn.Module):
    """Use through `apply(..., method=...)` with encode_image, encode_text, logit_scale_and_bias."""

    config: DualEncoderConfig
    image_size: tuple[int, int]
    vocab_size: int
    context_length: int
    end_id: int
    dtype: Any = jnp.float32

    def setup(self):
        config = self.config
        self.image = ViT(config.image, self.image_size, dtype=self.dtype)
        self.text = TextTransformer(
            config.text, self.vocab_size, self.context_length, self.end_id, dtype=self.dtype
        )
        projection = dict(features=config.embed_dim, names=("embed", None), use_bias=False, dtype=self.dtype)
        self.image_projection = Dense(**projection)
        self.text_projection = Dense(**projection)
        self.log_scale = self.param(
            "log_scale", nn.initializers.constant(-math.log(config.init_temperature)), (), jnp.float32
        )
        if config.init_bias is not None:
            self.bias = self.param("logit_bias", nn.initializers.constant(config.init_bias), (), jnp.float32)

    def encode_image(
        self, image: Float[Array, "b h w 3"], need: frozenset[str] = frozenset({"embed"})
    ) -> ImageFeatures:
        """Encode normalised images; `need`: any of embed, pooled, tokens."""
        pooled, tokens, grid = self.image(image)
        return ImageFeatures(
            embed=l2_normalize(self.image_projection(pooled)) if "embed" in need else None,
            pooled=pooled if "pooled" in need else None,
            tokens=tokens if "tokens" in need else None,
            grid=grid,
        )

    def encode_text(
        self, tokens: Int[Array, "b t"], mask: Bool[Array, "b t"], need: frozenset[str] = frozenset({"embed"})
    ) -> TextFeatures:
        """Encode token ids; `need`: any of embed, pooled, tokens."""
        pooled, hidden = self.text(tokens, mask)
        return TextFeatures(
            embed=l2_normalize(self.text_projection(pooled)) if "embed" in need else None,
            pooled=pooled if "pooled" in need else None,
            tokens=hidden if "tokens" in need else None,
            mask=mask if "tokens" in need else None,
        )

    def logit_scale_and_bias(self) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """(scale, bias) of the logits; the bias is 0 where the config has none."""
        scale = jnp.exp(_at_most(self.log_scale, math.log(self.config.max_scale)))
        return scale, self.bias if self.config.init_bias is not None else jnp.zeros(())

    def __call__(self, image: Float[Array, "b h w 3"], tokens: Int[Array, "b t"], mask: Bool[Array, "b t"]):
        """Touch every parameter; for `init`."""
        return self.encode_image(image), self.encode_text(tokens, mask), self.logit_scale_and_bias()


@jax.custom_vjp
def _at_most(x: Float[Array, ""], limit: float) -> Float[Array, ""]:
    """min(x, limit), whose gradient descent can come back from the limit: only steps further up are cut off."""
    return jnp.minimum(x, limit)


def _at_most_backward(saved, cotangent):
    x, limit = saved
    # Descent goes against the gradient, so a positive one leads down.
    return jnp.where((x < limit) | (cotangent > 0), cotangent, 0.0), None


_at_most.defvjp(lambda x, limit: (jnp.minimum(x, limit), (x, limit)), _at_most_backward)


def l2_normalize(x: Float[Array, "... d"]) -> Float[Array, "... d"]:
    """Unit norm along the last axis, in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-12))


def normalize_image(
    image: UInt8[Array, "b h w 3"],
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    dtype: Any,
) -> Float[Array, "b h w 3"]:
    """uint8 pixels -> (x / 255 - mean) / std, on the device, so that hosts move bytes and not floats."""
    scale = 1.0 / (255.0 * jnp.asarray(std, jnp.float32))
    return (
        image.astype(jnp.float32) * scale - jnp.asarray(mean, jnp.float32) / jnp.asarray(std, jnp.float32)
    ).astype(dtype)
