"""The text decoder over visual tokens, in three layouts behind one `prefill` and `step`.

A sequence is a prefix, padded on the LEFT so that its last token stands right before the first word, then the text:

    [pad ...] [START] [controls ...] | first word ... last word [END] [pad ...]

Positions count real tokens only, so padding changes nothing.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from bvl.errors import ConfigError
from bvl.mesh import constrain_rows
from bvl.models.decoder_layers import DecoderBlock, KeysValues, LayerContext, make_norm
from bvl.models.dropout import RowKeys, check_rates, dropout, fold
from bvl.models.layers import REMAT_POLICIES, Activation, RematPolicy, normal_init
from bvl.models.rotary import RopeScaling
from bvl.models.variants import check_sizes
from bvl.models.visual_tokens import VisualTokens

Layout = Literal["gpt2", "coca", "prefix"]


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A captioner's decoder, or a language model. Vocabulary and context length are the tokenizer's.

    layout: "gpt2": every block has self-attention, cross-attention and an MLP, learned positions (transformers' GPT-2
      with cross-attention). "coca": the first `unimodal_depth` blocks (None = half) do not see the image, the others
      are as in gpt2; without a text tower the first half embeds texts (Yu et al. 2022, arXiv:2205.01917). "prefix":
      visual tokens stand in front of the text, rotary positions, grouped heads, RMS norms, a gated MLP without biases (Llama, Qwen2).
      Without an image tower there is no cross-attention and nothing in front.
    visual_queries: 0 = the decoder sees all image tokens; n = n tokens, pooled from them by attention.
    visual: "patches", the image tower's tokens; of a ViT also "all", its class token and registers in front of them, or
      "unnormed", the same before its last norm: what transformers' captioners see of ViT and DINOv2, and of CLIP.
    null: a dropped image is a learned token; False = a token of zeros, as imported captioners have no other.
    mlp_hidden: None = 4 * width. activation: None = gelu_tanh, of layout "prefix" swiglu.
    num_kv_heads, head_dim: of layout "prefix", None = num_heads, and width / num_heads.
    qkv_bias, out_bias, mlp_bias: of layout "prefix" (Qwen2 has the first); the other layouts always have biases.
    rope_theta, rope_scaling: of layout "prefix"; see bvl/models/rotary.py.
    tied_head: the vocabulary head is the token embedding.
    unimodal_heads, unimodal_mlp_hidden: of layout "coca", for the blocks that do not see the image; None = as the rest.
    text_class, cross_mlp: of layout "coca", as open_clip's CoCa has them. text_class: a learned token behind the text
      is its embedding; it sees the text and one place behind it, but itself only where the text fills the context.
      cross_mlp: cross-attention stands behind a block's MLP, norms the visual tokens and has an MLP of its own.
    dropout: of the embeddings and of each branch of each block.
    """

    layout: Layout = "gpt2"
    width: int = 512
    depth: int = 6
    num_heads: int = 8
    mlp_hidden: int | None = None
    unimodal_depth: int | None = None
    num_kv_heads: int | None = None
    rope_theta: float = 10000.0
    qkv_bias: bool = False
    norm_epsilon: float = 1e-5
    visual_queries: int = 0
    tied_head: bool = True
    dropout: float = 0.0
    remat: RematPolicy = "none"
    activation: Activation | None = None
    head_dim: int | None = None
    out_bias: bool = False
    mlp_bias: bool = False
    rope_scaling: RopeScaling | None = None
    visual: Literal["patches", "all", "unnormed"] = "patches"
    null: bool = True
    unimodal_heads: int | None = None
    unimodal_mlp_hidden: int | None = None
    text_class: bool = False
    cross_mlp: bool = False

    def __post_init__(self):
        # A head of another size than width / num_heads need not divide the width.
        width, depth, num_heads, hidden = self.sizes
        check_sizes("decoder", (width, depth, 1 if self.head_dim else num_heads, hidden))
        check_rates("decoder", dropout=self.dropout)
        if self.visual_queries < 0:
            raise ConfigError(
                f"decoder visual_queries={self.visual_queries}: 0 for all image tokens, or a number"
            )
        # The defaults also stand in the configs of runs that do not read them.
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for layout, names in _OPTIONS_OF.items():
            for name in names:
                if self.layout != layout and getattr(self, name) != defaults[name]:
                    raise ConfigError(
                        f"decoder {name}={getattr(self, name)} belongs to layout={layout!r}, not {self.layout!r}"
                    )
        if self.layout == "coca":
            if not 0 < self.num_unimodal < self.depth:
                raise ConfigError(
                    f"decoder depth={self.depth}, unimodal_depth={self.num_unimodal}: layout='coca' needs at least "
                    "one block of each kind"
                )
            check_sizes("decoder unimodal", (width, depth, *self.unimodal_sizes))
        if self.num_heads < 1 or self.kv_heads < 1 or self.num_heads % self.kv_heads:
            raise ConfigError(
                f"decoder num_heads={self.num_heads}: must be a multiple of num_kv_heads={self.num_kv_heads}"
            )
        if self.layout == "prefix" and (self.head_channels < 2 or self.head_channels % 2):
            raise ConfigError(
                "decoder layout='prefix': rotary positions need an even width / num_heads, or head_dim"
            )

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """(width, depth, num_heads, mlp_hidden)."""
        hidden = 4 * self.width if self.mlp_hidden is None else self.mlp_hidden
        return self.width, self.depth, self.num_heads, hidden

    @property
    def unimodal_sizes(self) -> tuple[int, int]:
        """(num_heads, mlp_hidden) of the blocks that do not see the image."""
        heads, hidden = self.sizes[2:]
        return self.unimodal_heads or heads, self.unimodal_mlp_hidden or hidden

    @property
    def head_channels(self) -> int:
        return self.width // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def num_unimodal(self) -> int:
        """How many blocks at the beginning do not see the image."""
        if self.layout != "coca":
            return 0
        return self.depth // 2 if self.unimodal_depth is None else self.unimodal_depth


