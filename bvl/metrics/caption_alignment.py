"""How well captions fit their own images, judged by the embeddings of a contrastive model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Integer

from bvl.errors import DataError


def clip_score(
    image_embed: Float[np.ndarray, "n d"], text_embed: Float[np.ndarray, "n d"]
) -> Float[np.ndarray, " n"]:
    """CLIPScore of caption i for image i: 2.5 max(cos, 0) (Hessel et al. 2021, section 3).

    Embeddings have unit norm. The paper embeds captions behind "A photo depicts"; a published number needs
    the same model and words. Raises DataError when shapes disagree or a norm is not 1.
    """
    image_embed, text_embed = _pairs(image_embed, text_embed)
    return 2.5 * np.maximum(np.einsum("nd,nd->n", image_embed, text_embed), 0)


def ref_clip_score(
    image_embed: Float[np.ndarray, "n d"],
    text_embed: Float[np.ndarray, "n d"],
    reference_embed: Float[np.ndarray, "m d"],
    reference_of: Integer[np.ndarray, " m"],
) -> Float[np.ndarray, " n"]:
    """RefCLIPScore: harmonic mean of CLIPScore and the greatest max(cos, 0) of caption and reference.

    Hessel et al. 2021, section 3. Reference j belongs to caption `reference_of[j]`. 0 where either part is 0,
    NaN for a caption without reference. Raises DataError when shapes disagree, a norm is not 1, or an owner
    is no caption.
    """
    to_image = clip_score(image_embed, text_embed)
    text_embed, reference_embed = np.asarray(text_embed, np.float64), _unit(reference_embed, "reference")
    owners = np.asarray(reference_of, np.int64)
    if owners.shape != reference_embed.shape[:1] or reference_embed.shape[1:] != text_embed.shape[1:]:
        raise DataError(
            f"references {reference_embed.shape} of captions {owners.shape}, captions {text_embed.shape}"
        )
    if len(owners) and not 0 <= owners.min() <= owners.max() < len(text_embed):
        raise DataError(f"reference_of names captions outside 0..{len(text_embed) - 1}")
    cosines = np.einsum("md,md->m", text_embed[owners], reference_embed)
    to_reference = np.full(len(text_embed), -np.inf)
    np.maximum.at(to_reference, owners, cosines)
    to_reference = np.where(np.isneginf(to_reference), np.nan, np.maximum(to_reference, 0))
    total = to_image + to_reference
    return np.divide(2 * to_image * to_reference, total, out=np.zeros(len(total)), where=total != 0)


@dataclasses.dataclass(frozen=True)
class SelfRetrieval:
    """Where each caption's own image ranks among `num_candidates` images (it is one); row i is caption i.

    `hit`: probability in 0..1 that it is first. `rank`: mean rank, 1 the best. `reciprocal_rank`: mean of 1 /
    rank. All under a random order of images with equal scores. `bootstrap_mean` takes the arrays as they are.
    `chance_hit`, `chance_reciprocal_rank`: means of a scorer that knows nothing.
    """

    hit: Float[np.ndarray, " n"]
    rank: Float[np.ndarray, " n"]
    reciprocal_rank: Float[np.ndarray, " n"]
    num_candidates: int
    chance_hit: float
    chance_reciprocal_rank: float


def retrieve_in_pools(
    image_embed: Float[np.ndarray, "n d"],
    text_embed: Float[np.ndarray, "n d"],
    *,
    pool_size: int = 500,
    seed: int = 0,
) -> SelfRetrieval:
    """Self-retrieval: caption i must pick image i by inner product out of a random pool (Dessi et al. 2023).

    The images in an order drawn by `seed` are cut into pools, and every caption is asked once, in the pool of
    its image. All pools have exactly `pool_size` images: the last one is filled up with other images, whose
    captions are not asked again. Fewer images are one pool, and `num_candidates` says its size.

    Ties: an image with the same score as the own one stands before or after it with equal chance, so a
    caption shared by t images with equal embeddings hits 1/t, and a collapsed scorer hits at chance. Scores
    that are not a number count as worst for the own image and as best for others. Raises DataError when
    shapes disagree, a norm is not 1, pool_size is below 2, or there are fewer than 2 images.
    """
    image_embed, text_embed = _pairs(image_embed, text_embed)
    num = len(image_embed)
    if pool_size < 2 or num < 2:
        raise DataError(f"pool_size={pool_size} with {num} images: a choice needs at least 2 of each")
    size = min(pool_size, num)
    better, tied = np.zeros(num, np.int64), np.zeros(num, np.int64)
    for asked, pool in _pools(num, size, seed):
        scores = _scores(text_embed[asked], image_embed[pool])
        # The pool begins with the images of the captions that are asked.
        better[asked], tied[asked] = _place(scores, np.arange(len(asked)))
    return _summary(better, tied, size)


def near_neighbours(
    embed: Float[np.ndarray, "n d"], *, bag_size: int = 10, chunk_rows: int = 512
) -> Integer[np.ndarray, "n k"]:
    """For each image itself, then its nearest others by inner product, nearest first: k = bag_size images.

    Equally near ones come in the order of their indices, unknown ones (NaN) last. Fewer images than
    `bag_size` are all in every bag. Memory is chunk_rows x n. Raises DataError for bag_size below 2, fewer
    than 2 images, or a norm that is not 1.
    """
    embed = _unit(embed, "image")
    if bag_size < 2 or len(embed) < 2:
        raise DataError(f"bag_size={bag_size} with {len(embed)} images: a choice needs at least 2 of each")
    size = min(bag_size, len(embed))
    bags = np.empty((len(embed), size), np.int64)
    for start in range(0, len(embed), chunk_rows):
        scores = _scores(embed[start : start + chunk_rows], embed)
        scores[np.isnan(scores)] = -np.inf
        rows = np.arange(len(scores))
        # An image can have exact copies, so that "nearest first" alone would not put it first.
        scores[rows, start + rows] = np.inf
        least = np.partition(scores, -size, axis=1)[:, -size]
        for row in rows:
            candidates = np.flatnonzero(scores[row] >= least[row])
            order = np.argsort(-scores[row, candidates], kind="stable")
            bags[start + row] = candidates[order[:size]]
    return bags


def retrieve_in_bags(
    image_embed: Float[np.ndarray, "n d"],
    text_embed: Float[np.ndarray, "n d"],
    bags: Integer[np.ndarray, "n k"],
    *,
    chunk_rows: int = 512,
) -> SelfRetrieval:
    """Self-retrieval among look-alikes: caption i must pick image i = bags[i, 0] out of the images bags[i].

    After TrueMatch (Gaur et al. 2024), which has fixed bags of similar images; here every image has a bag of
    its own, from `near_neighbours`, so that it works on any data. Ties and unknown scores as in
    `retrieve_in_pools`. Raises DataError when shapes disagree, a norm is not 1, or a bag does not begin with
    its own image or names one twice.
    """
    image_embed, text_embed = _pairs(image_embed, text_embed)
    bags = np.asarray(bags)
    num = len(image_embed)
    if bags.ndim != 2 or len(bags) != num or bags.shape[1] < 2:
        raise DataError(f"bags {bags.shape} for {num} images: give [n, k] with k of 2 or more")
    ordered = np.sort(bags, axis=1)
    if (bags[:, 0] != np.arange(num)).any() or (ordered[:, 1:] == ordered[:, :-1]).any():
        raise DataError("each bag must begin with its own image and name no image twice")
    if bags.min(initial=0) < 0 or bags.max(initial=0) >= num:
        raise DataError(f"bags name images outside 0..{num - 1}")
    better, tied = np.zeros(num, np.int64), np.zeros(num, np.int64)
    for start in range(0, num, chunk_rows):
        rows = slice(start, start + chunk_rows)
        scores = np.einsum("nkd,nd->nk", image_embed[bags[rows]], text_embed[rows]).astype(np.float32)
        better[rows], tied[rows] = _place(scores, np.zeros(len(scores), np.int64))
    return _summary(better, tied, bags.shape[1])


def _pools(num: int, size: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(captions asked, images to choose from), the images of the captions asked first."""
    order = np.random.default_rng(seed).permutation(num)
    for start in range(0, num, size):
        asked = order[start : start + size]
        yield asked, np.concatenate([asked, order[: size - len(asked)]])


