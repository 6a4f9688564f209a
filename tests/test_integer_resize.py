"""Resizing as PyTorch does it: to the bit where torch is there, by its definition where it is not."""

import numpy as np
import pytest

from bvl.data.integer_resize import resize_bicubic

# (height, width) -> (width, height)
SIZES = [
    ((301, 427), (317, 224)),
    ((97, 61), (224, 224)),
    ((40, 50), (29, 13)),
    ((7, 9), (5, 30)),
    ((33, 80), (80, 12)),
]


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize("size, target", SIZES)
@pytest.mark.parametrize("channels", [(), (3,)])
def test_bits_of_torch(size, target, channels):
    torch = pytest.importorskip("torch")
    pixels = noise(*size, *channels)
    planes = torch.from_numpy(pixels.reshape(*size, -1)).permute(2, 0, 1)[None]
    planes = torch.nn.functional.interpolate(planes, target[::-1], mode="bicubic", antialias=True)
    expected = planes[0].permute(1, 2, 0).numpy().reshape(*target[::-1], *channels)
    np.testing.assert_array_equal(resize_bicubic(pixels, target), expected)


def test_a_row_against_a_loop():
    row = noise(1, 23)
    out = resize_bicubic(row, (9, 1))[0]

    def kernel(x):
        x = abs(x)
        if x < 1:
            return 1.5 * x**3 - 2.5 * x**2 + 1
        return -0.5 * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0

    scale = 23 / 9
    for i, got in enumerate(out):
        weights = [kernel((j + 0.5 - scale * (i + 0.5)) / scale) for j in range(23)]
        exact = np.dot(weights, row[0]) / sum(weights)
        assert abs(float(got) - np.clip(exact, 0, 255)) < 0.51


def test_a_flat_picture_stays_flat():
    pixels = np.full((31, 17, 3), 201, np.uint8)
    np.testing.assert_array_equal(resize_bicubic(pixels, (40, 11)), np.full((11, 40, 3), 201, np.uint8))
