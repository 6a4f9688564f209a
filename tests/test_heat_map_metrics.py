"""Heat maps: peaks, ties, contrast to noise, unknown pixels."""

import numpy as np
import pytest

from bvl.errors import DataError
from bvl.metrics.heat_maps import contrast_to_noise, inside_boxes, pointing_hit

MAP = np.array([[0.0, 1, 2], [1, 5, 3]])
RIGHT = np.array([[0, 0, 1], [0, 0, 1]], bool)


def test_pixels_of_boxes_by_their_centres():
    boxes = [[0.0, 0.0, 0.25, 1.0], [0.5, 0.5, 1.0, 0.76]]
    np.testing.assert_array_equal(inside_boxes(boxes, (2, 4)), [[1, 0, 0, 0], [1, 0, 1, 1]])
    assert not inside_boxes(np.zeros((0, 4)), (2, 4)).any()


def test_pointing():
    assert pointing_hit(MAP, ~RIGHT) == 1
    assert pointing_hit(MAP, RIGHT) == 0
    assert pointing_hit(np.zeros((2, 3)), RIGHT) == pytest.approx(1 / 3)
    assert pointing_hit(np.where(MAP == 5, np.nan, MAP), RIGHT) == 1
    assert np.isnan(pointing_hit(np.full((2, 3), np.nan), RIGHT))


def test_contrast_to_noise():
    inside, outside = np.array([2.0, 3]), np.array([0.0, 1, 1, 5])
    expected = (inside.mean() - outside.mean()) / np.sqrt(inside.var() + outside.var())
    assert contrast_to_noise(MAP, RIGHT) == pytest.approx(expected)
    assert contrast_to_noise(-MAP, RIGHT) == pytest.approx(expected)
    assert contrast_to_noise(-MAP, RIGHT, signed=True) == pytest.approx(-expected)
    assert contrast_to_noise(7 * MAP + 3, RIGHT) == pytest.approx(expected)


@pytest.mark.parametrize(
    "heat_map, inside", [(MAP, RIGHT | True), (MAP, RIGHT & False), (np.ones((2, 3)), RIGHT)]
)
def test_contrast_without_meaning(heat_map, inside):
    assert np.isnan(contrast_to_noise(heat_map, inside))


def test_shapes_must_agree():
    with pytest.raises(DataError, match="one shape"):
        pointing_hit(MAP, RIGHT.T)
