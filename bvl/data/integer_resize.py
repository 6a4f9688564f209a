"""Bicubic resizing to the bit as PyTorch does it on uint8 tensors, which is what transformers' image processors do."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int, UInt8

# Keys' cubic convolution kernel (1981), with the parameter that image libraries share.
_A = -0.5
_RADIUS = 2.0
# Weights are rounded to as many binary digits as fit 16 bits with a sign, and to at most these.
_WEIGHT_BITS, _MOST_DIGITS = 15, 22
# Outputs computed together: neighbours read nearly the same inputs.
_ROWS_AT_ONCE = 32


def resize_bicubic(
    pixels: UInt8[np.ndarray, "h w *c"], size: tuple[int, int]
) -> UInt8[np.ndarray, "oh ow *c"]:
    """`pixels` resized to size = (width, height), antialiased: equal to torch's interpolate(mode="bicubic",
    antialias=True) of a uint8 tensor.

    Pillow has finer weights: its pixels differ by one grey level here and there, by two now and then, and by more
    where overshoot is clipped between the two passes in another order.
    """
    width, height = size
    pixels = np.swapaxes(_resize_rows(np.swapaxes(pixels, 0, 1), width), 0, 1)
    return np.ascontiguousarray(_resize_rows(pixels, height))


def _resize_rows(pixels: UInt8[np.ndarray, "n ..."], count: int) -> UInt8[np.ndarray, "count ..."]:
    if pixels.shape[0] == count:
        return pixels
    weights, digits, first, last = _integer_weights(pixels.shape[0], count)
    # Sums of whole numbers are exact in float64, and faster than in integers.
    flat = pixels.reshape(pixels.shape[0], -1).astype(np.float64)
    out = np.empty((count, flat.shape[1]), np.uint8)
    for a in range(0, count, _ROWS_AT_ONCE):
        b = min(a + _ROWS_AT_ONCE, count)
        read = slice(first[a], last[b - 1])
        sums = weights[a:b, read] @ flat[read]
        out[a:b] = np.clip(np.floor(np.ldexp(sums, -digits) + 0.5), 0, 255)
    return out.reshape(count, *pixels.shape[1:])


def _integer_weights(
    source: int, target: int
) -> tuple[Float[np.ndarray, "target source"], int, Int[np.ndarray, " target"], Int[np.ndarray, " target"]]:
    """(whole-numbered weights, their binary digits behind the point, first input of each output, one past its last)"""
    scale = source / target
    # Where it shrinks, the kernel is widened over all that falls into an output pixel.
    spread = max(scale, 1.0)
    centre = scale * (np.arange(target) + 0.5)
    first = np.maximum((centre - _RADIUS * spread + 0.5).astype(int), 0)
    last = np.minimum((centre + _RADIUS * spread + 0.5).astype(int), source)
    at = np.arange(source)
    inside = (at >= first[:, None]) & (at < last[:, None])
    weights = np.where(inside, _kernel((at - centre[:, None] + 0.5) / spread), 0.0)
    weights /= weights.sum(axis=1, keepdims=True)
    digits = 0
    while digits < _MOST_DIGITS and int(0.5 + np.ldexp(weights.max(), digits + 1)) < 2**_WEIGHT_BITS:
        digits += 1
    scaled = np.ldexp(weights, digits)
    # Halves are rounded away from zero.
    return np.trunc(scaled + np.copysign(0.5, scaled)), digits, first, last


def _kernel(x: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    x = np.abs(x)
    near = ((_A + 2.0) * x - (_A + 3.0)) * x * x + 1.0
    far = _A * (((x - 5.0) * x + 8.0) * x - 4.0)
    return np.where(x < 1.0, near, np.where(x < _RADIUS, far, 0.0))
