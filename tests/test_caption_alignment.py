"""CLIPScore and self-retrieval against hand-computed values and a brute-force twin."""

import itertools

import numpy as np
import pytest

from bvl.errors import DataError
from bvl.metrics.caption_alignment import (
    _pools,
    clip_score,
    near_neighbours,
    ref_clip_score,
    retrieve_in_bags,
    retrieve_in_pools,
)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def unit(array):
    array = np.asarray(array, np.float32)
    return array / np.linalg.norm(array, axis=-1, keepdims=True)


def at(*cosines):
    """Unit vectors at these cosines from (1, 0)."""
    return np.array([[c, np.sqrt(1 - c * c)] for c in cosines])


# --- CLIPScore


def test_clip_score_by_hand():
    images = np.array([[1.0, 0.0]] * 3)
    np.testing.assert_allclose(clip_score(images, at(1, 0.4, -0.5)), [2.5, 1.0, 0.0], atol=1e-12)


def test_ref_clip_score_by_hand():
    images = np.array([[1.0, 0.0]] * 4)
    captions = at(0.4, 0.4, 0.4, -0.4)
    # Caption 0: references at cosines 1 and -1, the better counts: 2 * 1 * 1 / (1 + 1). Caption 1: none.
    # Caption 2: the reference is opposite. Caption 3: the image is.
    references = np.stack([captions[0], -captions[0], -captions[2], captions[3]])
    found = ref_clip_score(images, captions, references, np.array([0, 0, 2, 3]))
    np.testing.assert_allclose(found, [1.0, np.nan, 0.0, 0.0], atol=1e-12)
    half = ref_clip_score(images[:1], at(1.0), at(0.5), np.array([0]))
    np.testing.assert_allclose(half, [2 * 2.5 * 0.5 / (2.5 + 0.5)])
    nothing = ref_clip_score(images[:1], at(-1.0), at(1.0), np.array([0]))
    np.testing.assert_array_equal(nothing, [0.0])


# --- self-retrieval


def brute_force(scores, own):
    """Mean of hit, rank and reciprocal rank over every order of the candidates that respects the scores."""
    found = []
    for order in itertools.permutations(range(len(scores))):
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order)):
            rank = order.index(own) + 1
            found.append((rank == 1, rank, 1 / rank))
    return np.mean(found, axis=0)


def test_ranks_equal_brute_force_over_all_orders_of_ties(rng):
    # Few different vectors give many exact ties.
    kinds = unit(rng.normal(size=(3, 4)))
    images, texts = kinds[[0, 0, 1, 2, 2, 2]], kinds[[0, 1, 1, 2, 0, 2]]
    pools = retrieve_in_pools(images, texts)
    assert pools.num_candidates == 6 and pools.chance_hit == pytest.approx(1 / 6)
    bags = near_neighbours(images, bag_size=4)
    in_bags = retrieve_in_bags(images, texts, bags, chunk_rows=4)
    for i in range(6):
        expected = brute_force((images @ texts[i]).round(5), i)
        np.testing.assert_allclose(
            [pools.hit[i], pools.rank[i], pools.reciprocal_rank[i]], expected, rtol=1e-12
        )
        expected = brute_force((images[bags[i]] @ texts[i]).round(5), 0)
        np.testing.assert_allclose(
            [in_bags.hit[i], in_bags.rank[i], in_bags.reciprocal_rank[i]], expected, rtol=1e-12
        )
    assert pools.hit.round(3).tolist() == [0.5, 0, 1, 0.333, 0, 0.333]


def test_a_perfect_and_a_collapsed_scorer(rng):
    images = unit(rng.normal(size=(23, 8)))
    perfect = retrieve_in_pools(images, images, pool_size=10)
    assert (perfect.hit == 1).all() and (perfect.rank == 1).all() and perfect.num_candidates == 10
    # One caption for all: each of the two full pools has one image that it picks, the third perhaps.
    assert 2 <= retrieve_in_pools(images, images[[0] * 23], pool_size=10).hit.sum() <= 3
    # Large enough that a matrix product in double does not give equal rows bitwise equal sums.
    same, texts = np.repeat(unit(rng.normal(size=(1, 300))), 257, 0), unit(rng.normal(size=(257, 300)))
    pools = retrieve_in_pools(same, texts)
    np.testing.assert_allclose(pools.hit, 1 / 257)
    np.testing.assert_allclose(pools.rank, 129)
    for found in (
        retrieve_in_pools(same, texts, pool_size=10),
        retrieve_in_bags(same, texts, near_neighbours(same)),
    ):
        np.testing.assert_allclose(found.hit, found.chance_hit)
        np.testing.assert_allclose(found.reciprocal_rank, found.chance_reciprocal_rank)
        np.testing.assert_allclose(found.rank, 5.5)


