"""The vision-language model put together: towers, projections to the shared space, temperature and bias."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from bvl.errors import ConfigError
from bvl.models.bert import BertConfig
from bvl.models.decoder import Decoder, DecoderCache, DecoderConfig, DecoderContext
from bvl.models.dropout import RowKeys
from bvl.models.features import ImageFeatures, Located, RegionPrompts, TextFeatures
from bvl.models.hybrid import HybridConfig
from bvl.models.layers import Dense, at_most, gelu, l2_normalize
from bvl.models.region_decoder import RegionDecoder, RegionDecoderConfig
from bvl.models.region_encoder import RegionEncoder, RegionEncoderConfig
from bvl.models.resnet import ResNetConfig
from bvl.models.text import TextConfig, pool_tokens
from bvl.models.vit import ViTConfig

Projection = Literal["linear", "linear_bias", "mlp", "none"]


@dataclasses.dataclass(frozen=True)
class DualEncoderConfig:
    """An image tower and a text tower that meet in a space of `embed_dim`, and a text decoder over image tokens.

    image: ViTConfig, ResNetConfig or HybridConfig; text: TextConfig or BertConfig.
    text=None: a captioner or an image tower alone; with a decoder of layout "coca" its first half embeds texts, pooled
      at their end. image=None: a text tower or a language model alone, to start from.
    decoder: for tasks that write text; None = none.
    region_encoder: tells the decoder of regions, for tasks that describe them. region_decoder: finds regions.
    image_projection, text_projection: from a tower's pooled vector to the shared space: "linear" (CLIP),
      "linear_bias" (SigLIP's text tower; the output map of a CLIP ResNet's attention pool), "mlp" (two maps without
      bias and a GELU between, as in BiomedCLIP's text tower) or "none" (SigLIP's image
      tower: the pooled vector itself).
    The logits are `scale * cosine + bias`: scale = exp(a learned number), never above `max_scale`
    (CLIP: 0.07 and 100); `init_bias` is for the sigmoid loss (SigLIP: temperature 0.1, bias -10). init_temperature=None:
    there are no logits and no scale, as in an imported captioner, which embeds no texts.
    """

    image: ViTConfig | ResNetConfig | HybridConfig | None = ViTConfig()
    text: TextConfig | BertConfig | None = TextConfig()
    decoder: DecoderConfig | None = None
    region_encoder: RegionEncoderConfig | None = None
    region_decoder: RegionDecoderConfig | None = None
    embed_dim: int = 512
    image_projection: Projection = "linear"
    text_projection: Projection = "linear"
    init_temperature: float | None = 0.07
    max_scale: float = 100.0
    init_bias: float | None = None

    def __post_init__(self):
        if self.embed_dim < 1:
            raise ConfigError(f"embed_dim={self.embed_dim}: must be at least 1")
        if self.image is None and self.text is None and self.decoder is None:
            raise ConfigError("the model is empty: give model.image, model.text or model.decoder")
        if self.image is None and (self.region_encoder is not None or self.region_decoder is not None):
            raise ConfigError("region modules read images: give model.image")
        if self.decoder is not None and self.decoder.visual != "patches":
            if not isinstance(self.image, ViTConfig) or self.image.attentional_pool is not None:
                raise ConfigError(
                    f"decoder visual={self.decoder.visual!r} belongs to an image tower of ViTConfig without "
                    "attentional_pool"
                )
        describes = self.region_encoder is not None or (
            self.region_decoder is not None and self.region_decoder.phrases == "decoder"
        )
        if self.has_own_visual and describes:
            raise ConfigError(
                "region modules of a decoder need one that reads patches: decoder visual='patches', and no "
                "attentional_pool"
            )
        if self.region_encoder is not None and self.decoder is None:
            raise ConfigError(
                "model.region_encoder tells a text decoder of regions: set model.decoder as well"
            )
        if self.region_decoder is not None and self.region_decoder.phrases == "decoder":
            if self.decoder is None:
                raise ConfigError("region_decoder phrases='decoder' needs a text decoder: set model.decoder")
        elif self.region_decoder is not None and not self.embeds_text:
            raise ConfigError(
                "model.region_decoder reads phrases by the text tower: give one, or phrases='decoder'"
            )
        for name, width in (("image", self.image_width), ("text", self.text_width)):
            if width and getattr(self, f"{name}_projection") == "none" and width != self.embed_dim:
                raise ConfigError(
                    f"{name}_projection='none' needs embed_dim={width}, the width of the {name} tower's pooled "
                    f"vector; it is {self.embed_dim}"
                )
        if self.init_temperature is None:
            if self.image is not None and self.embeds_text:
                raise ConfigError(
                    "init_temperature=None: images and texts are compared with a scale; give a number"
                )
        elif self.init_temperature <= 0 or 1 / self.init_temperature > self.max_scale:
            raise ConfigError(
                f"init_temperature={self.init_temperature}: it must be above 0, and the scale 1 / temperature "
                f"at most max_scale={self.max_scale}"
            )

    @property
    def is_alone(self) -> bool:
        """Whether there is an image tower alone, a text tower alone or a language model alone: no logits, so no scale."""
        alone = self.image is None or (self.text is None and self.decoder is None)
        return alone or self.init_temperature is None

    @property
    def has_own_visual(self) -> bool:
        """Whether the decoder reads something else of an image than the tower's tokens, one a patch."""
        pooled = isinstance(self.image, ViTConfig) and self.image.attentional_pool is not None
        return self.decoder is not None and (pooled or self.decoder.visual != "patches")

    @property
    def image_width(self) -> int:
        """Width of the image tower's pooled vector, 0 without one."""
        return 0 if self.image is None else self.image.output_width

    @property
    def text_width(self) -> int:
        """Width of the text tower's pooled vector, or of the decoder's where there is no tower; 0 without both."""
        tower = self.decoder if self.text is None else self.text
        return 0 if tower is None else tower.width

    @property
    def region_needs(self) -> frozenset[str]:
        """What the region modules read of an image."""
        modules = (self.region_encoder, self.region_decoder)
        levels = any(module is not None and module.reads_levels for module in modules)
        return frozenset({"tokens", "levels"} if levels else {"tokens"})

    @property
    def embeds_text(self) -> bool:
        """Whether anything gives text embeddings."""
        return self.text is not None or (self.decoder is not None and self.decoder.layout == "coca")


