"""open_clip's CoCa: a ViT with an attentional pooler, and a decoder whose first half embeds texts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bvl.assembly import embedding_rows
from bvl.config import Config
from bvl.convert import open_clip_towers as native
from bvl.convert import open_clip_writing as writing
from bvl.convert.families import Described, Family, Layer, Source, TextFacts, Tower, expect
from bvl.convert.hf_common import refuse, unlike
from bvl.convert.open_clip import (
    as_loaded,
    encode_image,
    encode_text,
    load_folder,
    model_cfg,
    scale_options,
    scale_rows,
    text_facts,
    text_projection_of,
)
from bvl.convert.preprocess import from_open_clip, to_open_clip
from bvl.convert.table import Row, Table, Unread, Unwritten, linear, norm, packed, table
from bvl.convert.tensors import Tensors
from bvl.convert.tokenizers import open_clip_entries
from bvl.data.text import Tokenizer
from bvl.errors import ConversionError
from bvl.models.decoder import DecoderConfig
from bvl.models.vit import ViTConfig
from bvl.models.vlm import DualEncoderConfig

_MODEL_OPTIONS = {
    "embed_dim", "vision_cfg", "text_cfg", "multimodal_cfg", "quick_gelu", "init_logit_scale", "init_logit_bias",
    "nonscalar_logit_scale", "custom_text", "cast_dtype", "pad_id", "output_dict",
}  # fmt: skip
# What open_clip's training gives the two losses.
TASKS = {
    "contrastive": {"type": "bvl.tasks.contrastive.Contrastive"},
    "caption": {"type": "bvl.tasks.caption.Caption", "weight": 2.0, "image_dropout": 0.0},
}

# A cross block of the multimodal half, which is the second half of one of our blocks.
CROSS = table(
    norm("cross_norm", "ln_1"),
    norm("visual_norm", "ln_1_kv"),
    packed("cross", ("query", "key", "value"), "attn.in_proj_weight", "attn.in_proj_bias"),
    linear("cross/out", "attn.out_proj"),
    norm("image_mlp_norm", "ln_2"),
    linear("image_mlp/up", "mlp.c_fc"),
    linear("image_mlp/down", "mlp.c_proj"),
)
ENDS = table(
    Row("decoder/token_embed", "text.token_embedding.weight"),
    Row("decoder/positions", "text.positional_embedding"),
    Row("decoder/text_class", "text.cls_emb"),
    norm("decoder/unimodal_norm", "text.ln_final"),
    norm("decoder/norm", "text_decoder.ln_final"),
    Row("decoder/head", "text_decoder.text_projection", "transpose"),
    Unread(r"text(_decoder)?\.attn_mask", "the causal mask"),
    Unwritten(
        r"decoder/visual_tokens/null",
        "open_clip has no null image, which guidance needs: read back, the model has none (model.decoder.null=False)",
    ),
)
# Options of our decoder that open_clip's has with any value, or that matter in training alone, and those that it has
# with one value, beside the defaults.
_FREE = "width depth num_heads mlp_hidden unimodal_depth unimodal_heads unimodal_mlp_hidden activation dropout remat null"
_FIXED: dict[str, tuple[Any, ...]] = {
    **{"layout": ("coca",), "text_class": (True,), "cross_mlp": (True,)},
    "tied_head": (False,),
}
_PROJECTIONS = {"linear": ("linear", False), "linear_bias": ("linear", True), "none": ("none", False)}


class CoCa(Family):
    """Yu et al. 2022 (arXiv:2205.01917), as open_clip has it."""

    name = "CoCa"
    library = "open_clip"
    weights_file = "open_clip_model.safetensors"
    config_file = "open_clip_config.json"

    def accepts(self, source: Source) -> bool:
        cfg = source.config.get("model_cfg")
        return isinstance(cfg, Mapping) and "multimodal_cfg" in cfg

    def describe(self, source: Source) -> Described:
        where = str(source.folder)
        cfg = model_cfg(source.config, where=where)
        native.known_options(cfg, _MODEL_OPTIONS, where=where)
        image = _read_vision(cfg, where=f"{where}: vision_cfg")
        decoder = _read_decoder(cfg, where=where)
        if image.output_width != decoder.width:
            raise ConversionError(
                f"{where}: the decoder of width {decoder.width} cannot read image tokens of width {image.output_width}"
            )
        return Described(
            model=native.checked(
                DualEncoderConfig,
                where=where,
                image=image,
                text=None,
                decoder=decoder,
                embed_dim=cfg["embed_dim"],
                text_projection=text_projection_of(cfg["text_cfg"]),
                **scale_options(cfg, source, self.tensors(source)),
            ),
            preprocess=from_open_clip(
                source.config.get("preprocess_cfg"), native.image_size(cfg["vision_cfg"])
            ),
            text=_text_facts(cfg),
            tasks=TASKS,
        )

    def tensors(self, source: Source) -> Tensors:
        return as_loaded(source.tensors(), model_cfg(source.config, where=str(source.folder)), custom=True)

    def table(self, model: DualEncoderConfig, foreign: Mapping[str, Any]) -> Table:
        cfg, decoder = foreign["model_cfg"], model.decoder
        block, first = native.block(), decoder.num_unimodal
        rows = [
            native.vision_transformer(model.image).under("image/", "visual."),
            Row("image_projection/kernel", "visual.proj"),
            ENDS,
            block.under("decoder/block_{i}/", "text.transformer.resblocks.{i}.").repeat(first),
            scale_rows(cfg),
        ]
        for i in range(decoder.depth - first):
            rows.append(block.under(f"decoder/block_{first + i}/", f"text_decoder.resblocks.{i}."))
            rows.append(CROSS.under(f"decoder/block_{first + i}/", f"text_decoder.cross_attn.{i}."))
        if model.text_projection == "linear":
            rows.append(Row("text_projection/kernel", "text.text_projection"))
        elif model.text_projection == "linear_bias":
            rows.append(linear("text_projection", "text.text_projection"))
        return table(*rows)

    def load_peer(self, folder: Path, foreign: Mapping[str, Any]) -> Any:
        return load_folder(folder)

    def towers(self, model: DualEncoderConfig, foreign: Mapping[str, Any]) -> tuple[Tower, ...]:
        first, depth = model.decoder.num_unimodal, model.decoder.depth
        image = native.vision_layers(model.image, {})
        text = [Layer(f"decoder/block_{i}", f"text.transformer.resblocks.{i}") for i in range(first)]
        decoder = [
            Layer(f"decoder/block_{first + i}", f"text_decoder.cross_attn.{i}") for i in range(depth - first)
        ]
        return (
            Tower("image", image, encode_image),
            Tower("text", tuple(text), encode_text),
            Tower("decoder", (*decoder, Layer("decoder/norm", "text_decoder.ln_final")), _decode),
        )

    def scale_and_bias(self, peer: Any) -> tuple[float, float]:
        bias = 0.0 if peer.logit_bias is None else float(peer.logit_bias.detach())
        return float(peer.logit_scale.detach().exp()), bias

    def foreign(self, config: Config, tokenizer: Tokenizer) -> dict[str, Any]:
        model, size = config.model, config.data.preprocess.height_width
        refuse(self.name, _wrong(config))
        decoder, bare = model.decoder, dataclasses.replace(model, decoder=None)
        vision = {**writing.write_vision(bare, size, timm=False), "output_tokens": True}
        kind, bias = _PROJECTIONS[model.text_projection]
        heads, hidden = decoder.unimodal_sizes
        rows = embedding_rows(config, tokenizer)
        text = {
            "vocab_size": rows,
            "width": decoder.width,
            "heads": heads,
            "layers": decoder.num_unimodal,
            "mlp_ratio": native.mlp_ratio(decoder.width, hidden),
            "embed_cls": True,
            "output_tokens": True,
            "proj_type": kind,
            "proj_bias": bias,
            "pad_id": tokenizer.pad_id,
            **open_clip_entries(tokenizer),
        }
        multimodal = {
            "context_length": tokenizer.context_length,
            "vocab_size": rows,
            "width": decoder.width,
            "heads": decoder.num_heads,
            "layers": decoder.depth - decoder.num_unimodal,
        }
        cfg = {
            "embed_dim": model.embed_dim,
            "vision_cfg": vision,
            "text_cfg": text,
            "multimodal_cfg": multimodal,
            "custom_text": True,
            "quick_gelu": decoder.activation == "quick_gelu",
            "init_logit_scale": math.log(1 / model.init_temperature),
        }
        if model.init_bias is not None:
            cfg["init_logit_bias"] = model.init_bias
        return {"model_cfg": cfg, "preprocess_cfg": to_open_clip(config.data.preprocess)}

    def write_files(
        self, folder: Path, foreign: Mapping[str, Any], config: Config, tokenizer: Tokenizer
    ) -> None:
        writing.write_files(folder, foreign, config, tokenizer)

    def how_to_load(self, folder_name: str) -> str:
        return writing.how_to_load(folder_name)


def _wrong(config: Config) -> list[str]:
    """Which options of a model of ours CoCa has not, beside those of its ViT."""
    model = config.model
    if not isinstance(model.image, ViTConfig) or model.decoder is None or model.text is not None:
        return ["model but one of a ViTConfig as model.image, model.decoder and model.text=None"]
    image, decoder = model.image, model.decoder
    wrong = [f"model.{n}" for n in ("region_encoder", "region_decoder") if getattr(model, n) is not None]
    wrong += unlike("model.decoder", decoder, free=_FREE, fixed=_FIXED)
    if decoder.sizes[3] != 4 * decoder.width:
        wrong.append(f"model.decoder.mlp_hidden={decoder.sizes[3]} (there 4 * width)")
    if decoder.activation not in ("gelu", "quick_gelu"):
        wrong.append(f"model.decoder.activation={decoder.activation!r} (there 'gelu' or 'quick_gelu')")
    elif (decoder.activation == "quick_gelu") != (image.activation == "quick_gelu"):
        wrong.append(
            "model.image.activation beside another of model.decoder: quick_gelu is one option for both"
        )
    if image.output_width != decoder.width:
        wrong.append(f"image tokens of width {image.output_width} for a decoder of {decoder.width}")
    if model.text_projection not in _PROJECTIONS:
        wrong.append(f"model.text_projection={model.text_projection!r}")
    if config.data.controls.num_slots != 1:
        wrong.append("data.controls: a start token alone stands before a text")
    return wrong


def _decode(peer: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Logits of every token of texts."""
    _, visual = peer.visual(inputs["pixels"])
    _, tokens = peer.text(inputs["tokens"])
    return {"logits": peer.text_decoder(visual, tokens)}


