"""Whether a thing is there at all: calibrated p-values, false alarms, and the risk of answering."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Num

from bvl.errors import DataError


def conformal_p_values(
    scores: Float[np.ndarray, "*n"], negatives: Float[np.ndarray, " m"]
) -> Float[np.ndarray, "*n"]:
    """p = (1 + number of negatives with a score >= s) / (1 + m) of every score s.

    `negatives` are scores of m held-out cases where the thing is absent. If a new absent case is exchangeable with
    them, P(p <= a) <= a for every a, whatever the model (Vovk, Gammerman and Shafer 2005; inductive conformal
    anomaly detection, Laxhammar and Falkman 2015): calling things found where p <= a gives false alarms at a rate
    of at most a. No p is below 1 / (1 + m). Raises DataError for NaN or no negatives.
    """
    scores, negatives = _known(scores, "scores"), np.sort(_known(negatives, "negatives").reshape(-1))
    if not len(negatives):
        raise DataError("no negatives: p-values need scores of held-out cases where the thing is absent")
    reached = len(negatives) - np.searchsorted(negatives, scores, side="left")
    return (1 + reached) / (1 + len(negatives))


def false_found_rate_at(
    positives: Float[np.ndarray, " n"], negatives: Float[np.ndarray, " m"], *, found_rate: float = 0.9
) -> float:
    """Share of negatives at or above the highest threshold that finds `found_rate` of the positives or more.

    The false positive rate at a fixed true positive rate. NaN without positives or negatives. Raises DataError for
    NaN or a rate outside (0, 1].
    """
    positives, negatives = _known(positives, "positives"), _known(negatives, "negatives")
    if not 0 < found_rate <= 1:
        raise DataError(f"found_rate={found_rate}: give a share above 0 and up to 1")
    if not len(positives) or not len(negatives):
        return float("nan")
    # 0.9 * 10 is a hair above 9 on some machines' paths; the hair must not ask for a tenth positive.
    needed = int(np.ceil(found_rate * len(positives) - 1e-9))
    threshold = np.sort(positives)[len(positives) - needed]
    return float((negatives >= threshold).mean())


def risk_coverage(
    confidence: Float[np.ndarray, " n"], correct: Num[np.ndarray, " n"] | Bool[np.ndarray, " n"]
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """(coverage, risk): error rate among the k most confident answers, k = 1 ... n (El-Yaniv and Wiener 2010).

    Answers of equal confidence come in random order; the risk is its expectation. `correct` may lie between 0 and
    1. Raises DataError for NaN or different lengths.
    """
    confidence, correct = _known(confidence, "confidence"), _known(correct, "correct")
    if confidence.shape != correct.shape or confidence.ndim != 1:
        raise DataError(
            f"confidence {confidence.shape} and correct {correct.shape}: give one of each an answer"
        )
    _, level, sizes = np.unique(-confidence, return_inverse=True, return_counts=True)
    wrong_share = np.bincount(level, weights=1.0 - correct, minlength=len(sizes)) / sizes
    answered = np.arange(1, len(confidence) + 1)
    return answered / max(len(confidence), 1), np.cumsum(np.repeat(wrong_share, sizes)) / answered


def area_under_risk_coverage(
    confidence: Float[np.ndarray, " n"], correct: Num[np.ndarray, " n"] | Bool[np.ndarray, " n"]
) -> float:
    """AURC: the mean risk over the coverages of `risk_coverage`, lower is better; NaN for no answers."""
    _, risk = risk_coverage(confidence, correct)
    return float(risk.mean()) if len(risk) else float("nan")


def _known(values: np.ndarray, what: str) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if np.isnan(values).any():
        raise DataError(f"{what}: a value is NaN and has no order")
    return values
