"""Regions that a user points at: checked, and brought into the model's view of the image."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from bvl.convert.torch_format.source.errors import UserError
from bvl.convert.torch_format.source.images import Shown
from bvl.convert.torch_format.source.region_encoder import BOX, MASK, POINT, RegionPrompts

TOLERANCE = 1e-6


def region_lists(count: int, **given: Any) -> list[list[dict[str, Any]]]:
    """The one of boxes, points, masks and regions that is given, as [{"box": ...}, ...] for each of `count` images."""
    used = [name for name, value in given.items() if value is not None]
    if len(used) != 1:
        raise UserError(
            "give one of boxes, points, masks and regions, as a list for each image, not "
            f"{' and '.join(used) or 'none'}"
        )
    (name,) = used
    lists = given[name]
    if len(lists) != count:
        raise UserError(
            f"regions of {len(lists)} images for {count} images: give a list of regions for each image, empty where "
            "there is none"
        )
    one = {"boxes": "box", "points": "point", "masks": "mask"}.get(name)
    out = [[region if one is None else {one: region} for region in some] for some in lists]
    for i, some in enumerate(out):
        for k, region in enumerate(some):
            if (
                not isinstance(region, Mapping)
                or len(region) != 1
                or not region.keys() <= {"box", "point", "mask"}
            ):
                raise UserError(
                    f'images[{i}], region {k}: give {{"box": [x0, y0, x1, y1]}}, {{"point": [x, y]}} or '
                    '{"mask": array}'
                )
            # Before anything is encoded; masks need the image's size first.
            check = {"box": checked_box, "point": checked_point}
            ((kind, value),) = region.items()
            if kind in check:
                check[kind](value, f"images[{i}], {kind} {k}")
    if not any(out):
        raise UserError("no regions to describe: give at least one box, point or mask")
    return out


def region_prompt(
    region: Mapping[str, Any], shown: Shown, grid: tuple[int, int], where: str
) -> RegionPrompts:
    """The prompt of one region [1, ...] of an image, with masks on a grid of (rows, columns)."""
    ((kind, value),) = region.items()
    if kind == "box":
        box = seen_box(checked_box(value, where), shown, where)
        point, mask, number = (box[:2] + box[2:]) / 2, box_cells(box, grid), BOX
    elif kind == "point":
        point = seen_point(checked_point(value, where), shown, where)
        box, mask, number = np.concatenate([point, point]), point_cell(point, grid), POINT
    else:
        seen = seen_mask(checked_mask(value, shown.original_size, where), shown, where)
        box, number = tight_box(seen), MASK
        point, mask = (box[:2] + box[2:]) / 2, mask_cells(seen, grid)
    return RegionPrompts(
        box=torch.tensor(box, dtype=torch.float32)[None],
        point=torch.tensor(point, dtype=torch.float32)[None],
        mask=torch.from_numpy(mask)[None],
        kind=torch.tensor([number]),
    )


def numbers(value: Any, count: int, where: str) -> np.ndarray:
    """`count` finite numbers, or UserError."""
    value = value.tolist() if hasattr(value, "tolist") else value
    plain = isinstance(value, Sequence) and not isinstance(value, str) and len(value) == count
    try:
        array = np.asarray(value, np.float64) if plain else None
    except (TypeError, ValueError):
        array = None
    if array is None or array.shape != (count,) or not np.isfinite(array).all():
        raise UserError(f"{where}: {value!r} is not {count} numbers")
    if array.min() < -TOLERANCE or array.max() > 1 + TOLERANCE:
        hint = " Are these pixels? Divide x by the width and y by the height." if array.max() > 1.5 else ""
        raise UserError(f"{where}: {value} lies outside 0..1; coordinates are fractions of the image.{hint}")
    return np.clip(array, 0.0, 1.0)


def checked_box(box: Any, where: str) -> np.ndarray:
    """A box with an area, or UserError."""
    box = numbers(box, 4, where)
    if box[2] <= box[0] or box[3] <= box[1]:
        raise UserError(f"{where}: box {box.tolist()} has no area; x0 < x1 and y0 < y1 are needed")
    return box


def checked_point(point: Any, where: str) -> np.ndarray:
    return numbers(point, 2, where)


def checked_mask(mask: Any, size: tuple[int, int], where: str) -> np.ndarray:
    """A boolean mask of the image's size with some pixel, or UserError."""
    mask = np.asarray(mask)
    if mask.ndim != 2 or not (mask.dtype == bool or np.issubdtype(mask.dtype, np.integer)):
        raise UserError(
            f"{where}: a mask of shape {mask.shape} and type {mask.dtype}; give a boolean array [height, width]"
        )
    if mask.shape != tuple(size):
        raise UserError(f"{where}: the mask is {mask.shape} and its image {tuple(size)} (height, width)")
    if mask.dtype != bool and len(np.unique(mask[mask != 0])) > 1:
        raise UserError(
            f"{where}: the mask holds several numbers besides 0; give one region, such as ids == 3"
        )
    if not mask.any():
        raise UserError(f"{where}: the mask is empty; at least one pixel must be true")
    return mask != 0


