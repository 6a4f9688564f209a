"""Reading images and masks: any still picture PIL knows, bytes, or arrays, as upright 8-bit RGB.

Conventions, the same for files and arrays:

- 16-bit grey: kept as it is where no value is above 255, else scaled by the full range (value / 257).
- transparency: composited on white, the paper that figures with transparent ground are drawn for.
- the EXIF orientation is applied, so that fractions of the image mean what a viewer shows.
- grey, palette, 1-bit, CMYK, YCbCr and LAB pictures become RGB.
"""

from __future__ import annotations

import difflib
import io
import itertools
from pathlib import Path

import numpy as np
from jaxtyping import Int32, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from bvl.errors import ImageError

ImageLike = str | Path | bytes | Image.Image | np.ndarray

_ORIENTATION = 0x0112
_DEEP_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N", "F")
# So many names are looked at for a near miss; a folder of millions is not worth the wait.
_NAMES_LOOKED_AT = 20_000


def load_image(
    value: ImageLike, root: str | Path | None = None, *, name: str | None = None
) -> UInt8[np.ndarray, "h w 3"]:
    """Reads one image as upright 8-bit RGB.

    value: a path (relative paths against `root`), encoded bytes, a PIL image, or an array: uint8, uint16, bool or
      float in 0..1, of shape [h, w], [h, w, 1], [h, w, 3] or [h, w, 4] (with alpha).
    name: what to call it in an error, for bytes and arrays.
    Raises ImageError if it is missing, empty, truncated, animated, too large, or no image.
    """
    picture = open_image(value, root, name=name)
    return np.array(picture if picture.mode == "RGB" else picture.convert("RGB"))


def open_image(value: ImageLike, root: str | Path | None = None, *, name: str | None = None) -> Image.Image:
    """Like `load_image`, but as a decoded PIL image of mode RGB, or L where the picture is grey.

    For code that resizes next: it saves two copies of the full image, and grey costs a third.
    """
    if isinstance(value, np.ndarray):
        return _from_array(value, name or "array")
    if isinstance(value, Image.Image):
        name = name or getattr(value, "filename", "") or "PIL image"
        return _upright_rgb(_decode(value, name), name)
    source, name = _resolve(value, root, name)
    try:
        with Image.open(source) as picture:
            return _upright_rgb(_decode(picture, name), name)
    except Exception as error:
        raise _explain(error, value if isinstance(value, bytes) else source, name) from error


def load_mask(
    value: ImageLike, root: str | Path | None = None, *, name: str | None = None
) -> Int32[np.ndarray, "h w"]:
    """Reads a mask of instance ids, 0 = background: an 8-bit, 16-bit, 1-bit or palette PNG, or an integer array.

    Raises ImageError as `load_image` does, and for colour pictures, whose values are no ids.
    """
    if isinstance(value, np.ndarray):
        return _mask_ids(value, name or "array")
    if isinstance(value, Image.Image):
        name = name or getattr(value, "filename", "") or "PIL image"
        return _mask_ids(np.asarray(_decode(value, name)), name)
    source, name = _resolve(value, root, name)
    try:
        with Image.open(source) as picture:
            # A palette picture's indices are its ids; the colours are only for looking at.
            return _mask_ids(np.asarray(_decode(picture, name)), name)
    except Exception as error:
        raise _explain(error, value if isinstance(value, bytes) else source, name) from error


def _resolve(
    value: str | Path | bytes, root: str | Path | None, name: str | None
) -> tuple[Path | io.BytesIO, str]:
    if isinstance(value, bytes):
        return io.BytesIO(value), name or f"image of {len(value)} bytes"
    if not isinstance(value, (str, Path)):
        raise ImageError(
            f"{name or 'image'}: a {type(value).__name__} is no image; give a path, bytes, a PIL image or an array."
        )
    path = Path(value) if root is None else Path(root) / value
    return path, name or str(path)


def _decode(picture: Image.Image, name: str) -> Image.Image:
    """Decodes the pixels of a still picture; an animation is refused, for which frame is meant is not known."""
    # MPO is a JPEG with a preview or a second view behind it: the first frame is the photograph.
    if getattr(picture, "is_animated", False) and picture.format != "MPO":
        raise ImageError(
            f"{name}: animated image with {picture.n_frames} frames; save the frame you want as a still."
        )
    picture.load()
    return picture


