"""Vision transformers of timm as open_clip's image towers: what their names mean, and their table."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from bvl.convert.families import Layer, expect
from bvl.convert.open_clip_towers import (
    TIMM_OPTIONS,
    VIT_OPTIONS,
    checked,
    image_size,
    known_options,
    vit_sizes,
)
from bvl.convert.peers import import_peer
from bvl.convert.table import Row, Table, linear, norm, packed, table
from bvl.errors import ConversionError
from bvl.models.vit import ViTConfig
from bvl.models.vlm import DualEncoderConfig

Size = tuple[int, int]

# The word for the size in a name -> (width, depth, num_heads, mlp_hidden). Heads cannot be told from tensors: from
# "huge" on they are wider than 64 channels, which is why a name that is not listed needs timm itself.
_SIZES = {
    "xsmall": (256, 10, 4, 1024),
    "tiny": (192, 12, 3, 768),
    "small": (384, 12, 6, 1536),
    "medium": (512, 12, 8, 2048),
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
    "huge": (1280, 32, 16, 5120),
    "giant": (1408, 40, 16, 6144),
    "gigantic": (1664, 48, 16, 8192),
    "so400m": (1152, 27, 16, 4304),
    "giantopt": (1536, 40, 16, 6144),
}
_CLIP: dict[str, Any] = {"pool": "cls", "patch_bias": False, "pre_norm": True, "norm_epsilon": 1e-5}
# What stands between patch size and image size in a name -> the options that it means.
_KINDS: dict[str, dict[str, Any]] = {
    "": {"pool": "cls", "norm_epsilon": 1e-6},
    "clip_": _CLIP,
    "clip_quickgelu_": _CLIP | {"activation": "quick_gelu"},
    "siglip_": {"pool": "map", "norm_epsilon": 1e-6},
    "siglip_gap_": {"pool": "mean", "norm_epsilon": 1e-6},
}
# Size and patch size -> image sizes, for each kind.
_PLAIN_SIZES = """tiny 16 224 384; small 8 224; small 16 224 384; small 32 224 384; base 8 224; base 16 224 384;
    base 32 224 384; large 14 224; large 16 224 384; large 32 224 384; huge 14 224; giant 14 224; gigantic 14 224"""
_CLIP_SIZES = """xsmall 16 224; medium 16 224; medium 32 224; base 16 224 384; base 32 224 256 384 448; large 14 224 336;
    huge 14 224 336 378; giant 14 224; gigantic 14 224 378"""
_QUICK_SIZES = "base 16 224; base 32 224; large 14 224 336; huge 14 224 378; gigantic 14 224"
_SIGLIP_SIZES = """base 16 224 256 384 512; base 32 256; large 16 256 384 512; so400m 14 224 378 384;
    so400m 16 256 384 512; giantopt 16 256 384"""
_GAP_SIZES = _SIGLIP_SIZES + "; so400m 14 448 896"
# Models of SigLIP 2 that had no predecessor compute GELU by the tanh formula.
_TANH = re.compile(
    r"vit_(base_patch32_siglip_(gap_)?256|large_patch16_siglip_(gap_)?512|(so400m|giantopt)_patch16_siglip_.*)"
)
_DINO: dict[str, Any] = {"pool": "cls", "norm_epsilon": 1e-6, "layer_scale": 1e-5}
_REGISTERS: dict[str, Any] = {"registers": 4, "prefix_positions": "none"}
_TEST: dict[str, Any] = {"norm_epsilon": 1e-6, "registers": 1, "prefix_positions": "all", "layer_scale": 1e-5}
# Names that follow no rule -> sizes, patch size, image size, options. The small ones are those that timm tests itself with.
_OTHERS: dict[str, tuple[tuple[int, int, int, int], int, int, dict[str, Any]]] = {
    "test_vit": ((64, 6, 2, 192), 16, 160, {"pool": "cls", "norm_epsilon": 1e-6}),
    "test_vit2": ((64, 8, 2, 192), 16, 160, _TEST | {"pool": "mean", "norm_after_pool": True}),
    "test_vit3": ((96, 9, 3, 192), 16, 160, _TEST | {"pool": "map", "pool_prefix": True}),
    **{f"vit_{word}_patch14_dinov2": (_SIZES[word], 14, 518, _DINO) for word in ("small", "base", "large")},
    **{
        f"vit_{word}_patch14_reg4_dinov2": (_SIZES[word], 14, 518, _DINO | _REGISTERS)
        for word in ("small", "base", "large")
    },
}
_DYNAMIC = ("test_vit", "test_vit2")
# timm's global_pool -> ours.
_POOLS = {"token": "cls", "avg": "mean", "map": "map"}
_GELUS = {"GELU": "gelu", "GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu"}


@dataclasses.dataclass(frozen=True)
class Trunk:
    """A network and its image size as timm makes it without further options; dynamic: it reads other sizes too."""

    config: ViTConfig
    size: Size
    dynamic: bool = False


def _trunks() -> dict[str, Trunk]:
    out = {}
    listed = zip(_KINDS, (_PLAIN_SIZES, _CLIP_SIZES, _QUICK_SIZES, _SIGLIP_SIZES, _GAP_SIZES), strict=True)
    for kind, sizes in listed:
        for entry in sizes.split(";"):
            word, patch, *sides = entry.split()
            for side in sides:
                name = f"vit_{word}_patch{patch}_{kind}{side}"
                options = _KINDS[kind] | ({"activation": "gelu_tanh"} if _TANH.fullmatch(name) else {})
                whole = int(side) % int(patch) == 0
                config = ViTConfig(**vit_sizes(*_SIZES[word], int(patch)), whole_patches=whole, **options)
                out[name] = Trunk(config, (int(side), int(side)))
    for name, (sizes, patch, side, options) in _OTHERS.items():
        config = ViTConfig(**vit_sizes(*sizes, patch), **options)
        out[name] = Trunk(config, (side, side), name in _DYNAMIC)
    return out


TRUNKS = _trunks()


def read_vision(vision: Mapping[str, Any], *, where: str) -> tuple[ViTConfig, str, Size]:
    """(our image tower, its projection, its image size) of a vision_cfg that names a timm model.

    Raises ConversionError for a model that is no plain vision transformer, and for options that we lack.
    """
    # Options of open_clip's own ViT may stand there and mean nothing.
    known_options(vision, VIT_OPTIONS | TIMM_OPTIONS, where=where)
    expect(
        vision,
        {"timm_proj": ("linear", "none", "", None), "timm_drop": (0.0, 0), "timm_pool": ("avg", "token", "map", "")},
        where=where,
    )  # fmt: skip
    name = str(vision["timm_model_name"]).partition(".")[0]
    pool, headed = vision.get("timm_pool", "avg"), vision.get("timm_proj", "linear") == "linear"
    trunk = _listed(name, pool, headed=headed) or _built(name, vision, where=where)
    config, size, wanted = trunk.config, trunk.size, image_size(vision)
    if wanted != size and trunk.dynamic:
        config, size = dataclasses.replace(config, position_size=size), wanted
    if wanted != size:
        raise ConversionError(
            f"{where}: image_size={vision.get('image_size', 224)!r}, but {name} reads {size[0]} x {size[1]} pixels "
            "and open_clip does not tell it otherwise"
        )
    config = dataclasses.replace(
        config,
        patch_dropout=vision.get("patch_dropout") or 0.0,
        drop_path=vision.get("timm_drop_path") or 0.0,
    )
    if headed:
        projection = "linear_bias" if vision.get("timm_proj_bias") else "linear"
    else:
        projection = "none" if vision["timm_proj"] == "none" else "linear_bias"
    return config, projection, size


def _listed(name: str, pool: str, *, headed: bool) -> Trunk | None:
    """A trunk by its name alone; None where timm itself must say."""
    if name not in TRUNKS:
        return None
    trunk = TRUNKS[name]
    if _POOLS.get(pool) == trunk.config.pool or (headed and not pool):
        return trunk
    if headed and pool == "avg" and trunk.config.pool == "cls":
        # The pooling is changed after the trunk is made: its norm stays in front of it, and its class token too.
        return dataclasses.replace(
            trunk, config=dataclasses.replace(trunk.config, pool="mean", class_token=True)
        )
    return None


def _built(name: str, vision: Mapping[str, Any], *, where: str) -> Trunk:
    """A trunk as timm makes it, without memory for its tensors."""
    timm = import_peer("timm", what=f"{where}: timm_model_name={name!r} is not listed in bvl, so reading it")
    torch = import_peer("torch", what="timm")
    pool, proj = vision.get("timm_pool", "avg"), vision.get("timm_proj", "linear")
    try:
        with torch.device("meta"):
            if proj == "linear":
                trunk = timm.create_model(name)
                trunk.reset_classifier(0, **({"global_pool": pool} if pool else {}))
            else:
                trunk = timm.create_model(name, num_classes=0, global_pool=pool)
    except Exception as error:  # an unknown name, or options that this model does not take
        raise ConversionError(f"{where}: timm_model_name={name!r} cannot be made: {error}") from error
    return _read_trunk(trunk, where=f"{where}: timm_model_name={name!r}")


def _read_trunk(trunk: Any, *, where: str) -> Trunk:
    """Our config of a timm VisionTransformer; raises ConversionError naming what bvl's has not."""

    def require(what: str, found: Any, *known: Any) -> None:
        if found not in known:
            raise ConversionError(f"{where}: {what} is {found}, which bvl does not reproduce")

    def kind(module: Any) -> str:
        return type(module).__name__

    require("the class", kind(trunk), "VisionTransformer")
    block = trunk.blocks[0]
    require("the block", kind(block), "Block")
    require("the attention", kind(block.attn), "Attention")
    require("the norm of queries", kind(block.attn.q_norm), "Identity", "LayerNorm")
    require("the norm in the attention", kind(getattr(block.attn, "norm", None)), "Identity", "NoneType")
    require("the MLP", kind(block.mlp), "Mlp")
    require("the norm in the MLP", kind(block.mlp.norm), "Identity")
    require("the norm", kind(block.norm1), "LayerNorm")
    require("the activation", kind(block.mlp.act), *_GELUS)
    tanh = getattr(block.mlp.act, "approximate", "none") == "tanh"
    require("the patch embedding", kind(trunk.patch_embed), "PatchEmbed")
    require("its norm", kind(trunk.patch_embed.norm), "Identity")
    require("global_pool", trunk.global_pool, *_POOLS)
    pool, norms = _POOLS[trunk.global_pool], (kind(trunk.norm), kind(trunk.fc_norm))
    after = [("Identity", "LayerNorm")] if pool == "mean" else []
    require("(norm, fc_norm)", norms, ("LayerNorm", "Identity"), *after)
    require("pos_embed", "none" if trunk.pos_embed is None else "learn", "learn")
    epsilons = {module.eps for module in trunk.modules() if kind(module) == "LayerNorm"}
    require("the number of different norm epsilons", len(epsilons), 1)
    size, patch = trunk.patch_embed.img_size, trunk.patch_embed.patch_size
    require("patch_size", patch, (patch[0], patch[0]))
    prefix = "none" if trunk.no_embed_class else "all" if trunk.num_reg_tokens else "class"
    config = checked(
        ViTConfig,
        where=where,
        **vit_sizes(
            trunk.embed_dim, len(trunk.blocks), block.attn.num_heads, block.mlp.fc1.out_features, patch[0]
        ),
        pool=pool,
        class_token=True if trunk.has_class_token and pool != "cls" else None,
        prefix_positions=prefix,
        pool_prefix=bool(trunk.pool_include_prefix) and pool != "cls",
        norm_after_pool=norms[0] == "Identity",
        registers=trunk.num_reg_tokens,
        patch_bias=trunk.patch_embed.proj.bias is not None,
        pre_norm=kind(trunk.norm_pre) == "LayerNorm",
        qk_norm=kind(block.attn.q_norm) == "LayerNorm",
        qkv_bias=block.attn.qkv.bias is not None,
        layer_scale=getattr(block.ls1, "init_values", 1e-5) if kind(block.ls1) == "LayerScale" else None,
        activation="gelu_tanh" if tanh else _GELUS[kind(block.mlp.act)],
        norm_epsilon=epsilons.pop(),
        whole_patches=not any(side % patch[0] for side in size),
    )
    return Trunk(config, (int(size[0]), int(size[1])), bool(trunk.dynamic_img_size))