class ProjectionMlp(nn.Module):
    """Two affine maps without bias and a GELU between; hidden width: the mean of both ends (BiomedCLIP)."""

    embed_dim: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, pooled: Float[Array, "b d"]) -> Float[Array, "b e"]:
        options = dict(use_bias=False, dtype=self.dtype)
        hidden = (pooled.shape[-1] + self.embed_dim) // 2
        x = gelu(Dense(hidden, names=("embed", None), name="hidden", **options)(pooled))
        return Dense(self.embed_dim, names=(None, None), name="out", **options)(x)


class DualEncoder(nn.Module):
    """Use through `apply(..., method=...)` with encode_image, encode_text, logit_scale_and_bias; with a decoder also
    visual_tokens, decode_train, vocabulary, prefill, decoder_step; with the region modules region_tokens, and ground,
    detect, detection_logits.

    prefix_length: longest prefix (start token and controls) in front of a text of the decoder.
    `keys`: one random key an example while training, None in evaluation (bvl/models/dropout.py).
    """

    config: DualEncoderConfig
    image_size: tuple[int, int]
    vocab_size: int
    context_length: int
    end_id: int
    pad_id: int = 0
    prefix_length: int = 1
    dtype: Any = jnp.float32

    def setup(self):
        config = self.config
        if config.image is not None:
            self.image = config.image.make(image_size=self.image_size, dtype=self.dtype)
        if config.text is not None:
            self.text = config.text.make(
                vocab_size=self.vocab_size,
                context_length=self.context_length,
                pad_id=self.pad_id,
                end_id=self.end_id,
                dtype=self.dtype,
            )
        if config.decoder is not None:
            self.decoder = Decoder(
                config.decoder,
                self.vocab_size,
                self.prefix_length + self.context_length,
                sees_images=config.image is not None,
                dtype=self.dtype,
            )
        if config.region_encoder is not None:
            self.region_encoder = RegionEncoder(config.region_encoder, config.decoder.width, dtype=self.dtype)
        if config.region_decoder is not None:
            self.region_decoder = RegionDecoder(
                config.region_decoder, self.image_size, config.embed_dim, dtype=self.dtype
            )
        self.image_projection = _projection(config.image_projection, config.embed_dim, self.dtype)
        self.text_projection = _projection(config.text_projection, config.embed_dim, self.dtype)
        if config.is_alone:
            return
        self.log_scale = self.param(
            "log_scale", nn.initializers.constant(-math.log(config.init_temperature)), (), jnp.float32
        )
        if config.init_bias is not None:
            self.bias = self.param("logit_bias", nn.initializers.constant(config.init_bias), (), jnp.float32)

    def encode_image(
        self,
        image: Float[Array, "b h w c"],
        need: frozenset[str] = frozenset({"embed"}),
        keys: RowKeys | None = None,
    ) -> ImageFeatures:
        """Encode normalised images, of a tower with `mask_channel` also with a mask as fourth channel.

        need: any of embed, pooled, tokens, levels, patch_embed, "visual" (what the decoder reads: the result's
          `for_decoder`) and "regions" (what the region modules read).
        """
        if self.config.image is None:
            raise ConfigError("this model has no image tower (model.image=None), so it reads no images")
        if "regions" in need:
            need = need | self.config.region_needs
        options = {}
        if "visual" in need and not self.config.has_own_visual:
            need = need | {"tokens"}
        elif "visual" in need and self.config.decoder.visual != "patches":
            options["visual"] = self.config.decoder.visual
        out = self.image(image, keys=keys, levels="levels" in need, patches="patch_embed" in need, **options)
        embed = l2_normalize(self.image_projection(out.pooled)) if "embed" in need else None
        patch_embed = l2_normalize(self.image_projection(out.patches)) if "patch_embed" in need else None
        return _only(out.replace(embed=embed, patch_embed=patch_embed), need)

    def encode_text(
        self,
        tokens: Int[Array, "b t"],
        mask: Bool[Array, "b t"],
        need: frozenset[str] = frozenset({"embed"}),
        keys: RowKeys | None = None,
    ) -> TextFeatures:
        """Encode token ids; `need`: any of embed, pooled, tokens."""
        if self.config.text is not None:
            out = self.text(tokens, mask, keys=keys)
        elif self.config.embeds_text:
            x, pooled = self.decoder.embed_text(tokens, mask, keys)
            if pooled is None:
                pooled = pool_tokens(x, tokens, mask, "end", self.end_id)
            out = TextFeatures(pooled=pooled, tokens=x, mask=mask)
        else:
            raise ConfigError(
                "this model has no text tower (model.text=None), so it gives no text embeddings; a decoder of "
                "layout='coca' would"
            )
        embed = l2_normalize(self.text_projection(out.pooled)) if "embed" in need else None
        return _only(out.replace(embed=embed, mask=mask if "tokens" in need else None), need | {"mask"})

    def logit_scale_and_bias(self) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """(scale, bias) of the logits; the bias is 0 where the config has none, and a tower alone has (1, 0)."""
        if self.config.is_alone:
            return jnp.ones(()), jnp.zeros(())
        scale = jnp.exp(at_most(self.log_scale, math.log(self.config.max_scale)))
        return scale, self.bias if self.config.init_bias is not None else jnp.zeros(())

    def visual_tokens(
        self, tokens: Float[Array, "b l d"], dropped: Bool[Array, " b"]
    ) -> tuple[Float[Array, "b s w"], Bool[Array, "b s"]]:
        """What the decoder sees of images: (visual tokens, mask) from their features' `for_decoder`; the null if `dropped`."""
        return self.decoder.visual_tokens(tokens, dropped)

    def decode_train(
        self,
        visual: Float[Array, "b s w"] | None,
        visual_mask: Bool[Array, "b s"] | None,
        tokens: Int[Array, "b l"],
        mask: Bool[Array, "b l"],
        parallel: Bool[Array, " b"] | None = None,
        keys: RowKeys | None = None,
    ) -> Float[Array, "b l d"]:
        """The decoder's hidden states of whole sequences, prefix included (see bvl/models/decoder.py).

        visual, visual_mask: None for a language model alone, here and in `prefill`.
        """
        return self.decoder(visual, visual_mask, tokens, mask, parallel, keys)

    def vocabulary(self) -> Float[Array, "v d"]:
        """The table of the decoder's vocabulary head: logits = hidden @ table.T."""
        return self.decoder.vocabulary()

    def prefill(
        self,
        visual: Float[Array, "c s w"] | None,
        visual_mask: Bool[Array, "c s"] | None,
        prefix: Int[Array, "c p"],
        prefix_mask: Bool[Array, "c p"],
        max_new: int,
    ) -> tuple[Float[Array, "c v"], DecoderContext, DecoderCache]:
        """(logits of the first token, shared context, empty cache) to generate up to `max_new` tokens."""
        return self.decoder.prefill(visual, visual_mask, prefix, prefix_mask, max_new)

    def decoder_step(
        self, context: DecoderContext, cache: DecoderCache, tokens: Int[Array, "c k"], t: Int[Array, ""]
    ) -> tuple[Float[Array, "c k v"], DecoderCache]:
        """(logits after the t-th generated token, the cache with it)."""
        return self.decoder.step(context, cache, tokens, t)

    def region_tokens(
        self,
        tokens: Float[Array, "b l d"],
        levels: tuple[Float[Array, "b h w c"], ...] | None,
        grid: tuple[int, int],
        prompts: RegionPrompts,
        dropped: Bool[Array, " br"],
    ) -> tuple[Float[Array, "br s w"], Bool[Array, "br s"]]:
        """What the decoder sees of regions, behind the image's tokens; see bvl/models/region_encoder.py."""
        return self.region_encoder(tokens, levels, grid, prompts, dropped)

    def ground(
        self,
        tokens: Float[Array, "b l d"],
        levels: tuple[Float[Array, "b h w c"], ...] | None,
        grid: tuple[int, int],
        phrase: Float[Array, "b p e"],
        words: Float[Array, "b p t d"],
        words_mask: Bool[Array, "b p t"],
    ) -> Located:
        """Boxes, mask and presence of phrases, given by a vector and tokens each; see bvl/models/region_decoder.py."""
        return self.region_decoder.ground(tokens, levels, grid, phrase, words, words_mask)

    def detect(
        self,
        tokens: Float[Array, "b l d"],
        levels: tuple[Float[Array, "b h w c"], ...] | None,
        grid: tuple[int, int],
    ) -> Located:
        """Candidates for the objects of images; see bvl/models/region_decoder.py."""
        return self.region_decoder.detect(tokens, levels, grid)

    def detection_logits(
        self, embed: Float[Array, "b q e"], names: Float[Array, "b n e"]
    ) -> Float[Array, "b q n"]:
        """How well candidates fit names, given by their embeddings."""
        return self.region_decoder.detection_logits(embed, names)

    def __call__(self, image: Float[Array, "b h w 3"], tokens: Int[Array, "b t"], mask: Bool[Array, "b t"]):
        """Touch every parameter; for `init`."""
        rows = len(image)
        out = [self.logit_scale_and_bias()]
        if self.config.image is not None:
            if getattr(self.config.image, "mask_channel", False):
                image = jnp.pad(image, ((0, 0), (0, 0), (0, 0), (0, 1)))
            features = self.encode_image(image, frozenset({"embed", "tokens", "visual", "regions"}))
            maps = (features.tokens, features.levels, features.grid)
            out.append(features)
        if self.config.embeds_text:
            text = self.encode_text(tokens, mask, frozenset({"embed", "pooled", "tokens"}))
            out.append(text)
        if self.config.decoder is not None:
            visual = (None, None)
            if self.config.image is not None:
                visual = self.decoder.visual_tokens(features.for_decoder, jnp.zeros(rows, bool))
            hidden = self.decoder(*visual, tokens, mask)
            out.append(hidden)
        if self.config.region_encoder is not None:
            prompts = RegionPrompts(
                box=jnp.ones((rows, 1, 4)),
                point=jnp.ones((rows, 1, 2)),
                mask=jnp.ones((rows, 1, *features.grid), bool),
                kind=jnp.zeros((rows, 1), jnp.int8),
            )
            out.append(self.region_encoder(*maps, prompts, jnp.zeros(rows, bool)))
        if self.config.region_decoder is not None:
            if self.config.region_decoder.phrases == "text":
                phrase, words = text.pooled, text.tokens
            else:
                phrase, words = hidden[:, -1], hidden
            out.append(self.region_decoder.ground(*maps, phrase[:, None], words[:, None], mask[:, None]))
            found = self.region_decoder.detect(*maps)
            out.append(self.region_decoder.detection_logits(found.embed, found.embed))
        return out


