"""Image preprocessing as open_clip's `preprocess_cfg` and transformers' image processors describe it, both ways.

What a foreign library cannot express is an error that names the option. Where it can, but rounds a pixel otherwise,
`differences` says so: the tensors of some image sizes are then not equal, and a card must tell.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from bvl.data.transforms import CLIP_MEAN, CLIP_STD, Preprocess
from bvl.errors import ConfigError, ConversionError

# What open_clip's `resize_mode` means here.
_OPEN_CLIP_MODES = {"shortest": "shortest_crop", "longest": "pad", "squash": "squash"}
# PIL's codes of the resampling filters.
_RESAMPLE = {1: "lanczos", 2: "bilinear", 3: "bicubic"}
_RESAMPLE_NAMES = {0: "nearest", 4: "box", 5: "hamming"}

_HALF = (0.5, 0.5, 0.5)


@dataclasses.dataclass(frozen=True)
class _Processor:
    """What an image processor of transformers does where its file says nothing."""

    size: int | dict[str, int]
    resample: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop: int | None = None
    # A size given as one number means a square, not the shortest edge.
    square: bool = True


_PROCESSORS = {
    "CLIPImageProcessor": _Processor({"shortest_edge": 224}, 3, CLIP_MEAN, CLIP_STD, 224, square=False),
    "BitImageProcessor": _Processor({"shortest_edge": 224}, 3, CLIP_MEAN, CLIP_STD, 224, square=False),
    "SiglipImageProcessor": _Processor(224, 3, _HALF, _HALF),
    "ViTImageProcessor": _Processor(224, 2, _HALF, _HALF),
    "DeiTImageProcessor": _Processor(256, 3, _HALF, _HALF, 224),
    "BlipImageProcessor": _Processor(384, 3, CLIP_MEAN, CLIP_STD),
}
# Keys that say how a processor is found or called and nothing about pixels.
_SILENT_KEYS = frozenset(
    "image_processor_type feature_extractor_type processor_class _valid_processor_keys auto_map data_format "
    "input_data_format return_tensors device disable_grouping default_to_square do_convert_rgb image_seq_length "
    "_commit_hash transformers_version".split()
)
_READ_KEYS = frozenset(
    "size resample image_mean image_std crop_size do_resize do_center_crop do_rescale do_normalize "
    "rescale_factor".split()
)


def from_open_clip(preprocess_cfg: Mapping[str, Any] | None, image_size: int | tuple[int, int]) -> Preprocess:
    """The preprocessing of open_clip's evaluation transform.

    preprocess_cfg: the entry of open_clip_config.json, None or incomplete where open_clip takes its defaults; keys
      that open_clip does not know are ignored there and here.
    image_size: of the model, which open_clip uses whatever the entry's `size` says.
    Raises ConversionError naming an option and its value.
    """
    try:
        return _from_open_clip(preprocess_cfg, image_size)
    except (TypeError, ValueError, AttributeError) as error:  # a text for a number, and the like
        raise ConversionError(f"preprocess_cfg has a value of another kind: {error}") from error


def _from_open_clip(
    preprocess_cfg: Mapping[str, Any] | None, image_size: int | tuple[int, int]
) -> Preprocess:
    given = {key: value for key, value in (preprocess_cfg or {}).items() if value is not None}
    resize_mode, interpolation = given.get("resize_mode", "shortest"), given.get("interpolation", "bicubic")
    if given.get("mode", "RGB") != "RGB":
        raise ConversionError(f"preprocess_cfg.mode={given['mode']!r}: only RGB is known")
    if resize_mode not in _OPEN_CLIP_MODES:
        raise ConversionError(
            f"preprocess_cfg.resize_mode={resize_mode!r}: known are {', '.join(_OPEN_CLIP_MODES)}"
        )
    if interpolation not in ("bicubic", "bilinear", "random"):
        raise ConversionError(
            f"preprocess_cfg.interpolation={interpolation!r}: known are bicubic, bilinear, random"
        )
    size = _one_size(image_size)
    oblong = resize_mode == "shortest" and not isinstance(size, int)
    # "random" is for training alone, and inputs that are not square are resized bicubically whatever is said.
    if interpolation == "random" or oblong:
        interpolation = "bicubic"
    return _checked(
        "preprocess_cfg",
        image_size=size,
        resize=_OPEN_CLIP_MODES[resize_mode],
        interpolation=interpolation,
        mean=_three(given.get("mean", CLIP_MEAN)),
        std=_three(given.get("std", CLIP_STD)),
        fill=given.get("fill_color", 0) if resize_mode == "longest" else 0,
        long_side="nearest" if oblong else "down",
    )


def to_open_clip(preprocess: Preprocess) -> dict[str, Any]:
    """The `preprocess_cfg` of open_clip_config.json; raises ConversionError naming what open_clip cannot do."""
    if preprocess.interpolation == "lanczos":
        raise _inexpressible("interpolation", preprocess, "open_clip resizes bicubic or bilinear")
    if _cuts_off_more(preprocess):
        raise _inexpressible("resize_to", preprocess, "open_clip resizes to image_size and no larger")
    size = _one_size(preprocess.image_size)
    if preprocess.resize == "shortest_crop" and not isinstance(size, int):
        if preprocess.interpolation != "bicubic":
            raise _inexpressible(
                "interpolation", preprocess, "open_clip resizes bicubically for inputs that are not square"
            )
    modes = {ours: theirs for theirs, ours in _OPEN_CLIP_MODES.items()}
    return {
        "size": size if isinstance(size, int) else list(size),
        "mode": "RGB",
        "mean": list(preprocess.mean),
        "std": list(preprocess.std),
        "interpolation": preprocess.interpolation,
        "resize_mode": modes[preprocess.resize],
        "fill_color": preprocess.fill if preprocess.resize == "pad" else 0,
    }


def read_hf(folder: Path) -> dict[str, Any] | None:
    """The image processor's part of preprocessor_config.json or processor_config.json; None where there is neither.

    Raises ConversionError for a file that is no JSON object.
    """
    for name, key in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        path = folder / name
        if not path.is_file():
            continue
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConversionError(f"{path} is no JSON: {error}") from error
        if not isinstance(config, dict):
            raise ConversionError(f"{path} holds no JSON object")
        # Newer files hold all processors of a model, each under its name.
        config = config.get("image_processor") if key or "image_processor" in config else config
        if config is not None:
            return config
    return None


def from_hf(config: Mapping[str, Any], *, default_class: str = "CLIPImageProcessor") -> Preprocess:
    """The preprocessing of a transformers image processor, in its default (torchvision) implementation.

    config: the content of preprocessor_config.json. default_class: the class where the file names none.
    Raises ConversionError naming an option and its value.
    """
    try:
        return _from_hf(config, default_class)
    except (TypeError, ValueError, AttributeError) as error:  # a text for a number, and the like
        raise ConversionError(f"preprocessor_config.json has a value of another kind: {error}") from error


def _from_hf(config: Mapping[str, Any], default_class: str) -> Preprocess:
    name = config.get("image_processor_type") or config.get("feature_extractor_type") or default_class
    name = name.removesuffix("Fast").removesuffix("Pil").replace("FeatureExtractor", "ImageProcessor")
    if name not in _PROCESSORS:
        raise ConversionError(f"image_processor_type={name!r}: known are {', '.join(_PROCESSORS)}")
    known = _PROCESSORS[name]
    for key, value in config.items():
        if key not in _SILENT_KEYS | _READ_KEYS and value not in (None, False):
            raise ConversionError(f"{name}: {key}={value!r} is not known here")

    def given(key: str, default: Any) -> Any:
        value = config.get(key)
        return default if value is None else value

    resample = given("resample", known.resample)
    if resample not in _RESAMPLE:
        raise ConversionError(
            f"{name}: resample={resample!r} ({_RESAMPLE_NAMES.get(resample, 'unknown')}); known are "
            + ", ".join(f"{code} ({word})" for code, word in _RESAMPLE.items())
        )
    crop = None
    if given("do_center_crop", known.crop is not None):
        crop = _height_width(name, "crop_size", given("crop_size", known.crop or 224))
    geometry = _geometry(name, given("size", known.size), crop, square=known.square)
    if not given("do_resize", True):
        raise ConversionError(f"{name}: do_resize=False; images keep their sizes, and a model here has one")
    mean, std = _statistics(name, given, known)
    return _checked(
        name,
        **geometry,
        interpolation=_RESAMPLE[resample],
        mean=mean,
        std=std,
        crop_offset="down",
        resampler="torchvision",
    )


def to_hf(preprocess: Preprocess, processor: str = "CLIPImageProcessor") -> dict[str, Any]:
    """The content of preprocessor_config.json for an image processor class of transformers.

    Raises ConversionError naming the option that no processor, or not this one, can express.
    """
    if preprocess.resize == "pad":
        raise _inexpressible(
            "resize", preprocess, "no stock image processor pads around the centre; export with --to torch"
        )
    if processor not in _PROCESSORS:
        raise ConversionError(f"image processor {processor}: known are {', '.join(_PROCESSORS)}")
    if preprocess.long_side != "down":
        raise _inexpressible("long_side", preprocess, "image processors of transformers round down")
    height, width = preprocess.height_width
    cover = preprocess.image_size if preprocess.resize_to is None else preprocess.resize_to
    cover = _one_size(cover)
    if preprocess.resize == "squash":
        size = dict(
            zip(("height", "width"), (cover, cover) if isinstance(cover, int) else cover, strict=True)
        )
    elif isinstance(cover, int):
        size = {"shortest_edge": cover}
    else:
        raise _inexpressible(
            "image_size" if preprocess.resize_to is None else "resize_to",
            preprocess,
            "image processors of transformers resize the shortest edge to one number of pixels before they crop; use "
            "resize='squash', or --to torch",
        )
    crops = preprocess.resize == "shortest_crop" or _cuts_off_more(preprocess)
    if crops and _PROCESSORS[processor].crop is None:
        raise ConversionError(
            f"data.preprocess.resize={preprocess.resize!r} crops, and {processor} does not; use CLIPImageProcessor"
        )
    codes = {word: code for code, word in _RESAMPLE.items()}
    out: dict[str, Any] = {
        "image_processor_type": processor,
        "do_convert_rgb": True,
        "do_resize": True,
        "size": size,
        "resample": codes[preprocess.interpolation],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
        "do_center_crop": crops,
    }
    if crops:
        out["crop_size"] = {"height": height, "width": width}
    return out


def as_written(preprocess: Preprocess, format: Literal["open_clip", "hf"]) -> Preprocess:
    """What the other library's transform does where it is given `preprocess`; equal to it but for `differences`.

    Raises ConversionError as `to_open_clip` and `to_hf` do.
    """
    if format == "open_clip":
        return from_open_clip(to_open_clip(preprocess), preprocess.image_size)
    return from_hf(to_hf(preprocess))


def differences(preprocess: Preprocess, format: Literal["open_clip", "hf"]) -> list[str]:
    """What the other library's transform rounds otherwise than `preprocess`, a sentence each; none = equal tensors."""
    out = []
    offset, resampler = ("nearest", "pillow") if format == "open_clip" else ("down", "torchvision")
    crops = preprocess.resize == "shortest_crop" or _cuts_off_more(preprocess)
    if crops and preprocess.crop_offset != offset:
        out.append(
            f"data.preprocess.crop_offset={preprocess.crop_offset!r}, and {format} rounds {offset!r}: of image sizes "
            f"whose resized side exceeds the crop by 3, 7, 11, ... pixels it sees a centre one pixel aside."
        )
    if format == "open_clip" and preprocess.resize == "shortest_crop":
        oblong = not isinstance(_one_size(preprocess.image_size), int)
        wanted = "nearest" if oblong else "down"
        if preprocess.long_side != wanted:
            out.append(
                f"data.preprocess.long_side={preprocess.long_side!r}, and open_clip rounds {wanted!r}: the long side "
                f"may be a pixel longer or shorter before the crop."
            )
    if preprocess.interpolation != "bilinear" and preprocess.resampler != resampler:
        out.append(
            f"data.preprocess.resampler={preprocess.resampler!r}, and {format} resizes as {resampler!r} does: single "
            f"pixels differ by a grey level or two, and by more at sharp edges where an image is squashed."
        )
    return out