def vision_table(model: DualEncoderConfig, vision: Mapping[str, Any]) -> Table:
    """The image tower and its projection; names of ours below the model."""
    config = model.image
    rows = table(
        Row("patch_embed/kernel", "patch_embed.proj.weight", "patches"),
        Row("patch_embed/bias", "patch_embed.proj.bias") if config.patch_bias else (),
        Row("cls", "cls_token", leading=2) if config.has_class_token else (),
        Row("registers", "reg_token", leading=1) if config.registers else (),
        Row("positions", "pos_embed", leading=1),
        norm("pre_norm", "norm_pre") if config.pre_norm else (),
        _block(config).under("stack/block_{i}/", "blocks.{i}.").repeat(config.sizes[1]),
        norm("norm", "fc_norm" if config.norm_after_pool else "norm"),
        _attention_pool() if config.pool == "map" else (),
    )
    head: tuple[Row, ...] = ()
    if vision.get("timm_proj", "linear") == "linear":
        head = linear("image_projection", "visual.head.proj", bias=model.image_projection == "linear_bias")
    elif model.image_projection == "linear_bias":
        head = linear("image_projection", "visual.trunk.head")
    return table(rows.under("image/", "visual.trunk."), head)


def _block(config: ViTConfig) -> Table:
    biased = "attn.qkv.bias" if config.qkv_bias else None
    return table(
        norm("attention_norm", "norm1"),
        packed("attention", ("query", "key", "value"), "attn.qkv.weight", biased),
        (norm("attention/query_norm", "attn.q_norm") + norm("attention/key_norm", "attn.k_norm"))
        if config.qk_norm
        else (),
        linear("attention/out", "attn.proj"),
        norm("mlp_norm", "norm2"),
        linear("mlp/up", "mlp.fc1"),
        linear("mlp/down", "mlp.fc2"),
        (Row("attention_scale/scale", "ls1.gamma"), Row("mlp_scale/scale", "ls2.gamma"))
        if config.layer_scale is not None
        else (),
    )


