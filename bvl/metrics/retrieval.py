"""Image-text retrieval with many-to-many positives: recall at k in both directions, beside its chance level."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence

import numpy as np
import scipy.sparse
from jaxtyping import Float, Integer

from bvl.errors import DataError


@dataclasses.dataclass(frozen=True)
class Retrieval:
    """What `recall_at_k` found.

    `rates`: `i2t_r1`, `t2i_r1`, ... in 0..1, each with `..._chance`, and `i2t_queries`, `t2i_queries` (queries
    that have a positive). `hits`: `i2t_r1` -> one value a query, 1 hit, 0 miss, NaN where the query has no
    positive and is left out of the rate; `bootstrap_mean` takes these arrays as they are.
    """

    rates: dict[str, float]
    hits: dict[str, Float[np.ndarray, " queries"]]


def recall_at_k(
    image_embed: Float[np.ndarray, "n d"],
    text_embed: Float[np.ndarray, "m d"],
    image_groups: Sequence[Hashable | Sequence[Hashable]],
    text_groups: Sequence[Hashable | Sequence[Hashable]],
    *,
    ks: Sequence[int] = (1, 5, 10),
    chunk_rows: int = 512,
) -> Retrieval:
    """Share of queries with at least one positive among the k highest inner products, image to text and back.

    Image i and text j are a positive pair when they share a group id. A row's groups are one id (int or string)
    or a list, tuple or set of ids, so that any many-to-many relation can be said without an [n, m] mask.

    Ties are broken against the model: a negative whose score equals a positive's ranks before it, so that a
    model whose embeddings collapsed to a point scores 0. Scores that are not a number count as worst. Chance is
    the probability that a random order hits, 1 - C(N-P, k) / C(N, k), averaged over the queries.

    Memory is chunk_rows x max(n, m). Raises DataError when the numbers of rows disagree or a k is below 1.
    """
    image_embed, text_embed = np.asarray(image_embed), np.asarray(text_embed)
    if image_embed.ndim != 2 or text_embed.ndim != 2 or image_embed.shape[1] != text_embed.shape[1]:
        raise DataError(
            f"embeddings must be [n, d] and [m, d], got {image_embed.shape} and {text_embed.shape}"
        )
    for what, embed, groups in (("image", image_embed, image_groups), ("text", text_embed, text_groups)):
        if len(embed) != len(groups):
            raise DataError(f"{len(embed)} {what} embeddings but groups for {len(groups)} {what} rows")
    if not ks or min(ks) < 1:
        raise DataError(f"ks={tuple(ks)}: give ranks of 1 or more")

    codes: dict[Hashable, int] = {}
    image_ids, text_ids = _code(image_groups, codes), _code(text_groups, codes)
    image_in, text_in = _incidence(image_ids, len(codes)), _incidence(text_ids, len(codes))

    rates: dict[str, float] = {}
    hits: dict[str, np.ndarray] = {}
    directions = (
        ("i2t", image_embed, text_embed, image_in, text_in),
        ("t2i", text_embed, image_embed, text_in, image_in),
    )
    for name, queries, targets, query_in, target_in in directions:
        negatives_before, num_positives = _negatives_before(queries, targets, query_in, target_in, chunk_rows)
        answerable = num_positives > 0
        rates[f"{name}_queries"] = float(answerable.sum())
        for k in ks:
            key = f"{name}_r{k}"
            hits[key] = np.where(answerable, negatives_before < k, np.nan).astype(np.float32)
            rates[key] = _mean(hits[key][answerable])
            rates[f"{key}_chance"] = _mean(chance_of_hit(num_positives[answerable], len(targets), k))
    return Retrieval(rates=rates, hits=hits)


def chance_of_hit(
    num_positives: Integer[np.ndarray, " queries"], num_targets: int, k: int
) -> Float[np.ndarray, " queries"]:
    """Probability that a random order of the targets has a positive in its first k: 1 - C(N-P, k) / C(N, k)."""
    negatives = num_targets - np.asarray(num_positives, np.float64)
    miss = np.ones_like(negatives)
    # The ratio of binomials as a product of k factors cannot overflow.
    for drawn in range(min(k, num_targets)):
        miss *= np.maximum(negatives - drawn, 0) / (num_targets - drawn)
    return 1.0 - miss


def _negatives_before(queries, targets, query_in, target_in, chunk_rows):
    """For each query the number of negatives that rank before its best positive, and its number of positives."""
    targets_t = targets.astype(np.float64).T
    target_in_t = target_in.T.tocsr()
    before = np.zeros(len(queries), np.int64)
    num_positives = np.zeros(len(queries), np.int64)
    for start in range(0, len(queries), chunk_rows):
        rows = slice(start, start + chunk_rows)
        # A matrix product sums equal rows in different orders in different blocks. Computed in double and rounded
        # to single, equal embeddings have equal scores and count as the ties they are.
        scores = (queries[rows].astype(np.float64) @ targets_t).astype(np.float32)
        positive = (query_in[rows] @ target_in_t).toarray() > 0
        unknown = np.isnan(scores)
        best = np.max(scores, axis=1, initial=-np.inf, where=positive & ~unknown)
        before[rows] = (~positive & (unknown | (scores >= best[:, None]))).sum(axis=1)
        num_positives[rows] = positive.sum(axis=1)
    return before, num_positives


def _code(groups, codes: dict[Hashable, int]) -> list[list[int]]:
    several = (list, tuple, set, frozenset, np.ndarray)
    rows = (group if isinstance(group, several) else (group,) for group in groups)
    return [[codes.setdefault(one, len(codes)) for one in row] for row in rows]


def _incidence(ids: list[list[int]], num_groups: int) -> scipy.sparse.csr_array:
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    indices = np.fromiter((one for row in ids for one in row), np.int64, int(indptr[-1]))
    ones = np.ones(len(indices), np.int32)
    return scipy.sparse.csr_array((ones, indices, indptr), shape=(len(ids), num_groups))


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values, dtype=np.float64)) if len(values) else float("nan")
