"""bvl's dual encoders as open_clip's configs, and the files that stand beside them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bvl.assembly import embedding_rows
from bvl.config import Config
from bvl.convert import open_clip_hf, open_clip_timm
from bvl.convert.hf_bert import bert_wrong, foreign_bert
from bvl.convert.hf_common import modules_wrong, refuse, unlike
from bvl.convert.open_clip_towers import TEXT_POOLS, mlp_ratio
from bvl.convert.preprocess import to_open_clip
from bvl.convert.tokenizers import open_clip_entries, write_hf_tokenizer
from bvl.data.text import Tokenizer
from bvl.errors import ConversionError
from bvl.models.bert import BertConfig
from bvl.models.resnet import VARIANTS as RESNETS
from bvl.models.resnet import ResNetConfig
from bvl.models.text import TextConfig
from bvl.models.vit import ViTConfig
from bvl.models.vlm import DualEncoderConfig

# Options that any open_clip tower takes over, or that change nothing once a model is trained.
_FREE = "variant width depth num_heads mlp_hidden activation norm_epsilon layer_scale qk_norm dropout drop_path scan remat "
_FREE_VIT = (
    _FREE + "pre_norm patch_dropout levels whole_patches position_resize norm_after_pool attentional_pool"
)
_FREE_TEXT = _FREE + "causal token_std position_std"
_FREE_RESNET = _FREE + "stages pool_heads norm"
# Values of other options that open_clip's own towers have; the rest must be at its default.
_VIT = {"pool": ("cls", "mean"), "patch_bias": (False,), "class_token": (None, True)}
_RESNET = {"pool": (None, "attention")}
_TEXT = {"pool": tuple(TEXT_POOLS.values()), "attend_padding": (True, False)}

RELOCATE = (
    "python -c \"import json, os; p = 'open_clip_config.json'; c = json.load(open(p)); "
    "c['model_cfg']['text_cfg']['hf_model_name'] = os.getcwd(); json.dump(c, open(p, 'w'), indent=2)\""
)


def foreign(config: Config, tokenizer: Tokenizer, *, custom: bool) -> dict[str, Any]:
    """open_clip_config.json of a model of ours, as CustomTextCLIP (`custom`) or CLIP.

    Raises ConversionError naming the options that prevent it.
    """
    model = config.model
    wrong = [f"model.{name}=None" for name in ("image", "text") if getattr(model, name) is None]
    refuse("a dual encoder there", wrong + modules_wrong(model))
    preprocess = to_open_clip(config.data.preprocess)
    size = config.data.preprocess.height_width
    vision = write_vision(model, size, timm=custom)
    if isinstance(model.text, BertConfig):
        if not custom:
            raise ConversionError("model.text: a BERT is a text tower of CustomTextCLIP")
        text = _write_bert(model, config, tokenizer)
    else:
        text = write_text(model, config, tokenizer)
    cfg: dict[str, Any] = {
        "embed_dim": model.embed_dim,
        "vision_cfg": vision,
        "text_cfg": text,
        "init_logit_scale": math.log(1 / model.init_temperature),
    }
    if _quick_gelu(model, vision):
        cfg["quick_gelu"] = True
    if model.init_bias is not None:
        cfg["init_logit_bias"] = model.init_bias
    if custom:
        cfg["custom_text"] = True
    return {"model_cfg": cfg, "preprocess_cfg": preprocess}


def _quick_gelu(model: DualEncoderConfig, vision: Mapping[str, Any]) -> bool:
    """open_clip has one option for both of its own towers."""
    towers = {}
    if "timm_model_name" not in vision and isinstance(model.image, ViTConfig):
        towers["image"] = model.image.activation
    if isinstance(model.text, TextConfig):
        towers["text"] = model.text.activation
    quick = {name for name, activation in towers.items() if activation == "quick_gelu"}
    if quick and len(quick) < len(towers):
        named = ", ".join(f"model.{name}.activation={value!r}" for name, value in towers.items())
        raise ConversionError(f"{named}: quick_gelu is one option for both towers there")
    return bool(quick)


def write_vision(model: DualEncoderConfig, size: tuple[int, int], *, timm: bool) -> dict[str, Any]:
    """vision_cfg of an image tower and its projection; raises ConversionError naming what prevents it.

    timm: whether it may be a model of timm.
    """
    if isinstance(model.image, ResNetConfig):
        return _write_resnet(model, size)
    if not isinstance(model.image, ViTConfig):
        raise ConversionError(f"model.image: {type(model.image).__name__} has no counterpart there")
    own = unlike("model.image", model.image, free=_FREE_VIT, fixed=_VIT)
    if model.image.pool == "mean" and not model.image.has_class_token:
        own.append("model.image.pool='mean' without class_token")
    pool = model.image.attentional_pool
    if pool is not None and pool.width != model.embed_dim:
        own.append(f"model.image.attentional_pool of width {pool.width} for embed_dim={model.embed_dim}")
    if model.image_projection != "linear":
        own.append(f"model.image_projection={model.image_projection!r}")
    if not own:
        return _write_vit(model.image, size)
    reason = f"open_clip's own ViT has no {', '.join(own)}"
    if not timm:
        raise ConversionError(reason)
    return {**_trunk(model, size, reason), "image_size": _json_size(size)}


def _write_vit(image: ViTConfig, size: tuple[int, int]) -> dict[str, Any]:
    width, depth, num_heads, hidden = image.sizes
    pool = image.attentional_pool
    pooler: dict[str, Any] = {}
    if pool is not None:
        pooler = {
            "attentional_pool": True,
            "attn_pooler_queries": pool.queries,
            "attn_pooler_heads": pool.num_heads,
        }
    return {
        **pooler,
        "image_size": _json_size(size),
        "patch_size": image.patch_size,
        "width": width,
        "layers": depth,
        "head_width": width // num_heads,
        "mlp_ratio": mlp_ratio(width, hidden),
        "no_ln_pre": not image.pre_norm,
        "pool_type": "avg" if image.pool == "mean" else "tok",
        "final_ln_after_pool": image.norm_after_pool,
        "patch_dropout": image.patch_dropout,
        **_block_options(image),
    }


def _write_resnet(model: DualEncoderConfig, size: tuple[int, int]) -> dict[str, Any]:
    image = model.image
    wrong = unlike("model.image", image, free=_FREE_RESNET, fixed=_RESNET)
    if not RESNETS[image.variant].clip:
        wrong.append(f"model.image.variant={image.variant!r}")
    if model.image_projection != "linear_bias":
        wrong.append(f"model.image_projection={model.image_projection!r}")
    if size[0] != size[1]:
        wrong.append(f"data.preprocess.image_size={size}")
    width, stages = image.sizes
    refuse("open_clip's ModifiedResNet", wrong)
    return {
        "image_size": size[0],
        "layers": list(stages),
        "width": width,
        "head_width": width * 32 // image.num_heads,
    }


def _trunk(model: DualEncoderConfig, size: tuple[int, int], reason: str) -> dict[str, Any]:
    """vision_cfg of the timm model that is the same network at the same image size."""
    projections = {"linear": ("linear", False), "linear_bias": ("linear", True), "none": ("none", False)}
    if model.image_projection not in projections:
        raise ConversionError(f"{reason}; timm's trunks are followed by no {model.image_projection!r}")
    projection, bias = projections[model.image_projection]
    image = model.image
    found = open_clip_timm.trunk_for(image, size, headed=projection == "linear")
    if isinstance(found, str):
        raise ConversionError(f"{reason}, and no known timm model is this network: {found}")
    name, pool = found
    cfg: dict[str, Any] = {
        "timm_model_name": name,
        "timm_model_pretrained": False,
        "timm_pool": pool,
        "timm_proj": projection,
        "timm_proj_bias": bias,
    }
    if image.patch_dropout:
        cfg["patch_dropout"] = image.patch_dropout
    if image.drop_path:
        cfg["timm_drop_path"] = image.drop_path
    return cfg


def write_text(model: DualEncoderConfig, config: Config, tokenizer: Tokenizer) -> dict[str, Any]:
    """text_cfg of a text tower of our own and its projection; raises ConversionError naming what prevents it."""
    text = model.text
    wrong = unlike("model.text", text, free=_FREE_TEXT, fixed=_TEXT)
    if not text.causal and not text.attend_padding:
        wrong.append("model.text.attend_padding=False (texts hide no padding there)")
    if model.text_projection == "mlp":
        wrong.append("model.text_projection='mlp'")
    refuse("open_clip's own text tower", wrong)
    pools = {ours: theirs for theirs, ours in TEXT_POOLS.items()}
    cfg = {
        "vocab_size": embedding_rows(config, tokenizer),
        "width": text.width,
        "heads": text.num_heads,
        "layers": text.depth,
        "mlp_ratio": mlp_ratio(text.width, text.sizes[3]),
        "no_causal_mask": not text.causal,
        "pool_type": pools[text.pool],
        "proj_type": "none" if model.text_projection == "none" else "linear",
        "proj_bias": model.text_projection == "linear_bias",
        "pad_id": tokenizer.pad_id,
        **_block_options(text),
        **open_clip_entries(tokenizer),
    }
    if text.pool == "end":
        cfg["eos_id"] = tokenizer.end_id
    return cfg


def _write_bert(model: DualEncoderConfig, config: Config, tokenizer: Tokenizer) -> dict[str, Any]:
    """text_cfg of a BERT; `hf_model_name` is left to `placed`."""
    poolers = {ours: theirs for theirs, ours in open_clip_hf.POOLS.items() if theirs is not None}
    projections = {ours: theirs for theirs, ours in open_clip_hf.PROJECTIONS.items()}
    wrong = bert_wrong(model.text, *poolers)
    if model.text_projection not in projections:
        wrong.append(f"model.text_projection={model.text_projection!r}")
    refuse("open_clip's BERT tower", wrong)
    if tokenizer.pad_id in (tokenizer.start_id, tokenizer.end_id):
        raise ConversionError(
            "data.tokenizer.pad is the token that ends or begins texts too, which open_clip would hide as padding"
        )
    return {
        "hf_model_name": "",
        "hf_model_pretrained": False,
        "hf_pooler_type": poolers[model.text.pool],
        "hf_proj_type": projections[model.text_projection],
        "vocab_size": embedding_rows(config, tokenizer),
        **open_clip_entries(tokenizer),
    }


def bert_config(config: Config, tokenizer: Tokenizer) -> dict[str, Any]:
    """config.json of a BERT text tower."""
    rows = embedding_rows(config, tokenizer)
    return {
        "architectures": ["BertModel"],
        **foreign_bert(config.model.text, rows=rows, pad_id=tokenizer.pad_id),
    }


def placed(cfg: Mapping[str, Any], folder: Path, *, hub_id: str | None) -> dict[str, Any]:
    """The config with the folder's own path, or a public name, as the place where a BERT's config lies."""
    model_cfg = cfg["model_cfg"]
    text = model_cfg["text_cfg"]
    if "hf_model_name" not in text:
        if hub_id is not None:
            raise ConversionError(
                f"hub_id={hub_id!r}: the text tower is open_clip's own and names no other model"
            )
        return dict(cfg)
    # open_clip looks for it in the working directory or under an absolute path, not beside the weights.
    text = {**text, "hf_model_name": str(folder.absolute()) if hub_id is None else hub_id}
    return {**cfg, "model_cfg": {**model_cfg, "text_cfg": text}}


def write_files(folder: Path, cfg: Mapping[str, Any], config: Config, tokenizer: Tokenizer) -> None:
    """Tokenizer, and a BERT's config.json."""
    write_hf_tokenizer(folder, tokenizer)
    if "hf_model_name" in cfg["model_cfg"]["text_cfg"]:
        content = json.dumps(bert_config(config, tokenizer), indent=2)
        (folder / "config.json").write_text(content + "\n", encoding="utf-8")