def _attention_pool() -> Table:
    rows = table(
        Row("probe", "latent"),
        linear("attention/query", "q"),
        packed("attention", ("key", "value"), "kv.weight", "kv.bias"),
        linear("attention/out", "proj"),
        norm("mlp_norm", "norm"),
        linear("mlp/up", "mlp.fc1"),
        linear("mlp/down", "mlp.fc2"),
    )
    return rows.under("pool/", "attn_pool.")


def layers(config: ViTConfig) -> tuple[Layer, ...]:
    """What the proof compares, from first to last."""
    trunk = "visual.trunk"
    found = [Layer("image/patch_embed", f"{trunk}.patch_embed")]
    if config.pre_norm:
        found.append(Layer("image/pre_norm", f"{trunk}.norm_pre"))
    found += [Layer(f"image/stack/block_{i}", f"{trunk}.blocks.{i}") for i in range(config.sizes[1])]
    if not config.norm_after_pool:
        found.append(Layer("image/norm", f"{trunk}.norm"))
    if config.pool == "map":
        found.append(Layer("image/pool", f"{trunk}.attn_pool"))
    return tuple(found)


def further_sizes(config: ViTConfig, vision: Mapping[str, Any]) -> tuple[Size, ...]:
    """Another image size that the trunk reads as it is; its positions are then resampled."""
    trunk = TRUNKS.get(str(vision["timm_model_name"]).partition(".")[0])
    rows, columns = image_size(vision)
    return ((rows + config.patch_size, columns),) if trunk is not None and trunk.dynamic else ()


