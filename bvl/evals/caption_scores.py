"""Scores of captions by their words, by the embeddings of a contrastive model, by the findings they state, by length."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Integer, Num

from bvl.evals.base import BOOTSTRAP_SAMPLES, LEVEL, Collector
from bvl.metrics.bleu import bleu, bleu_statistics
from bvl.metrics.bootstrap import Interval, bootstrap_mean, bootstrap_sums
from bvl.metrics.caption_alignment import (
    clip_score,
    near_neighbours,
    ref_clip_score,
    retrieve_in_bags,
    retrieve_in_pools,
)
from bvl.metrics.caption_text import (
    distinct_n,
    length_error,
    length_obeyed,
    num_words,
    tokenize,
    unique_share,
)
from bvl.metrics.cider import cider_d
from bvl.metrics.findings import FindingRules, finding_scores, finding_tables
from bvl.metrics.labeller import Lexicon, Status, label_text
from bvl.metrics.rouge import rouge_l

MAX_N = 4
POOL_SIZE, BAG_SIZE = 500, 10
FINDING_RULES = FindingRules()

# A value for every example, by its name in the per-example rows.
Columns = dict[str, Sequence[Any]]


@dataclasses.dataclass(frozen=True)
class Scores:
    """Where scores go: means and corpus values into `found`, with intervals that resample `groups`."""

    found: Collector
    groups: Sequence[Hashable]
    unit: str

    def mean(self, name: str, values: Num[np.ndarray, " n"], *, chance: float | None = None) -> None:
        """The mean of what is known of the values of the examples; absent where nothing is known."""
        values = np.asarray(values, np.float64)
        known = ~np.isnan(values)
        interval = bootstrap_mean(values, self.groups, **self._options)
        self.found.add(name, values[known].mean() if known.any() else np.nan, interval)
        if chance is not None:
            self.found.add(f"{name}/chance", chance)

    def of_sums(
        self, name: str, values: Num[np.ndarray, "n s"], statistic: Callable[[np.ndarray], float]
    ) -> None:
        """A statistic of the sums of `values` over the examples."""
        interval: Interval = bootstrap_sums(values, statistic, self.groups, **self._options)
        self.found.add(name, statistic(values.sum(0).astype(np.float64)), interval)

    @property
    def _options(self) -> dict[str, Any]:
        return {"num_samples": BOOTSTRAP_SAMPLES, "level": LEVEL, "unit": self.unit}


@dataclasses.dataclass(frozen=True)
class Embeddings:
    """What a contrastive model makes of images and references; `reference_of` names each reference's image.

    bags: the images among which a caption must find its own, from `near_neighbours`.
    """

    image: Float[np.ndarray, "n d"]
    reference: Float[np.ndarray, "m d"]
    reference_of: Integer[np.ndarray, " m"]
    bags: Integer[np.ndarray, "n k"]

    @classmethod
    def of(
        cls,
        image: Float[np.ndarray, "n d"],
        reference: Float[np.ndarray, "m d"],
        reference_of: Integer[np.ndarray, " m"],
    ) -> Embeddings:
        return cls(image, reference, reference_of, near_neighbours(image, bag_size=BAG_SIZE))


@dataclasses.dataclass(frozen=True)
class Truth:
    """What is true of an image: a status for its findings, and the lexicon that reads captions of it."""

    status: Mapping[str, Status]
    lexicon: Lexicon


def text_scores(captions: Sequence[str], references: Sequence[Sequence[str]], scores: Scores) -> Columns:
    """cider_d, bleu1..bleu4, rouge_l, mean_length in words, distinct1, distinct2, unique."""
    words = [tokenize(caption) for caption in captions]
    wanted = [[tokenize(reference) for reference in several] for several in references]
    cider = cider_d(words, wanted)
    scores.mean("cider_d", cider)
    statistics = bleu_statistics(words, wanted, max_n=MAX_N)
    for n in range(1, MAX_N + 1):
        scores.of_sums(f"bleu{n}", statistics, lambda sums, n=n: float(bleu(sums)[n - 1]))
    scores.mean("rouge_l", rouge_l(words, wanted))
    lengths = np.array([num_words(caption) for caption in captions])
    scores.mean("mean_length", lengths)
    for n in (1, 2):
        scores.found.add(f"distinct{n}", distinct_n(words, n))
    scores.found.add("unique", unique_share(words))
    return {"cider_d": cider.tolist(), "length": lengths.tolist()}


def alignment_scores(
    caption: Float[np.ndarray, "n d"], embeddings: Embeddings, scores: Scores, *, seed: int
) -> Columns:
    """clipscore, ref_clipscore, self_retrieval_r1 in pools of 500 and bag_r1 among 10 look-alikes.

    caption: embeddings of the captions. seed: of the pools.
    """
    image = embeddings.image
    clip = clip_score(image, caption)
    scores.mean("clipscore", clip)
    scores.mean(
        "ref_clipscore", ref_clip_score(image, caption, embeddings.reference, embeddings.reference_of)
    )
    pool = retrieve_in_pools(image, caption, pool_size=POOL_SIZE, seed=seed)
    scores.mean("self_retrieval_r1", pool.hit, chance=pool.chance_hit)
    bag = retrieve_in_bags(image, caption, embeddings.bags)
    scores.mean("bag_r1", bag.hit, chance=bag.chance_hit)
    return {
        "clipscore": clip.tolist(),
        "self_retrieval_r1": pool.hit.tolist(),
        "self_retrieval_rank": pool.rank.tolist(),
        "bag_r1": bag.hit.tolist(),
    }


def stated_findings(captions: Sequence[str], truths: Sequence[Truth], scores: Scores) -> Columns:
    """finding_precision, finding_recall, finding_f1 (micro), invented_rate and wrong_negation_rate of the captions."""
    stated = [label_text(text, truth.lexicon) for text, truth in zip(captions, truths, strict=True)]
    names = sorted({name for truth in truths for name in truth.lexicon.findings})
    tables = finding_tables(stated, [truth.status for truth in truths], names)
    # Micro averages need no more than the sums over the findings.
    over_findings = tables.sum(1).reshape(len(tables), 16)

    def value(field: str) -> Callable[[np.ndarray], float]:
        return lambda sums: getattr(finding_scores(sums.reshape(1, 4, 4), FINDING_RULES), field)

    for field in ("precision", "recall", "f1"):
        scores.of_sums(f"finding_{field}", over_findings, value(field))
    for field in ("invented_rate", "wrong_negation_rate"):
        scores.of_sums(field, over_findings, value(field))
    return {"stated": [dict(sorted(labels.items())) for labels in stated]}


def length_scores(captions: Sequence[str], asked: Sequence[int], scores: Scores) -> Columns:
    """length_within_1: share of captions at most a word off; length_error: mean of words written minus asked."""
    wanted = np.asarray(asked, np.float64)
    scores.mean("length_within_1", length_obeyed(wanted, captions))
    scores.mean("length_error", length_error(wanted, captions))
    return {"asked_length": list(asked)}
