"""Of which kind the values of foreign configs are, by the names of their options: a value of another kind is an error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bvl.errors import ConversionError

_WHOLE = set(
    "embed_dim width heads head_width context_length vocab_size attn_pooler_queries attn_pooler_heads hidden_size "
    "num_hidden_layers num_attention_heads intermediate_size max_position_embeddings type_vocab_size projection_dim "
    "num_channels num_register_tokens n_embd n_layer n_head n_positions original_max_position_embeddings".split()
)
_WHOLE_OR_NONE = set("num_key_value_heads head_dim n_inner projection_size pooler_output_size".split())
_NUMBER = set(
    "mlp_ratio init_logit_scale layer_norm_eps layer_norm_epsilon rms_norm_eps layerscale_value eps factor "
    "low_freq_factor high_freq_factor hidden_dropout_prob".split()
)
_NUMBER_OR_NONE = set(
    "init_logit_bias ls_init_value patch_dropout timm_drop timm_drop_path rope_theta partial_rotary_factor".split()
)
# A ResNet has no patches, and open_clip's configs say so.
_SIDES = {"image_size", "patch_size"}
_IDS = set("bos_token_id eos_token_id pad_token_id decoder_start_token_id eos_id pad_id".split())
_NAME_OR_NONE = set(
    "model_type hidden_act activation_function timm_model_name timm_pool timm_proj hf_model_name hf_tokenizer_name "
    "hf_proj_type hf_pooler_type pool_type proj_type rope_type".split()
)
_SWITCH = set(
    "quick_gelu custom_text nonscalar_logit_scale no_ln_pre final_ln_after_pool qk_norm no_causal_mask proj_bias "
    "timm_proj_bias embed_cls qkv_bias use_swiglu_ffn attention_bias mlp_bias tie_word_embeddings".split()
)
_PART = {"model_cfg", "vision_cfg", "text_cfg", "multimodal_cfg", "encoder", "decoder"}
_PART_OR_NONE = set(
    "vision_config text_config vision_config_dict text_config_dict preprocess_cfg norm_kwargs act_kwargs "
    "tokenizer_kwargs rope_scaling rope_parameters hf_model_config".split()
)


def check_kinds(config: Mapping[str, Any], *, where: str) -> None:
    """Raise ConversionError naming the first option whose value is of another kind, in the parts of a config too."""
    for name, value in config.items():
        wanted = _wanted(name, value)
        if wanted is not None:
            raise ConversionError(f"{where}: {name}={value!r} is no {wanted}")
        if name in _PART | _PART_OR_NONE and value is not None:
            check_kinds(value, where=f"{where}: {name}")


def _wanted(name: str, value: Any) -> str | None:
    """In words what the value of an option should be; None where it is that, or nothing is known of the option."""
    if (
        value is None
        and name in _SIDES | _WHOLE_OR_NONE | _NUMBER_OR_NONE | _NAME_OR_NONE | _PART_OR_NONE | _SWITCH | _IDS
    ):
        return None
    if name in _WHOLE | _WHOLE_OR_NONE and not _is_whole(value):
        return "whole number of at least 1"
    if name == "layers" and not (_is_whole(value) or _are_whole(value)):
        return "whole number of at least 1, nor a list of such"
    if name == "layer_types" and not (value is None or isinstance(value, list)):
        return "list of names"
    if name in _SIDES and not (_is_whole(value) or (_are_whole(value) and len(value) == 2)):
        return "number of pixels, nor height and width"
    if name in _NUMBER | _NUMBER_OR_NONE and (isinstance(value, bool) or not isinstance(value, int | float)):
        return "number"
    # A text may have several ends.
    ids = value if name == "eos_token_id" and isinstance(value, list) and value else [value]
    if name in _IDS and not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        return "id of a token"
    if name in _NAME_OR_NONE and not isinstance(value, str):
        return "name"
    if name in _SWITCH and value not in (True, False):
        return "true or false"
    if name in _PART | _PART_OR_NONE and not isinstance(value, Mapping):
        return "JSON object"
    return None


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _are_whole(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(map(_is_whole, value))