def _statistics(name: str, given: Any, known: _Processor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of values in 0..1: pixels * factor become (value - mean) / std."""
    factor = float(given("rescale_factor", 1 / 255)) if given("do_rescale", True) else 1.0
    mean, std = (0.0,) * 3, (1.0,) * 3
    if given("do_normalize", True):
        mean, std = _three(given("image_mean", known.mean)), _three(given("image_std", known.std))
    unit = 255 * factor
    if unit == 1.0:
        return mean, std
    if unit <= 0:
        raise ConversionError(f"{name}: rescale_factor={factor}: must be above 0")
    return tuple(m / unit for m in mean), tuple(s / unit for s in std)


def _geometry(name: str, size: Any, crop: tuple[int, int] | None, *, square: bool) -> dict[str, Any]:
    """image_size, resize and resize_to of a processor's `size` and crop."""
    if isinstance(size, int):
        size = {"height": size, "width": size} if square else {"shortest_edge": size}
    keys = {key for key, value in size.items() if value is not None} if isinstance(size, Mapping) else set()
    if keys == {"shortest_edge"}:
        side = size["shortest_edge"]
        if crop is None:
            raise ConversionError(
                f"{name}: size={dict(size)!r} with do_center_crop=False; images keep their aspect ratios, and a model "
                f"here has one size"
            )
        resized, resize = (side, side), "shortest_crop"
    elif keys == {"height", "width"}:
        resized, resize = _height_width(name, "size", size), "squash"
    else:
        raise ConversionError(f"{name}: size={size!r}; known are shortest_edge, or height and width")
    crop = crop or resized
    if crop[0] > resized[0] or crop[1] > resized[1]:
        raise ConversionError(
            f"{name}: crop_size={crop[0]}x{crop[1]} is larger than size={size!r}, which would be padded"
        )
    # For the shortest edge of an oblong crop the square that is covered must be said.
    resize_to = None if crop == resized else _one_size(resized)
    return {"image_size": _one_size(crop), "resize": resize, "resize_to": resize_to}


def _height_width(name: str, key: str, value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    if isinstance(value, Mapping) and set(value) == {"height", "width"}:
        return value["height"], value["width"]
    raise ConversionError(f"{name}: {key}={value!r}; known are a number, or height and width")


def _three(value: Any) -> tuple[float, ...]:
    return (float(value),) * 3 if isinstance(value, int | float) else tuple(value)


def _one_size(size: int | tuple[int, int] | list[int]) -> int | tuple[int, int]:
    """A square as one number."""
    if isinstance(size, int):
        return size
    height, width = size
    return height if height == width else (height, width)


def _cuts_off_more(preprocess: Preprocess) -> bool:
    """Is the image resized to more than what the model sees?"""
    return preprocess.resize_to is not None and _one_size(preprocess.resize_to) != _one_size(
        preprocess.image_size
    )


def _inexpressible(option: str, preprocess: Preprocess, why: str) -> ConversionError:
    return ConversionError(f"data.preprocess.{option}={getattr(preprocess, option)!r}: {why}")


def _checked(where: str, **fields: Any) -> Preprocess:
    try:
        return Preprocess(**fields)
    except ConfigError as error:
        raise ConversionError(f"{where}: {error}") from error
