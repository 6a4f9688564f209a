"""A contact sheet of what the model will see: images at the model's size, boxes, masks, and the decoded texts."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from bvl.data.batch import REGION_NEEDS, Need, needs_of
from bvl.data.controls import Controls
from bvl.data.paint import (
    ALARM,
    COLOURS,
    FAINT,
    INK,
    PAPER,
    Colour,
    Line,
    draw_lines,
    font_of,
    ink_on,
    line_height,
    paint_mask,
    wrap_lines,
)
from bvl.data.pipeline import DataConfig, Pipeline, training_texts
from bvl.data.sources import RecordSet
from bvl.data.text import Tokenizer
from bvl.data.transforms import Transformed, apply
from bvl.errors import ConfigError, DataError

TILE = 256
MARGIN = 12
FONT_SIZE = 12
# With more boxes than this their names would hide the image; the legend under it has them anyway.
MAX_NAMED_BOXES = 6


@dataclasses.dataclass(frozen=True)
class _Tile:
    """One example, ready to draw."""

    picture: Image.Image
    lines: list[Line]


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
        return Tokenizer.of(options.path, options).with_tokens(config.controls.tokens())
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
    lines = [Line(f"{record_set.name}: {record['id']}", FAINT)]
    # The order of draws is the pipeline's: first the image, where a task reads it, then the text.
    rng = np.random.default_rng((pipeline.seed, position))
    random = augmented and Need.IMAGE in pipeline.needs
    picture = Image.new("RGB", (width * scale, height * scale), (225, 225, 225))
    try:
        record = record_set.load(index, mask=True)
        if record.get("image") is None:
            lines.append(Line("(no image)", FAINT))
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
        lines.append(Line(str(error), ALARM))
    if labels := record.get("labels"):
        lines.append(Line("labels: " + ", ".join(labels), FAINT))
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
                lines.append(Line(_prefix(config.controls, controls, tokenizer), FAINT))
            lines.append(_decoded(text, tokenizer))
        if not texts:
            lines.append(Line("(no text)", FAINT))
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


def _decoded(text: str, tokenizer: Tokenizer) -> Line:
    ids, mask, truncated = tokenizer.encode(text)
    end = f"  [cut at {int(mask.sum())} tokens]" if truncated else ""
    return Line(tokenizer.decode(ids) + end, ALARM if truncated else INK)


def _draw(
    shown: Transformed, record: dict[str, Any], scale: int, colours: dict[str, Colour]
) -> tuple[Image.Image, list[Line]]:
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
        for i, name in names.items():
            paint_mask(pixels, ids == i, colour(name))
    picture = Image.fromarray(pixels)
    draw = ImageDraw.Draw(picture)
    font, line = font_of(FONT_SIZE), line_height(FONT_SIZE)
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
            left, top = round(x0) + 2, round(y0) - line if y0 >= line else round(y0) + 1
            left = max(0, min(left, picture.width - round(draw.textlength(name, font=font)) - 1))
            draw.rectangle(draw.textbbox((left, top), name, font=font), fill=colour(name))
            draw.text((left, top), name, fill=ink_on(colour(name)), font=font)
    hidden = len(boxes) - len(visible)
    legend = [Line(f"{name} x {number}", INK, colour(name)) for name, number in counts.items()]
    if hidden:
        legend.append(Line(f"boxes out of view: {hidden}", FAINT))
    return picture, legend


def _grid(tiles: list[_Tile]) -> Image.Image:
    font, line = font_of(FONT_SIZE), line_height(FONT_SIZE)
    columns = min(len(tiles), max(1, min(6, math.ceil(math.sqrt(len(tiles))))))
    width = max(tile.picture.width for tile in tiles)
    wrapped = [wrap_lines(tile.lines, width, font) for tile in tiles]
    rows = [range(i, min(i + columns, len(tiles))) for i in range(0, len(tiles), columns)]
    heights = [max(tiles[i].picture.height + line * len(wrapped[i]) for i in row) + MARGIN for row in rows]
    sheet = Image.new("RGB", (columns * (width + MARGIN) + MARGIN, sum(heights) + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    top = MARGIN
    for row, height in zip(rows, heights, strict=True):
        for column, i in enumerate(row):
            left = MARGIN + column * (width + MARGIN)
            sheet.paste(tiles[i].picture, (left, top))
            draw_lines(draw, (left, top + tiles[i].picture.height + 2), wrapped[i], font)
        top += height
    return sheet
