"""Images of any kind -> the model's input, and coordinates back to the original image.

Boxes [x0, y0, x1, y1] and points [x, y] are fractions of an image, x to the right and y down.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from bvl.convert.torch_format.source.errors import UserError

RESAMPLING = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
}
DEEP_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N", "F")
EXIF_ORIENTATION = 0x0112


def open_image(value: Any) -> Image.Image:
    """An upright 8-bit picture of mode RGB, or L where it is grey, from a path, bytes, a PIL image or an array.

    16-bit grey stays as it is where no value is above 255, else it is scaled by the full range (value / 257); arrays
    of floats are in 0..1; what is transparent is put on white. Raises UserError for what is no still picture.
    """
    if isinstance(value, np.ndarray):
        return picture_of_array(value)
    if isinstance(value, Image.Image):
        return upright(value)
    if not isinstance(value, str | Path | bytes):
        raise UserError(f"a {type(value).__name__} is no image; give a path, bytes, a PIL image or an array")
    name = f"image of {len(value)} bytes" if isinstance(value, bytes) else str(value)
    try:
        with Image.open(io.BytesIO(value) if isinstance(value, bytes) else value) as picture:
            return upright(picture)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError) as error:
        raise UserError(f"{name}: cannot be read as an image ({error})") from error


def upright(picture: Image.Image) -> Image.Image:
    """The picture in mode RGB or L, turned as its EXIF orientation says."""
    # MPO is a JPEG with a preview or a second view behind it: the first frame is the photograph.
    if getattr(picture, "is_animated", False) and picture.format != "MPO":
        raise UserError(f"animated image with {picture.n_frames} frames; save the frame you want as a still")
    picture.load()
    if picture.getexif().get(EXIF_ORIENTATION, 1) != 1:
        picture = ImageOps.exif_transpose(picture)
    if picture.mode in DEEP_MODES:
        return picture_of_array(np.asarray(picture))
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        layer = picture.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    if picture.mode in ("RGB", "L"):
        return picture
    return picture.convert("L" if picture.mode == "1" else "RGB")


def picture_of_array(array: np.ndarray) -> Image.Image:
    """A picture of an array [h, w], [h, w, 1], [h, w, 3] or [h, w, 4] (with alpha)."""
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or array.size == 0 or (array.ndim == 3 and array.shape[-1] not in (3, 4)):
        raise UserError(f"shape {array.shape} is no image; give [height, width] or [height, width, 3 or 4]")
    array = eight_bits(array)
    if array.ndim == 3 and array.shape[-1] == 4:
        return upright(Image.fromarray(array, "RGBA"))
    return Image.fromarray(array)


def eight_bits(array: np.ndarray) -> np.ndarray:
    """The values of an image array as uint8, by their type and range."""
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255
    floating = np.issubdtype(array.dtype, np.floating)
    if not floating and not np.issubdtype(array.dtype, np.integer):
        raise UserError(f"values of type {array.dtype} are no image; give uint8, uint16 or float in 0..1")
    low, high = array.min(), array.max()
    if floating:
        # Written so that NaN fails too.
        if not (low >= -1e-3 and high <= 1 + 1e-3):
            raise UserError(f"floating-point values from {low:g} to {high:g}; scale them to 0..1")
        return np.rint(np.clip(array, 0, 1) * 255).astype(np.uint8)
    if low < 0 or high > 65535:
        raise UserError(f"integer values from {low} to {high} fit neither 8 nor 16 bits; rescale them first")
    return array.astype(np.uint8) if high <= 255 else np.rint(array / 257.0).astype(np.uint8)


def resize_tensor(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A picture of mode RGB or L resized bicubically as torchvision resizes a tensor of bytes."""
    pixels = torch.from_numpy(np.array(picture))
    planes = pixels.reshape(*pixels.shape[:2], -1).permute(2, 0, 1)[None]
    planes = F.interpolate(planes, size[::-1], mode="bicubic", antialias=True)
    return Image.fromarray(planes[0].permute(1, 2, 0).reshape(size[1], size[0], *pixels.shape[2:]).numpy())


@dataclasses.dataclass(frozen=True)
class AxisMap:
    """new = scale * old + offset, separately in x and y, between fractions of two images."""

    scale: tuple[float, float]
    offset: tuple[float, float]

    def points(self, points: np.ndarray) -> np.ndarray:
        return np.asarray(points, np.float64).reshape(-1, 2) * self.scale + self.offset

    def boxes(self, boxes: np.ndarray) -> np.ndarray:
        corners = np.asarray(boxes, np.float64).reshape(-1, 4)
        return corners * (self.scale * 2) + (self.offset * 2)

    def inverse(self) -> AxisMap:
        (sx, sy), (tx, ty) = self.scale, self.offset
        return AxisMap((1.0 / sx, 1.0 / sy), (-tx / sx, -ty / sy))


