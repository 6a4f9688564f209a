"""BLEU as COCO captions are scored: Papineni et al. 2002 with the closest reference length."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Integer

from bvl.errors import DataError
from bvl.metrics.caption_text import check_pairs, ngram_counts

# What pycocoevalcap adds, so that its values come out also where nothing matches.
_TINY, _SMALL = 1e-15, 1e-9


def bleu_statistics(
    hypotheses: Sequence[Sequence[str]],
    references: Sequence[Sequence[Sequence[str]]],
    *,
    max_n: int = 4,
) -> Integer[np.ndarray, "n s"]:
    """Counts whose sums give BLEU: words, reference words, matched n-grams and n-grams for n = 1..max_n.

    s = 2 + 2 max_n. An n-gram matches at most as often as it occurs in the one reference that has it most
    often (clipping); the reference length is the closest one, the shorter of two equally close (Papineni et
    al. 2002, section 2). Sums over any rows go to `bleu`, and `bootstrap_sums` resamples them. Raises
    DataError for strings instead of tokens, a hypothesis without reference, or max_n below 1.
    """
    if max_n < 1:
        raise DataError(f"max_n={max_n}: n-grams have at least 1 word")
    check_pairs(hypotheses, references)
    counts = np.zeros((len(hypotheses), 2 + 2 * max_n), np.int64)
    for row, words, several in zip(counts, hypotheses, references, strict=True):
        allowed = ngram_counts([], max_n)
        for reference in several:
            allowed |= ngram_counts(reference, max_n)
        row[0] = len(words)
        row[1] = min((abs(len(reference) - len(words)), len(reference)) for reference in several)[1]
        for gram, count in (ngram_counts(words, max_n) & allowed).items():
            row[1 + len(gram)] += count
        row[2 + max_n :] = [max(0, len(words) - n) for n in range(max_n)]
    return counts


def bleu(statistics: Integer[np.ndarray, "*rows s"]) -> Float[np.ndarray, "*rows max_n"]:
    """BLEU-1..max_n from `bleu_statistics`: of each caption, or of a corpus from the sum of its rows.

    BLEU-n = min(1, exp(1 - r/h)) (prod_{k<=n} matched_k / all_k)^(1/n), in 0..1, with r the reference words
    and h the words (Papineni et al. 2002, section 2.3). The corpus value is not the mean of the captions'
    values.
    """
    statistics = np.asarray(statistics, np.float64)
    max_n = statistics.shape[-1] // 2 - 1
    written, wanted = statistics[..., :1], statistics[..., 1:2]
    matched, total = statistics[..., 2 : 2 + max_n], statistics[..., 2 + max_n :]
    precision = np.cumprod((matched + _TINY) / (total + _SMALL), axis=-1)
    ratio = (written + _TINY) / (wanted + _SMALL)
    brevity = np.exp(np.minimum(1 - 1 / ratio, 0))
    return brevity * precision ** (1 / np.arange(1, max_n + 1))
