"""Prompts that a user points at regions with: checked, and brought into the model's view of the image.

Boxes, points and masks are of the original image here, the first two as fractions of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from bvl.data.geometry import Rectangle, clip_boxes
from bvl.data.manifests import shorten
from bvl.data.records import BOX_TOLERANCE, box_problem
from bvl.data.regions import KINDS, Prompt, stack_prompts
from bvl.data.transforms import Transformed, sample_mask
from bvl.errors import UserError

BoxesLike = Sequence[Sequence[float]] | Float[np.ndarray, "n 4"]
PointsLike = Sequence[Sequence[float]] | Float[np.ndarray, "n 2"]
MasksLike = Sequence[np.ndarray] | Bool[np.ndarray, "n h w"]
RegionsLike = Sequence[Mapping[str, Any]]


def check_boxes(boxes: BoxesLike, where: str = "the image") -> Float[np.ndarray, "n 4"]:
    """The boxes as an array; UserError, naming the box of `where`, for one that cannot be used."""
    return np.array([_box(box, f"{where}, {name}") for name, box in _each(boxes, where, "boxes")])


def check_points(points: PointsLike, where: str = "the image") -> Float[np.ndarray, "n 2"]:
    """The points as an array; UserError, naming the point of `where`, for one that cannot be used."""
    return np.array([_point(point, f"{where}, {name}") for name, point in _each(points, where, "points")])


def check_masks(
    masks: MasksLike, image_size: tuple[int, int], where: str = "the image"
) -> Bool[np.ndarray, "n h w"]:
    """The masks as an array; UserError, naming the mask of `where`, for one that cannot be used.

    image_size: (height, width) of the image that the masks are of.
    """
    return np.stack(
        [_mask(mask, image_size, f"{where}, {name}") for name, mask in _each(masks, where, "masks")]
    )


def prompts_of(
    transformed: Transformed,
    *,
    image_size: tuple[int, int],
    mask_size: tuple[int, int],
    boxes: BoxesLike | None = None,
    points: PointsLike | None = None,
    masks: MasksLike | None = None,
    regions: RegionsLike | None = None,
    where: str = "the image",
) -> dict[str, np.ndarray]:
    """The batch keys region_box [n, 4], region_point [n, 2], region_mask [n, h, w] and region_kind [n] of n regions.

    transformed: the image as the model sees it. image_size: (height, width) of the original. mask_size: (h, w).
    boxes, points, masks: one of them is given, or `regions`, which mixes them: [{"box": [...]}, {"point": [...]},
      {"mask": array}].
    where: names the image in errors.
    Raises UserError for a region that cannot be used, and for one that the model does not see.
    """
    given = {"boxes": boxes, "points": points, "masks": masks, "regions": regions}
    used = [name for name, value in given.items() if value is not None]
    if len(used) != 1:
        raise UserError(
            f"{where}: give one of boxes, points, masks and regions, not {' and '.join(used) or 'none'}"
        )
    prompts = []
    for name, value in _each(given[used[0]], where, used[0]):
        place = f"{where}, {name}"
        kind, value = (
            _kind_of(value, place) if regions is not None else (KINDS[list(given).index(used[0])], value)
        )
        if kind == "box":
            prompts.append(Prompt.of_box(_seen_box(_box(value, place), transformed, place), mask_size))
        elif kind == "point":
            prompts.append(Prompt.of_point(_seen_point(_point(value, place), transformed, place), mask_size))
        else:
            mask = _mask(value, image_size, place)
            prompts.append(Prompt.of_mask(_seen_mask(mask, transformed, place), mask_size))
    return stack_prompts(prompts, mask_size, len(prompts))


def _each(values: Any, where: str, name: str) -> list[tuple[str, Any]]:
    """(name with index, value) of each region; UserError where there is no list of them, or an empty one."""
    one = {"boxes": "box", "points": "point", "masks": "mask", "regions": "region"}[name]
    if isinstance(values, str | Mapping) or not isinstance(values, Iterable):
        raise UserError(f"{where}: {name} is {shorten(values)}; give a list with one {one} or more")
    values = list(values)
    if not values:
        raise UserError(f"{where}: zero regions: give at least one {one}")
    single = 1 if name == "masks" else 0
    if not isinstance(values[0], Mapping | str | None) and np.ndim(values[0]) == single:
        raise UserError(f"{where}: {name} is a single {one}; put it into a list: {name}=[{one}]")
    return [(f"{name}[{i}]", value) for i, value in enumerate(values)]


def _kind_of(region: Any, where: str) -> tuple[str, Any]:
    if not isinstance(region, Mapping) or len(region) != 1 or not region.keys() <= set(KINDS):
        raise UserError(
            f'{where}: {shorten(region)} is no region; give {{"box": [x0, y0, x1, y1]}}, {{"point": [x, y]}} or '
            f'{{"mask": array}}'
        )
    ((kind, value),) = region.items()
    return kind, value


def _numbers(value: Any) -> Any:
    """Plain numbers where the value is an array or holds NumPy numbers."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, list | tuple):
        return [v.item() if isinstance(v, np.generic) else v for v in value]
    return value


