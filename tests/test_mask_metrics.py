"""Mask metrics: known overlaps, the undefined, and instances with tight boxes."""

import numpy as np
import pytest

from bvl.errors import DataError
from bvl.metrics import masks
from bvl.metrics.masks import dice, instances_of, mask_iou, pairwise_mask_iou


def drawn(*rows):
    return np.array([[pixel == "#" for pixel in row] for row in rows])


A, B = drawn("##..", "##..", "...."), drawn(".##.", ".##.", "...#")
EMPTY = np.zeros((3, 4), bool)


def test_dice_and_iou():
    first, second = np.stack([A, A, A, EMPTY]), np.stack([B, A, EMPTY, EMPTY])
    np.testing.assert_allclose(dice(first, second), [4 / 9, 1, 0, np.nan])
    np.testing.assert_allclose(mask_iou(first, second), [2 / 7, 1, 0, np.nan])


@pytest.mark.parametrize("chunk", [2**20, 5])
def test_pairwise_iou(chunk, monkeypatch):
    monkeypatch.setattr(masks, "_CHUNK_PIXELS", chunk)
    np.testing.assert_allclose(
        pairwise_mask_iou([A, B, EMPTY], [B, EMPTY]), [[2 / 7, 0], [1, 0], [0, 0]], rtol=1e-15
    )
    assert pairwise_mask_iou(np.zeros((0, 3, 4), bool), [A]).shape == (0, 1)


def test_wrong_masks():
    with pytest.raises(DataError, match="give bool"):
        dice(A.astype(float), B)
    with pytest.raises(DataError, match="same shape"):
        dice(A, B[:2])
    with pytest.raises(DataError, match="one grid"):
        pairwise_mask_iou([A], [B[:2]])


def test_instances():
    mask = drawn("##..#", "#....", "..###", "#..#.")
    found = instances_of(mask, min_area=2)
    np.testing.assert_array_equal(found.masks.sum((1, 2)), [3, 4])
    np.testing.assert_allclose(found.boxes, [[0, 0, 0.4, 0.5], [0.4, 0.5, 1, 1]])
    assert len(instances_of(mask).masks) == 4  # corners do not connect
    np.testing.assert_array_equal(instances_of(mask).masks.any(0), mask)
    nothing = instances_of(EMPTY)
    assert nothing.masks.shape == (0, 3, 4) and nothing.boxes.shape == (0, 4)