def test_equal_captions_of_equal_images_share_the_hit():
    images = unit([[1, 0, 0], [1, 0, 0], [0, 1, 0]])
    found = retrieve_in_pools(images, images)
    assert found.hit.tolist() == [0.5, 0.5, 1] and found.rank.tolist() == [1.5, 1.5, 1]
    # Equal captions of different images: only one of them can be right.
    images = unit([[1, 0, 0.1], [1, 0, 0.2], [0, 1, 0]])
    assert retrieve_in_pools(images, images[[0, 0, 2]]).hit.tolist() == [1, 0, 1]


def test_pools_are_exact_deterministic_and_ask_every_caption_once(rng):
    pools = list(_pools(23, 10, seed=0))
    assert [len(asked) for asked, _ in pools] == [10, 10, 3]
    assert sorted(np.concatenate([asked for asked, _ in pools])) == list(range(23))
    for asked, pool in pools:
        assert len(set(pool.tolist())) == 10 and pool[: len(asked)].tolist() == asked.tolist()
    images, texts = (unit(rng.normal(size=(60, 4))) for _ in range(2))
    a, b, c = (retrieve_in_pools(images, texts, pool_size=7, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(a.rank, b.rank)
    assert (a.rank != c.rank).any()
    small = retrieve_in_pools(images[:5], texts[:5], pool_size=7)
    assert small.num_candidates == 5 and small.chance_hit == 0.2


def test_a_scorer_that_knows_nothing_hits_at_chance(rng):
    images, texts = (unit(rng.normal(size=(3000, 16))) for _ in range(2))
    found = retrieve_in_pools(images, texts, pool_size=10)
    assert found.hit.mean() == pytest.approx(found.chance_hit, abs=0.02)
    assert found.reciprocal_rank.mean() == pytest.approx(found.chance_reciprocal_rank, abs=0.02)
    assert found.chance_reciprocal_rank == pytest.approx(sum(1 / k for k in range(1, 11)) / 10)


def test_unknown_scores_count_as_worst(rng):
    images = unit(rng.normal(size=(4, 3)))
    broken = images.copy()
    broken[1] = np.nan
    found = retrieve_in_pools(broken, images)
    # Image 1 stands before every other image's own, and last for its own caption.
    assert found.hit.tolist() == [0, 0, 0, 0] and found.rank.tolist() == [2, 4, 2, 2]


@pytest.mark.parametrize("chunk_rows", [3, 512])
def test_near_neighbours_equal_a_full_sort(chunk_rows, rng):
    kinds = unit(rng.normal(size=(9, 3)))
    embed = kinds[rng.integers(0, 9, 20)]
    found = near_neighbours(embed, bag_size=5, chunk_rows=chunk_rows)
    scores = (embed.astype(np.float64) @ embed.T.astype(np.float64)).astype(np.float32)
    for i in range(20):
        others = sorted((j for j in range(20) if j != i), key=lambda j: (-scores[i, j], j))
        assert found[i].tolist() == [i, *others[:4]]
    assert near_neighbours(embed[:3], bag_size=10).shape == (3, 3)
    broken = np.where(np.arange(4)[:, None] == 1, np.nan, at(1, 0.9, 0.5, 0))
    assert near_neighbours(broken, bag_size=4)[:2].tolist() == [[0, 2, 3, 1], [1, 0, 2, 3]]


def test_bad_input_is_refused(rng):
    images = unit(rng.normal(size=(4, 3)))
    bags = near_neighbours(images, bag_size=3)
    with pytest.raises(DataError, match="norm 2"):
        clip_score(images, images * 2)
    with pytest.raises(DataError, match="one caption an image"):
        clip_score(images, images[:3])
    with pytest.raises(DataError, match="outside 0..3"):
        ref_clip_score(images, images, images[:1], np.array([4]))
    with pytest.raises(DataError, match="references"):
        ref_clip_score(images, images, images[:2], np.array([0]))
    with pytest.raises(DataError, match="pool_size=1"):
        retrieve_in_pools(images, images, pool_size=1)
    with pytest.raises(DataError, match="1 images"):
        near_neighbours(images[:1])
    with pytest.raises(DataError, match="own image"):
        retrieve_in_bags(images, images, bags[:, ::-1])
    with pytest.raises(DataError, match="own image"):
        retrieve_in_bags(images, images, bags[:, [0, 1, 1]])
    with pytest.raises(DataError, match="outside"):
        retrieve_in_bags(images, images, np.where(bags == bags[:, :1], bags, bags + 4))
