"""RoIAlign and averages over regions against plain loops, in values and gradients."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import fast_compilation  # noqa: F401

from bvl.models.roi_align import box_coverage, mask_coverage, region_mean, roi_align

pytestmark = pytest.mark.usefixtures("fast_compilation")

jitted = jax.jit(roi_align, static_argnames=("output_size", "sampling_ratio"))

GOLDEN = Path(__file__).parent / "golden" / "roi_align.json"
# Against float64: sums of a few dozen products of values around 1 in float32.
TOLERANCE = dict(rtol=1e-5, atol=1e-5)


def bilinear(features, y, x):
    """Between the four neighbours of a place in cells; beyond the outermost centres the border goes on."""
    h, w, _ = features.shape
    y, x = min(max(y, 0.0), h - 1.0), min(max(x, 0.0), w - 1.0)
    y0, x0 = int(y), int(x)
    y1, x1 = min(y0 + 1, h - 1), min(x0 + 1, w - 1)
    dy, dx = y - y0, x - x0
    top = (1 - dx) * features[y0, x0] + dx * features[y0, x1]
    bottom = (1 - dx) * features[y1, x0] + dx * features[y1, x1]
    return (1 - dy) * top + dy * bottom


def naive_roi_align(features, boxes, size, ratio):
    """Box by box, cell by cell, sample by sample, in float64."""
    h, w = features.shape[1:3]
    out = np.zeros((*boxes.shape[:2], *size, features.shape[3]))
    for (image, region, i, j), _ in np.ndenumerate(out[..., 0]):
        x0, y0, x1, y1 = boxes[image, region]
        for a in range(ratio):
            for c in range(ratio):
                y = y0 + (y1 - y0) * (i + (a + 0.5) / ratio) / size[0]
                x = x0 + (x1 - x0) * (j + (c + 0.5) / ratio) / size[1]
                out[image, region, i, j] += bilinear(features[image], y * h - 0.5, x * w - 0.5) / ratio**2
    return out


def a_case():
    """Two images of three boxes: inside, smaller than a cell, over two borders; without width, almost all, outside."""
    boxes = [
        [[0.13, 0.21, 0.72, 0.87], [0.41, 0.52, 0.46, 0.57], [-0.31, 0.43, 0.38, 1.29]],
        [[0.33, 0.11, 0.33, 0.91], [0.01, 0.02, 0.98, 0.97], [1.12, 0.2, 1.4, 0.6]],
    ]
    return np.random.default_rng(0).normal(size=(2, 4, 5, 2)), np.array(boxes)


@pytest.mark.parametrize("size, ratio", [((1, 1), 1), ((2, 3), 2), ((3, 1), 3)])
def test_equal_to_loops_in_values_and_gradients(size, ratio):
    features, boxes = a_case()
    weights = np.random.default_rng(1).normal(size=(2, 3, *size, 2))

    def fast(features, boxes):
        out = roi_align(features, boxes, output_size=size, sampling_ratio=ratio)
        return (weights * out).sum(), out

    inputs = jnp.asarray(features, jnp.float32), jnp.asarray(boxes, jnp.float32)
    (_, out), (of_features, of_boxes) = jax.jit(jax.value_and_grad(fast, (0, 1), has_aux=True))(*inputs)
    np.testing.assert_allclose(out, naive_roi_align(features, boxes, size, ratio), **TOLERANCE)

    def slope(inputs, which, place, step):
        ends = []
        for sign in (1, -1):
            moved = [x.copy() for x in inputs]
            moved[which][place] += sign * step
            ends.append((weights * naive_roi_align(*moved, size, ratio)).sum())
        return (ends[0] - ends[1]) / (2 * step)

    # Linear in the features; piecewise quadratic in the boxes, so that differences over a tiny step are exact.
    for place in [(0, 0, 0, 0), (0, 3, 1, 1), (0, 2, 2, 0), (1, 0, 4, 1), (1, 2, 1, 0)]:
        expected = slope((features, boxes), 0, place, 1.0)
        np.testing.assert_allclose(np.asarray(of_features)[place], expected, **TOLERANCE, err_msg=str(place))
    for place in np.ndindex(boxes.shape):
        expected = slope((features, boxes), 1, place, 1e-6)
        np.testing.assert_allclose(
            np.asarray(of_boxes)[place], expected, rtol=1e-4, atol=1e-4, err_msg=str(place)
        )
    assert not np.asarray(of_boxes)[1, 2, [0, 2]].any(), "beside the image nothing changes to the right"


def test_equal_to_torchvision():
    """`torchvision.ops.roi_align(aligned=True)` on boxes whose samples lie in the image, where both define the same."""
    case = json.loads(GOLDEN.read_text())
    features, boxes = np.float32(case["features"]), np.float32(case["boxes"])
    for size, ratio, expected in case["results"]:
        out = jitted(features, boxes, output_size=tuple(size), sampling_ratio=ratio)
        np.testing.assert_allclose(out, np.float32(expected), **TOLERANCE)


def test_in_half_precision():
    features, boxes = a_case()
    out = jitted(jnp.asarray(features, jnp.bfloat16), jnp.asarray(boxes, jnp.float32), output_size=(2, 2))
    assert out.dtype == jnp.bfloat16
    expected = naive_roi_align(features, boxes, (2, 2), 2)
    # Features, weights and both products are rounded to 8 bits.
    np.testing.assert_allclose(np.float32(out), expected, atol=4 * 2**-8 * np.abs(features).max())


def test_coverage_of_boxes_and_masks():
    """Against counting fine pixels."""
    fine, grid = 120, (3, 4)
    boxes = np.array(
        [[0.1, 0.2, 0.75, 0.9], [0.25, 1 / 3, 0.5, 2 / 3], [-0.5, 0.5, 0.3, 1.5], [0.4, 0.2, 0.4, 0.9]]
    )
    centre = (np.arange(fine) + 0.5) / fine
    inside = [
        (centre >= y0)[:, None] & (centre < y1)[:, None] & (centre >= x0) & (centre < x1)
        for x0, y0, x1, y1 in boxes
    ]
    expected = np.array(inside).reshape(4, 3, fine // 3, 4, fine // 4).mean((2, 4))
    np.testing.assert_allclose(
        jax.jit(box_coverage, static_argnums=1)(jnp.float32(boxes), grid), expected, atol=1e-6
    )
    shape = jax.eval_shape(lambda b: box_coverage(b, grid), jnp.float32(boxes).reshape(2, 2, 4)).shape
    assert shape == (2, 2, *grid)

    # Finer than the grid, as fine, coarser, and of sides that do not divide.
    rng = np.random.default_rng(0)
    for size in [(6, 8), (3, 4), (1, 2), (5, 6)]:
        masks = rng.random((2, 3, *size)) < 0.5
        large = np.kron(masks, np.ones((fine // size[0], fine // size[1])))
        expected = large.reshape(2, 3, 3, fine // 3, 4, fine // 4).mean((3, 5))
        np.testing.assert_allclose(
            jax.jit(mask_coverage, static_argnums=1)(jnp.asarray(masks), grid), expected, atol=1e-6
        )


def test_means_over_regions():
    rng = np.random.default_rng(0)
    values, weights = rng.normal(size=(2, 6, 3)), rng.random((2, 4, 6))
    weights[1, 2] = 0
    means = np.asarray(jax.jit(region_mean)(jnp.float32(values), jnp.float32(weights)))
    for image, region in np.ndindex(2, 4):
        if weights[image, region].any():
            expected = np.average(values[image], axis=0, weights=weights[image, region])
            np.testing.assert_allclose(means[image, region], expected, rtol=1e-5, atol=1e-6)
    assert not means[1, 2].any(), "without any weight"
    slopes = jax.jit(jax.grad(lambda w: region_mean(jnp.float32(values), w).sum()))(jnp.float32(weights))
    assert np.isfinite(slopes).all()
    half = jax.eval_shape(region_mean, jnp.asarray(values, jnp.bfloat16), jnp.float32(weights))
    assert half.dtype == jnp.bfloat16