def _upright_rgb(picture: Image.Image, name: str) -> Image.Image:
    if picture.getexif().get(_ORIENTATION, 1) != 1:
        picture = ImageOps.exif_transpose(picture)
    if picture.mode in _DEEP_MODES:
        return _from_array(np.asarray(picture), name)
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        layer = picture.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    if picture.mode in ("RGB", "L"):
        return picture
    return picture.convert("L" if picture.mode == "1" else "RGB")


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or array.size == 0 or (array.ndim == 3 and array.shape[-1] not in (3, 4)):
        raise ImageError(
            f"{name}: shape {array.shape} is no image; give [height, width] or [height, width, 3 or 4]."
        )
    if array.ndim == 3 and array.shape[-1] == 4:
        return _upright_rgb(Image.fromarray(_to_uint8(array, name), "RGBA"), name)
    return Image.fromarray(_to_uint8(array, name))


def _to_uint8(array: np.ndarray, name: str) -> UInt8[np.ndarray, " ..."]:
    """8-bit values of an array by its type and range; see the module's conventions."""
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255
    if not np.issubdtype(array.dtype, np.integer) and not np.issubdtype(array.dtype, np.floating):
        raise ImageError(
            f"{name}: values of type {array.dtype} are no image; give uint8, uint16 or float in 0..1."
        )
    low, high = array.min(), array.max()
    if np.issubdtype(array.dtype, np.floating):
        # Written so that NaN fails too. A whisker outside 0..1 is resampling or float error.
        if not (low >= -1e-3 and high <= 1 + 1e-3):
            raise ImageError(
                f"{name}: floating-point values from {low:g} to {high:g}; scale them to 0..1 or give uint8."
            )
        return np.rint(np.clip(array, 0, 1) * 255).astype(np.uint8)
    if low < 0 or high > 65535:
        raise ImageError(
            f"{name}: integer values from {low} to {high} fit neither 8 nor 16 bits; rescale them first."
        )
    return array.astype(np.uint8) if high <= 255 else np.rint(array / 257.0).astype(np.uint8)


def _mask_ids(array: np.ndarray, name: str) -> Int32[np.ndarray, "h w"]:
    if array.ndim == 3 and array.shape[-1] == 3 and (array == array[..., :1]).all():
        array = array[..., 0]
    if (
        array.ndim != 2
        or array.size == 0
        or not (array.dtype == np.bool_ or np.issubdtype(array.dtype, np.integer))
    ):
        raise ImageError(
            f"{name}: a mask holds one whole number a pixel (0 = background), this has shape {array.shape} and "
            f"type {array.dtype}; save it as a single-channel 8- or 16-bit PNG."
        )
    if array.min() < 0:
        raise ImageError(f"{name}: a mask cannot hold the negative id {array.min()}.")
    return array.astype(np.int32)


def _explain(error: Exception, source: Path | io.BytesIO | bytes, name: str) -> Exception:
    """The ImageError that says what is wrong with the file, or the error itself if it is no fault of the file."""
    if isinstance(error, ImageError):
        return error
    if isinstance(error, FileNotFoundError):
        return ImageError(f"{name}: no such image.{_nearest(source)}")
    if isinstance(error, (IsADirectoryError, PermissionError)):
        return ImageError(f"{name}: cannot be read ({error.strerror}).")
    if isinstance(error, Image.DecompressionBombError):
        return ImageError(f"{name}: too large ({error}); downsample or tile it first.")
    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    if size == 0:
        return ImageError(f"{name}: the file is empty (0 bytes); copy or download it again.")
    if isinstance(error, UnidentifiedImageError):
        return ImageError(f"{name}: no image in a known format ({size} bytes); save it as PNG or JPEG.")
    if isinstance(error, (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError)):
        # PIL's decoders report damaged files through all of these.
        return ImageError(f"{name}: damaged or truncated ({error}); copy or download it again.")
    return error


def _nearest(path: Path) -> str:
    if not path.parent.is_dir():
        return f" Its folder {path.parent} does not exist either; is root right?"
    names = [entry.name for entry in itertools.islice(path.parent.iterdir(), _NAMES_LOOKED_AT)]
    close = difflib.get_close_matches(path.name, names, n=1)
    return f" Did you mean {close[0]}?" if close else ""
