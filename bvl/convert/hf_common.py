"""What the families of transformers share: names of activations, sizes, scales, and how their peers are loaded."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bvl.convert.families import Source
from bvl.convert.peers import import_peer
from bvl.convert.preprocess import from_hf, read_hf, to_hf
from bvl.convert.table import Table, linear, norm, table
from bvl.convert.tensors import Tensors
from bvl.data.transforms import Preprocess
from bvl.errors import ConversionError
from bvl.models.layers import Activation
from bvl.models.vlm import DualEncoderConfig

# transformers' names of activations -> ours.
ACTIVATION_NAMES = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
FOREIGN_ACTIVATIONS: dict[str, str] = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
}
# CLIP is trained with its scale held at or below this.
CLIP_MAX_SCALE = 100.0
# Beyond any scale in use, and far from overflow.
NO_MAX_SCALE = 1e6

_CROPPING = ("CLIPImageProcessor", "BitImageProcessor")

Config = Mapping[str, Any]
HeightWidth = tuple[int, int]
# Regular expressions and what stands in place of what they find.
Rules = tuple[tuple[str, str], ...]


def is_class(source: Source, model_type: str, *names: str) -> bool:
    """Whether the folder holds one of these classes, or says no class but this model type."""
    classes = source.config.get("architectures")
    if not classes:
        return source.config.get("model_type") == model_type
    return bool(set(classes) & set(names))


def activation_of(name: str, *, where: str, option: str) -> str:
    """Our name of an activation of transformers; ConversionError for one that bvl has not."""
    if name not in ACTIVATION_NAMES:
        raise ConversionError(
            f"{where}: {option}={name!r} is not reproduced by bvl; known: {', '.join(ACTIVATION_NAMES)}"
        )
    return ACTIVATION_NAMES[name]


def activation(config: Config, default: str, *, where: str) -> Activation:
    """Our name of a foreign config's activation; raises ConversionError for one that bvl has not."""
    return activation_of(config.get("hidden_act", default), where=where, option="hidden_act")


def number(config: Config, key: str, default: Any, *, where: str) -> Any:
    """A number of a foreign config; raises ConversionError where it is none."""
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConversionError(f"{where}: {key}={value!r} is no number")
    return value


def integer(config: Config, key: str, default: int, *, where: str) -> int:
    """A whole number of a foreign config, at least 1; raises ConversionError where it is none."""
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConversionError(f"{where}: {key}={value!r} is no whole number of at least 1")
    return value


def side(config: Config, key: str, default: int, *, where: str) -> int:
    """A side in pixels that may be given as a pair of equal numbers."""
    value = config.get(key, default)
    sides = tuple(value) if isinstance(value, list | tuple) else (value, value)
    if len(sides) != 2 or sides[0] != sides[1] or not isinstance(sides[0], int):
        raise ConversionError(
            f"{where}: {key}={value!r} is not reproduced by bvl: it must be a square's side"
        )
    return sides[0]


def height_width(config: Config, key: str, default: int, *, where: str) -> HeightWidth:
    """A size in pixels that may be given as one number."""
    value = config.get(key, default)
    sides = tuple(value) if isinstance(value, list | tuple) else (value, value)
    if len(sides) != 2 or not all(isinstance(s, int) and s > 0 for s in sides):
        raise ConversionError(f"{where}: {key}={value!r} is no size in pixels")
    return sides


def max_scale(source: Source, tensors: Tensors, name: str = "logit_scale", *, known: float) -> float:
    """Where our model limits its scale: where the foreign model's training does, unless its scale lies above."""
    if name not in tensors.shapes:
        return known
    found = float(tensors.load(name).astype("float64").reshape(-1)[0])
    if not math.isfinite(found) or found > math.log(NO_MAX_SCALE):
        raise ConversionError(f"{source.folder}: {name}={found}: that is no scale of cosines")
    # float32 rounds the logarithm of 100 up or down.
    return known if found <= math.log(known) + 1e-6 else NO_MAX_SCALE


def read_preprocess(source: Source, image_size: HeightWidth, processor: str) -> Preprocess:
    """The folder's preprocessing; where it has no file of it, that of the class `processor` in the model's size.

    Raises ConversionError naming an option that bvl does not reproduce.
    """
    config = read_hf(source.folder)
    if config is None:
        height, width = image_size
        config = {"image_processor_type": processor, "size": {"height": height, "width": width}}
        if height == width and processor in _CROPPING:
            config |= {"size": {"shortest_edge": height}, "crop_size": {"height": height, "width": width}}
    return from_hf(config, default_class=processor)


def below(prefix: str, rules: Rules) -> Rules:
    """Rules of whole names as rules of what stands behind a prefix; the others as they are."""
    at = f"(?<=^{re.escape(prefix)})"
    return tuple((at + p.removeprefix("^") if p.startswith("^") else p, to) for p, to in rules)


