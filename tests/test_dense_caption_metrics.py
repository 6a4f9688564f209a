"""Dense-caption mAP: place and words must both be right."""

import numpy as np
import pytest

from bvl.errors import DataError
from bvl.metrics.caption_text import tokenize
from bvl.metrics.dense_captions import TEXT_THRESHOLDS, dense_caption_map, match_dense_captions
from bvl.metrics.rouge import rouge_l

IOUS = [np.array([[0.65, 0.0], [0.0, 0.45]]), np.zeros((0, 1))]
SCORES = [[0.9, 0.8], []]
REFERENCES = [["a small round nodule", "clear left lung"], ["a nodule"]]


def rouge(text, reference):
    return rouge_l([tokenize(text)], [[tokenize(reference)]])[0]


def score(texts, **options):
    return match_dense_captions(IOUS, SCORES, [texts, []], REFERENCES, text_score=rouge, **options)


def test_mean_over_places_and_words():
    right = ["a small round nodule", "clear left lung"]
    # One of three found (IoU 0.5, 0.6): 34 of 101 recalls; two (0.3, 0.4): 67 of 101; none at 0.7.
    expected = (2 * 34 + 2 * 67 + 0) / 101 / 5
    assert dense_caption_map(score(right)) == pytest.approx(expected)
    # The second caption shares no word: right at the text threshold of 0 alone, and a miss that follows the hit.
    wrong = (5 * (4 * 34) / 101 / 5 + expected) / 6
    assert dense_caption_map(score([right[0], "fracture"])) == pytest.approx(wrong)
    # Words of one box at the place of the other count for nothing.
    assert dense_caption_map(score(right[::-1], text_thresholds=[0.25])) == 0


def test_a_sample_of_images():
    matches = score(["a small round nodule", "clear left lung"])
    assert len(matches) == len(TEXT_THRESHOLDS)
    assert dense_caption_map(matches, np.array([0, 0])) == pytest.approx((2 * 1 + 2 * 51 / 101 + 0) / 5)
    assert dense_caption_map(matches, np.array([1, 1])) == 0


def test_texts_are_compared_once_and_only_where_boxes_meet():
    seen = []

    def agreement(text, reference):
        seen.append((text, reference))
        return 1.0

    match_dense_captions(IOUS, SCORES, [["x", "y"], []], REFERENCES, text_score=agreement)
    assert seen == [("x", REFERENCES[0][0]), ("y", REFERENCES[0][1])]


def test_bad_input():
    with pytest.raises(DataError, match="outside 0..1"):
        match_dense_captions(IOUS, SCORES, [["x", "y"], []], REFERENCES, text_score=lambda a, b: 3.0)
    with pytest.raises(DataError, match="image 0 has 1 predicted"):
        score(["x"])
