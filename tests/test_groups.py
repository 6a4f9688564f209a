"""Groups of rows: what is drawn, and the loss of groups on one device. `tests/sharded/test_groups_sharded.py` has more."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_contrastive_loss import (
    LOSSES,
    SCALE,
    assert_equal,
    features,
    make_case,
    make_inputs,
    value_and_gradients,
)

from bvl.errors import ConfigError
from bvl.losses.contrastive import naive_sigmoid_loss, naive_softmax_loss, sigmoid_loss, softmax_loss
from bvl.losses.groups import draw_groups, into_groups, rows_of_groups
from bvl.tasks.contrastive import Contrastive


@pytest.mark.parametrize("groups", (1, 2, 3))
def test_every_row_is_in_one_group(groups):
    """Groups are of equal size, take as many rows from every run of the batch, and differ from key to key."""
    size = 36
    rows = {
        seed: np.asarray(rows_of_groups(draw_groups(jax.random.key(seed), size, groups))) for seed in (0, 1)
    }
    assert sorted(rows[0]) == list(range(size))
    for group in rows[0].reshape(groups, -1):
        assert np.bincount(group // (size // groups)).tolist() == [size // groups**2] * groups
    sets = [{frozenset(group) for group in r.reshape(groups, -1).tolist()} for r in rows.values()]
    assert (sets[0] == sets[1]) == (groups == 1)
    again = np.asarray(rows_of_groups(draw_groups(jax.random.key(0), size, groups)))
    np.testing.assert_array_equal(again, rows[0])


def test_parts_of_a_row_move_together():
    order = draw_groups(jax.random.key(0), 8, 2)
    rows = np.asarray(rows_of_groups(order))
    images, texts = (
        into_groups(jnp.arange(8), order),
        into_groups(jnp.arange(24).reshape(24, 1), order, each=3),
    )
    np.testing.assert_array_equal(images, rows)
    np.testing.assert_array_equal(texts.reshape(8, 3), rows[:, None] * 3 + np.arange(3))


@pytest.mark.parametrize("loss", LOSSES)
def test_groups_equal_naive(loss):
    fast, naive = LOSSES[loss]
    m, options = make_case("masks_and_weights", 24)
    image, text = make_inputs(24, m, options)
    options |= {"groups": 3}
    actual = value_and_gradients(fast, image, text, options | {"chunk_size": 3})
    assert_equal(actual, value_and_gradients(naive, image, text, options))


def test_the_loss_is_the_mean_of_the_groups():
    """By numbers of valid images; the naive twin is itself the naive loss of each group's rows."""
    image, text = features(0, 12, 8), features(1, 12, 8)
    valid = np.arange(12) != 2
    weights = np.array([3, 4, 4]) / 11
    parts = [slice(4 * i, 4 * i + 4) for i in range(3)]
    masks = [dict(image_valid=valid[part], text_valid=valid[part]) for part in parts]
    masked = dict(image_valid=valid, text_valid=valid, groups=3)

    def values(image, text):
        for fast, naive, options in (
            (softmax_loss, naive_softmax_loss, dict(scale=SCALE)),
            (sigmoid_loss, naive_sigmoid_loss, dict(scale=SCALE, bias=-2.0)),
        ):
            each = [naive(image[p], text[p], **options, **mask) for p, mask in zip(parts, masks, strict=True)]
            yield jnp.stack(each) @ weights
            yield naive(image, text, **options, **masked)
            yield fast(image, text, **options, **masked)
            yield naive(image, text, **options, **(masked | {"groups": 1}))

    for expected, naive, fast, whole in np.reshape(jax.jit(lambda *x: list(values(*x)))(image, text), (2, 4)):
        np.testing.assert_allclose([naive, fast], expected, rtol=1e-5)
        assert abs(whole - expected) > 1e-2


def test_groups_that_do_not_fit():
    with pytest.raises(ConfigError, match="groups=0: must be at least 1"):
        Contrastive(groups=0)
    with pytest.raises(ConfigError, match="12 rows cannot be drawn into groups=4: use a multiple of 16"):
        draw_groups(jax.random.key(0), 12, 4)
    with pytest.raises(ConfigError, match="10 rows cannot be split into groups=4 of equal size"):
        softmax_loss(features(0, 10, 4), features(1, 10, 4), scale=1.0, groups=4)
