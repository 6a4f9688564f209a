"""Tables of open_clip's own towers, and the options of their configs: VisionTransformer, ModifiedResNet, TextTransformer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from bvl.convert.families import Layer, expect
from bvl.convert.table import Constant, Row, Table, linear, norm, packed, table
from bvl.errors import ConfigError, ConversionError
from bvl.models.attentional_pool import AttentionalPool
from bvl.models.layers import Activation
from bvl.models.resnet import VARIANTS as RESNETS
from bvl.models.resnet import ResNetConfig
from bvl.models.text import TextConfig
from bvl.models.vit import VARIANTS as VITS
from bvl.models.vit import ViTConfig

# Options of a block that change what it computes and that bvl's has not.
_BLOCK_OPTIONS: dict[str, tuple[Any, ...]] = {
    "scaled_cosine_attn": (False,),
    "scale_heads": (False,),
    "scale_attn_inner": (False,),
    "scale_attn": (False,),
    "scale_fc": (False,),
    "block_type": (None, "default", "custom"),
}
VIT_OPTIONS = {
    "width", "layers", "head_width", "mlp_ratio", "patch_size", "image_size", "ls_init_value", "patch_dropout",
    "attentional_pool", "attn_pooler_queries", "attn_pooler_heads", "no_ln_pre", "pos_embed_type",
    "final_ln_after_pool", "pool_type", "output_tokens", "act_kwargs", "norm_kwargs", "qk_norm", *_BLOCK_OPTIONS,
}  # fmt: skip
_RESNET_OPTIONS = {"layers", "width", "head_width", "image_size"}
# Of a vision_cfg these concern timm's models alone, or nothing where none is named.
TIMM_OPTIONS = {
    "timm_model_name", "timm_model_pretrained", "timm_pool", "timm_proj", "timm_proj_bias", "timm_drop",
    "timm_drop_path",
}  # fmt: skip
# Of a text_cfg these concern transformers' models alone.
HF_OPTIONS = {"hf_model_name", "hf_model_pretrained", "hf_model_config", "hf_proj_type", "hf_pooler_type"}
TOKENIZER_OPTIONS = {
    "context_length",
    "vocab_size",
    "hf_tokenizer_name",
    "tokenizer_mode",
    "tokenizer_kwargs",
}
_TEXT_OPTIONS = {
    "width", "heads", "layers", "mlp_ratio", "ls_init_value", "embed_cls", "pad_id", "eos_id", "no_causal_mask",
    "final_ln_after_pool", "pool_type", "proj_bias", "proj_type", "output_tokens", "act_kwargs", "norm_kwargs",
    "qk_norm", *_BLOCK_OPTIONS, *TOKENIZER_OPTIONS,
}  # fmt: skip
# Their pool_type of texts -> ours.
TEXT_POOLS = {"argmax": "highest", "eos": "end", "last": "last", "first": "cls"}


def block(*, qk_norm: bool = False, layer_scale: bool = False) -> Table:
    """One ResidualAttentionBlock; names of ours below "stack/block_{i}/", of theirs below "resblocks.{i}."."""
    return table(
        norm("attention_norm", "ln_1"),
        packed("attention", ("query", "key", "value"), "attn.in_proj_weight", "attn.in_proj_bias"),
        linear("attention/out", "attn.out_proj"),
        norm("mlp_norm", "ln_2"),
        linear("mlp/up", "mlp.c_fc"),
        linear("mlp/down", "mlp.c_proj"),
        (norm("attention/query_norm", "attn.ln_q") + norm("attention/key_norm", "attn.ln_k")) if qk_norm else (),
        (Row("attention_scale/scale", "ls_1.gamma"), Row("mlp_scale/scale", "ls_2.gamma")) if layer_scale else (),
    )  # fmt: skip


def blocks(config: ViTConfig | TextConfig) -> Table:
    """The blocks of a tower; names of ours below the tower, of theirs below it as well."""
    one = block(qk_norm=config.qk_norm, layer_scale=config.layer_scale is not None)
    return one.under("stack/block_{i}/", "transformer.resblocks.{i}.").repeat(config.sizes[1])


def attentional_pool(config: ViTConfig) -> Table:
    """The pooler; torch keeps its maps in one tensor where both widths are equal."""
    maps = ("query", "key", "value")
    if config.attentional_pool.width == config.sizes[0]:
        rows = packed("attention", maps, "attn.in_proj_weight", "attn.in_proj_bias")
    else:
        rows = tuple(
            row
            for k, name in enumerate(maps)
            for row in (
                Row(f"attention/{name}/kernel", f"attn.{name[0]}_proj_weight", "transpose"),
                Row(f"attention/{name}/bias", "attn.in_proj_bias", part=(k, 3)),
            )
        )
    return table(
        Row("queries", "query"),
        norm("query_norm", "ln_q"),
        norm("token_norm", "ln_k"),
        rows,
        linear("attention/out", "attn.out_proj"),
    )


def vision_transformer(config: ViTConfig) -> Table:
    """A VisionTransformer without its projection; names of ours below "image/", of theirs below "visual."."""
    return table(
        Row("patch_embed/kernel", "conv1.weight", "patches"),
        Row("cls", "class_embedding"),
        Row("positions", "positional_embedding"),
        norm("pre_norm", "ln_pre") if config.pre_norm else (),
        blocks(config),
        norm("norm", "ln_post"),
        attentional_pool(config).under("attentional_pool/", "attn_pool.") if config.attentional_pool else (),
    )


def _conv_norm(ours: tuple[str, str], theirs: tuple[str, str]) -> Table:
    """A convolution and its batch norm."""
    (conv, batch_norm), (their_conv, their_norm) = ours, theirs
    return table(
        Row(f"{conv}/kernel", f"{their_conv}.weight", "convolution"),
        norm(batch_norm, their_norm),
        Row(f"{batch_norm}/running_mean", f"{their_norm}.running_mean"),
        Row(f"{batch_norm}/running_var", f"{their_norm}.running_var"),
        Constant(f"{their_norm}.num_batches_tracked", 0),
    )


def modified_resnet(config: ResNetConfig) -> Table:
    """A ModifiedResNet with its projection; names of ours below the model, of theirs below "visual."."""
    rows = table(
        *(_conv_norm((f"stem/conv_{i}", f"stem/norm_{i}"), (f"conv{i + 1}", f"bn{i + 1}")) for i in range(3))
    )
    for i, depth in enumerate(config.sizes[1]):
        for j in range(depth):
            ours, theirs = f"stage_{i}_block_{j}/", f"layer{i + 1}.{j}."
            parts = [
                _conv_norm((f"{name}_conv", f"{name}_norm"), (f"conv{k}", f"bn{k}"))
                for k, name in enumerate(("reduce", "middle", "expand"), start=1)
            ]
            if j == 0:
                parts.append(_conv_norm(("shortcut_conv", "shortcut_norm"), ("downsample.0", "downsample.1")))
            rows += table(*parts).under(ours, theirs)
    pool = table(
        Row("positions", "positional_embedding"),
        *(linear(name, f"{name[0]}_proj") for name in ("query", "key", "value")),
    )
    return table(
        rows.under("image/"),
        pool.under("image/pool/", "attnpool."),
        linear("image_projection", "attnpool.c_proj"),
    )


def text_transformer(config: TextConfig) -> Table:
    """A TextTransformer without its projection; names of ours below "text/", of theirs below the tower."""
    return table(
        Row("token_embed", "token_embedding.weight"),
        Row("positions", "positional_embedding"),
        blocks(config),
        norm("norm", "ln_final"),
    )


def vision_layers(config: ViTConfig | ResNetConfig, vision: Mapping[str, Any]) -> tuple[Layer, ...]:
    """What the proof compares in an image tower, from first to last."""
    if isinstance(config, ResNetConfig):
        stages = [
            Layer(f"image/stage_{i}_block_{j}", f"visual.layer{i + 1}.{j}", "nchw")
            for i, depth in enumerate(config.sizes[1])
            for j in range(depth)
        ]
        return (Layer("image/stem/conv_2", "visual.conv3", "nchw"), *stages)
    layers = [Layer("image/patch_embed", "visual.conv1", "nchw")]
    if config.pre_norm:
        layers.append(Layer("image/pre_norm", "visual.ln_pre"))
    layers += [
        Layer(f"image/stack/block_{i}", f"visual.transformer.resblocks.{i}") for i in range(config.sizes[1])
    ]
    if not vision.get("final_ln_after_pool") or config.attentional_pool is not None:
        layers.append(Layer("image/norm", "visual.ln_post"))
    if config.attentional_pool is not None:
        layers.append(Layer("image/attentional_pool", "visual.attn_pool"))
    return tuple(layers)


def text_layers(config: TextConfig, prefix: str = "") -> tuple[Layer, ...]:
    """What the proof compares in a text tower whose names begin with `prefix`."""
    return (
        *(Layer(f"text/stack/block_{i}", f"{prefix}transformer.resblocks.{i}") for i in range(config.depth)),
        Layer("text/norm", f"{prefix}ln_final"),
    )


def read_vision(
    vision: Mapping[str, Any], *, embed_dim: int, quick_gelu: bool, where: str
) -> ViTConfig | ResNetConfig:
    """Our config of a vision_cfg without a timm model; raises ConversionError naming the option that we lack."""
    layers = vision.get("layers", 12)
    if isinstance(layers, list | tuple):
        return _read_resnet(vision, tuple(layers), where=where)
    known_options(vision, VIT_OPTIONS | TIMM_OPTIONS, where=where)
    expect(
        vision,
        {
            "attentional_pool": (False, True, None),
            "pos_embed_type": ("learnable",),
            "pool_type": ("tok", "avg"),
            "output_tokens": (False,),
            **_BLOCK_OPTIONS,
        },
        where=where,
    )
    patch = vision.get("patch_size", 16)
    if patch is None:
        raise ConversionError(f"{where}: patch_size=None, which only a ResNet can have (layers: a list)")
    rows, columns = patch if isinstance(patch, list | tuple) else (patch, patch)
    if rows != columns:
        raise ConversionError(f"{where}: patch_size={patch!r} is not square, which bvl does not reproduce")
    width = vision.get("width", 768)
    mean = vision.get("pool_type", "tok") == "avg"
    pool = None
    if vision.get("attentional_pool"):
        pool = checked(
            AttentionalPool,
            where=where,
            width=embed_dim,
            queries=vision.get("attn_pooler_queries", 256),
            num_heads=vision.get("attn_pooler_heads", 8),
        )
    return checked(
        ViTConfig,
        where=where,
        **vit_sizes(
            width, layers, width // vision.get("head_width", 64), int(width * vision.get("mlp_ratio", 4.0)), rows
        ),
        pool="mean" if mean else "cls",
        class_token=True if mean else None,
        # With a pooler open_clip does not read the option.
        norm_after_pool=mean and bool(vision.get("final_ln_after_pool")) and pool is None,
        attentional_pool=pool,
        patch_bias=False,
        whole_patches=not any(side % rows for side in image_size(vision)),
        pre_norm=not vision.get("no_ln_pre", False),
        patch_dropout=vision.get("patch_dropout") or 0.0,
        **_block_config(vision, quick_gelu=quick_gelu, where=where),
    )  # fmt: skip


def _read_resnet(vision: Mapping[str, Any], layers: tuple[int, ...], *, where: str) -> ResNetConfig:
    known_options(vision, _RESNET_OPTIONS | TIMM_OPTIONS, where=where)
    width = vision.get("width", 768)
    height, side = image_size(vision)
    if height != side:
        raise ConversionError(
            f"{where}: image_size={vision['image_size']!r}: open_clip's ResNets take squares"
        )
    names = [n for n, v in RESNETS.items() if v.clip and (v.width, v.stages) == (width, layers)]
    sizes = {} if names else {"width": width, "stages": layers}
    heads = width * 32 // vision.get("head_width", 64)
    config = checked(ResNetConfig, where=where, variant=(names or ["RN50"])[0], pool_heads=heads, **sizes)
    usual = checked(ResNetConfig, where=where, variant=config.variant, **sizes)
    return usual if usual.num_heads == heads else config


def read_text(text: Mapping[str, Any], *, quick_gelu: bool, where: str) -> TextConfig:
    """Our config of a text_cfg without a model of transformers; raises ConversionError naming the option that we lack."""
    known_options(text, _TEXT_OPTIONS | HF_OPTIONS, where=where)
    # Where one token is read, it is the same whether the norm comes before or after (final_ln_after_pool).
    expect(
        text,
        {
            "embed_cls": (False,),
            "pool_type": tuple(TEXT_POOLS),
            "proj_type": ("linear", "none"),
            "output_tokens": (False,),
            **_BLOCK_OPTIONS,
        },
        where=where,
    )
    width, causal = text.get("width", 512), not text.get("no_causal_mask", False)
    pool = TEXT_POOLS[text.get("pool_type", "argmax")]
    return checked(
        TextConfig,
        where=where,
        width=width,
        depth=text.get("layers", 12),
        num_heads=text.get("heads", 8),
        mlp_hidden=int(width * text.get("mlp_ratio", 4.0)),
        causal=causal,
        pool=pool,
        # Under a causal mask nobody sees padding; without one open_clip hides none.
        attend_padding=not causal or pool == "last",
        **_block_config(text, quick_gelu=quick_gelu, where=where),
    )


def _block_config(cfg: Mapping[str, Any], *, quick_gelu: bool, where: str) -> dict[str, Any]:
    epsilon = dict(cfg.get("norm_kwargs") or {})
    out = {
        "activation": _activation(cfg.get("act_kwargs"), quick_gelu=quick_gelu, where=where),
        "norm_epsilon": epsilon.pop("eps", 1e-5),
        "layer_scale": cfg.get("ls_init_value"),
        "qk_norm": bool(cfg.get("qk_norm", False)),
    }
    if epsilon:
        raise ConversionError(f"{where}: norm_kwargs={cfg['norm_kwargs']!r}: bvl reproduces eps alone")
    return out


def _activation(options: Mapping[str, Any] | None, *, quick_gelu: bool, where: str) -> Activation:
    if quick_gelu and not options:
        return "quick_gelu"
    known = {"none": "gelu", "tanh": "gelu_tanh"}
    approximate = (options or {}).get("approximate", "none")
    if quick_gelu or set(options or {}) - {"approximate"} or approximate not in known:
        name = "quick_gelu" if quick_gelu else "gelu"
        raise ConversionError(f"{where}: act_kwargs={dict(options)!r} of {name} is not reproduced by bvl")
    return known[approximate]


def image_size(vision: Mapping[str, Any]) -> tuple[int, int]:
    """(height, width) of a vision_cfg."""
    size = vision.get("image_size", 224)
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def vit_sizes(width: int, depth: int, num_heads: int, mlp_hidden: int, patch: int) -> dict[str, Any]:
    """The options of ViTConfig for these sizes: a name alone where they have one."""
    for name, row in VITS.items():
        if row == (width, depth, num_heads, mlp_hidden):
            return {"variant": f"{name}/{patch}"}
    sizes = {"width": width, "depth": depth, "num_heads": num_heads, "mlp_hidden": mlp_hidden}
    return {"variant": f"B/{patch}", **sizes}


def mlp_ratio(width: int, hidden: int) -> float:
    """The ratio of which open_clip and timm, who round int(width * ratio) down, make `hidden`."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def known_options(cfg: Mapping[str, Any], known: set[str], *, where: str) -> None:
    """Raise ConversionError for an option that is not known, unless it is off or empty."""
    for name, value in cfg.items():
        if name not in known and value not in (None, False):
            raise ConversionError(f"{where}: the option {name}={value!r} is not known to bvl")


def checked(make: type, *, where: str, **options: Any) -> Any:
    """make(**options); what a config of ours refuses is a ConversionError."""
    try:
        return make(**options)
    except (ConfigError, TypeError) as error:
        raise ConversionError(f"{where}: {error}") from error
