"""A contact sheet of what the model will see: images at the model's size, boxes, masks, and the decoded texts."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from typing import Any

import numpy as np
from jaxtyping import Int
from PIL import Image, ImageDraw, ImageFont

from bvl.data.batch import REGION_NEEDS, Need, needs_of
from bvl.data.controls import Controls
from bvl.data.pipeline import DataConfig, Pipeline, training_texts
from bvl.data.sources import RecordSet
from bvl.data.text import Tokenizer
from bvl.data.transforms import Transformed, apply
from bvl.errors import ConfigError, DataError

TILE = 256
MARGIN = 12
FONT_SIZE = 13
LINE = 16
SWATCH = 14
# No text is set tighter than this on average, in pixels a character.
NARROWEST = 3
MAX_LINES = 9
# With more boxes than this their names would hide the image; the legend under it has them anyway.
MAX_NAMED_BOXES = 6
MASK_OPACITY = 0.25

Colour = tuple[int, int, int]
PAPER, INK, FAINT, ALARM = (255, 255, 255), (20, 20, 20), (120, 120, 120), (190, 20, 20)
# Distinct on grey and on pink alike; names take them in the order in which the sheet meets them.
COLOURS = (
    (0, 200, 80),
    (255, 140, 0),
    (30, 120, 255),
    (235, 0, 160),
    (240, 220, 0),
    (0, 200, 220),
    (150, 80, 255),
    (170, 100, 30),
)


@dataclasses.dataclass(frozen=True)
class _Line:
    """A line under a picture; `swatch` puts a square of that colour before it."""

    text: str
    colour: Colour = INK
    swatch: Colour | None = None


@dataclasses.dataclass(frozen=True)
class _Tile:
    """One example, ready to draw."""

    picture: Image.Image
    lines: list[_Line]


def contact_sheet(
    config: DataConfig,
    *,
    sets: list[RecordSet] | None = None,
    tokenizer: Tokenizer | None = None,
    keys_of_tasks: dict[str, frozenset[str]] | None = None,
    seed: int = 0,
    batch_size: int = 1,
    count: int = 24,
    augmented: bool = False,
) -> Image.Image:
    """A grid of the first `count` examples of a training run with this `seed` and `batch_size`, in their order.

    augmented: as in training, with the run's own randomness; else as in evaluation, with each record's first text.
    Texts are shown as they come back from the token ids, so that what is cut or unknown can be seen.
    sets, tokenizer: None = opened and made as the config says. keys_of_tasks: the batch keys that each task reads,
    which decide what records are used; None = all that have an image.
    """
    if count < 1:
        raise ConfigError(f"count={count}: a contact sheet shows at least 1 image")
    sets = [RecordSet(source) for source in config.sources()] if sets is None else sets
    keys_of_tasks = keys_of_tasks or {"show": frozenset({"image"})}
    pipeline = Pipeline(
        config,
        sets=sets,
        keys_of_tasks=keys_of_tasks,
        tokenizer=_make_tokenizer(config, sets, needs_of(frozenset().union(*keys_of_tasks.values())))
        if tokenizer is None
        else tokenizer,
        classes=(),
        batch_size=batch_size,
        seed=seed,
    )
    colours: dict[str, Colour] = {}
    tiles = [_tile(pipeline, position, augmented=augmented, colours=colours) for position in range(count)]
    return _grid(tiles)


def _make_tokenizer(config: DataConfig, sets: list[RecordSet], needs: frozenset[Need]) -> Tokenizer | None:
    """The one a fresh run would have; None where there is no text."""
    options = config.tokenizer
    if options.path is not None:
        loaded = Tokenizer.load(options.path, options.context_length, options.lowercase)
        return loaded.with_tokens(config.controls.tokens())
    regions = config.regions if needs & REGION_NEEDS else None
    texts = list(training_texts(sets, config.controls, regions))
    return Tokenizer.train(texts, options, config.controls.tokens()) if texts else None


def _tile(pipeline: Pipeline, position: int, *, augmented: bool, colours: dict[str, Colour]) -> _Tile:
    config, tokenizer = pipeline.config, pipeline.tokenizer
    source, place = pipeline.sampler(position)
    record_set, index = pipeline.sets[source], int(pipeline.indices[source][place])
    record = record_set.describe(index)
    height, width = config.preprocess.height_width
    scale = max(1, round(TILE / max(height, width)))
    lines = [_Line(f"{record_set.name}: {record['id']}", FAINT)]
    # The order of draws is the pipeline's: first the image, where a task reads it, then the text.
    rng = np.random.default_rng((pipeline.seed, position))
    random = augmented and Need.IMAGE in pipeline.needs
    picture = Image.new("RGB", (width * scale, height * scale), (225, 225, 225))
    try:
        record = record_set.load(index, mask=True)
        if record.get("image") is None:
            lines.append(_Line("(no image)", FAINT))
        else:
            boxes = [box["box"] for box in record.get("boxes") or ()]
            shown = apply(
                record["image"],
                preprocess=config.preprocess,
                augment=config.augment_of(record_set.config) if random else None,
                rng=rng if random else None,
                boxes=np.array(boxes, np.float64).reshape(-1, 4),
                mask=record.get("mask"),
                allow_horizontal_flip=not record_set.config.laterality,
            )
            picture, legend = _draw(shown, record, scale, colours)
            lines += legend
    except DataError as error:
        lines.append(_Line(str(error), ALARM))
    if labels := record.get("labels"):
        lines.append(_Line("labels: " + ", ".join(labels), FAINT))
    if tokenizer is not None:
        if augmented:
            texts = [(drawn.text, drawn.controls) for drawn in pipeline.draw_texts(record_set, record, rng)]
        else:
            texts = [
                (first.text, config.controls.of_text(first, record, tokenizer))
                for first in record_set.choice.in_order(record)[:1]
            ]
        for text, controls in texts:
            if "prompt" in pipeline.keys and controls:
                lines.append(_Line(_prefix(config.controls, controls, tokenizer), FAINT))
            lines.append(_decoded(text, tokenizer))
        if not texts:
            lines.append(_Line("(no text)", FAINT))
    return _Tile(picture, lines)


def _prefix(controls: Controls, given: dict[str, Any], tokenizer: Tokenizer) -> str:
    """What stands in front of a text, as it comes back from its ids."""
    ids, mask = controls.prefix(tokenizer, **given, cut=True)
    after_start = [int(i) for i in ids[mask][1:]]
    parts: list[str] = []
    for is_control, group in itertools.groupby(after_start, key=tokenizer.control_ids.__contains__):
        run = list(group)
        parts += map(tokenizer.token, run) if is_control else [tokenizer.decode(run)]
    return " ".join(parts)


def _decoded(text: str, tokenizer: Tokenizer) -> _Line:
    ids, mask, truncated = tokenizer.encode(text)
    end = f"  [cut at {int(mask.sum())} tokens]" if truncated else ""
    return _Line(tokenizer.decode(ids) + end, ALARM if truncated else INK)


def _draw(
    shown: Transformed, record: dict[str, Any], scale: int, colours: dict[str, Colour]
) -> tuple[Image.Image, list[_Line]]:
    """The enlarged picture with its mask and boxes, and the legend of their colours."""

    def colour(name: str) -> Colour:
        return colours.setdefault(name, COLOURS[len(colours) % len(COLOURS)])

    pixels = np.repeat(np.repeat(shown.image, scale, 0), scale, 1)
    boxes = record.get("boxes") or []
    counts: collections.Counter = collections.Counter()
    if shown.mask is not None:
        # With mask_name the mask is one named region, else id k is the instance in boxes[k-1].
        region = record.get("mask_name")
        ids = np.repeat(np.repeat(shown.mask, scale, 0), scale, 1)
        names = {
            int(i): region or (boxes[i - 1]["name"] if i <= len(boxes) else "mask")
            for i in np.unique(ids)
            if i
        }
        if region:
            counts[region] += 1
        pixels = _paint_mask(pixels, ids, {i: colour(name) for i, name in names.items()})
    picture = Image.fromarray(pixels)
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=FONT_SIZE)
    visible = [i for i in range(len(boxes)) if shown.box_valid[i]]
    for i in visible:
        name = boxes[i]["name"]
        counts[name] += 1
        x0, y0, x1, y1 = shown.boxes[i] * (picture.size * 2)
        # The last pixel inside, so that the outline never passes the box.
        draw.rectangle(
            (round(x0), round(y0), max(round(x0), round(x1) - 1), max(round(y0), round(y1) - 1)),
            outline=colour(name),
        )
        if len(visible) <= MAX_NAMED_BOXES:
            left, top = round(x0) + 2, round(y0) - LINE if y0 >= LINE else round(y0) + 1
            left = max(0, min(left, picture.width - round(draw.textlength(name, font=font)) - 1))
            draw.rectangle(draw.textbbox((left, top), name, font=font), fill=INK)
            draw.text((left, top), name, fill=colour(name), font=font)
    hidden = len(boxes) - len(visible)
    legend = [_Line(f"{name} x {number}", INK, colour(name)) for name, number in counts.items()]
    if hidden:
        legend.append(_Line(f"boxes out of view: {hidden}", FAINT))
    return picture, legend


def _paint_mask(pixels: np.ndarray, ids: Int[np.ndarray, "h w"], colours: dict[int, Colour]) -> np.ndarray:
    """Tints every instance and draws its inner outline."""
    padded = np.pad(ids, 1, constant_values=0)
    neighbours = (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])
    outline = (ids > 0) & np.any([n != ids for n in neighbours], axis=0)
    table = np.zeros((int(ids.max()) + 1, 3))
    for i, value in colours.items():
        table[i] = value
    paint = table[ids]
    opacity = np.where(outline, 1.0, np.where(ids > 0, MASK_OPACITY, 0.0))[..., None]
    return np.rint(pixels * (1 - opacity) + paint * opacity).astype(np.uint8)


def _grid(tiles: list[_Tile]) -> Image.Image:
    font = ImageFont.load_default(size=FONT_SIZE)
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    columns = min(len(tiles), max(1, min(6, math.ceil(math.sqrt(len(tiles))))))
    width = max(tile.picture.width for tile in tiles)
    wrapped = [_wrap(tile.lines, width, measure, font) for tile in tiles]
    rows = [range(i, min(i + columns, len(tiles))) for i in range(0, len(tiles), columns)]
    heights = [max(tiles[i].picture.height + LINE * len(wrapped[i]) for i in row) + MARGIN for row in rows]
    sheet = Image.new("RGB", (columns * (width + MARGIN) + MARGIN, sum(heights) + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    top = MARGIN
    for row, height in zip(rows, heights, strict=True):
        for column, i in enumerate(row):
            left = MARGIN + column * (width + MARGIN)
            sheet.paste(tiles[i].picture, (left, top))
            for number, line in enumerate(wrapped[i]):
                y = top + tiles[i].picture.height + 2 + number * LINE
                if line.swatch is not None:
                    draw.rectangle((left, y + 3, left + 9, y + 12), fill=line.swatch)
                draw.text((left + (SWATCH if line.swatch else 0), y), line.text, fill=line.colour, font=font)
        top += height
    return sheet


def _wrap(lines: list[_Line], width: int, draw: ImageDraw.ImageDraw, font: Any) -> list[_Line]:
    """Lines no wider than `width` pixels; of a long text the first MAX_LINES, which an ellipsis says."""
    out = []
    for line in lines:
        rest, taken = " ".join(line.text.split()), 0
        room = width - (SWATCH if line.swatch else 0)
        while rest and taken < MAX_LINES:
            end = len(rest)
            if end > (most := room // NARROWEST):  # measuring all of a long text for every line is slow
                end = max(rest.rfind(" ", 0, most), most // 2)
            while end > 1 and draw.textlength(rest[:end], font=font) > room:
                space = rest.rfind(" ", 0, end)
                end = space if space > 0 else end - 1
            taken += 1
            last = taken == MAX_LINES and end < len(rest)
            out.append(
                dataclasses.replace(line, text=rest[: max(1, end - 3)] + "..." if last else rest[:end])
            )
            rest = rest[end:].lstrip()
    return out