def trunk_for(config: ViTConfig, size: Size, *, headed: bool) -> tuple[str, str] | str:
    """(timm's name, timm_pool) of a network at an image size; in words how the nearest one differs, where none is equal."""
    wanted = _network(config)
    nearest: list[str] | None = None
    for name in TRUNKS:
        for pool in _POOLS:
            listed = _listed(name, pool, headed=headed)
            if listed is None:
                continue
            theirs = _network(listed.config)
            differing = [
                f"model.image.{key} is {wanted[key]!r} and not {theirs[key]!r}"
                for key in wanted
                if wanted[key] != theirs[key]
            ]
            if listed.size != (config.position_size or size) or (listed.size != size and not listed.dynamic):
                differing.append(f"data.preprocess.image_size is {size} and not {listed.size}")
            if not differing:
                return name, pool
            if nearest is None or len(differing) < len(nearest) - 1:
                nearest = [f"of {name}", *differing]
    return f"{nearest[0]}, the nearest, {'; '.join(nearest[1:])}"


def _network(config: ViTConfig) -> dict[str, Any]:
    """What a trained network computes: sizes by number, options that only training reads left out."""
    out = dataclasses.asdict(config)
    for (
        key
    ) in "variant position_size position_resize patch_dropout dropout drop_path levels scan remat".split():
        del out[key]
    out |= dict(zip(("width", "depth", "num_heads", "mlp_hidden"), config.sizes, strict=True))
    return out | {
        "patch_size": config.patch_size,
        "class_token": config.has_class_token,
        "layer_scale": config.layer_scale is not None,
        "prefix_positions": config.num_prefix_positions,
        # Where the sides are whole patches it makes no difference; where not, only False is possible.
        "whole_patches": None,
    }
