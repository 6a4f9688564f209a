"""Box overlaps: known values, a plain twin in scalars, and gradients that stay finite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import fast_compilation  # noqa: F401

from bvl.losses import boxes

pytestmark = pytest.mark.usefixtures("fast_compilation")

box_iou, box_l1 = jax.jit(boxes.box_iou), jax.jit(boxes.box_l1)
generalized_iou, pairwise_generalized_iou = map(
    jax.jit, (boxes.generalized_iou, boxes.pairwise_generalized_iou)
)


def naive_giou(a, b):
    def area(x0, y0, x1, y1):
        return max(x1 - x0, 0) * max(y1 - y0, 0)

    inter = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    union = area(*a) + area(*b) - inter
    hull = area(min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3]))
    return inter / union, inter / union - (hull - union) / hull


def random_boxes(rng, n):
    corners = np.sort(rng.random((n, 2, 2)), axis=1)
    return corners.reshape(n, 4).astype(np.float32)


def test_equal_to_scalars():
    rng = np.random.default_rng(0)
    a, b = random_boxes(rng, 5), random_boxes(rng, 7)
    expected = np.array([[naive_giou(x, y) for y in b] for x in a])
    np.testing.assert_allclose(box_iou(a, b), expected[..., 0], atol=1e-6)
    np.testing.assert_allclose(pairwise_generalized_iou(a, b), expected[..., 1], atol=1e-5)
    np.testing.assert_allclose(generalized_iou(a, b[:5]), np.diag(expected[..., 1]), atol=1e-5)
    np.testing.assert_allclose(box_l1(a, b[:5]), np.abs(a - b[:5]).sum(-1), atol=1e-6)


@pytest.mark.parametrize(
    "a, b, iou, giou",
    [
        ([0, 0, 0.5, 0.5], [0, 0, 0.5, 0.5], 1, 1),
        ([0, 0, 0.5, 1], [0.25, 0, 0.75, 1], 1 / 3, 1 / 3),
        ([0, 0, 0.25, 1], [0.75, 0, 1, 1], 0, -0.5),
        ([0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5], 0, 0),
        ([0.6, 0.6, 0.4, 0.4], [0, 0, 1, 1], 0, 0),
    ],
)
def test_known_values(a, b, iou, giou):
    a, b = jnp.array([a], jnp.float32), jnp.array([b], jnp.float32)
    assert float(box_iou(a, b)[0, 0]) == pytest.approx(iou, abs=1e-6)
    assert float(generalized_iou(a, b)[0]) == pytest.approx(giou, abs=1e-6)


def test_gradients_are_finite_for_any_boxes():
    point, line, tiny = [0.5, 0.5, 0.5, 0.5], [0.2, 0.3, 0.9, 0.3], [0.0, 0.0, 1e-10, 1e-10]
    reversed_, whole = [0.9, 0.8, 0.1, 0.2], [0.0, 0.0, 1.0, 1.0]
    some = jnp.array([point, line, tiny, reversed_, whole], jnp.float32)

    def total(a, b):
        return (pairwise_generalized_iou(a, b) + box_iou(a, b)).sum() + box_l1(a, b).sum()

    value, gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(some, some)
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in gradients)


def test_gradient_draws_separate_boxes_together():
    a, b = jnp.array([0.0, 0.0, 0.2, 1.0]), jnp.array([0.6, 0.0, 0.8, 1.0])
    assert jax.jit(jax.grad(lambda a: generalized_iou(a, b)))(a)[2] > 0
    assert jax.jit(jax.grad(lambda a: box_iou(a[None], b[None])[0, 0]))(a)[2] == 0


def test_half_precision_is_computed_in_f32():
    one = jnp.array([[0.1, 0.1, 0.3, 0.2]], jnp.bfloat16)
    assert generalized_iou(one, one).dtype == box_l1(one, one).dtype == jnp.float32