# Layout -> options that are of it alone.
_OPTIONS_OF = {
    "prefix": (
        *("num_kv_heads", "head_dim", "rope_theta", "rope_scaling"),
        *("qkv_bias", "out_bias", "mlp_bias"),
    ),
    "coca": ("unimodal_depth", "unimodal_heads", "unimodal_mlp_hidden", "text_class", "cross_mlp"),
}


@flax.struct.dataclass
class DecoderContext:
    """What the continuations of each image share while generating.

    first_position: of the first generated token. Rows c: images, or images and their null rows.
    """

    layers: tuple[LayerContext, ...]
    prefix_mask: Bool[Array, "c p"]
    visual_mask: Bool[Array, "c s"] | None
    first_position: Int[Array, " c"]


# Of each block, keys [c, k, heads, channels, max_new] and values [c, k, heads, max_new, channels] of the generated
# tokens.
DecoderCache = tuple[KeysValues, ...]


class Decoder(nn.Module):
    """Use through `apply(..., method=...)`: visual_tokens, __call__ (training), prefill, step, embed_text.

    sees_images: False for a language model; `visual` and its mask are then None everywhere.
    """

    config: DecoderConfig
    vocab_size: int
    max_positions: int
    sees_images: bool = True
    dtype: Any = jnp.float32

    def setup(self):
        config = self.config
        width, depth, num_heads, hidden = config.sizes
        rotary = config.layout == "prefix"
        block = DecoderBlock
        if config.remat != "none":
            block = nn.remat(DecoderBlock, policy=REMAT_POLICIES[config.remat])
        if self.sees_images:
            self.visual_tokens = VisualTokens(width, config.visual_queries, config.null, dtype=self.dtype)
        self.token_embed = self.param(
            "token_embed", normal_init(0.02, "vocab", "embed"), (self.vocab_size, width)
        )
        if not rotary:
            self.positions = self.param(
                "positions", normal_init(0.01, "position", "embed"), (self.max_positions, width)
            )
        if not config.tied_head:
            self.head = self.param("head", normal_init(0.02, "vocab", "embed"), (self.vocab_size, width))
        self.blocks = [
            block(
                width=width,
                num_heads=heads,
                mlp_hidden=hidden,
                num_kv_heads=config.kv_heads if rotary else heads,
                head_dim=config.head_channels if rotary else width // heads,
                cross_attention=self.sees_images and not rotary and i >= config.num_unimodal,
                cross_mlp=config.cross_mlp,
                norm="rms" if rotary else "layer",
                norm_epsilon=config.norm_epsilon,
                activation=config.activation or ("swiglu" if rotary else "gelu_tanh"),
                qkv_bias=config.qkv_bias or not rotary,
                out_bias=config.out_bias or not rotary,
                mlp_bias=config.mlp_bias or not rotary,
                rope_theta=config.rope_theta if rotary else None,
                rope_scaling=config.rope_scaling,
                dropout=config.dropout,
                dtype=self.dtype,
                name=f"block_{i}",
            )
            for i, (heads, hidden) in enumerate(
                [config.unimodal_sizes] * config.num_unimodal
                + [(num_heads, hidden)] * (depth - config.num_unimodal)
            )
        ]
        self.norm = make_norm("rms" if rotary else "layer", config.norm_epsilon, self.dtype)
        if config.layout == "coca":
            self.unimodal_norm = make_norm("layer", config.norm_epsilon, self.dtype)
        if config.text_class:
            self.text_class = self.param("text_class", normal_init(0.01, "embed"), (width,))

    def vocabulary(self) -> Float[Array, "v d"]:
        """The table of the vocabulary head: logits = hidden @ table.T."""
        return self.token_embed if self.config.tied_head else self.head

    def __call__(
        self,
        visual: Float[Array, "b s d"] | None,
        visual_mask: Bool[Array, "b s"] | None,
        tokens: Int[Array, "b l"],
        mask: Bool[Array, "b l"],
        parallel: Bool[Array, " b"] | None = None,
        keys: RowKeys | None = None,
    ) -> Float[Array, "b l d"]:
        """Hidden states of whole sequences; state i is for predicting token i + 1.

        parallel: rows whose tokens see each other in both directions, and padding too, so that the length of a text
        is not given away.
        """
        length = tokens.shape[1]
        seen = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (len(tokens), length, length))
        if parallel is not None:
            seen = seen | parallel[:, None, None]
            # The left-padding of the prefix stays hidden; the rest of the places may hold words.
            mask = mask | (parallel[:, None] & (jnp.cumsum(mask, axis=1) > 0))
        return self._whole(visual, visual_mask, tokens, mask, seen & mask[:, None], keys)[0]

    def prefill(
        self,
        visual: Float[Array, "c s d"] | None,
        visual_mask: Bool[Array, "c s"] | None,
        prefix: Int[Array, "c p"],
        prefix_mask: Bool[Array, "c p"],
        max_new: int,
    ) -> tuple[Float[Array, "c v"], DecoderContext, DecoderCache]:
        """(logits of the first token after the prefix, shared context, empty cache with one continuation a row).

        Raises ConfigError where learned positions end before max_new further tokens.
        """
        length = prefix.shape[1]
        if self.config.layout != "prefix" and length + max_new > self.max_positions:
            raise ConfigError(
                f"{length} tokens and {max_new} further ones, but the decoder was made for {self.max_positions}: "
                "write shorter texts (max_length)"
            )
        causal = jnp.tril(jnp.ones((length, length), bool))
        hidden, own, cross = self._whole(
            visual, visual_mask, prefix, prefix_mask, causal & prefix_mask[:, None], None
        )
        in_front = self.config.layout == "prefix" and visual is not None
        start = visual.shape[1] if in_front else 0
        context = DecoderContext(
            layers=tuple(LayerContext(prefix=a, visual=b) for a, b in zip(own, cross, strict=True)),
            prefix_mask=jnp.concatenate([visual_mask, prefix_mask], axis=1) if in_front else prefix_mask,
            visual_mask=None if in_front else visual_mask,
            first_position=start + prefix_mask.sum(axis=1),
        )

        def empty(x: KeysValues) -> KeysValues:
            rows, heads, channels, _ = x.keys.shape
            return KeysValues(
                keys=jnp.zeros((rows, 1, heads, channels, max_new), x.keys.dtype),
                values=jnp.zeros((rows, 1, heads, max_new, channels), x.values.dtype),
            )

        cache = tuple(empty(layer) for layer in own)
        return self._logits(hidden[:, -1]), context, cache

    def step(
        self, context: DecoderContext, cache: DecoderCache, tokens: Int[Array, "c k"], t: Int[Array, ""]
    ) -> tuple[Float[Array, "c k v"], DecoderCache]:
        """(logits after the t-th generated token, the cache with it); k continuations a row of `context`."""
        positions = jnp.broadcast_to((context.first_position + t)[:, None], tokens.shape)
        x = self._embed(tokens, positions)
        new = []
        for block, layer, generated in zip(self.blocks, context.layers, cache, strict=True):
            x, generated = block.step(
                x, layer, context.prefix_mask, context.visual_mask, generated, t, positions
            )
            new.append(generated)
        return self._logits(self.norm(x)), tuple(new)

    def embed_text(
        self, tokens: Int[Array, "b t"], mask: Bool[Array, "b t"], keys: RowKeys | None = None
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b d"] | None]:
        """Layout coca: what the blocks that do not see the image make of texts, and of the class token behind them."""
        count = tokens.shape[1]
        positions, seen = _positions(mask), mask
        if self.config.text_class:
            # The class token sees a place of padding, which has its own position in open_clip.
            positions = jnp.broadcast_to(jnp.arange(count), tokens.shape)
        x = self._embed(tokens, positions)
        if self.config.text_class:
            behind = self.text_class.astype(self.dtype) + self.positions[count].astype(self.dtype)
            x = jnp.concatenate([x, jnp.broadcast_to(behind, (len(x), 1, x.shape[-1]))], axis=1)
            seen = jnp.concatenate([jnp.ones((len(x), 1), bool), mask], axis=1)
            positions = jnp.pad(positions, ((0, 0), (0, 1)), constant_values=count)
        causal = jnp.tril(jnp.ones((x.shape[1],) * 2, bool)) & seen[:, None]
        x = dropout(x, self.config.dropout, fold(keys, 0))
        for i in range(self.config.num_unimodal):
            x, _ = self.blocks[i](x, causal, positions, None, None, fold(keys, 1 + i))
        x = self.unimodal_norm(x)
        return x[:, :count], x[:, count] if self.config.text_class else None

    def _embed(self, tokens: Int[Array, "c l"], positions: Int[Array, "c l"]) -> Float[Array, "c l d"]:
        x = constrain_rows(self.token_embed[tokens]).astype(self.dtype)
        if self.config.layout != "prefix":
            x = x + self.positions[positions].astype(self.dtype)
        return x

    def _whole(self, visual, visual_mask, tokens, mask, seen, keys):
        """(hidden states of the tokens, keys and values of each self-attention, and of each cross-attention)."""
        config = self.config
        if tokens.shape[1] > self.max_positions:
            raise ConfigError(f"{tokens.shape[1]} tokens, but the decoder was made for {self.max_positions}")
        positions = _positions(mask)
        x = dropout(self._embed(tokens, positions), config.dropout, fold(keys, 0))
        if config.layout == "prefix" and visual is not None:
            count = visual.shape[1]
            x = jnp.concatenate([visual.astype(self.dtype), x], axis=1)
            in_front = jnp.broadcast_to(jnp.arange(count), visual_mask.shape)
            positions = jnp.concatenate([in_front, count + positions], axis=1)
            causal = jnp.tril(jnp.ones((count, count), bool)) & visual_mask[:, None]
            above = jnp.zeros((len(x), count, tokens.shape[1]), bool)
            left = jnp.broadcast_to(visual_mask[:, None], (len(x), tokens.shape[1], count))
            seen = jnp.concatenate(
                [jnp.concatenate([causal, above], axis=2), jnp.concatenate([left, seen], axis=2)], axis=1
            )
        own, cross = [], []
        for i, block in enumerate(self.blocks):
            cross.append(None if visual is None else block.visual(visual))
            x, heads = block(constrain_rows(x), seen, positions, cross[-1], visual_mask, fold(keys, 1 + i))
            own.append(heads)
        return self.norm(x[:, -tokens.shape[1] :]), own, cross

    def _logits(self, hidden: Float[Array, "*rows d"]) -> Float[Array, "*rows v"]:
        table = self.vocabulary().astype(hidden.dtype)
        return jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)


def _positions(mask: Bool[Array, "c l"]) -> Int[Array, "c l"]:
    """0 for the first real token, and so on; padding in front has 0 as well."""
    return jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