def _read_vision(cfg: Mapping[str, Any], *, where: str) -> ViTConfig:
    vision = dict(cfg["vision_cfg"])
    if vision.get("timm_model_name"):
        raise ConversionError(
            f"{where}: timm_model_name={vision['timm_model_name']!r}: timm's towers hand no tokens to a decoder"
        )
    if isinstance(vision.get("layers", 12), list | tuple):
        raise ConversionError(f"{where}: layers={vision['layers']!r}: ResNets hand no tokens to a decoder")
    expect(vision, {"output_tokens": (True,), "attentional_pool": (False, True, None)}, where=where)
    pooled = bool(vision.get("attentional_pool"))
    if vision.get("final_ln_after_pool") and not pooled:
        raise ConversionError(
            f"{where}: final_ln_after_pool=True: the decoder would read tokens without norm"
        )
    plain = {**vision, "output_tokens": False}
    quick = bool(cfg.get("quick_gelu", False))
    return native.read_vision(plain, embed_dim=cfg["embed_dim"], quick_gelu=quick, where=where)


def _read_decoder(cfg: Mapping[str, Any], *, where: str) -> DecoderConfig:
    text, multimodal, quick = cfg["text_cfg"], cfg["multimodal_cfg"], bool(cfg.get("quick_gelu", False))
    if text.get("hf_model_name"):
        raise ConversionError(
            f"{where}: text_cfg.hf_model_name={text['hf_model_name']!r}: a CoCa whose decoder reads the tokens of a "
            "tower of transformers is not reproduced by bvl"
        )
    expect(text, {"embed_cls": (True,), "no_causal_mask": (False,)}, where=f"{where}: text_cfg")
    if not text.get("embed_cls"):
        raise ConversionError(f"{where}: text_cfg.embed_cls=False is not reproduced by bvl; known: True")
    expect(
        text,
        {name: (None, {}) for name in ("norm_kwargs", "act_kwargs", "ls_init_value")} | {"qk_norm": (False,)},
        where=f"{where}: text_cfg",
    )
    # The class token is pooled whatever pool_type says.
    plain = {**text, "embed_cls": False, "output_tokens": False, "pool_type": "last"}
    tower = native.read_text(plain, quick_gelu=quick, where=f"{where}: text_cfg")
    expect(multimodal, {"ls_init_value": (None,)}, where=f"{where}: multimodal_cfg")
    width, depth = multimodal.get("width", 512), multimodal.get("layers", 12)
    if width != tower.width:
        raise ConversionError(
            f"{where}: multimodal_cfg.width={width} and text_cfg.width={tower.width} must be equal"
        )
    context = text.get("context_length", 77)
    if multimodal.get("context_length", 77) < context:
        raise ConversionError(
            f"{where}: multimodal_cfg.context_length={multimodal.get('context_length', 77)} is shorter than that of "
            f"text_cfg, {context}"
        )
    return native.checked(
        DecoderConfig,
        where=where,
        layout="coca",
        width=width,
        depth=tower.depth + depth,
        unimodal_depth=tower.depth,
        num_heads=multimodal.get("heads", 8),
        unimodal_heads=tower.num_heads,
        mlp_hidden=4 * width,  # open_clip does not read mlp_ratio here
        unimodal_mlp_hidden=tower.mlp_hidden,
        activation=tower.activation,
        tied_head=False,
        null=False,
        text_class=True,
        cross_mlp=True,
    )


def _text_facts(cfg: Mapping[str, Any]) -> TextFacts:
    # Padding is seen by the class token, so that it must be theirs.
    text = cfg["text_cfg"]
    return dataclasses.replace(text_facts(text), pad_id=text.get("pad_id", 0))


FAMILIES = (CoCa(),)
