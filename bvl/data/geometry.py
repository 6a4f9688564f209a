"""Coordinate geometry: one axis-aligned map between an image and what crop, resize, pad and flip made of it.

Coordinates are fractions of an image, x to the right and y down; a box is [x0, y0, x1, y1]. Everything here is pure
NumPy, and every image transform of `bvl.data.transforms` is described by one `AxisAlignedMap`.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Bool, Float

# (x0, y0, x1, y1); in pixels or in fractions, as the function says.
Rectangle = tuple[float, float, float, float]


@dataclasses.dataclass(frozen=True)
class AxisAlignedMap:
    """The map `new = scale * old + offset`, separately in x and y, between fractions of two images.

    A negative scale is a flip. As the axes do not mix, boxes stay boxes and the inverse is exact.
    """

    scale: tuple[float, float] = (1.0, 1.0)
    offset: tuple[float, float] = (0.0, 0.0)

    def points(self, points: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "n 2"]:
        """Maps points (x, y); what falls outside the new image lies outside 0..1."""
        return np.asarray(points, np.float64).reshape(-1, 2) * self.scale + self.offset

    def boxes(self, boxes: Float[np.ndarray, "n 4"]) -> Float[np.ndarray, "n 4"]:
        """Maps boxes without clipping; x0 <= x1 and y0 <= y1 hold after a flip as well."""
        boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
        corners = boxes * (self.scale * 2) + (self.offset * 2)
        first, second = corners[:, :2], corners[:, 2:]
        return np.concatenate([np.minimum(first, second), np.maximum(first, second)], axis=1)

    def inverse(self) -> AxisAlignedMap:
        """The map back: `old = (new - offset) / scale`."""
        (sx, sy), (tx, ty) = self.scale, self.offset
        return AxisAlignedMap((1.0 / sx, 1.0 / sy), (-tx / sx, -ty / sy))

    def then(self, after: AxisAlignedMap) -> AxisAlignedMap:
        """This map followed by another one."""
        (sx, sy), (tx, ty) = self.scale, self.offset
        (ax, ay), (bx, by) = after.scale, after.offset
        return AxisAlignedMap((sx * ax, sy * ay), (tx * ax + bx, ty * ay + by))


def crop_map(rectangle: Rectangle) -> AxisAlignedMap:
    """The map from an image to its crop `rectangle`, given in fractions of the image.

    A rectangle that reaches outside 0..1 pads, so that this one function covers padding too.
    """
    x0, y0, x1, y1 = rectangle
    width, height = x1 - x0, y1 - y0
    return AxisAlignedMap((1.0 / width, 1.0 / height), (-x0 / width, -y0 / height))


def place_map(rectangle: Rectangle) -> AxisAlignedMap:
    """The map from an image to a canvas on which it fills `rectangle`, given in fractions of the canvas."""
    x0, y0, x1, y1 = rectangle
    return AxisAlignedMap((x1 - x0, y1 - y0), (x0, y0))


def flip_map(*, horizontal: bool, vertical: bool) -> AxisAlignedMap:
    """The map of mirroring left and right (`horizontal`), top and bottom (`vertical`), or both."""
    return AxisAlignedMap(
        (-1.0 if horizontal else 1.0, -1.0 if vertical else 1.0),
        (1.0 if horizontal else 0.0, 1.0 if vertical else 0.0),
    )


def box_area(boxes: Float[np.ndarray, "n 4"]) -> Float[np.ndarray, " n"]:
    """The areas of boxes; a reversed box has none."""
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    return np.prod(np.maximum(boxes[:, 2:] - boxes[:, :2], 0.0), axis=1)


def clip_boxes(
    boxes: Float[np.ndarray, "n 4"], window: Rectangle, *, minimum_visible: float
) -> tuple[Float[np.ndarray, "n 4"], Bool[np.ndarray, " n"]]:
    """Clips boxes to `window` and says of which at least the fraction `minimum_visible` of the area is left.

    A box without area is never valid.
    """
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    low, high = np.asarray(window[:2] * 2), np.asarray(window[2:] * 2)
    clipped = np.clip(boxes, low, high)
    area, visible = box_area(boxes), box_area(clipped)
    # The factor forgives rounding where the threshold is met exactly, as with minimum_visible = 1.
    return clipped, (visible > 0) & (visible >= minimum_visible * area * (1 - 1e-9))
