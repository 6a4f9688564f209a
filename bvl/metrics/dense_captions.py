"""Mean average precision of boxes with texts: a caption counts where place and words are both right.

Regions described one by one are judged elsewhere: names by `classification.balanced_accuracy`, lengths by
`caption_text.length_obeyed`, words by the caption metrics.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Integer

from bvl.errors import DataError
from bvl.metrics.detection import Matches, average_precision, match_detections

IOU_THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7)
TEXT_THRESHOLDS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25)


def match_dense_captions(
    ious: Sequence[Float[np.ndarray, "d g"]],
    scores: Sequence[Float[np.ndarray, " d"]],
    texts: Sequence[Sequence[str]],
    references: Sequence[Sequence[str]],
    *,
    text_score: Callable[[str, str], float],
    iou_thresholds: Sequence[float] = IOU_THRESHOLDS,
    text_thresholds: Sequence[float] = TEXT_THRESHOLDS,
    max_detections: int = 100,
) -> tuple[Matches, ...]:
    """Matches of described boxes with true ones, one a text threshold (Johnson et al. 2016, DenseCap, section 4.2).

    All arguments have one entry an image: IoUs of its predicted with its true boxes, scores and texts of the former,
    texts of the latter. `text_score(predicted, reference)` lies in 0..1. A prediction can take a true box where both
    the IoU and the text score reach their thresholds; otherwise as `match_detections`.

    Johnson et al. score texts with METEOR, whose thresholds are the defaults here; METEOR needs WordNet, and values of
    another text score compare with no published ones. They also merge true boxes that overlap by more than 0.7 into
    one with several references, and bind a prediction to the box of greatest IoU before they look at the text. Raises
    DataError for a text score outside 0..1 and what `match_detections` raises.
    """
    if not len(ious) == len(texts) == len(references):
        raise DataError(
            f"dense captions: IoUs of {len(ious)} images but texts of {len(texts)}, {len(references)}"
        )

    @functools.cache
    def agreement(text: str, reference: str) -> float:
        value = float(text_score(text, reference))
        if not 0 <= value <= 1:
            raise DataError(f"text score {value} of {text!r} and {reference!r} is outside 0..1")
        return value

    lowest = min(iou_thresholds)
    similar = []
    for i, matrix in enumerate(ious):
        matrix = np.asarray(matrix)
        if matrix.shape != (len(texts[i]), len(references[i])):
            raise DataError(
                f"dense captions: image {i} has {len(texts[i])} predicted and {len(references[i])} true texts, "
                f"but IoUs {matrix.shape}"
            )
        similar.append(np.full(matrix.shape, -1.0))
        for d, g in np.argwhere(matrix >= lowest):
            similar[i][d, g] = agreement(texts[i][d], references[i][g])
    one_class = [[""] * len(row) for row in texts], [[""] * len(row) for row in references]
    return tuple(
        match_detections(
            [np.where(s >= threshold, matrix, -1.0) for matrix, s in zip(ious, similar, strict=True)],
            scores,
            *one_class,
            thresholds=iou_thresholds,
            max_detections=max_detections,
        )
        for threshold in text_thresholds
    )


def dense_caption_map(
    matches: Sequence[Matches], images: Integer[np.ndarray, " rows"] | None = None
) -> float:
    """Mean AP over all pairs of IoU and text threshold, of all images or of a bootstrap sample of them."""
    return float(np.mean([average_precision(m, images).mean for m in matches]))