def unseen(where: str) -> UserError:
    return UserError(
        f"{where}: lies wholly in what preprocessing cuts off; point at something else, or crop the image yourself"
    )


def seen_box(box: np.ndarray, shown: Shown, where: str) -> np.ndarray:
    """The part of the box that is in view, in the model's image."""
    placed = shown.to_original.inverse().boxes(box[None])[0]
    low, high = np.asarray(shown.window[:2] * 2), np.asarray(shown.window[2:] * 2)
    clipped = np.clip(placed, low, high)
    if not (clipped[2:] > clipped[:2]).all():
        raise unseen(where)
    return clipped


def seen_point(point: np.ndarray, shown: Shown, where: str) -> np.ndarray:
    placed = shown.to_original.inverse().points(point[None])[0]
    low, high = np.asarray(shown.window[:2]), np.asarray(shown.window[2:])
    if (placed < low - TOLERANCE).any() or (placed > high + TOLERANCE).any():
        raise unseen(where)
    return np.clip(placed, low, high)


def seen_mask(mask: np.ndarray, shown: Shown, where: str) -> np.ndarray:
    """The mask in the model's image: for each pixel the value under its centre."""
    size, window = shown.pixels.shape[:2], shown.window
    indices, inside = [], []
    for axis, (count, source) in enumerate(((size[1], mask.shape[1]), (size[0], mask.shape[0]))):
        centres = (np.arange(count) + 0.5) / count
        inside.append((centres > window[axis]) & (centres < window[axis + 2]))
        position = (centres * shown.to_original.scale[axis] + shown.to_original.offset[axis]) * source
        indices.append(np.clip(np.floor(position).astype(np.int64), 0, source - 1))
    seen = mask[indices[1]][:, indices[0]] & inside[1][:, None] & inside[0][None]
    if not seen.any():
        # Finer than the model's pixels, or out of view.
        rows, columns = np.nonzero(mask)
        centres = np.stack([(columns + 0.5) / mask.shape[1], (rows + 0.5) / mask.shape[0]], axis=1)
        placed = shown.to_original.inverse().points(centres)
        there = ((placed > window[:2]) & (placed < window[2:])).all(1)
        if not there.any():
            raise unseen(where)
        columns, rows = (placed[there] * size[::-1]).astype(int).T
        seen = np.zeros(size, bool)
        seen[rows, columns] = True
    return seen


def tight_box(mask: np.ndarray) -> np.ndarray:
    """The smallest box about the pixels of a mask."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    height, width = mask.shape
    return np.array(
        [columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height]
    )


def point_cell(point: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """The one cell that holds a point."""
    cells, (rows, columns) = np.zeros(grid, bool), grid
    cells[min(int(point[1] * rows), rows - 1), min(int(point[0] * columns), columns - 1)] = True
    return cells


def box_cells(box: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """The cells of which a box covers at least half; of a smaller box those it covers most of."""
    x, y = (
        np.clip(np.minimum(high * n, np.arange(n) + 1) - np.maximum(low * n, np.arange(n)), 0, 1)
        for low, high, n in ((box[0], box[2], grid[1]), (box[1], box[3], grid[0]))
    )
    return mostly_covered(np.outer(y, x))


def mask_cells(mask: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """The cells of which a mask covers at least half; of a smaller mask those it covers most of."""
    (rows, columns), (height, width) = grid, mask.shape
    return mostly_covered(mask.reshape(rows, height // rows, columns, width // columns).mean((1, 3)))


def mostly_covered(share: np.ndarray) -> np.ndarray:
    most = share.max()
    # A little less than the most, as equal shares differ by rounding.
    return share >= (0.5 if most >= 0.5 else most * (1 - 1e-9)) if most > 0 else np.zeros(share.shape, bool)


def flat(name: str, value: Any, counts: Sequence[int]) -> Any:
    """`value` with the lists of the images, if it holds such, made one list of all regions."""
    lists = (list, tuple, np.ndarray)
    if not isinstance(value, lists) or not any(isinstance(x, lists) for x in value):
        return value
    found = [len(x) if isinstance(x, lists) else None for x in value]
    if found != list(counts):
        raise UserError(f"{name}: lists of {found} values for images with {list(counts)} regions")
    return [x for some in value for x in some]


def joined(prompts: Iterable[RegionPrompts], device: torch.device) -> RegionPrompts:
    """Prompts of one region each as rows [b, 1, ...]."""
    prompts = list(prompts)
    names = ("box", "point", "mask", "kind")
    stacked = {name: torch.stack([getattr(one, name) for one in prompts]) for name in names}
    return RegionPrompts(**{name: value.to(device) for name, value in stacked.items()})