def _scores(queries: np.ndarray, targets: np.ndarray) -> np.ndarray:
    # Computed in double and rounded to single, equal embeddings have equal scores wherever they stand.
    return (queries @ targets.T).astype(np.float32)


def _place(scores: np.ndarray, own: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each row the number of other columns that score higher than column `own`, and as high as it."""
    own_scores = np.take_along_axis(scores, own[:, None], axis=1)
    others = np.arange(scores.shape[1]) != own[:, None]
    unknown = np.isnan(scores) | np.isnan(own_scores)
    better = (others & (unknown | (scores > own_scores))).sum(axis=1)
    return better, (others & (scores == own_scores)).sum(axis=1)


def _summary(better: np.ndarray, tied: np.ndarray, num_candidates: int) -> SelfRetrieval:
    # The own image stands at better + 1, ..., better + tied + 1 with equal chance.
    harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, num_candidates + 1))])
    return SelfRetrieval(
        hit=np.where(better == 0, 1 / (tied + 1), 0.0),
        rank=1 + better + tied / 2,
        reciprocal_rank=(harmonic[better + tied + 1] - harmonic[better]) / (tied + 1),
        num_candidates=num_candidates,
        chance_hit=1 / num_candidates,
        chance_reciprocal_rank=float(harmonic[-1] / num_candidates),
    )


def _pairs(image_embed, text_embed) -> tuple[np.ndarray, np.ndarray]:
    image_embed, text_embed = _unit(image_embed, "image"), _unit(text_embed, "text")
    if image_embed.shape != text_embed.shape:
        raise DataError(
            f"image embeddings {image_embed.shape}, text embeddings {text_embed.shape}: give one caption an image"
        )
    return image_embed, text_embed


def _unit(embed, what: str) -> np.ndarray:
    """In double, after a look at the norms; rows that are not a number pass."""
    embed = np.asarray(embed, np.float64)
    if embed.ndim != 2:
        raise DataError(f"{what} embeddings must be [n, d], got {embed.shape}")
    norms = np.linalg.norm(embed, axis=1)
    # bfloat16 embeddings are off by up to 1/256.
    if (np.abs(norms - 1) > 0.01).any():
        row = int(np.argmax(np.abs(norms - 1) > 0.01))
        raise DataError(f"{what} embedding {row} has norm {norms[row]:.4g}; give unit embeddings")
    return embed
