"""How well a heat map points at a region. NaN pixels (padding, unknown) are left out everywhere."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float

from bvl.errors import DataError


def inside_boxes(boxes: Float[np.ndarray, "n 4"], shape: tuple[int, int]) -> Bool[np.ndarray, "h w"]:
    """Pixels of a map of this (height, width) whose centre lies in a box [x0, y0, x1, y1] in fractions of the map."""
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    y, x = ((np.arange(size) + 0.5) / size for size in shape)
    in_x = (boxes[:, :1] <= x) & (x < boxes[:, 2:3])
    in_y = (boxes[:, 1:2] <= y) & (y < boxes[:, 3:])
    return (in_y[:, :, None] & in_x[:, None, :]).any(0)


def pointing_hit(heat_map: Float[np.ndarray, "h w"], inside: Bool[np.ndarray, "h w"]) -> float:
    """1 where the highest pixel lies inside, else 0: the pointing game (Zhang et al. 2018), with tolerance 0.

    Of several equally high pixels the share that lies inside, so that a constant map gets what chance would. The
    mean over phrases is the score. NaN where no pixel is known. Raises DataError for different shapes.
    """
    values, inside = _known(heat_map, inside)
    return float(inside[values == values.max()].mean()) if len(values) else float("nan")


def contrast_to_noise(
    heat_map: Float[np.ndarray, "h w"], inside: Bool[np.ndarray, "h w"], *, signed: bool = False
) -> float:
    """CNR = |mean_in - mean_out| / sqrt(var_in + var_out) of a heat map (Boecking et al. 2022, BioViL).

    The absolute value rewards a map that is lowest where it should be highest; `signed` leaves it out. NaN where
    nothing or everything is inside, or both variances are 0. Raises DataError for different shapes.
    """
    values, inside = _known(heat_map, inside)
    within, outside = values[inside], values[~inside]
    if not len(within) or not len(outside):
        return float("nan")
    noise = np.sqrt(within.var() + outside.var())
    contrast = within.mean() - outside.mean()
    return float((contrast if signed else abs(contrast)) / noise) if noise > 0 else float("nan")


def _known(
    heat_map: np.ndarray, inside: np.ndarray
) -> tuple[Float[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    heat_map, inside = np.asarray(heat_map, np.float64), np.asarray(inside, bool)
    if heat_map.shape != inside.shape or heat_map.ndim != 2:
        raise DataError(f"heat map {heat_map.shape} and region {inside.shape}: give two of one shape [h, w]")
    known = ~np.isnan(heat_map)
    return heat_map[known], inside[known]
