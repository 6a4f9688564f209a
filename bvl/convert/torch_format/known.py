"""The options of configs that the PyTorch file knows, so that a new one is refused until it is taken over."""

from __future__ import annotations

import dataclasses
from typing import Any

from bvl.errors import ConversionError

# Type of a config -> names of its fields. Some are read in training alone.
KNOWN: dict[str, frozenset[str]] = {
    name: frozenset(fields.split())
    for name, fields in {
        "DualEncoderConfig": "image text decoder region_encoder region_decoder embed_dim image_projection "
        "text_projection init_temperature max_scale init_bias",
        "ViTConfig": "variant stem pool width depth num_heads mlp_hidden patch_bias pre_norm qk_norm qkv_bias "
        "position_resize whole_patches activation norm_epsilon layer_scale registers norm_after_pool class_token "
        "prefix_positions position_size pool_prefix attentional_pool mask_channel patch_dropout dropout drop_path levels scan remat",
        "AttentionalPool": "width queries num_heads",
        "ResNetConfig": "variant pool norm drop_path width stages pool_heads",
        "HybridConfig": "variant widths depths num_heads positions drop_path",
        "TextConfig": "width depth num_heads mlp_hidden causal pool attend_padding activation norm_epsilon qk_norm "
        "layer_scale dropout drop_path token_std position_std scan remat",
        "BertConfig": "variant hidden_size depth num_heads mlp_hidden max_positions type_vocab_size pool pool_layers "
        "activation norm_epsilon dropout drop_path scan remat",
        "DecoderConfig": "layout width depth num_heads mlp_hidden unimodal_depth num_kv_heads rope_theta qkv_bias "
        "norm_epsilon visual_queries tied_head dropout remat activation head_dim out_bias mlp_bias rope_scaling null "
        "unimodal_heads unimodal_mlp_hidden text_class cross_mlp visual",
        "RopeScaling": "kind factor low_freq_factor high_freq_factor original_context",
        "RegionEncoderConfig": "kind width levels output_size sampling_ratio point_extent num_heads",
        "RegionDecoderConfig": "width depth num_heads queries num_queries phrases mask_stride pixel_width reads_levels "
        "instance_masks",
        "Preprocess": "image_size resize interpolation mean std fill resize_to long_side crop_offset resampler",
        "TokenizerConfig": "path kind vocab_size lowercase context_length start end pad embedding_rows",
        "Controls": "sections lengths quality prompt prompt_tokens dropout",
    }.items()
}


def check_known(config: Any) -> None:
    """Raise ConversionError, naming them, for options of a run's model and data that the PyTorch file does not know."""
    data = config.data
    for part in (config.model, data.preprocess, data.tokenizer, data.controls):
        _check(part)


def _check(part: Any) -> None:
    kind = type(part).__name__
    if kind not in KNOWN:
        raise ConversionError(f"export to torch knows no config of type {kind}")
    values = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
    if unknown := sorted(values.keys() - KNOWN[kind]):
        shown = ", ".join(f"{name}={values[name]!r}" for name in unknown)
        raise ConversionError(f"export to torch does not know these options of {kind}: {shown}")
    for value in values.values():
        if dataclasses.is_dataclass(value):
            _check(value)