@dataclasses.dataclass(frozen=True)
class Shown:
    """An image as the model sees it.

    pixels: uint8 [H, W, 3]. window: the part of it that is not padding. to_original: fractions of it to fractions of
    the original image, whose (height, width) is `original_size`.
    """

    pixels: np.ndarray
    window: tuple[float, float, float, float]
    to_original: AxisMap
    original_size: tuple[int, int]

    def boxes_to_original(self, boxes: np.ndarray) -> np.ndarray:
        """Boxes of the model's image as boxes of the original, clipped to it."""
        return np.clip(self.to_original.boxes(boxes), 0.0, 1.0)

    def to_original_pixels(self, maps: np.ndarray, outside: float) -> np.ndarray:
        """Maps [k, h, w] over the model's image at each pixel of the original, bilinear; `outside` what was cut off."""
        forward = self.to_original.inverse()
        weights, seen = [], []
        for axis, count, cells in (
            (1, self.original_size[0], maps.shape[1]),
            (0, self.original_size[1], maps.shape[2]),
        ):
            place = (np.arange(count) + 0.5) / count * forward.scale[axis] + forward.offset[axis]
            seen.append((place >= 0) & (place <= 1))
            position = np.clip(place * cells - 0.5, 0, cells - 1)
            distance = np.abs(position[:, None] - np.arange(cells))
            weights.append(np.maximum(1.0 - distance, 0.0).astype(np.float32))
        out = weights[0] @ maps.astype(np.float32) @ weights[1].T
        out[:, ~(seen[0][:, None] & seen[1][None])] = outside
        return out


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preprocess:
    """How an image of any size becomes the model's input; the content of preprocess.json.

    image_size: (height, width). resize: "shortest_crop" (cut the centre), "squash" (ignore the aspect ratio), "pad"
      (keep everything, at the centre of a canvas of the grey value `fill`).
    mean, std: per channel, of values in 0..1.
    resize_to: (height, width) to cover before the centre is cut out. long_side, crop_offset: how the long side's length
      and the offset of the cut are rounded, "down" or to the "nearest". resampler: "torchvision" gives the pixels of its
      tensors, "pillow" those of PIL images.
    """

    image_size: tuple[int, int]
    resize: str
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fill: int
    resize_to: tuple[int, int]
    long_side: str
    crop_offset: str
    resampler: str

    @classmethod
    def load(cls, path: Path) -> Preprocess:
        values = json.loads(path.read_text())
        values["resize_to"] = values["resize_to"] or values["image_size"]
        for name in ("image_size", "resize_to"):
            size = values[name]
            values[name] = (size, size) if isinstance(size, int) else tuple(size)
        return cls(**values)

    def __call__(self, image: Any) -> Shown:
        """The image, anything that `open_image` takes, as the model sees it."""
        picture = open_image(image)
        source_width, source_height = picture.size
        place = self._pad if self.resize == "pad" else self._crop
        picture, window, forward = place(picture)
        pixels = np.array(picture if picture.mode == "RGB" else picture.convert("RGB"))
        return Shown(pixels, window, forward.inverse(), (source_height, source_width))

    def _crop(self, picture: Image.Image) -> tuple[Image.Image, tuple[float, ...], AxisMap]:
        height, width = self.image_size
        resized = self._size_before_crop(*picture.size)
        offset = math.floor if self.crop_offset == "down" else round
        left, top = offset((resized[0] - width) / 2), offset((resized[1] - height) / 2)
        picture = self._resized(picture, resized)
        if resized != (width, height):
            picture = picture.crop((left, top, left + width, top + height))
        x0, y0, x1, y1 = (
            left / resized[0],
            top / resized[1],
            (left + width) / resized[0],
            (top + height) / resized[1],
        )
        scale, offset = (1.0 / (x1 - x0), 1.0 / (y1 - y0)), (-x0 / (x1 - x0), -y0 / (y1 - y0))
        return picture, (0.0, 0.0, 1.0, 1.0), AxisMap(scale, offset)

    def _resized(self, picture: Image.Image, size: tuple[int, int]) -> Image.Image:
        if picture.size == size:
            return picture
        if self.resampler == "torchvision":
            if self.interpolation == "bicubic":
                return resize_tensor(picture, size)
            picture = picture.resize((size[0], picture.size[1]), RESAMPLING[self.interpolation])
        return picture.resize(size, RESAMPLING[self.interpolation])

    def _size_before_crop(self, source_width: int, source_height: int) -> tuple[int, int]:
        height, width = self.resize_to
        if self.resize == "squash":
            return width, height

        def long_side(short: int, source_long: int, source_short: int) -> int:
            # The order of operations decides where the quotient is all but whole.
            if self.long_side == "nearest":
                return round(source_long / (source_short / short))
            return int(short * source_long / source_short)

        if height * source_width >= width * source_height:
            return max(width, long_side(height, source_width, source_height)), height
        return width, max(height, long_side(width, source_height, source_width))

    def _pad(self, picture: Image.Image) -> tuple[Image.Image, tuple[float, ...], AxisMap]:
        height, width = self.image_size
        ratio = max(picture.size[0] / width, picture.size[1] / height)
        new_width, new_height = (
            max(1, min(side, round(source / ratio)))
            for side, source in zip((width, height), picture.size, strict=True)
        )
        picture = self._resized(picture, (new_width, new_height))
        left, top = (width - new_width) // 2, (height - new_height) // 2
        if picture.size != (width, height):
            canvas = Image.new(picture.mode, (width, height), (self.fill,) * len(picture.getbands()))
            canvas.paste(picture, (left, top))
            picture = canvas
        window = (left / width, top / height, (left + new_width) / width, (top + new_height) / height)
        scale = (window[2] - window[0], window[3] - window[1])
        return picture, window, AxisMap(scale, window[:2])
