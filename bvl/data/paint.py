"""Colours, masks and lines of text: what contact sheets and overlays are drawn with."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import scipy.ndimage
from jaxtyping import Bool, UInt8
from PIL import ImageDraw, ImageFont

Colour = tuple[int, int, int]
PAPER, INK, FAINT, ALARM = (255, 255, 255), (20, 20, 20), (120, 120, 120), (190, 20, 20)
# Told apart by colour-blind readers too, on grey and on pink: Okabe and Ito, "Color Universal Design", 2008, without
# its black, in an order in which neighbours differ most.
_DISTINCT: tuple[Colour, ...] = (
    (230, 159, 0),
    (86, 180, 233),
    (213, 94, 0),
    (0, 158, 115),
    (240, 228, 66),
    (204, 121, 167),
    (0, 114, 178),
)
# Beyond them their lighter shades.
COLOURS = _DISTINCT + tuple(tuple((v + 255) // 2 for v in colour) for colour in _DISTINCT)
MASK_OPACITY = 0.25
# Lines of a text below a picture; an ellipsis says that there is more.
MAX_LINES = 9
# No text is set tighter than this on average, as a share of the font's size.
NARROWEST = 0.25


@dataclasses.dataclass(frozen=True)
class Line:
    """A line below a picture; `swatch` puts a square of that colour before it."""

    text: str
    colour: Colour = INK
    swatch: Colour | None = None


@functools.lru_cache(maxsize=64)
def font_of(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which has the Greek letters and signs that captions are written with."""
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def line_height(size: int) -> int:
    """Pixels from one line to the next, of a font of `size`."""
    return round(size * 1.3)


def swatch_width(size: int) -> int:
    """Pixels that a line's square takes up, with the gap behind it."""
    return size + round(size * 0.4)


def ink_on(colour: Colour) -> Colour:
    """Dark or white letters, whichever stand out more on a colour (by the relative luminance of WCAG 2.2)."""
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in np.array(colour) / 255]
    return INK if np.dot(linear, (0.2126, 0.7152, 0.0722)) > 0.18 else PAPER


def paint_mask(
    pixels: UInt8[np.ndarray, "h w 3"], mask: Bool[np.ndarray, "h w"], colour: Colour, *, width: int = 1
) -> None:
    """Tints the pixels of a mask, in place, and draws its inner outline, `width` pixels wide."""
    if not mask.any():
        return
    x0, y0, x1, y1 = bounds_of(mask)
    inside, mask = pixels[y0:y1, x0:x1], mask[y0:y1, x0:x1]
    depth = scipy.ndimage.distance_transform_cdt(np.pad(mask, 1), metric="taxicab")[1:-1, 1:-1]
    opacity = np.where(mask & (depth <= width), 1.0, np.where(mask, MASK_OPACITY, 0.0))[..., None]
    inside[:] = np.rint(inside * (1 - opacity) + np.array(colour) * opacity)


def wrap(text: str, width: int, font: ImageFont.FreeTypeFont) -> list[str]:
    """A text in lines no wider than `width` pixels: of a long one the first MAX_LINES, which an ellipsis says."""
    out: list[str] = []
    rest = " ".join(text.split())
    while rest and len(out) < MAX_LINES:
        end = len(rest)
        # Measuring all of a long text for every line is slow.
        if end > (most := max(2, round(width / (font.size * NARROWEST)))):
            end = max(rest.rfind(" ", 0, most), most // 2)
        while end > 1 and font.getlength(rest[:end]) > width:
            space = rest.rfind(" ", 0, end)
            end = space if space > 0 else end - 1
        last = len(out) == MAX_LINES - 1 and end < len(rest)
        out.append(rest[: max(1, end - 3)] + "..." if last else rest[:end])
        rest = rest[end:].lstrip()
    return out


def wrap_lines(lines: Sequence[Line], width: int, font: ImageFont.FreeTypeFont) -> list[Line]:
    """Lines no wider than `width` pixels, their squares included; only the first line of a text has its square."""
    out = []
    for line in lines:
        room = width - (swatch_width(font.size) if line.swatch else 0)
        out += [dataclasses.replace(line, text=text) for text in wrap(line.text, room, font)]
    return out


def draw_lines(
    draw: ImageDraw.ImageDraw, corner: tuple[int, int], lines: Sequence[Line], font: ImageFont.FreeTypeFont
) -> None:
    """Draws lines one below the other from their upper left corner on."""
    left, top = corner
    for number, line in enumerate(lines):
        y = top + number * line_height(font.size)
        if line.swatch is not None:
            down = round(font.size * 0.2)
            draw.rectangle((left, y + down, left + font.size - 1, y + down + font.size - 1), fill=line.swatch)
        draw.text(
            (left + (swatch_width(font.size) if line.swatch else 0), y),
            line.text,
            fill=line.colour,
            font=font,
        )


def bounds_of(mask: Bool[np.ndarray, "h w"]) -> tuple[int, int, int, int]:
    """Columns and rows of a mask that has some pixel: x0, y0, and one past the last x and y."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
