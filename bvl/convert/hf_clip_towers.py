"""The towers of transformers' CLIP and SigLIP, and all image towers by the `model_type` of their config."""

from __future__ import annotations

from typing import Any

from bvl.convert.families import Layer, TextFacts, expect
from bvl.convert.hf_common import (
    FOREIGN_ACTIVATIONS,
    Config,
    HeightWidth,
    activation,
    block,
    integer,
    number,
    side,
    unlike,
)
from bvl.convert.hf_vision_towers import Dinov2RegistersTower, Dinov2Tower, VisionTower, ViTTower
from bvl.convert.table import Row, Table, Unread, linear, norm, packed, table
from bvl.data.text import Tokenizer
from bvl.errors import ConversionError
from bvl.models.text import TextConfig
from bvl.models.vit import ViTConfig

BLOCK = {
    "attention_norm": "layer_norm1",
    "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj",
    "attention/out": "self_attn.out_proj",
    "mlp_norm": "layer_norm2",
    "mlp/up": "mlp.fc1",
    "mlp/down": "mlp.fc2",
}
# Options of ours that both classes can have, or that matter in training alone.
_FREE = "width depth num_heads mlp_hidden activation norm_epsilon dropout drop_path token_std position_std scan remat"
_POSITION_IDS = Unread(r"embeddings\.position_ids", "0, 1, 2, ...")


class ClipVisionTower(VisionTower):
    """CLIPVisionModel: no bias of the patches, a norm before the blocks; the final norm is that of the class token."""

    model_type, class_name, processor = "clip_vision_model", "CLIPVisionModel", "CLIPImageProcessor"
    layer, live_layer, live_patches = "encoder.layers", "encoder.layers", "embeddings.patch_embedding"
    fixed = {"pool": ("cls",), "patch_bias": (False,), "pre_norm": (True,)}
    renames = ((r"^vision_model\.", ""),)
    block_names = BLOCK

    def image_size(self, foreign: Config, *, where: str) -> HeightWidth:
        square = side(foreign, "image_size", 224, where=where)
        return square, square

    def config(self, foreign: Config, *, where: str, pooler: bool = False) -> ViTConfig:
        del pooler  # The class token behind its norm is what this class calls so.
        return self._config(
            foreign,
            where=where,
            patch=32,
            pool="cls",
            pre_norm=True,
            patch_bias=False,
            activation=activation(foreign, "quick_gelu", where=where),
            norm_epsilon=number(foreign, "layer_norm_eps", 1e-5, where=where),
        )

    def table(self, config: ViTConfig) -> Table:
        return table(
            Row("cls", "embeddings.class_embedding"),
            Row("positions", "embeddings.position_embedding.weight"),
            Row("patch_embed/kernel", "embeddings.patch_embedding.weight", "patches"),
            norm("pre_norm", "pre_layrnorm"),
            block(self.block_names).under(theirs=f"{self.layer}.{{i}}.").repeat(config.sizes[1]),
            norm("norm", "post_layernorm"),
            _POSITION_IDS,
        )

    def layers(self, config: ViTConfig) -> tuple[Layer, ...]:
        patches, *blocks = super().layers(config)
        return (patches, Layer("pre_norm", "pre_layrnorm"), *blocks)

    def run(self, vision: Any, pixels: Any, config: ViTConfig) -> dict[str, Any]:
        own = (vision.embeddings.image_size,) * 2
        out = vision(pixel_values=pixels, interpolate_pos_encoding=tuple(pixels.shape[2:]) != own)
        return {"pooled": out.pooler_output, "tokens": vision.post_layernorm(out.last_hidden_state)[:, 1:]}


class SiglipVisionTower(ClipVisionTower):
    """SiglipVisionModel: no class token; a learned query attends to the patches."""

    model_type, class_name, processor = "siglip_vision_model", "SiglipVisionModel", "SiglipImageProcessor"
    fixed = {"class_token": (None, False)}

    def config(self, foreign: Config, *, where: str, pooler: bool = False) -> ViTConfig:
        del pooler  # The attention pool is what this class calls so.
        expect(foreign, {"vision_use_head": (True,)}, where=where)
        return self._config(
            foreign,
            where=where,
            pool="map",
            activation=activation(foreign, "gelu_pytorch_tanh", where=where),
            norm_epsilon=number(foreign, "layer_norm_eps", 1e-6, where=where),
        )

    def table(self, config: ViTConfig) -> Table:
        attention = ("query", "key", "value")
        return table(
            Row("positions", "embeddings.position_embedding.weight"),
            Row("patch_embed/kernel", "embeddings.patch_embedding.weight", "patches"),
            Row("patch_embed/bias", "embeddings.patch_embedding.bias"),
            block(self.block_names).under(theirs=f"{self.layer}.{{i}}.").repeat(config.sizes[1]),
            norm("norm", "post_layernorm"),
            Row("pool/probe", "head.probe"),
            packed(
                "pool/attention", attention, "head.attention.in_proj_weight", "head.attention.in_proj_bias"
            ),
            linear("pool/attention/out", "head.attention.out_proj"),
            norm("pool/mlp_norm", "head.layernorm"),
            linear("pool/mlp/up", "head.mlp.fc1"),
            linear("pool/mlp/down", "head.mlp.fc2"),
            _POSITION_IDS,
        )

    def layers(self, config: ViTConfig) -> tuple[Layer, ...]:
        return (*VisionTower.layers(self, config), Layer("norm", "post_layernorm"), Layer("pool", "head"))

    def run(self, vision: Any, pixels: Any, config: ViTConfig) -> dict[str, Any]:
        own = (vision.embeddings.image_size,) * 2
        out = vision(pixel_values=pixels, interpolate_pos_encoding=tuple(pixels.shape[2:]) != own)
        return {"pooled": out.pooler_output, "tokens": out.last_hidden_state}