def renamed(tensors: Tensors, rules: Rules) -> Tensors:
    """Tensors under the names after replacements, one after the other."""

    def rename(name: str) -> str:
        for pattern, to in rules:
            name = re.sub(pattern, to, name)
        return name

    return tensors.renamed(rename)


def block(theirs: Mapping[str, str], *, qkv_bias: bool = True) -> Table:
    """The rows of one layer. theirs: our module below the block ("attention/query") -> their module."""
    parts = []
    for ours, name in theirs.items():
        if ours.endswith("_norm"):
            parts.append(norm(f"stack/block_{{i}}/{ours}", name))
        else:
            has_bias = qkv_bias or ours not in ("attention/query", "attention/key", "attention/value")
            parts.append(linear(f"stack/block_{{i}}/{ours}", name, bias=has_bias))
    return table(*parts)


def load_peer(class_name: str, folder: Path, **options: Any) -> Any:
    """A folder as transformers loads it, in float32, for evaluation; ConversionError where it cannot."""
    transformers = import_peer("transformers", what="the proof")
    torch = import_peer("torch", what="the proof")
    try:
        peer = getattr(transformers, class_name).from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True, **options
        )
    except Exception as error:  # whatever transformers finds wrong with the folder
        raise ConversionError(f"transformers cannot load {folder} as {class_name}: {error}") from error
    return peer.eval()


def unit(x: Any) -> Any:
    """A torch tensor's rows at unit norm."""
    return x / x.norm(dim=-1, keepdim=True).clamp_min(1e-6)


def unlike(name: str, config: Any, *, free: str, fixed: Mapping[str, tuple[Any, ...]]) -> list[str]:
    """Which options of ours a foreign class has not. name: of the config in ours, "model.image".

    free: options, by spaces, that it can have with any value, or that matter in training alone. fixed: option -> the
    values it has; of any other option that is the default.
    """
    wrong = []
    for field in dataclasses.fields(config):
        known, value = fixed.get(field.name, (field.default,)), getattr(config, field.name)
        if field.name not in free.split() and value not in known:
            wrong.append(f"{name}.{field.name}={value!r} (there {' or '.join(map(repr, known))})")
    return wrong


def alone_wrong(model: DualEncoderConfig, tower: str) -> list[str]:
    """What prevents a class of one tower, "image" or "text", beside that tower's own options."""
    projection = f"{tower}_projection"
    wrong = modules_wrong(model)
    if getattr(model, projection) != "none":
        wrong.append(f"model.{projection}={getattr(model, projection)!r} (there 'none')")
    return wrong


def modules_wrong(model: DualEncoderConfig) -> list[str]:
    """Modules beside the towers, which no encoder of transformers has."""
    names = ("decoder", "region_encoder", "region_decoder")
    return [f"model.{name}" for name in names if getattr(model, name) is not None]


def refuse(class_name: str, wrong: list[str]) -> None:
    """Raise ConversionError naming what is `wrong`, if anything is."""
    if wrong:
        raise ConversionError(f"{class_name} has no {', '.join(wrong)}")


def reasons(*attempts: Callable[[], Any]) -> list[str]:
    """What ConversionErrors of these calls say."""
    found = []
    for attempt in attempts:
        try:
            attempt()
        except ConversionError as error:
            found.append(str(error))
    return found


def how_to_load(
    folder_name: str,
    class_name: str,
    *,
    options: str = "",
    tokenizer: str = "",
    processor: str = "",
    then: str = "",
) -> str:
    """Lines of Python that load an export with these options, read an image and a text, and use them."""
    named = sorted({name for name in (class_name, tokenizer, processor) if name})
    lines = [f"from transformers import {', '.join(named)}", ""]
    lines += [f'model = {class_name}.from_pretrained("{folder_name}"{options}).eval()']
    if processor:
        lines += [f'processor = {processor}.from_pretrained("{folder_name}")']
        lines += ['images = processor(images=[image], return_tensors="pt")']
    if tokenizer:
        lines += [f'tokenizer = {tokenizer}.from_pretrained("{folder_name}")']
        lines += ['texts = tokenizer([text], padding="max_length", truncation=True, return_tensors="pt")']
    return "\n".join([*lines, *([then] if then else [])])


def processor_class(preprocess: Preprocess, preferred: str) -> str:
    """The class of image processor that an export names: the tower's own where it does what is asked."""
    crops = preprocess.resize == "shortest_crop" or preprocess.resize_to is not None
    if crops:
        return preferred if preferred in _CROPPING else "CLIPImageProcessor"
    return "ViTImageProcessor" if preferred in _CROPPING else preferred


def write_processor(folder: Path, preprocess: Preprocess, preferred: str) -> None:
    """Write preprocessor_config.json; raises ConversionError naming what no image processor can do."""
    content = to_hf(preprocess, processor_class(preprocess, preferred))
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
