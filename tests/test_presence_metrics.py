"""Presence: p-values that keep their promise, false alarms, risk and coverage."""

import numpy as np
import pytest

from bvl.errors import DataError
from bvl.metrics.presence import (
    area_under_risk_coverage,
    conformal_p_values,
    false_found_rate_at,
    risk_coverage,
)


def test_p_values_count_negatives_at_or_above():
    np.testing.assert_allclose(
        conformal_p_values([[5.0, 2.0], [0.0, -1.0]], [0.0, 1.0, 2.0, 2.0]),
        [[0.2, 0.6], [1.0, 1.0]],
    )


@pytest.mark.parametrize("digits", [None, 0])  # continuous, and coarse with many ties
def test_p_values_are_valid_for_new_negatives(digits):
    draws = np.random.default_rng(0).normal(size=(50, 20))
    draws = draws if digits is None else np.round(draws, digits)
    # Exchangeable: each of the 20 is the new one equally often, so the rates are exact and not of chance.
    p = np.array([[conformal_p_values(row[i], np.delete(row, i)) for i in range(20)] for row in draws])
    for level in (0.05, 0.1, 0.33, 0.5):
        rates = (p <= level + 1e-12).mean(1)
        assert (rates <= level + 1e-12).all()
        if digits is None:
            np.testing.assert_allclose(rates, np.floor(20 * level) / 20)  # and no more careful than needed


def test_p_values_need_negatives():
    with pytest.raises(DataError, match="no negatives"):
        conformal_p_values([1.0], [])
    with pytest.raises(DataError, match="NaN"):
        conformal_p_values([np.nan], [1.0])


def test_false_found_rate():
    positives = np.arange(10.0)  # finding nine of ten needs a threshold of 1
    assert false_found_rate_at(positives, [0.0, 0.5, 1.0, 7.0]) == 0.5
    assert false_found_rate_at(positives, [0.0, 0.5, 1.0, 7.0], found_rate=1.0) == 1.0
    assert false_found_rate_at(positives, [0.0, 0.5, 1.0, 7.0], found_rate=0.3) == 0.25
    assert np.isnan(false_found_rate_at([], [1.0]))
    with pytest.raises(DataError, match="found_rate=0"):
        false_found_rate_at(positives, positives, found_rate=0)


def test_risk_and_coverage():
    coverage, risk = risk_coverage([0.1, 0.9, 0.5, 0.7], [False, True, False, True])
    np.testing.assert_allclose(coverage, [0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(risk, [0, 0, 1 / 3, 0.5])
    assert area_under_risk_coverage([0.1, 0.9, 0.5, 0.7], [0, 1, 0, 1]) == pytest.approx((1 / 3 + 0.5) / 4)


def test_risk_of_ties_is_the_mean_over_their_orders():
    confidence, correct = np.array([0.5, 0.5, 0.9, 0.5, 0.1]), np.array([1.0, 0, 1, 0, 1])
    orders = [[2, *tie, 4] for tie in ([0, 1, 3], [1, 0, 3], [1, 3, 0], [0, 3, 1], [3, 0, 1], [3, 1, 0])]
    expected = np.mean([np.cumsum(1 - correct[o]) / np.arange(1, 6) for o in orders], axis=0)
    np.testing.assert_allclose(risk_coverage(confidence, correct)[1], expected)


def test_no_answers():
    assert np.isnan(area_under_risk_coverage([], []))
