"""Regions out: a light two-way transformer between phrases and patches gives boxes, masks, embeddings and presence."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce, repeat
from jaxtyping import Array, Bool, Float

from bvl.errors import ConfigError
from bvl.models.convolution import Conv
from bvl.models.features import Located
from bvl.models.layers import (
    Attention,
    Dense,
    LayerNorm,
    Mlp,
    at_most,
    constant_init,
    gelu,
    l2_normalize,
    normal_init,
)

# Of the logits of names; CLIP's limit (Radford et al. 2021, section 2.5).
MAX_SCALE = 100.0


@dataclasses.dataclass(frozen=True)
class RegionDecoderConfig:
    """Finds what a phrase names, and the objects of an image.

    queries: candidates for a box. "patches": every patch is one, and its box is predicted relative to the patch's place,
      which learns from far fewer images (OWL-ViT: Minderer et al. 2022, arXiv:2205.06230, section 3.2 and appendix A).
      "learned": `num_queries` learned vectors without a place (DETR: Carion et al. 2020, arXiv:2005.12872).
    num_queries: learned vectors; with queries="patches" they are not candidates but carry what the whole image has.
    phrases: what stands for a phrase: "text", the text tower's vector; "decoder", the text decoder's hidden state at
      the phrase's marked word, with the image in view (LISA: Lai et al. 2023, arXiv:2308.00692, section 3.2).
    depth: two-way blocks. mask_stride: image pixels to a pixel of the masks, along each side.
    pixel_width: channels of the pixel embeddings. reads_levels: the tower's feature maps that are finer than its patches
      join the up-sampling; ResNets, hybrids and ViTs with stem="conv" have such.
    instance_masks: detection gives a mask for every candidate as well.
    """

    width: int = 128
    depth: int = 2
    num_heads: int = 4
    queries: Literal["patches", "learned"] = "patches"
    num_queries: int = 8
    phrases: Literal["text", "decoder"] = "text"
    mask_stride: int = 4
    pixel_width: int = 48
    reads_levels: bool = True
    instance_masks: bool = False

    def __post_init__(self):
        for name in ("width", "depth", "num_heads", "num_queries", "mask_stride", "pixel_width"):
            if getattr(self, name) < 1:
                raise ConfigError(f"region_decoder {name}={getattr(self, name)}: must be at least 1")
        if self.width % self.num_heads:
            raise ConfigError(
                f"region_decoder width={self.width}: must be a multiple of num_heads={self.num_heads}"
            )
        for name, choices in (("queries", ("patches", "learned")), ("phrases", ("text", "decoder"))):
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f"region_decoder {name}={getattr(self, name)!r}: choose {' or '.join(choices)}"
                )


class TwoWayBlock(nn.Module):
    """Queries among themselves, queries to patches, an MLP, patches to queries (Kirillov et al. 2023, arXiv:2304.02643, appendix A)."""

    num_heads: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, q: Float[Array, "n k d"], q_mask: Bool[Array, "n k"] | None, x: Float[Array, "n l d"]
    ) -> tuple[Float[Array, "n k d"], Float[Array, "n l d"]]:
        def norm(name: str, y: jax.Array) -> jax.Array:
            return LayerNorm(dtype=self.dtype, name=f"{name}_norm")(y)

        def attention(name: str) -> Attention:
            return Attention(self.num_heads, dtype=self.dtype, name=name)

        y = norm("self", q)
        q = q + attention("self")(y, key_mask=q_mask)
        keys = norm("patches", x)
        q = q + attention("to_patches")(norm("query", q), keys)
        q = q + Mlp(2 * q.shape[-1], dtype=self.dtype, name="mlp")(norm("mlp", q))
        x = x + attention("to_queries")(keys, norm("answer", q), key_mask=q_mask)
        x = x + Mlp(2 * x.shape[-1], dtype=self.dtype, name="patch_mlp")(norm("patch_mlp", x))
        return q, x


class PixelEmbedding(nn.Module):
    """Patch tokens to one vector for each pixel of the masks: up-sampled by 2 at a time, the tower's finer maps added."""

    config: RegionDecoderConfig
    size: tuple[int, int]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w d"], levels: tuple[Float[Array, "b i j c"], ...]
    ) -> Float[Array, "b H W c"]:
        width = self.config.pixel_width
        by_size = {level.shape[1:3]: level for level in levels}
        x = Dense(width, names=("embed", None), dtype=self.dtype, name="in")(x)
        step = 0
        while x.shape[1:3] != self.size:
            grown = tuple(min(2 * a, b) for a, b in zip(x.shape[1:3], self.size, strict=True))
            if grown == (2 * x.shape[1], 2 * x.shape[2]):
                # The convolution that follows smooths it; interpolation costs as much as that on CPU.
                x = repeat(x, "b h w c -> b (h i) (w j) c", i=2, j=2)
            else:
                x = jax.image.resize(x, (len(x), *grown, width), method="bilinear").astype(self.dtype)
            if grown in by_size:
                fine = LayerNorm(dtype=self.dtype, name=f"fine_norm_{step}")(by_size[grown])
                x = x + Dense(width, names=("embed", None), dtype=self.dtype, name=f"fine_{step}")(fine)
            y = LayerNorm(dtype=self.dtype, name=f"norm_{step}")(x)
            x = x + Conv(width, 3, use_bias=True, dtype=self.dtype, name=f"conv_{step}")(gelu(y))
            step += 1
        return LayerNorm(dtype=self.dtype, name="norm")(x)


