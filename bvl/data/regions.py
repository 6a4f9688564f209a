"""Regions of an image: what a record knows of them, prompts that point at them, and their masks on a coarse grid.

Boxes [x0, y0, x1, y1] and points [x, y] are fractions of an image, x to the right and y down. A grid is (rows,
columns) = image size // `Regions.mask_stride`. What finds regions by their phrases is in `bvl.data.phrases`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from bvl.data.controls import Controls
from bvl.data.text import Tokenizer
from bvl.data.text_choice import ChosenText, TextChoice
from bvl.data.transforms import Transformed
from bvl.errors import ConfigError

# A prompt's kind is its place here.
KINDS = ("box", "point", "mask")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Regions:
    """How the regions of records are shown to tasks that describe or find them.

    max_regions: prompts of an image that are described; of more boxes a random part. balanced: then each name in the
      image comes as often as the others, as long as there are boxes of it, so that a common one does not crowd out the rest.
    max_objects: objects of an image that are to be found. With more in view, the image teaches no detection, and a
      phrase teaches boxes only where none of its objects is beyond a random part of so many; masks and presence it
      teaches as ever.
    max_phrases: phrases that are looked for in an image.
    kinds: what prompts are, "box", "point" or "mask", with probabilities; a region without a mask is shown as a box.
    box_jitter: each side of a prompt's box is moved by up to this share of the box's width or height.
    mask_stride: pixels of the image to a cell of every mask.
    text: what a region is described by: a field of its box entry, or fields with probabilities (see `Source.text`).
    phrases: what a region is looked for by, likewise. One word may be marked with asterisks, as in "a *nodule* on the left".
    absent: probability that a phrase names what the image is known not to show, where some such thing is known. At
      least one phrase names what is there if anything is.
    context_length: tokens of a region's text or phrase in training, start and end included; None = as of other texts
      (data.tokenizer.context_length). Few make training faster, for they are most of the rows.
    """

    max_regions: int = 8
    balanced: bool = False
    max_objects: int = 16
    max_phrases: int = 4
    kinds: dict[str, float] = dataclasses.field(default_factory=lambda: {"box": 1.0})
    box_jitter: float = 0.0
    mask_stride: int = 4
    text: str | dict[str, float] = "name"
    phrases: str | dict[str, float] = "name"
    absent: float = 0.5
    context_length: int | None = None

    def __post_init__(self):
        for field in ("max_regions", "max_objects", "max_phrases", "mask_stride"):
            if getattr(self, field) < 1:
                raise ConfigError(f"data.regions.{field}={getattr(self, field)}: must be at least 1")
        if self.context_length is not None and self.context_length < 3:
            raise ConfigError(
                f"data.regions.context_length={self.context_length}: start, one token and end need at least 3"
            )
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown:
            raise ConfigError(f"data.regions.kinds: unknown {unknown[0]!r}; there is {', '.join(KINDS)}")
        if not self.kinds or not all(p > 0 and math.isfinite(p) for p in self.kinds.values()):
            raise ConfigError(f"data.regions.kinds={self.kinds!r}: give kinds with probabilities above 0")
        # With half of it the sides could meet.
        if not 0 <= self.box_jitter < 0.5:
            raise ConfigError(f"data.regions.box_jitter={self.box_jitter}: must lie in [0, 0.5)")
        if not 0 <= self.absent <= 1:
            raise ConfigError(f"data.regions.absent={self.absent}: must lie in [0, 1]")
        for field in ("text", "phrases"):
            try:
                TextChoice.of(getattr(self, field))
            except ConfigError as error:
                raise ConfigError(f"data.regions.{field}: {error}") from None

    def tokenizer(self, tokenizer: Tokenizer) -> Tokenizer:
        """The tokenizer of training texts and phrases; ConfigError for more room than the models' texts have."""
        if self.context_length is None:
            return tokenizer
        if self.context_length > tokenizer.context_length:
            raise ConfigError(
                f"data.regions.context_length={self.context_length} is longer than data.tokenizer.context_length="
                f"{tokenizer.context_length}"
            )
        return tokenizer.with_context(self.context_length)

    def text_choice(self) -> TextChoice:
        """Which text of a box entry describes it."""
        return TextChoice.of(self.text)

    def phrase_choice(self) -> TextChoice:
        """Which text of a box entry is looked for."""
        return TextChoice.of(self.phrases)

    def grid(self, height_width: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of the masks of an image; ConfigError where cells would not fill it."""
        height, width = height_width
        if height % self.mask_stride or width % self.mask_stride:
            raise ConfigError(
                f"data.regions.mask_stride={self.mask_stride}: cells of so many pixels do not fill images of {width}x"
                f"{height} pixels (width x height); choose a divisor of both"
            )
        return height // self.mask_stride, width // self.mask_stride


def region_entries(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The box entries of a record, and one without "box" for a named mask that no box has the name of."""
    entries = list(record.get("boxes") or ())
    name = record.get("mask_name")
    if name and record.get("mask") is not None and name not in {entry["name"] for entry in entries}:
        entries.append({"name": name})
    return entries


def entry_boxes(
    entries: Sequence[Mapping[str, Any]], mask: Int[np.ndarray, "h w"] | None
) -> Float[np.ndarray, "n 4"]:
    """The boxes of `region_entries`; that of a named mask is tight about it, without area where the mask is empty."""
    boxes = np.zeros((len(entries), 4))
    for i, entry in enumerate(entries):
        if "box" in entry:
            boxes[i] = entry["box"]
        elif mask is not None and mask.any():
            boxes[i] = tight_box(mask > 0)
    return boxes


class Visible:
    """The regions of a record in its transformed image.

    entries: of `region_entries`. boxes, valid: `Transformed.boxes` of `entry_boxes`, and which are still in view.
    named: the name of the region that the mask shows; None where it holds the ids of instances.
    """

    def __init__(self, record: Mapping[str, Any], entries: Sequence[Mapping[str, Any]], shown: Transformed):
        self.entries = list(entries)
        self.boxes, self.valid = shown.boxes, shown.box_valid
        self.named: str | None = record.get("mask_name")
        self._ids = shown.mask

    def mask(self, members: Sequence[int]) -> Bool[np.ndarray, "H W"] | None:
        """The pixels of some entries together; None where no mask shows them."""
        if self._ids is None or not len(members):
            return None
        if self.named is not None:
            everyone = [i for i, entry in enumerate(self.entries) if entry["name"] == self.named]
            pixels = self._ids > 0 if set(everyone) == set(members) else None
        elif len(members) == 1:
            pixels = self._ids == members[0] + 1
        else:
            pixels = np.isin(self._ids, np.asarray(members) + 1)
        return pixels if pixels is not None and pixels.any() else None


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What points at one region; the fields are those of the batch keys "region_box" and so on."""

    box: Float[np.ndarray, " 4"]
    point: Float[np.ndarray, " 2"]
    mask: Bool[np.ndarray, "h w"]
    kind: str

    @classmethod
    def of_box(cls, box: Float[np.ndarray, " 4"], grid: tuple[int, int]) -> Prompt:
        """A box, its centre and its cells."""
        return cls(box, (box[:2] + box[2:]) / 2, box_cells(box, grid), "box")

    @classmethod
    def of_point(cls, point: Float[np.ndarray, " 2"], grid: tuple[int, int]) -> Prompt:
        """A point, as a box without area and as the one cell that holds it."""
        cells = np.zeros(grid, bool)
        rows, columns = grid
        cells[min(int(point[1] * rows), rows - 1), min(int(point[0] * columns), columns - 1)] = True
        return cls(np.concatenate([point, point]), point, cells, "point")

    @classmethod
    def of_mask(cls, mask: Bool[np.ndarray, "H W"], grid: tuple[int, int]) -> Prompt:
        """A mask with some pixel, the box tight about it and that box's centre."""
        box = tight_box(mask)
        return cls(box, (box[:2] + box[2:]) / 2, mask_cells(mask, grid), "mask")


def stack_prompts(prompts: Sequence[Prompt], grid: tuple[int, int], rows: int) -> dict[str, np.ndarray]:
    """The batch keys of prompts, filled up to `rows` with zeros."""
    out = {
        "region_box": np.zeros((rows, 4), np.float32),
        "region_point": np.zeros((rows, 2), np.float32),
        "region_mask": np.zeros((rows, *grid), bool),
        "region_kind": np.zeros(rows, np.int8),
    }
    for i, prompt in enumerate(prompts):
        out["region_box"][i], out["region_point"][i] = prompt.box, prompt.point
        out["region_mask"][i], out["region_kind"][i] = prompt.mask, KINDS.index(prompt.kind)
    return out


class PromptSampler:
    """Draws the region prompts of training images and their texts."""

    def __init__(
        self, regions: Regions, *, controls: Controls, tokenizer: Tokenizer, height_width: tuple[int, int]
    ):
        self.regions, self.controls = regions, controls
        self.tokenizer = regions.tokenizer(tokenizer)
        self.grid = regions.grid(height_width)
        self._choice = regions.text_choice()
        total = sum(regions.kinds.values())
        self._kinds = tuple(regions.kinds)
        self._shares = [p / total for p in regions.kinds.values()]

    def draw(
        self,
        visible: Visible | None,
        image_box: Float[np.ndarray, " 4"],
        rng: np.random.Generator,
    ) -> dict[str, np.ndarray]:
        """The keys "region_..." of one image; None for `visible` where there is none."""
        rows = self.regions.max_regions
        prompts, texts = [], []
        if visible is not None:
            members = [
                int(i) for i in np.flatnonzero(visible.valid) if self._choice.offers(visible.entries[i])
            ]
            order = rng.permutation(members).astype(int)
            if self.regions.balanced:
                order = _by_turns(order, [visible.entries[i]["name"] for i in order])
            for i in order[:rows]:
                (text,) = self._choice.draw(visible.entries[i], rng)
                texts.append(text)
                prompts.append(self._prompt(visible, i, image_box, rng))
        out = stack_prompts(prompts, self.grid, rows)
        out["region_valid"] = np.arange(rows) < len(prompts)
        missing = rows - len(prompts)
        out["region_text"], out["region_text_mask"] = self.tokenizer.encode_texts(
            [text.text for text in texts] + [""] * missing
        )
        prefixes = [self._prefix(text, rng) for text in texts]
        prefixes += [self.controls.prefix(self.tokenizer)] * missing
        out["region_prompt"], out["region_prompt_mask"] = (np.stack(a) for a in zip(*prefixes, strict=True))
        return out

    def _prefix(self, text: ChosenText, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """The length is the only control of a region's text: sections, quality and prompts are of the whole image."""
        length = None
        if self.controls.lengths and rng.random() >= self.controls.dropout:
            length = self.controls.length_of(self.tokenizer.as_shown(text.text))
        return self.controls.prefix(self.tokenizer, length=length)

    def _prompt(
        self, visible: Visible, i: int, image_box: Float[np.ndarray, " 4"], rng: np.random.Generator
    ) -> Prompt:
        kind = self._kinds[rng.choice(len(self._kinds), p=self._shares)]
        box = visible.boxes[i]
        mask = visible.mask([i]) if kind != "box" else None
        if kind == "point":
            return Prompt.of_point(_random_point(box, mask, rng), self.grid)
        if mask is not None:
            return Prompt.of_mask(mask, self.grid)
        if self.regions.box_jitter:
            reach = self.regions.box_jitter * np.tile(box[2:] - box[:2], 2)
            box = np.clip(
                box + rng.uniform(-1, 1, 4) * reach, np.tile(image_box[:2], 2), np.tile(image_box[2:], 2)
            )
        return Prompt.of_box(box, self.grid)


def _by_turns(order: Sequence[int], names: Sequence[str]) -> list[int]:
    """One of each name in turn, as long as there are any; otherwise in the given order."""
    counts: dict[str, int] = {}
    turns = []
    for name in names:
        counts[name] = counts.get(name, -1) + 1
        turns.append(counts[name])
    return [i for _, i in sorted(zip(turns, order, strict=True), key=lambda pair: pair[0])]


def _random_point(
    box: Float[np.ndarray, " 4"], mask: Bool[np.ndarray, "H W"] | None, rng: np.random.Generator
) -> Float[np.ndarray, " 2"]:
    """A point of the mask, or of the middle half of the box: what lies in its corners may be something else."""
    if mask is None:
        return box[:2] + (box[2:] - box[:2]) * rng.uniform(0.25, 0.75, 2)
    rows, columns = np.nonzero(mask)
    pixel = int(rng.integers(len(rows)))
    return (np.array([columns[pixel], rows[pixel]]) + rng.random(2)) / mask.shape[::-1]


def tight_box(mask: Bool[np.ndarray, "H W"]) -> Float[np.ndarray, " 4"]:
    """The smallest box about the pixels of a mask, which has some."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    height, width = mask.shape
    return np.array(
        [columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height]
    )


def box_cells(box: Float[np.ndarray, " 4"], grid: tuple[int, int]) -> Bool[np.ndarray, "h w"]:
    """The cells of which a box covers at least half; of a box smaller than that those it covers most of."""
    x, y = (
        np.clip(np.minimum(high * count, edges + 1) - np.maximum(low * count, edges), 0, 1)
        for low, high, count, edges in (
            (box[0], box[2], grid[1], np.arange(grid[1])),
            (box[1], box[3], grid[0], np.arange(grid[0])),
        )
    )
    return _mostly_covered(np.outer(y, x))


def mask_cells(mask: Bool[np.ndarray, "H W"], grid: tuple[int, int]) -> Bool[np.ndarray, "h w"]:
    """The cells of which a mask covers at least half; of a mask smaller than that those it covers most of."""
    # The mean over the part that holds the mask alone: most masks are small, and there are many.
    steps = [size // count for size, count in zip(mask.shape, grid, strict=True)]
    share = np.zeros(grid)
    if mask.any():
        found = [np.flatnonzero(mask.any(axis)) // step for axis, step in zip((1, 0), steps, strict=True)]
        (top, bottom), (left, right) = ((cells[0], cells[-1] + 1) for cells in found)
        (dy, dx), shape = steps, (bottom - top, steps[0], right - left, steps[1])
        part = mask[top * dy : bottom * dy, left * dx : right * dx]
        share[top:bottom, left:right] = part.reshape(shape).mean((1, 3))
    return _mostly_covered(share)


def _mostly_covered(share: Float[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    most = share.max()
    # A little less than the most, as equal shares differ by rounding.
    return share >= (0.5 if most >= 0.5 else most * (1 - 1e-9)) if most > 0 else np.zeros(share.shape, bool)
