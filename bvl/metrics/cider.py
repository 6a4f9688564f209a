"""CIDEr-D: consensus of a caption with its references, n-grams weighted by how rare they are."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from bvl.errors import DataError
from bvl.metrics.caption_text import check_pairs, check_tokens, ngram_counts


@dataclasses.dataclass(frozen=True)
class DocumentFrequencies:
    """In how many of `num_documents` images an n-gram occurs in some reference.

    Raises DataError when an n-gram occurs in more documents than there are.
    """

    counts: Mapping[tuple[str, ...], int]
    num_documents: int

    def __post_init__(self):
        if max(self.counts.values(), default=0) > self.num_documents:
            raise DataError(f"an n-gram occurs in more than num_documents={self.num_documents} documents")


def document_frequencies(
    references: Sequence[Sequence[Sequence[str]]], *, max_n: int = 4
) -> DocumentFrequencies:
    """`DocumentFrequencies` of the references of a set of images, to score a part of it or one image."""
    counts: collections.Counter[tuple[str, ...]] = collections.Counter()
    for several in references:
        check_tokens(several)
        counts.update(set().union(*(ngram_counts(words, max_n) for words in several)))
    return DocumentFrequencies(counts, len(references))


def cider_d(
    hypotheses: Sequence[Sequence[str]],
    references: Sequence[Sequence[Sequence[str]]],
    *,
    max_n: int = 4,
    sigma: float = 6.0,
    frequencies: DocumentFrequencies | None = None,
) -> Float[np.ndarray, " n"]:
    """CIDEr-D per caption, 0..10; the corpus value is the mean (published tables often show it times 100).

    With g(c) the vector of count x (log images - log max(1, images with the n-gram)) of a caption's n-grams,

        10 / (N m) sum_{n<=N, j<=m} exp(-(l_c - l_j)^2 / 2 sigma^2) cos_n(c, j)
        cos_n(c, j) = min(g_n(c), g_n(j)) . g_n(j) / (|g_n(c)| |g_n(j)|)

    over the m references (CIDEr-D of Vedantam et al. 2015). l counts bigrams, as pycocoevalcap does: words
    less one. `frequencies` default to those of the references given, so a value belongs to its set; over a
    single image every weight is log 1 and the score 0. An interval from `bootstrap_mean` holds the
    frequencies fixed. Raises DataError for strings instead of tokens, a hypothesis without reference, or
    sigma or max_n out of range.
    """
    if max_n < 1 or not sigma > 0:
        raise DataError(f"max_n={max_n}, sigma={sigma}: n-grams have at least 1 word and sigma is positive")
    check_pairs(hypotheses, references)
    if frequencies is None:
        frequencies = document_frequencies(references, max_n=max_n)
    scores = np.zeros(len(hypotheses))
    for i, (words, several) in enumerate(zip(hypotheses, references, strict=True)):
        weights, norms = _weigh(words, max_n, frequencies)
        for reference in several:
            ref_weights, ref_norms = _weigh(reference, max_n, frequencies)
            products = np.zeros(max_n)
            for gram, weight in weights.items():
                other = ref_weights.get(gram, 0.0)
                products[len(gram) - 1] += min(weight, other) * other
            scale = norms * ref_norms
            cosines = np.divide(products, scale, out=np.zeros(max_n), where=scale > 0)
            difference = max(len(words) - 1, 0) - max(len(reference) - 1, 0)
            scores[i] += cosines.mean() * math.exp(-(difference**2) / (2 * sigma**2)) / len(several)
    return 10 * scores


def _weigh(words, max_n, frequencies) -> tuple[dict[tuple[str, ...], float], np.ndarray]:
    """Weight of each n-gram, and the Euclidean norm for each n."""
    log_images = math.log(max(1, frequencies.num_documents))
    weights, squares = {}, np.zeros(max_n)
    for gram, count in ngram_counts(words, max_n).items():
        weights[gram] = count * (log_images - math.log(max(1, frequencies.counts.get(gram, 0))))
        squares[len(gram) - 1] += weights[gram] ** 2
    return weights, np.sqrt(squares)
