"""Box metrics: known overlaps, hits that bootstrap, suppression against a plain twin."""

import numpy as np
import pytest

from bvl.errors import DataError
from bvl.metrics.boxes import accuracy_at, hits_at, iou, non_maximum_suppression, pairwise_iou

BOXES = np.array([[0, 0, 4, 4], [2, 0, 6, 4], [0, 0, 4, 2], [8, 8, 9, 9], [5, 5, 5, 5]], float)


def test_known_overlaps():
    expected = [[1, 1 / 3, 0.5, 0, 0], [1 / 3, 1, 0.2, 0, 0], [0.5, 0.2, 1, 0, 0], [0, 0, 0, 1, 0], [0] * 5]
    np.testing.assert_allclose(pairwise_iou(BOXES, BOXES), expected)
    np.testing.assert_allclose(iou(BOXES[:3], BOXES[[0, 0, 1]]), [1, 1 / 3, 0.2])


def test_empty_and_wrong_boxes():
    assert pairwise_iou([], BOXES).shape == (0, 5)
    with pytest.raises(DataError, match="5 boxes but 3"):
        iou(BOXES, BOXES[:3])
    with pytest.raises(DataError, match=r"rows \[x0"):
        pairwise_iou(BOXES[:, :3], BOXES)


def test_a_hit_is_at_or_above_the_threshold():
    np.testing.assert_array_equal(hits_at([0.5, 0.49, np.nan, 1.0], 0.5), [1, 0, np.nan, 1])
    assert accuracy_at([0.5, 0.49, np.nan, 1.0], 0.5) == pytest.approx(2 / 3)
    assert np.isnan(accuracy_at([], 0.5))


def naive_suppression(boxes, scores, threshold, labels):
    kept = []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        if all(labels[i] != labels[k] or pairwise_iou(boxes[[i]], boxes[[k]]) <= threshold for k in kept):
            kept.append(i)
    return kept


@pytest.mark.parametrize("num_labels", [1, 3])
def test_suppression_equals_a_plain_twin(num_labels):
    rng = np.random.default_rng(0)
    low = rng.random((60, 2))
    boxes = np.concatenate([low, low + 0.1 + 0.5 * rng.random((60, 2))], 1)
    scores, labels = rng.integers(0, 9, 60) / 9, rng.integers(0, num_labels, 60)
    kept = non_maximum_suppression(boxes, scores, iou_threshold=0.3, labels=labels.tolist())
    assert kept.tolist() == naive_suppression(boxes, scores, 0.3, labels)
    assert 5 < len(kept) < 60


def test_suppression_of_nothing_and_of_nan():
    assert len(non_maximum_suppression([], [])) == 0
    with pytest.raises(DataError, match="NaN"):
        non_maximum_suppression(BOXES, [1, 2, np.nan, 3, 4])
    with pytest.raises(DataError, match="5 boxes"):
        non_maximum_suppression(BOXES, [1, 2])