VISION: dict[str, VisionTower] = {
    tower.model_type: tower
    for tower in (ViTTower(), Dinov2Tower(), Dinov2RegistersTower(), ClipVisionTower(), SiglipVisionTower())
}


def text_table(config: TextConfig) -> Table:
    """CLIP's and SigLIP's text tower; names of ours below "text/", theirs below "text_model."."""
    return table(
        Row("token_embed", "embeddings.token_embedding.weight"),
        Row("positions", "embeddings.position_embedding.weight"),
        block(BLOCK).under(theirs="encoder.layers.{i}.").repeat(config.depth),
        norm("norm", "final_layer_norm"),
        _POSITION_IDS,
    )


def text_layers(config: TextConfig) -> tuple[Layer, ...]:
    """What the proof compares of such a text tower."""
    blocks = (Layer(f"stack/block_{i}", f"encoder.layers.{i}") for i in range(config.depth))
    return (*blocks, Layer("norm", "final_layer_norm"))


def clip_text(foreign: Config, *, where: str) -> tuple[TextConfig, TextFacts]:
    """A CLIPTextConfig in our terms; raises ConversionError naming an option that bvl does not reproduce."""
    rows = integer(foreign, "vocab_size", 49408, where=where)
    end = foreign.get("eos_token_id", 49407)
    legacy = end == 2  # What configs said before transformers 4.31; the class then pools at the highest id.
    if not legacy and not (isinstance(end, int) and 0 <= end < rows):
        raise ConversionError(f"{where}: eos_token_id={end!r} is no id of the vocabulary of {rows}")
    config = _text(
        foreign,
        where=where,
        width=512,
        heads=8,
        hidden=2048,
        activation=activation(foreign, "quick_gelu", where=where),
        norm_epsilon=number(foreign, "layer_norm_eps", 1e-5, where=where),
        pool="highest" if legacy else "end",
    )
    # Padding stands behind the end, where a causal tower does not look; which token it is does not matter.
    facts = TextFacts(
        kind="clip",
        context_length=integer(foreign, "max_position_embeddings", 77, where=where),
        embedding_rows=rows,
        end_id=None if legacy else end,
    )
    return config, facts


def siglip_text(foreign: Config, *, where: str) -> tuple[TextConfig, TextFacts]:
    """A SiglipTextConfig in our terms; raises ConversionError naming an option that bvl does not reproduce."""
    config = _text(
        foreign,
        where=where,
        width=768,
        heads=12,
        hidden=3072,
        causal=False,
        attend_padding=True,
        activation=activation(foreign, "gelu_pytorch_tanh", where=where),
        norm_epsilon=number(foreign, "layer_norm_eps", 1e-6, where=where),
        pool="last",
    )
    # The ids that such a config gives are CLIP's, whatever the tokenizer.
    facts = TextFacts(
        kind="siglip",
        context_length=integer(foreign, "max_position_embeddings", 64, where=where),
        embedding_rows=integer(foreign, "vocab_size", 32000, where=where),
        start_id=-1,
    )
    return config, facts


def _text(foreign: Config, *, where: str, width: int, heads: int, hidden: int, **options: Any) -> TextConfig:
    width = integer(foreign, "hidden_size", width, where=where)
    return TextConfig(
        width=width,
        depth=integer(foreign, "num_hidden_layers", 12, where=where),
        num_heads=integer(foreign, "num_attention_heads", heads, where=where),
        mlp_hidden=integer(foreign, "intermediate_size", hidden, where=where),
        **options,
    )


def clip_text_wrong(config: TextConfig, tokenizer: Tokenizer) -> list[str]:
    """Which options of a text tower of ours CLIPTextModel has not."""
    # Under a causal mask no text token sees the padding behind it.
    fixed = {"pool": ("end", "highest"), "attend_padding": (False, True)}
    wrong = unlike("model.text", config, free=_FREE, fixed=fixed)
    if config.pool == "end" and tokenizer.end_id == 2:
        wrong.append("model.text.pool='end' with an end token of id 2, which means the highest id there")
    return wrong + _activation_wrong(config)


def siglip_text_wrong(config: TextConfig) -> list[str]:
    """Which options of a text tower of ours SiglipTextModel has not."""
    fixed = {"causal": (False,), "pool": ("last",), "attend_padding": (True,)}
    return unlike("model.text", config, free=_FREE, fixed=fixed) + _activation_wrong(config)


def foreign_text(config: TextConfig, tokenizer: Tokenizer, *, model_type: str, rows: int) -> dict[str, Any]:
    """The CLIPTextConfig or SiglipTextConfig of a text tower of ours without wrong options."""
    width, depth, num_heads, hidden = config.sizes
    return {
        "model_type": model_type,
        "vocab_size": rows,
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": num_heads,
        "intermediate_size": hidden,
        "max_position_embeddings": tokenizer.context_length,
        "hidden_act": FOREIGN_ACTIVATIONS[config.activation],
        "layer_norm_eps": config.norm_epsilon,
        "bos_token_id": tokenizer.start_id,
        "eos_token_id": 2 if config.pool == "highest" else tokenizer.end_id,
        "pad_token_id": tokenizer.pad_id,
    }


def _activation_wrong(config: TextConfig) -> list[str]:
    known = config.activation in FOREIGN_ACTIVATIONS
    return [] if known else [f"model.text.activation={config.activation!r}"]
