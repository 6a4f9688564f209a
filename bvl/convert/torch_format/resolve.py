"""The config.json of the PyTorch file: all it needs to know of a run, as plain values."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from bvl.config import Config
from bvl.convert.torch_format.known import check_known
from bvl.data.controls import PROMPT_END, Controls
from bvl.data.text import Tokenizer
from bvl.errors import ConversionError
from bvl.models.bert import BertConfig
from bvl.models.decoder import DecoderConfig
from bvl.models.hybrid import HybridConfig
from bvl.models.resnet import VARIANTS, ResNetConfig
from bvl.models.text import TextConfig
from bvl.models.vit import ViTConfig
from bvl.models.vlm import DualEncoderConfig

Shapes = Mapping[str, tuple[int, ...]]
FORMAT_VERSION = 1


def resolve(config: Config, tokenizer: Tokenizer, shapes: Shapes) -> dict[str, Any]:
    """The content of config.json; shapes: of all parameters by name.

    Raises ConversionError for an option that the PyTorch file does not know.
    """
    check_known(config)
    model, preprocess = config.model, config.data.preprocess
    size = preprocess.height_width
    resolved = {
        "format": "bvl-torch",
        "format_version": FORMAT_VERSION,
        "embed_dim": model.embed_dim,
        "image": None if model.image is None else _image(model, size),
        "text": None if model.text is None else _text(model.text, tokenizer, shapes),
        "decoder": None if model.decoder is None else _decoder(model, shapes),
        "region_encoder": None if model.region_encoder is None else _region_encoder(model, shapes),
        "region_decoder": None if model.region_decoder is None else _region_decoder(model, size, shapes),
        "image_projection": model.image_projection,
        "text_projection": model.text_projection,
        "pooled_widths": {
            "image": model.image_width,
            "text": model.text_width if model.embeds_text else 0,
        },
        "has_logits": not model.is_alone,
        "has_bias": model.init_bias is not None,
        "max_scale": model.max_scale,
        "end_id": tokenizer.end_id,
        "image_size": list(size),
        "mean": list(preprocess.mean),
        "std": list(preprocess.std),
        "reads_levels": "levels" in model.region_needs,
        "region_grid": [side // config.data.regions.mask_stride for side in size],
        "tokenizer": _tokenizer(tokenizer, shapes),
        "controls": _controls(config.data.controls, tokenizer),
        "tasks": _tasks(config),
    }
    return resolved


def _image(model: DualEncoderConfig, size: tuple[int, int]) -> dict[str, Any]:
    image = model.image
    vit = isinstance(image, ViTConfig)
    grid = list(image.position_grid(size) if vit else image.grid(size))
    if vit:
        width, depth, num_heads, mlp_hidden = image.sizes
        same = ("stem", "pool", "patch_bias", "pre_norm", "qk_norm", "qkv_bias", "activation", "norm_epsilon")
        same += ("registers", "mask_channel", "norm_after_pool", "whole_patches", "pool_prefix")
        return {
            "type": "vit",
            "width": width,
            "depth": depth,
            "num_heads": num_heads,
            "mlp_hidden": mlp_hidden,
            "patch_size": image.patch_size,
            "grid": grid,
            "levels": list(image.level_blocks),
            "layer_scale": image.layer_scale is not None,
            "attentional_pool": image.attentional_pool and dataclasses.asdict(image.attentional_pool),
            "visual": "patches" if model.decoder is None else model.decoder.visual,
            "class_token": image.has_class_token,
            "prefix_positions": image.num_prefix_positions,
            "antialias_positions": image.position_resize == "antialias",
            **{name: getattr(image, name) for name in same},
        }
    if isinstance(image, ResNetConfig):
        width, stages = image.sizes
        variant = VARIANTS[image.variant]
        return {
            "type": "resnet",
            "width": width,
            "stages": list(stages),
            "bottleneck": variant.bottleneck,
            "clip": variant.clip,
            "pool": image.pooling,
            "num_heads": image.num_heads,
            "norm": image.norm,
            "grid": grid,
        }
    if isinstance(image, HybridConfig):
        widths, depths, num_heads = image.sizes
        return {
            "type": "hybrid",
            "widths": list(widths),
            "depths": list(depths),
            "num_heads": num_heads,
            "positions": image.positions,
            "grid": grid,
        }
    raise ConversionError(f"the PyTorch file knows no image tower of type {type(image).__name__}")


def _text(text: Any, tokenizer: Tokenizer, shapes: Shapes) -> dict[str, Any]:
    width, depth, num_heads, mlp_hidden = text.sizes
    shared = {
        "width": width,
        "depth": depth,
        "num_heads": num_heads,
        "mlp_hidden": mlp_hidden,
        "vocab_size": shapes["text/token_embed"][0],
        "context_length": tokenizer.context_length,
        "end_id": tokenizer.end_id,
        "pool": text.pool,
        "activation": text.activation,
        "norm_epsilon": text.norm_epsilon,
    }
    if isinstance(text, TextConfig):
        same = ("causal", "attend_padding", "qk_norm")
        scale = {"layer_scale": text.layer_scale is not None}
        return {"type": "transformer", **shared, **scale, **{name: getattr(text, name) for name in same}}
    if isinstance(text, BertConfig):
        blocks = [layer - 1 if layer > 0 else depth + layer for layer in text.pool_layers]
        same = ("max_positions", "type_vocab_size")
        return {
            "type": "bert",
            **shared,
            "pool_blocks": blocks,
            **{name: getattr(text, name) for name in same},
        }
    raise ConversionError(f"the PyTorch file knows no text tower of type {type(text).__name__}")


def _decoder(model: DualEncoderConfig, shapes: Shapes) -> dict[str, Any]:
    decoder: DecoderConfig = model.decoder
    width, depth, num_heads, hidden = decoder.sizes
    rotary, sees_images = decoder.layout == "prefix", model.image is not None
    blocks = []
    for i in range(depth):
        unimodal = i < decoder.num_unimodal
        heads, mlp_hidden = decoder.unimodal_sizes if unimodal else (num_heads, hidden)
        blocks.append(
            {
                "num_heads": heads,
                "num_kv_heads": decoder.kv_heads if rotary else heads,
                "head_dim": decoder.head_channels if rotary else width // heads,
                "mlp_hidden": mlp_hidden,
                "cross_attention": sees_images and not rotary and not unimodal,
            }
        )
    same = (
        "layout",
        "norm_epsilon",
        "visual_queries",
        "tied_head",
        "null",
        "text_class",
        "cross_mlp",
        "rope_theta",
    )
    return {
        "width": width,
        "blocks": blocks,
        "num_unimodal": decoder.num_unimodal,
        "visual_width": model.image_width,
        "vocab_size": shapes["decoder/token_embed"][0],
        "unimodal_norm": "decoder/unimodal_norm/scale" in shapes,
        "max_positions": None if rotary else shapes["decoder/positions"][0],
        "activation": decoder.activation or ("swiglu" if rotary else "gelu_tanh"),
        "rope_scaling": None if decoder.rope_scaling is None else dataclasses.asdict(decoder.rope_scaling),
        **{name: getattr(decoder, name) or not rotary for name in ("qkv_bias", "out_bias", "mlp_bias")},
        **{name: getattr(decoder, name) for name in same},
    }


def _region_encoder(model: DualEncoderConfig, shapes: Shapes) -> dict[str, Any]:
    encoder = model.region_encoder
    same = ("kind", "width", "output_size", "sampling_ratio", "point_extent", "num_heads")
    tokens = next(
        (
            shapes[name][0]
            for name in ("region_encoder/mask", "region_encoder/level_0/kernel")
            if name in shapes
        ),
        model.image_width,
    )
    return {
        "image_width": tokens,
        "decoder_width": model.decoder.width,
        "levels": list(encoder.levels),
        "level_widths": _widths(shapes, "region_encoder/level_{}/kernel", 1 + len(encoder.levels)),
        **{name: getattr(encoder, name) for name in same},
    }


def _region_decoder(model: DualEncoderConfig, size: tuple[int, int], shapes: Shapes) -> dict[str, Any]:
    decoder = model.region_decoder
    steps = sum(name.startswith("region_decoder/pixels/conv_") for name in shapes) // 2
    same = ("width", "depth", "num_heads", "queries", "num_queries", "pixel_width", "reads_levels")
    return {
        "image_width": shapes["region_decoder/image_in/kernel"][0],
        "phrase_width": model.text_width if decoder.phrases == "text" else model.decoder.width,
        "embed_dim": model.embed_dim,
        "mask_size": [side // decoder.mask_stride for side in size],
        "fine_widths": _widths(shapes, "region_decoder/pixels/fine_{}/kernel", steps),
        "reads_own_pixels": "region_decoder/fine_in/kernel" in shapes,
        "instance_masks": decoder.instance_masks,
        **{name: getattr(decoder, name) for name in same},
    }


def _widths(shapes: Shapes, pattern: str, count: int) -> list[int]:
    """Channels that the numbered maps read; 0 where there is no map of a number."""
    return [shapes.get(pattern.format(i), (0,))[0] for i in range(count)]


def _tokenizer(tokenizer: Tokenizer, shapes: Shapes) -> dict[str, Any]:
    # An imported model may have more rows than its tokenizer has tokens.
    (rows, *_) = shapes.get("decoder/token_embed", (tokenizer.vocab_size,))
    return {
        "context_length": tokenizer.context_length,
        "pad_id": tokenizer.pad_id,
        "start_id": tokenizer.start_id,
        "end_id": tokenizer.end_id,
        "control_ids": sorted(tokenizer.control_ids),
        "excluded_ids": np.flatnonzero(tokenizer.no_words(rows)).tolist(),
    }


def _controls(controls: Controls, tokenizer: Tokenizer) -> dict[str, Any]:
    # Of the vocabulary entries in the order of `Controls.tokens`.
    ids = iter([tokenizer.token_id(name) for name in controls.tokens()])
    return {
        "num_slots": controls.num_slots,
        "sections": {name: next(ids) for name in controls.sections},
        "lengths": [(words, next(ids)) for words in (controls.length_values if controls.lengths else ())],
        "open_ended": not isinstance(controls.lengths, int),
        "quality": [next(ids) for _ in range(controls.quality)],
        "prompt": None
        if controls.prompt is None
        else {"tokens": controls.prompt_tokens, "end_id": tokenizer.token_id(PROMPT_END)},
    }


def _tasks(config: Config) -> dict[str, Any]:
    """What the run was trained to do; None, or False, for what not.

    Tasks are known by the names of their types, for they lie in a layer above this one.
    """

    def task(name: str) -> Any:
        tasks = config.tasks.values()
        return next((t for t in tasks if name in {kind.__name__ for kind in type(t).__mro__}), None)

    context = config.data.tokenizer.context_length
    grounding, detection = task("Grounding"), task("Detection")
    contrastive = task("Contrastive") is not None
    return {
        "contrastive": contrastive,
        "caption": task("Caption") and {"max_length": context - 1},
        "describe": task("RegionCaption")
        and {"max_length": (config.data.regions.context_length or context) - 1},
        "ground": grounding
        and {
            "phrases": grounding.phrases,
            "boxes": bool(grounding.l1 or grounding.giou or grounding.score),
            "masks": bool(grounding.bce or grounding.dice),
        },
        "detect": detection and {"instance_masks": config.model.region_decoder.instance_masks},
        "heat_maps": contrastive or task("Mosaic") is not None,
    }