def notes(cfg: Mapping[str, Any], folder: Path) -> tuple[str, ...]:
    """What to do after the folder is moved."""
    name = cfg["model_cfg"]["text_cfg"].get("hf_model_name")
    if name != str(folder.absolute()):
        return ()
    return (
        "open_clip finds the config of the BERT by an absolute path. After the folder has been moved or copied, run "
        f"this in it once:\n\n```sh\n{RELOCATE}\n```",
    )


def how_to_load(folder_name: str) -> str:
    """Lines of Python."""
    return (
        "import open_clip\n\n"
        f'model, _, preprocess = open_clip.create_model_and_transforms("local-dir:{folder_name}")\n'
        f'tokenizer = open_clip.get_tokenizer("local-dir:{folder_name}")'
    )


def _block_options(tower: ViTConfig | TextConfig) -> dict[str, Any]:
    out: dict[str, Any] = {"ls_init_value": tower.layer_scale, "norm_kwargs": {"eps": tower.norm_epsilon}}
    if tower.qk_norm:
        out["qk_norm"] = True
    if tower.activation == "gelu_tanh":
        out["act_kwargs"] = {"approximate": "tanh"}
    elif tower.activation not in ("gelu", "quick_gelu"):
        raise ConversionError(f"activation={tower.activation!r} is not open_clip's")
    return out


def _json_size(size: tuple[int, int]) -> int | list[int]:
    return size[0] if size[0] == size[1] else list(size)