def _box(box: Any, where: str) -> Float[np.ndarray, " 4"]:
    box = _numbers(box)
    problem = box_problem(box)
    if problem is not None:
        raise UserError(f"{where}: {problem}")
    return np.clip(np.asarray(box, np.float64), 0.0, 1.0)


def _point(point: Any, where: str) -> Float[np.ndarray, " 2"]:
    point = _numbers(point)
    numbers = isinstance(point, list) and all(
        isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in point
    )
    if not numbers or len(point) != 2:
        raise UserError(f"{where}: point is {shorten(point)}; it must be two numbers [x, y].")
    if min(point) < -BOX_TOLERANCE or max(point) > 1 + BOX_TOLERANCE:
        hint = " Are these pixels? Divide x by the width and y by the height." if max(point) > 1.5 else ""
        raise UserError(f"{where}: point {point} lies outside 0..1; points are fractions of the image.{hint}")
    return np.clip(np.asarray(point, np.float64), 0.0, 1.0)


def _mask(mask: Any, image_size: tuple[int, int], where: str) -> Bool[np.ndarray, "h w"]:
    mask = np.asarray(mask)
    if mask.ndim != 2 or not (mask.dtype == bool or np.issubdtype(mask.dtype, np.integer)):
        raise UserError(
            f"{where}: a mask of shape {mask.shape} and type {mask.dtype}; give a boolean array [height, width]."
        )
    if mask.shape != tuple(image_size):
        raise UserError(
            f"{where}: the mask is {mask.shape[1]}x{mask.shape[0]} pixels (width x height) and its image "
            f"{image_size[1]}x{image_size[0]}; give the mask at the image's size."
        )
    if mask.dtype != bool and len(np.unique(mask[mask != 0])) > 1:
        raise UserError(
            f"{where}: the mask holds several numbers besides 0; give a boolean mask of one region, such as ids == 3."
        )
    if not mask.any():
        raise UserError(f"{where}: the mask is empty; at least one pixel must be true.")
    return mask != 0


def _unseen(where: str, what: str, transformed: Transformed) -> UserError:
    seen = np.clip(transformed.to_original.boxes([transformed.image_box])[0], 0, 1)
    part = ", ".join(f"{v:.3g}" for v in seen)
    return UserError(
        f"{where}: the {what} lies wholly in what is cut off: the model sees the part [{part}] of the image "
        f"(resize='shortest_crop' cuts out the centre). Point at something in there, or crop the image yourself."
    )


def _window(transformed: Transformed) -> Rectangle:
    return tuple(transformed.image_box.tolist())


def _seen_box(box: Float[np.ndarray, " 4"], transformed: Transformed, where: str) -> Float[np.ndarray, " 4"]:
    """The part of the box that is in view, in the model's image."""
    placed = transformed.to_original.inverse().boxes(box[None])
    clipped, visible = clip_boxes(placed, _window(transformed), minimum_visible=0.0)
    if not visible[0]:
        raise _unseen(where, "box", transformed)
    return clipped[0]


def _seen_point(
    point: Float[np.ndarray, " 2"], transformed: Transformed, where: str
) -> Float[np.ndarray, " 2"]:
    placed = transformed.to_original.inverse().points(point[None])[0]
    low, high = transformed.image_box[:2], transformed.image_box[2:]
    if (placed < low - BOX_TOLERANCE).any() or (placed > high + BOX_TOLERANCE).any():
        raise _unseen(where, "point", transformed)
    return np.clip(placed, low, high)


def _seen_mask(
    mask: Bool[np.ndarray, "h w"], transformed: Transformed, where: str
) -> Bool[np.ndarray, "H W"]:
    """The mask in the model's image, as training samples it; something of it is left if any pixel is in view."""
    size = transformed.image.shape[:2]
    window = _window(transformed)
    seen = sample_mask(mask, transformed.to_original, window, size, mask)
    if not seen.any():
        # Finer than the model's pixels, or out of view.
        rows, columns = np.nonzero(mask)
        centres = np.stack([(columns + 0.5) / mask.shape[1], (rows + 0.5) / mask.shape[0]], axis=1)
        placed = transformed.to_original.inverse().points(centres)
        inside = ((placed > window[:2]) & (placed < window[2:])).all(1)
        if not inside.any():
            raise _unseen(where, "mask", transformed)
        columns, rows = (placed[inside] * size[::-1]).astype(int).T
        seen = np.zeros(size, bool)
        seen[rows, columns] = True
    return seen