def _projection(kind: Projection, embed_dim: int, dtype: Any) -> Callable[[jax.Array], jax.Array]:
    if kind == "none":
        return lambda pooled: pooled
    if kind == "mlp":
        return ProjectionMlp(embed_dim, dtype=dtype)
    return Dense(embed_dim, names=("embed", None), use_bias=kind == "linear_bias", dtype=dtype)


def _only(features: Any, need: frozenset[str]) -> Any:
    """`features` without the arrays that nobody asked for."""
    arrays = {"embed", "pooled", "tokens", "levels", "patches", "patch_embed", "visual", "mask"}
    names = arrays & features.__dataclass_fields__.keys()
    return features.replace(**{name: None for name in names - need})


def normalize_image(
    image: UInt8[Array, "b h w c"],
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    dtype: Any,
) -> Float[Array, "b h w c"]:
    """uint8 pixels -> (x / 255 - mean) / std, on the device, so that hosts move bytes and not floats.

    A fourth channel is a mask and becomes x / 255.
    """
    masks = image.shape[-1] - 3
    mean, std = (*mean, *(0.0,) * masks), (*std, *(1.0,) * masks)
    scale = 1.0 / (255.0 * jnp.asarray(std, jnp.float32))
    return (
        image.astype(jnp.float32) * scale - jnp.asarray(mean, jnp.float32) / jnp.asarray(std, jnp.float32)
    ).astype(dtype)