class RegionDecoder(nn.Module):
    """Use through `apply(..., method=...)`: ground, detect, detection_logits.

    embed_dim: of the shared space.
    """

    config: RegionDecoderConfig
    image_size: tuple[int, int]
    embed_dim: int
    dtype: Any = jnp.float32

    def setup(self):
        config, width = self.config, self.config.width

        def dense(features: int) -> Dense:
            return Dense(features, names=("embed", None), dtype=self.dtype)

        def norm() -> LayerNorm:
            return LayerNorm(dtype=self.dtype)

        self.image_in, self.image_norm = dense(width), norm()
        self.pixels, self.fine_in = PixelEmbedding(config, self.mask_size, dtype=self.dtype), dense(width)
        self.phrase_in, self.words_in = dense(width), dense(width)
        self.queries = self.param("queries", normal_init(0.02, None, "embed"), (config.num_queries, width))
        self.blocks = [
            TwoWayBlock(config.num_heads, dtype=self.dtype, name=f"block_{i}") for i in range(config.depth)
        ]
        self.query_norm, self.candidate_norm = norm(), norm()
        # In f32: eight bits of a coordinate are not enough.
        self.box_hidden, self.box_out = dense(width), Dense(4, names=("embed", None), dtype=jnp.float32)
        self.score_candidate, self.score_query = dense(width), dense(width)
        self.mask_query, self.mask_patch = dense(config.pixel_width + 1), dense(width)
        self.presence_hidden, self.presence_out = dense(width), dense(1)
        self.object_out = dense(1)
        self.embed_hidden, self.embed_out = dense(width), dense(self.embed_dim)
        # Scale 10 and bias -2: an unlike pair is taken for a negative from the start.
        self.log_scale = self.param("log_scale", constant_init(float(np.log(10.0)), None), (1,))
        self.bias = self.param("bias", constant_init(-2.0, None), (1,))

    @property
    def mask_size(self) -> tuple[int, int]:
        """Rows and columns of the masks."""
        stride = self.config.mask_stride
        if any(side % stride for side in self.image_size):
            raise ConfigError(
                f"region_decoder mask_stride={stride} does not divide data.preprocess.image_size={self.image_size}"
            )
        return tuple(side // stride for side in self.image_size)

    def ground(
        self,
        tokens: Float[Array, "b l d"],
        levels: tuple[Float[Array, "b h w c"], ...] | None,
        grid: tuple[int, int],
        phrase: Float[Array, "b p e"],
        words: Float[Array, "b p t d"],
        words_mask: Bool[Array, "b p t"],
    ) -> Located:
        """Boxes, mask and presence of each phrase; a phrase's result does not depend on the others.

        phrase, words: vector and tokens of each phrase.
        """
        count = phrase.shape[1]
        x, pixels = self._image(tokens, levels, grid)
        q = jnp.concatenate(
            [
                rearrange(self.phrase_in(phrase), "b p d -> (b p) 1 d"),
                self._learned(len(x) * count),
                rearrange(self.words_in(words), "b p t d -> (b p) t d"),
            ],
            axis=1,
        )
        first_word = 1 + self.config.num_queries
        mask = jnp.pad(
            rearrange(words_mask, "b p t -> (b p) t"), ((0, 0), (first_word, 0)), constant_values=True
        )
        q, x = self._exchange(q, mask, repeat(x, "b l d -> (b p) l d", p=count))
        state, candidates = q[:, 0], self._candidates(q[:, 1:first_word], x)
        query = self.score_query(state)
        scores = _scaled_product(self.score_candidate(candidates), query)
        # What the likeliest candidates are, and how well they fit, decides about presence.
        shares = jax.nn.softmax(scores, axis=-1)
        seen = jnp.einsum("nq,nqd->nd", shares, candidates.astype(jnp.float32)).astype(self.dtype)
        hidden = gelu(self.presence_hidden(jnp.concatenate([state, seen], axis=-1)))
        best = jax.nn.logsumexp(scores, axis=-1) - np.log(scores.shape[-1])
        presence = self.presence_out(hidden)[..., 0].astype(jnp.float32) + best
        coarse = _scaled_product(self.mask_patch(x), query)
        coarse = rearrange(coarse, "(b p) (h w) -> b p h w", p=count, h=grid[0])

        def split(y: jax.Array) -> jax.Array:
            return rearrange(y, "(b p) ... -> b p ...", p=count)

        masks = self._masks(pixels, split(self.mask_query(state)))
        masks = masks + jax.image.resize(coarse, masks.shape, method="bilinear")
        return Located(
            boxes=split(self._boxes(candidates, grid)),
            scores=split(scores),
            mask_logits=masks,
            presence=split(presence),
            embed=split(self._embed(state)),
        )

    def detect(
        self,
        tokens: Float[Array, "b l d"],
        levels: tuple[Float[Array, "b h w c"], ...] | None,
        grid: tuple[int, int],
    ) -> Located:
        """The image's candidates, whatever they are: boxes, embeddings to compare with names, presence."""
        x, pixels = self._image(tokens, levels, grid)
        q, x = self._exchange(self._learned(len(x)), None, x)
        candidates = self._candidates(q, x)
        return Located(
            boxes=self._boxes(candidates, grid),
            presence=self.object_out(candidates)[..., 0].astype(jnp.float32),
            embed=self._embed(candidates),
            mask_logits=self._masks(pixels, self.mask_query(candidates))
            if self.config.instance_masks
            else None,
        )

    def detection_logits(
        self, embed: Float[Array, "b q e"], names: Float[Array, "b n e"]
    ) -> Float[Array, "b q n"]:
        """How well each candidate fits each name, both of unit norm: scale * cosine + bias."""
        cosine = jnp.einsum("bqe,bne->bqn", embed, names, preferred_element_type=jnp.float32)
        return jnp.exp(at_most(self.log_scale, np.log(MAX_SCALE))) * cosine + self.bias

    def _image(self, tokens, levels, grid) -> tuple[Float[Array, "b l d"], Float[Array, "b h w c"]]:
        """(patches at this width, pixel embeddings), from the tower's tokens and finer maps."""
        x = self.image_norm(self.image_in(tokens))
        fine = levels if self.config.reads_levels and levels is not None else ()
        pixels = self.pixels(rearrange(x, "b (h w) d -> b h w d", h=grid[0]), fine)
        if all(side % cells == 0 for side, cells in zip(self.mask_size, grid, strict=True)):
            # Each patch also gets the mean of its own pixels, which have seen the finer maps.
            own = reduce(pixels, "b (h i) (w j) c -> b (h w) c", "mean", h=grid[0], w=grid[1])
            x = x + self.fine_in(own)
        return x, pixels

    def _learned(self, rows: int) -> Float[Array, "n k d"]:
        return jnp.broadcast_to(self.queries.astype(self.dtype), (rows, *self.queries.shape))

    def _exchange(self, q, mask, x):
        for block in self.blocks:
            q, x = block(q, mask, x)
        return self.query_norm(q), self.candidate_norm(x)

    def _candidates(self, learned: Float[Array, "n k d"], patches: Float[Array, "n l d"]) -> jax.Array:
        return patches if self.config.queries == "patches" else learned

    def _boxes(self, candidates: Float[Array, "n q d"], grid: tuple[int, int]) -> Float[Array, "n q 4"]:
        """[x0, y0, x1, y1] from centre and size, which for patches are predicted relative to the patch's."""
        raw = self.box_out(gelu(self.box_hidden(candidates)))
        if self.config.queries == "patches":
            rows, cols = grid
            y, x = np.meshgrid((np.arange(rows) + 0.5) / rows, (np.arange(cols) + 0.5) / cols, indexing="ij")
            size = np.broadcast_to([min(2 / cols, 0.5), min(2 / rows, 0.5)], (rows * cols, 2))
            prior = np.concatenate([np.stack([x, y], -1).reshape(-1, 2), size], axis=1)
            raw = raw + np.log(prior / (1 - prior)).astype(np.float32)
        centre, size = jnp.split(jax.nn.sigmoid(raw), 2, axis=-1)
        return jnp.concatenate([centre - size / 2, centre + size / 2], axis=-1)

    def _masks(
        self, pixels: Float[Array, "b h w c"], query: Float[Array, "b n c1"]
    ) -> Float[Array, "b n h w"]:
        """Mask logits: products of queries and pixels, and a bias of each query."""
        weights, bias = query[..., :-1], query[..., -1].astype(jnp.float32)
        logits = jnp.einsum("bhwc,bnc->bnhw", pixels, weights, preferred_element_type=jnp.float32)
        return logits / np.sqrt(weights.shape[-1]) + bias[..., None, None]

    def _embed(self, states: Float[Array, "*n d"]) -> Float[Array, "*n e"]:
        return l2_normalize(self.embed_out(gelu(self.embed_hidden(states))))


def _scaled_product(x: Float[Array, "n q d"], query: Float[Array, "n d"]) -> Float[Array, "n q"]:
    return jnp.einsum("nqd,nd->nq", x, query, preferred_element_type=jnp.float32) / np.sqrt(x.shape[-1])
