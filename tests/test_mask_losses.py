"""Mask losses: equal to the formulas in NumPy, and finite for extreme logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bvl.losses.masks import mask_bce, mask_dice_loss, sigmoid_focal_loss

RNG = np.random.default_rng(0)
LOGITS = (3 * RNG.normal(size=(2, 3, 4, 5))).astype(np.float32)
TARGET = RNG.random((2, 3, 4, 5)) < 0.4
P = 1 / (1 + np.exp(-LOGITS.astype(np.float64)))


def test_cross_entropy_of_each_mask():
    expected = -np.where(TARGET, np.log(P), np.log(1 - P)).mean((-2, -1))
    np.testing.assert_allclose(mask_bce(LOGITS, TARGET), expected, rtol=1e-5)


def test_dice_of_each_mask():
    expected = 1 - (2 * (P * TARGET).sum((-2, -1)) + 1) / (P.sum((-2, -1)) + TARGET.sum((-2, -1)) + 1)
    np.testing.assert_allclose(mask_dice_loss(LOGITS, TARGET), expected, rtol=1e-5)


def test_dice_of_an_empty_mask_predicted_empty_is_0():
    assert float(mask_dice_loss(jnp.full((4, 4), -100.0), jnp.zeros((4, 4), bool))) == 0.0


@pytest.mark.parametrize("alpha, gamma", [(0.25, 2.0), (0.5, 0.0), (0.7, 0.5)])
def test_focal_loss(alpha, gamma):
    p_t = np.where(TARGET, P, 1 - P)
    expected = -np.where(TARGET, alpha, 1 - alpha) * (1 - p_t) ** gamma * np.log(p_t)
    np.testing.assert_allclose(
        sigmoid_focal_loss(LOGITS, TARGET, alpha=alpha, gamma=gamma), expected, rtol=1e-4, atol=1e-7
    )


def test_extreme_logits_have_finite_gradients():
    logits = jnp.array([[-1e4, 1e4], [-200.0, 200.0]])
    target = jnp.array([[True, True], [False, True]])

    def total(x):
        focal = sigmoid_focal_loss(x, target, gamma=0.5).sum()
        return focal + mask_bce(x, target) + mask_dice_loss(x, target)

    value, gradient = jax.value_and_grad(total)(logits)
    assert np.isfinite(value) and np.isfinite(gradient).all()
