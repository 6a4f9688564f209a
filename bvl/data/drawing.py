"""Boxes, masks, points, heat maps and their texts, drawn legibly on an image of any size."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Hashable, Sequence
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Bool, Float
from PIL import Image, ImageDraw

from bvl.data.images import ImageLike, open_image
from bvl.data.paint import (
    COLOURS,
    FAINT,
    INK,
    PAPER,
    Colour,
    Line,
    bounds_of,
    draw_lines,
    font_of,
    ink_on,
    line_height,
    paint_mask,
    wrap,
    wrap_lines,
)
from bvl.errors import UserError

# Of a heat map's highest value; its lowest is not painted at all.
HEAT_OPACITY = 0.6
# The long side that small images are enlarged to at least, and for which the sizes below are given.
SIDE = 512
FONT_SIZE, LINE_WIDTH = 13, 2
# Labels may take up this share of the picture, and so many lines each, before they go below it.
MOST_COVERED, MOST_LABEL_LINES = 0.2, 4
# A label is no wider than this share of the picture.
WIDEST_LABEL = 0.42


def draw_regions(
    image: ImageLike,
    *,
    boxes: Sequence[Sequence[float] | None] | Float[np.ndarray, "n 4"] | None = None,
    masks: Sequence[np.ndarray | None] | Bool[np.ndarray, "n h w"] | None = None,
    points: Sequence[Sequence[float] | None] | Float[np.ndarray, "n 2"] | None = None,
    texts: Sequence[str] | None = None,
    scores: Sequence[float] | Float[np.ndarray, " n"] | None = None,
    groups: Sequence[Hashable] | None = None,
    heat_map: Float[np.ndarray, "h w"] | None = None,
    notes: Sequence[str] = (),
) -> Image.Image:
    """The image with n regions; a small one is enlarged, and what stands below it is added at the bottom.

    boxes, points: fractions of the image. masks: boolean, at the image's size. Region i has what is not None of
      boxes[i], masks[i] and points[i].
    texts, scores: what a region is labelled with. Labels stand beside their regions while they fit there without
      covering each other; else regions get numbers, and the texts follow below the picture.
    groups: regions of one group share a colour, and labels that do not fit become one line a group (its first text, and
      how many there are). None = each region on its own.
    heat_map: painted below the regions, the more the higher a value is between the least and the most; NaN is not.
    notes: lines below the picture, such as what was not found.
    Raises UserError for lists of different lengths and for arrays of another size than the image, ImageError for an
    image that cannot be read.
    """
    picture = open_image(image).convert("RGB")
    regions = _regions(picture.size, boxes, masks, points, texts, scores, groups)
    canvas = _Canvas(picture)
    lines = [] if heat_map is None else [canvas.heat(np.asarray(heat_map))]
    canvas.masks([(region.mask, region.colour) for region in regions if region.mask is not None])
    for region in regions:
        canvas.outline(region)
    lines = canvas.labels(regions) + lines + [Line(note) for note in notes]
    return canvas.with_lines(lines)


def side_by_side(pictures: Sequence[Image.Image]) -> Image.Image:
    """One or more pictures in a row, on white."""
    gap = max(4, pictures[0].width // 64)
    width = sum(picture.width for picture in pictures) + gap * (len(pictures) - 1)
    sheet = Image.new("RGB", (width, max(picture.height for picture in pictures)), PAPER)
    left = 0
    for picture in pictures:
        sheet.paste(picture, (left, 0))
        left += picture.width + gap
    return sheet


@dataclasses.dataclass
class _Region:
    """One region of the original image, its colour and its label."""

    colour: Colour
    group: Hashable
    text: str
    score: float | None
    box: Sequence[float] | None = None
    mask: Bool[np.ndarray, "h w"] | None = None
    point: Sequence[float] | None = None

    @property
    def label(self) -> str:
        return " ".join(filter(None, [self.text, "" if self.score is None else f"{self.score:.2f}"]))


def _regions(
    size: tuple[int, int], boxes: Any, masks: Any, points: Any, texts: Any, scores: Any, groups: Any
) -> list[_Region]:
    given = {
        "boxes": boxes,
        "masks": masks,
        "points": points,
        "texts": texts,
        "scores": scores,
        "groups": groups,
    }
    counts = {name: len(values) for name, values in given.items() if values is not None}
    if len(set(counts.values())) > 1:
        raise UserError(f"different numbers of regions: {', '.join(f'{k} {n}' for k, n in counts.items())}")
    count = next(iter(counts.values()), 0)
    rows = [
        dict(zip(given, row, strict=True))
        for row in zip(*(_filled(v, count) for v in given.values()), strict=True)
    ]
    colours: dict[Hashable, Colour] = {}
    out = []
    for i, row in enumerate(rows):
        group = i if groups is None else row["groups"]
        colour = colours.setdefault(group, COLOURS[len(colours) % len(COLOURS)])
        mask = None if row["masks"] is None else _sized(row["masks"], size, f"masks[{i}]").astype(bool)
        score = None if row["scores"] is None else float(row["scores"])
        out.append(_Region(colour, group, row["texts"] or "", score, row["boxes"], mask, row["points"]))
    return out


def _filled(values: Any, count: int) -> Sequence[Any]:
    return [None] * count if values is None else values


def _sized(array: Any, size: tuple[int, int], name: str) -> np.ndarray:
    array = np.asarray(array)
    if array.shape != size[::-1]:
        raise UserError(
            f"{name} has the shape {array.shape}; its image is {size[0]}x{size[1]} pixels (width x height)"
        )
    return array


class _Canvas:
    """A picture being drawn on; what is given in fractions or in the original's pixels is scaled to it."""

    def __init__(self, original: Image.Image):
        self.original_size = original.size
        # By a whole number, so that the original's pixels stay what they are.
        self.zoom = max(1, math.ceil(SIDE / max(original.size)))
        width, height = original.width * self.zoom, original.height * self.zoom
        self.picture = original.resize((width, height), Image.Resampling.NEAREST)
        scale = max(width, height) / SIDE
        self.line = max(1, round(LINE_WIDTH * scale))
        self.font_size = max(FONT_SIZE, round(FONT_SIZE * scale))
        self.font = font_of(self.font_size)
        self.draw = ImageDraw.Draw(self.picture)

    def heat(self, values: Float[np.ndarray, "h w"]) -> Line:
        """Paints a heat map; returns the line that says what its colours mean."""
        values = _sized(values, self.original_size, "heat_map")
        seen = np.isfinite(values)
        if not seen.any():
            return Line("heat map: nothing to see", FAINT)
        low, high = float(values[seen].min()), float(values[seen].max())
        share = np.where(seen, (values - low) / max(high - low, 1e-12), 0.0)
        paint = matplotlib.colormaps["plasma"](share)[..., :3] * 255
        opacity = (share * HEAT_OPACITY)[..., None]
        pixels = np.asarray(self.picture)[:: self.zoom, :: self.zoom]
        mixed = np.rint(pixels * (1 - opacity) + paint * opacity).astype(np.uint8)
        self.picture.paste(Image.fromarray(mixed).resize(self.picture.size, Image.Resampling.NEAREST))
        return Line(
            f"heat map: {low:.2f} (clear) to {high:.2f}", FAINT, _rounded(matplotlib.colormaps["plasma"](1.0))
        )

    def masks(self, masks: Sequence[tuple[Bool[np.ndarray, "h w"], Colour]]) -> None:
        """Tints masks of the original image."""
        if masks:
            pixels = np.array(self.picture)
            for mask, colour in masks:
                enlarged = np.repeat(np.repeat(mask, self.zoom, 0), self.zoom, 1)
                paint_mask(pixels, enlarged, colour, width=self.line)
            self.picture.paste(Image.fromarray(pixels))

    def outline(self, region: _Region) -> None:
        # Dark on both sides, so that any colour stands out on any ground.
        edge = max(1, self.line // 2)
        if region.box is not None:
            x0, y0, x1, y1 = self._pixels(region.box)
            # Lines of a box that is hardly larger than they are would hide what it holds.
            line = max(1, min(self.line, (min(x1 - x0, y1 - y0)) // 4))
            box = (x0, y0, x1 - 1, y1 - 1)
            outer = (x0 - edge, y0 - edge, x1 - 1 + edge, y1 - 1 + edge)
            self.draw.rectangle(outer, outline=INK, width=line + 2 * edge if line > 1 else edge)
            self.draw.rectangle(box, outline=region.colour, width=line)
        if region.point is not None:
            x, y = (f * n for f, n in zip(region.point, self.picture.size, strict=True))
            for radius, colour in ((3 * self.line + edge, INK), (3 * self.line, region.colour)):
                self.draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)

    def _pixels(self, box: Sequence[float]) -> tuple[int, int, int, int]:
        """The pixels of a box, at least one each way and none outside the picture."""
        width, height = self.picture.size
        x0, y0 = (
            min(max(round(float(f) * n), 0), n - 1) for f, n in zip(box[:2], (width, height), strict=True)
        )
        x1, y1 = (min(round(float(f) * n), n) for f, n in zip(box[2:], (width, height), strict=True))
        return x0, y0, max(x1, x0 + 1), max(y1, y0 + 1)

    def _anchor(self, region: _Region) -> tuple[int, int, int, int] | None:
        """The rectangle that a label belongs to."""
        if region.box is not None:
            return self._pixels(region.box)
        if region.mask is not None and region.mask.any():
            return tuple(v * self.zoom for v in bounds_of(region.mask))
        if region.point is not None:
            x, y = (round(f * n) for f, n in zip(region.point, self.picture.size, strict=True))
            return x - 4 * self.line, y - 4 * self.line, x + 4 * self.line, y + 4 * self.line
        return None

    def labels(self, regions: Sequence[_Region]) -> list[Line]:
        """Draws the labels beside their regions, or numbers, whose texts are then the lines returned."""
        shown = [region for region in regions if region.label and self._anchor(region) is not None]
        anchors = [self._anchor(region) for region in shown]
        room = round(self.picture.width * WIDEST_LABEL)
        wrapped = [wrap(region.label, room, self.font) for region in shown]
        sizes = [self._label_size(lines) for lines in wrapped]
        covered = sum(w * h for w, h in sizes) / (self.picture.width * self.picture.height)
        if covered <= MOST_COVERED and all(len(lines) <= MOST_LABEL_LINES for lines in wrapped):
            places = self._places(sizes, anchors)
            if places is not None:
                for region, lines, place, size in zip(shown, wrapped, places, sizes, strict=True):
                    self._label(region.colour, lines, place, size)
                return []
        names: dict[Hashable, _Region] = {}
        for region in shown:
            names.setdefault(region.group, region)
        if len(names) < len(shown):
            counts = collections.Counter(region.group for region in shown)
            return [
                Line(f"{first.text} x {counts[group]}", INK, first.colour) for group, first in names.items()
            ]
        numbers = [[str(i + 1)] for i in range(len(shown))]
        sizes = [self._label_size(lines) for lines in numbers]
        for region, lines, place, size in zip(
            shown, numbers, self._places(sizes, anchors, overlap=True), sizes, strict=True
        ):
            self._label(region.colour, lines, place, size)
        return [Line(f"{i + 1}: {region.label}", INK, region.colour) for i, region in enumerate(shown)]

    def _label_size(self, lines: Sequence[str]) -> tuple[int, int]:
        margin = self.font_size // 3
        width = max(math.ceil(self.font.getlength(line)) for line in lines)
        return width + 2 * margin, line_height(self.font_size) * len(lines) + margin // 2

    def _label(
        self, colour: Colour, lines: Sequence[str], place: tuple[int, int], size: tuple[int, int]
    ) -> None:
        (left, top), (width, height) = place, size
        self.draw.rectangle((left, top, left + width - 1, top + height - 1), fill=colour)
        for number, line in enumerate(lines):
            corner = (left + self.font_size // 3, top + number * line_height(self.font_size))
            self.draw.text(corner, line, fill=ink_on(colour), font=self.font)

    def _places(
        self,
        sizes: Sequence[tuple[int, int]],
        anchors: Sequence[tuple[int, int, int, int]],
        *,
        overlap: bool = False,
    ) -> list[tuple[int, int]] | None:
        """The upper left corners of labels: at their anchors, inside the picture, and off each other and other regions.

        None where one would have to cover another, unless `overlap`.
        """
        taken = np.zeros((0, 4))
        others = np.array(anchors, float).reshape(-1, 4)
        places = []
        for (w, h), (x0, y0, x1, y1) in zip(sizes, anchors, strict=True):
            # Outside first, the way a reader looks for it; then inside.
            wanted = [(x0, y0 - h), (x0, y1), (x1 - w, y0 - h), (x1 - w, y1), (x1, y0), (x0 - w, y0)]
            wanted += [(x1, y1 - h), (x0 - w, y1 - h), (x0, y0), (x0, y1 - h), (x1 - w, y0), (x1 - w, y1 - h)]
            corners = np.array(wanted, float)
            limits = np.array([self.picture.width - w, self.picture.height - h], float)
            corners = np.clip(corners, 0, np.maximum(limits, 0))
            rectangles = np.concatenate([corners, corners + [w, h]], axis=1)
            over_labels = _overlap(rectangles, taken)
            cost = (
                over_labels * len(sizes) * 10
                + _overlap(rectangles, others)
                + np.arange(len(corners)) * 0.01 * w * h
            )
            best = int(cost.argmin())
            if over_labels[best] > 0 and not overlap:
                return None
            taken = np.concatenate([taken, rectangles[best : best + 1]])
            places.append((int(corners[best, 0]), int(corners[best, 1])))
        return places

    def with_lines(self, lines: Sequence[Line]) -> Image.Image:
        """The picture, with lines below it if there are any."""
        margin = self.font_size // 3
        lines = wrap_lines(lines, self.picture.width - 2 * margin, self.font)
        if not lines:
            return self.picture
        height = line_height(self.font_size) * len(lines) + 2 * margin
        out = Image.new("RGB", (self.picture.width, self.picture.height + height), PAPER)
        out.paste(self.picture)
        draw_lines(ImageDraw.Draw(out), (margin, self.picture.height + margin), lines, self.font)
        return out


def _overlap(
    rectangles: Float[np.ndarray, "n 4"], others: Float[np.ndarray, "m 4"]
) -> Float[np.ndarray, " n"]:
    """How much of each rectangle others cover, counted for each of them."""
    low = np.maximum(rectangles[:, None, :2], others[None, :, :2])
    high = np.minimum(rectangles[:, None, 2:], others[None, :, 2:])
    return np.prod(np.maximum(high - low, 0), axis=-1).sum(axis=1)


def _rounded(colour: Sequence[float]) -> Colour:
    return tuple(round(v * 255) for v in colour[:3])
