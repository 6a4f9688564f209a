"""ROUGE-L: the longest common subsequence of a caption and its references (Lin 2004)."""

from __future__ import annotations

import collections
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from bvl.metrics.caption_text import check_pairs


def rouge_l(
    hypotheses: Sequence[Sequence[str]],
    references: Sequence[Sequence[Sequence[str]]],
    *,
    beta: float = 1.2,
) -> Float[np.ndarray, " n"]:
    """F_beta of the longest common subsequence, per caption in 0..1; the corpus value is the mean.

    P = LCS / words of the hypothesis, R = LCS / words of the reference, F = (1 + beta^2) P R / (R + beta^2 P)
    (Lin 2004, equations 2 to 4). P and R are each the greatest over the references, as pycocoevalcap has it,
    so they can come from different ones. An empty caption matches an empty reference only. Raises DataError
    for strings instead of tokens or a hypothesis without reference.
    """
    check_pairs(hypotheses, references)
    scores = np.zeros(len(hypotheses))
    for i, (words, several) in enumerate(zip(hypotheses, references, strict=True)):
        # One empty token for an empty text, as in pycocoevalcap, where "" has the one token "".
        words, several = list(words) or [""], [list(reference) or [""] for reference in several]
        common = [_common_subsequence(words, reference) for reference in several]
        precision = max(common) / len(words)
        recall = max(c / len(reference) for c, reference in zip(common, several, strict=True))
        if precision:
            scores[i] = (1 + beta**2) * precision * recall / (recall + beta**2 * precision)
    return scores


def _common_subsequence(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence, a row of its table as the bits of an int (Hyyro 2004)."""
    where: dict[str, int] = collections.defaultdict(int)
    for i, word in enumerate(a):
        where[word] |= 1 << i
    full = (1 << len(a)) - 1
    # Bit i is 0 where the table's row grows by one at column i.
    row = full
    for word in b:
        matches = row & where.get(word, 0)
        row = ((row + matches) | (row - matches)) & full
    return len(a) - row.bit_count()
