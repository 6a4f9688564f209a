"""Image transforms on the host: deterministic preprocessing and random augmentation of one example.

`apply` turns an image of any size into uint8 [H, W, 3] of the model's size and carries boxes and masks along.
Normalisation by mean and standard deviation happens on the device; here they are only kept with the preprocessing.

Rounding, the same as that of the transforms PyTorch models are trained with (where these differ, by option):

- `shortest_crop`: the image is resized to whole pixels, the tight side to the target's and the other to
  `int(target * long / short)`; then the centre is cut out at offset `round((resized - target) / 2)`.
- `squash`: the whole image is resized to the target size.
- `pad`: both sides are divided by the one smallest ratio at which they still fit and rounded; the image is placed at
  offset `(target - resized) // 2` on a canvas of the fill value.

Boxes and masks follow the rounded geometry, not the ideal one. Random crops have fractional borders, are cut and
resized in one call, and fill the target (with `pad` they keep their aspect ratio and are padded).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image

from bvl.data.erasing import erase
from bvl.data.geometry import AxisAlignedMap, Rectangle, clip_boxes, crop_map, flip_map, place_map
from bvl.data.integer_resize import resize_bicubic
from bvl.errors import ConfigError, DataError

# A box of which less than this fraction of the area is left after a crop no longer shows what its name says.
MINIMUM_VISIBLE = 0.25
# Random crops that do not fit are drawn again this often before the largest fitting centre crop is taken.
CROP_ATTEMPTS = 10

_RESAMPLING = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
}
_RESIZE_MODES = ("shortest_crop", "squash", "pad")


# Pixel statistics of OpenAI's CLIP, as `Preprocess` takes them; models that start from its weights keep them.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preprocess:
    """How an image of any size becomes the model's input; the content of `preprocess.json`.

    image_size: side of the square input in pixels, or (height, width).
    resize: "shortest_crop" (cut the centre), "squash" (ignore the aspect ratio), "pad" (keep everything).
    mean, std: per channel, of values in 0..1; applied on the device, not here.
    fill: grey value 0..255 of the padding.
    resize_to: what the resize aims at where the centre is cut out of something larger: the shortest side in pixels
      for "shortest_crop", or (height, width) to cover; None = image_size. Not for "pad".
    long_side, crop_offset: how the fractions of a pixel are rounded in the long side's length ("down" as torchvision
      does, "nearest" as open_clip does for inputs that are not square) and in the offset of the centre crop
      ("nearest", half to even, as torchvision does; "down" as transformers does).
    resampler: "torchvision" gives the pixels of its tensors: the width is resized first, and bicubic weights are
      rounded to 16 bits (`bvl.data.integer_resize`; several times slower). "pillow" leaves to Pillow whether rows or
      columns are resized first: from version 13 on it chooses the cheaper order, for one of three sizes another than
      before. Overshoot of sharp edges is clipped in between, so the order can show there.
    """

    image_size: int | tuple[int, int]
    resize: Literal["shortest_crop", "squash", "pad"] = "shortest_crop"
    interpolation: Literal["bicubic", "bilinear", "lanczos"] = "bicubic"
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    fill: int = 0
    resize_to: int | tuple[int, int] | None = None
    long_side: Literal["down", "nearest"] = "down"
    crop_offset: Literal["nearest", "down"] = "nearest"
    resampler: Literal["pillow", "torchvision"] = "pillow"

    def __post_init__(self):
        for name in ("image_size", "resize_to"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, value := tuple(value))
            if value is not None or name == "image_size":
                _check_sides(name, value)
        if self.resize_to is not None:
            if self.resize == "pad":
                raise ConfigError("resize_to: with resize='pad' nothing is cut off; leave it out.")
            small = any(r < s for r, s in zip(_pair(self.resize_to), self.height_width, strict=True))
            if small:
                raise ConfigError(
                    f"resize_to is {self.resize_to!r}; it cannot be smaller than image_size, which is cut out of it."
                )
        if self.resize not in _RESIZE_MODES:
            raise ConfigError(f"resize is {self.resize!r}; choose one of {', '.join(_RESIZE_MODES)}.")
        if self.interpolation not in _RESAMPLING:
            raise ConfigError(
                f"interpolation is {self.interpolation!r}; choose one of {', '.join(_RESAMPLING)}."
            )
        for name in ("mean", "std"):
            value = getattr(self, name)
            if not isinstance(value, (tuple, list)) or len(value) != 3 or not all(map(_is_number, value)):
                raise ConfigError(f"{name} is {value!r}; give three numbers, one a channel.")
            object.__setattr__(self, name, tuple(float(v) for v in value))
        if min(self.std) <= 0:
            raise ConfigError(f"std is {self.std!r}; every value must be above 0.")
        for name in ("long_side", "crop_offset"):
            if getattr(self, name) not in ("down", "nearest"):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; choose down or nearest.")
        if self.resampler not in ("pillow", "torchvision"):
            raise ConfigError(f"resampler is {self.resampler!r}; choose pillow or torchvision.")
        if not _is_int(self.fill) or not 0 <= self.fill <= 255:
            raise ConfigError(f"fill is {self.fill!r}; give a grey value from 0 to 255.")

    @property
    def height_width(self) -> tuple[int, int]:
        """The input size as (height, width) in pixels."""
        return _pair(self.image_size)

    def to_dict(self) -> dict[str, Any]:
        """The fields as values that JSON can hold."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocess:
        """The inverse of `to_dict`; raises ConfigError for an unknown or a missing key."""
        names = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - names)
        if unknown or "image_size" not in values:
            problem = f"unknown key(s) {', '.join(unknown)}" if unknown else "image_size is missing"
            raise ConfigError(f"preprocess: {problem}; the keys are {', '.join(sorted(names))}.")
        return cls(**values)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augment:
    """Random changes of a training image; the defaults change nothing.

    crop_scale: range of the random crop's share of the image area; (1, 1) keeps the evaluation geometry.
    crop_ratio: range of the crop's width / height, drawn evenly in its logarithm, relative to the model input's
      for `shortest_crop` (1 = undistorted) and to the whole image's for `squash` and `pad` (1 = like evaluation).
    flip_horizontal, flip_vertical: mirror with probability 1/2; horizontally only images of sources without laterality.
    brightness, contrast: b draws a factor from [1 - b, 1 + b]; contrast is about the mean grey value.
    erase: probability that a rectangle of the image is covered; boxes and masks stay as they are.
    erase_scale: range of its share of the image area; erase_fill: with noise, or the preprocessing's mean colour.
    """

    crop_scale: tuple[float, float] = (1.0, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip_horizontal: bool = False
    flip_vertical: bool = False
    brightness: float = 0.0
    contrast: float = 0.0
    erase: float = 0.0
    erase_scale: tuple[float, float] = (0.02, 0.33)
    erase_fill: Literal["noise", "mean"] = "noise"

    def __post_init__(self):
        for name, top in (("crop_scale", 1.0), ("crop_ratio", math.inf), ("erase_scale", 1.0)):
            value = getattr(self, name)
            if not isinstance(value, (tuple, list)) or len(value) != 2 or not all(map(_is_number, value)):
                raise ConfigError(f"{name} is {value!r}; give two numbers (low, high).")
            if not 0 < value[0] <= value[1] <= top:
                raise ConfigError(f"{name} is {value!r}; it needs 0 < low <= high <= {top:g}.")
            object.__setattr__(self, name, tuple(float(v) for v in value))
        for name in ("brightness", "contrast", "erase"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= value <= 1:
                raise ConfigError(f"{name} is {value!r}; give a number from 0 (off) to 1.")
        if self.erase_fill not in ("noise", "mean"):
            raise ConfigError(f"erase_fill is {self.erase_fill!r}; choose noise or mean.")
        for name in ("flip_horizontal", "flip_vertical"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; give True or False.")


@dataclasses.dataclass(frozen=True)
class Transformed:
    """One example after `apply`.

    boxes: fractions of the new image, clipped to `image_box`; where `box_valid` is False a box may have no area.
    box_valid: at least `MINIMUM_VISIBLE` of the box's area is still in view.
    mask: ids, sampled at pixel centres; 0 on the padding.
    image_box: the part of the new image that is not padding.
    to_original: maps fractions of the new image to fractions of the original.
    """

    image: UInt8[np.ndarray, "H W 3"]
    boxes: Float[np.ndarray, "n 4"] | None
    box_valid: Bool[np.ndarray, " n"] | None
    mask: Int[np.ndarray, "H W"] | None
    image_box: Float[np.ndarray, " 4"]
    to_original: AxisAlignedMap


def apply(
    image: UInt8[np.ndarray, "h w 3"] | Image.Image,
    *,
    preprocess: Preprocess,
    augment: Augment | None = None,
    rng: np.random.Generator | None = None,
    boxes: Float[np.ndarray, "n 4"] | None = None,
    mask: Int[np.ndarray, "h w"] | None = None,
    allow_horizontal_flip: bool = True,
) -> Transformed:
    """Brings one image to the model's size, with its boxes and mask; random only where `augment` is given.

    image: an array, or a PIL image of mode L or RGB (as `bvl.data.images.open_image` gives it), which saves a copy.
    boxes: fractions of the image.  mask: ids, for the same field of view (it may have another resolution).
    allow_horizontal_flip: False where left and right carry meaning, whatever `augment` says.
    Raises DataError if the mask's aspect ratio is not the image's.
    """
    if augment is not None and rng is None:
        raise ValueError("augment needs rng, a numpy.random.Generator seeded for this example")
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    height, width = preprocess.height_width

    if augment is not None and augment.crop_scale != (1.0, 1.0):
        crop = _random_crop(rng, augment, preprocess, picture.size)
    else:
        crop = None
    picture, placed, forward = _resize(picture, crop, preprocess)
    flips = (False, False)
    if augment is not None:
        picture = _jitter(picture, augment, rng)
        flips = _random_flips(rng, augment, allow_horizontal_flip)
    if picture.size != (width, height):
        canvas = Image.new(picture.mode, (width, height), (preprocess.fill,) * len(picture.getbands()))
        canvas.paste(picture, placed[:2])
        picture = canvas
    window: Rectangle = (placed[0] / width, placed[1] / height, placed[2] / width, placed[3] / height)
    if any(flips):
        horizontal, vertical = flips
        if horizontal:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if vertical:
            picture = picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
        flip = flip_map(horizontal=horizontal, vertical=vertical)
        forward = forward.then(flip)
        window = tuple(flip.boxes(np.array([window]))[0])

    box_valid = None
    if boxes is not None:
        boxes, box_valid = clip_boxes(forward.boxes(boxes), window, minimum_visible=MINIMUM_VISIBLE)
    to_original = forward.inverse()
    if mask is not None:
        mask = sample_mask(mask, to_original, window, (height, width), image)
    # Grey images stay single-channel up to here: a third of the work for the same values.
    pixels = np.array(picture if picture.mode == "RGB" else picture.convert("RGB"))
    if augment is not None and augment.erase and rng.random() < augment.erase:
        colour = preprocess.mean if augment.erase_fill == "mean" else None
        pixels = erase(pixels, scale=augment.erase_scale, colour=colour, within=window, rng=rng)
    return Transformed(
        image=pixels,
        boxes=boxes,
        box_valid=box_valid,
        mask=mask,
        image_box=np.asarray(window, np.float64),
        to_original=to_original,
    )


def boxes_to_original(boxes: Float[np.ndarray, "n 4"], transformed: Transformed) -> Float[np.ndarray, "n 4"]:
    """Boxes in fractions of the transformed image as fractions of the original, clipped to it."""
    return np.clip(transformed.to_original.boxes(boxes), 0.0, 1.0)


def _resize(
    picture: Image.Image, crop: Rectangle | None, preprocess: Preprocess
) -> tuple[Image.Image, tuple[int, int, int, int], AxisAlignedMap]:
    """Cuts and resizes: the picture, where it lies on the output (pixels), and the map original -> output."""
    height, width = preprocess.height_width
    source_width, source_height = picture.size
    x0, y0, x1, y1 = crop or (0.0, 0.0, float(source_width), float(source_height))
    view = crop_map((x0 / source_width, y0 / source_height, x1 / source_width, y1 / source_height))

    if preprocess.resize != "pad" and crop is None:
        resized = _size_before_crop(picture.size, preprocess)
        left, top = (
            _rounded((side - target) / 2, preprocess.crop_offset)
            for side, target in zip(resized, (width, height), strict=True)
        )
        picture = _resized(picture, resized, (0.0, 0.0, *map(float, picture.size)), preprocess)
        if resized != (width, height):
            picture = picture.crop((left, top, left + width, top + height))
        cut = (left / resized[0], top / resized[1], (left + width) / resized[0], (top + height) / resized[1])
        return picture, (0, 0, width, height), crop_map(cut)

    new_width, new_height = width, height
    if preprocess.resize == "pad":
        ratio = max((x1 - x0) / width, (y1 - y0) / height)
        new_width = max(1, min(width, round((x1 - x0) / ratio)))
        new_height = max(1, min(height, round((y1 - y0) / ratio)))
    picture = _resized(picture, (new_width, new_height), (x0, y0, x1, y1), preprocess)
    left, top = (width - new_width) // 2, (height - new_height) // 2
    placed = (left, top, left + new_width, top + new_height)
    target = (placed[0] / width, placed[1] / height, placed[2] / width, placed[3] / height)
    return picture, placed, view.then(place_map(target))


def _resized(
    picture: Image.Image, size: tuple[int, int], box: Rectangle, preprocess: Preprocess
) -> Image.Image:
    """The part of a picture in `box` (pixels), resized to `size` (width, height)."""
    if size == picture.size and box == (0.0, 0.0, *size):
        return picture
    resample = _RESAMPLING[preprocess.interpolation]
    if preprocess.resampler == "torchvision":
        if preprocess.interpolation == "bicubic" and box == (0.0, 0.0, *picture.size):
            return Image.fromarray(resize_bicubic(np.asarray(picture), size))
        x0, y0, x1, y1 = box
        picture = picture.resize((size[0], picture.size[1]), resample, box=(x0, 0, x1, picture.size[1]))
        box = (0.0, y0, float(size[0]), y1)
    return picture.resize(size, resample, box=box)


def _size_before_crop(size: tuple[int, int], preprocess: Preprocess) -> tuple[int, int]:
    """(width, height) that an image of `size` is resized to before the centre is cut out."""
    height, width = _pair(preprocess.image_size if preprocess.resize_to is None else preprocess.resize_to)
    if preprocess.resize == "squash":
        return width, height

    def long_side(short: int, source_long: int, source_short: int) -> int:
        # The order of operations of torchvision and of open_clip, which decides where the quotient is all but whole.
        if preprocess.long_side == "nearest":
            return round(source_long / (source_short / short))
        return int(short * source_long / source_short)

    if height * size[0] >= width * size[1]:
        return max(width, long_side(height, size[0], size[1])), height
    return width, max(height, long_side(width, size[1], size[0]))


def _rounded(value: float, how: str) -> int:
    return math.floor(value) if how == "down" else round(value)


def _random_crop(
    rng: np.random.Generator, augment: Augment, preprocess: Preprocess, size: tuple[int, int]
) -> Rectangle:
    """A random rectangle in pixels of the source, after Szegedy et al. 2015 (arXiv:1409.4842), section 6."""
    width, height = size
    target_height, target_width = preprocess.height_width
    base = target_width / target_height if preprocess.resize == "shortest_crop" else width / height
    low, high = (math.log(base * r) for r in augment.crop_ratio)
    for _ in range(CROP_ATTEMPTS):
        area = width * height * rng.uniform(*augment.crop_scale)
        ratio = math.exp(rng.uniform(low, high))
        crop_width, crop_height = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if crop_width <= width and crop_height <= height:
            x0, y0 = rng.uniform(0, width - crop_width), rng.uniform(0, height - crop_height)
            # The sums may pass the border by a rounding error, which the resize would refuse.
            return x0, y0, min(x0 + crop_width, width), min(y0 + crop_height, height)
    ratio = min(max(width / height, math.exp(low)), math.exp(high))
    crop_width, crop_height = min(width, height * ratio), min(height, width / ratio)
    x0, y0 = (width - crop_width) / 2, (height - crop_height) / 2
    return x0, y0, min(x0 + crop_width, width), min(y0 + crop_height, height)


def _random_flips(
    rng: np.random.Generator, augment: Augment, allow_horizontal_flip: bool
) -> tuple[bool, bool]:
    horizontal, vertical = rng.random(2) < 0.5
    return (
        bool(allow_horizontal_flip and augment.flip_horizontal and horizontal),
        bool(augment.flip_vertical and vertical),
    )


def _jitter(picture: Image.Image, augment: Augment, rng: np.random.Generator) -> Image.Image:
    """Scales grey values by a brightness factor, then stretches them about their mean by a contrast factor."""
    if not augment.brightness and not augment.contrast:
        return picture
    brightness, contrast = 1 + rng.uniform(-1, 1, 2) * (augment.brightness, augment.contrast)
    levels = np.arange(256.0) * brightness
    if augment.contrast:
        grey = picture if picture.mode == "L" else picture.convert("L")
        counts = np.asarray(grey.histogram(), np.float64)
        mean = float(counts @ np.minimum(levels, 255.0) / counts.sum())
        levels = mean + contrast * (np.minimum(levels, 255.0) - mean)
    table = np.clip(np.rint(levels), 0, 255).astype(np.uint8).tolist()
    return picture.point(table * len(picture.getbands()))


def sample_mask(
    mask: Int[np.ndarray, "h w"],
    to_original: AxisAlignedMap,
    window: Rectangle,
    height_width: tuple[int, int],
    image: np.ndarray | Image.Image,
) -> Int[np.ndarray, "H W"]:
    """Takes for each output pixel the id under its centre: nearest sampling through the one geometric map.

    window: the part of the output that shows the image; beyond it ids are 0. Raises DataError for a mask of another
    shape than the image's.
    """
    source_height, source_width = mask.shape
    image_width, image_height = image.size if isinstance(image, Image.Image) else image.shape[1::-1]
    # One pixel of rounding on each side is what a mask saved at another resolution may be off.
    if abs(source_width * image_height - source_height * image_width) > max(
        source_width + image_width, source_height + image_height
    ):
        raise DataError(
            f"the mask is {source_width}x{source_height} pixels (width x height) and its image {image_width}x"
            f"{image_height}: they must show the same field of view; save the mask at the image's size."
        )
    indices = []
    for axis, (count, source) in enumerate(
        ((height_width[1], source_width), (height_width[0], source_height))
    ):
        centres = (np.arange(count) + 0.5) / count
        inside = (centres > window[axis]) & (centres < window[axis + 2])
        position = (centres * to_original.scale[axis] + to_original.offset[axis]) * source
        indices.append((np.clip(np.floor(position).astype(np.int64), 0, source - 1), inside))
    (columns, column_inside), (rows, row_inside) = indices
    sampled = mask.take(rows, axis=0).take(columns, axis=1)
    if not (column_inside.all() and row_inside.all()):
        sampled = np.where(row_inside[:, None] & column_inside[None, :], sampled, 0)
    return sampled


def _pair(sides: int | tuple[int, int]) -> tuple[int, int]:
    return (sides, sides) if isinstance(sides, int) else sides


def _check_sides(name: str, value: Any) -> None:
    sides = _pair(value)
    if not isinstance(sides, tuple) or len(sides) != 2 or not all(_is_int(s) and s > 0 for s in sides):
        raise ConfigError(f"{name} is {value!r}; give a positive number of pixels or (height, width).")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
