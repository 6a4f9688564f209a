"""When a run stops early: only what its rows say counts."""

import json

import pytest

from bvl.config import EvalConfig
from bvl.train.early_stop import EarlyStop, early_stop_at


def stopped_after(values, **options):
    """How many evaluations there are before the stop, None if it never comes."""
    stop = EarlyStop(EvalConfig(stop_metric="a/b", **options))
    for i, value in enumerate(values, 1):
        stop.add(i, {"a/c": 1.0} | ({} if value is None else {"a/b": value}))
        if stop.reached:
            return i
    return None


@pytest.mark.parametrize(
    "values, options, expected",
    [
        ([1, 2, 2, 1, 3, 3], dict(stop_patience=2), 4),
        ([1, 2, 2, 3, 3, 4], dict(stop_patience=2), None),
        ([3, 2, 1, 1, 1], dict(stop_patience=2, stop_mode="min"), 5),
        ([1, 1.1, 1.2, 1.3], dict(stop_patience=2, stop_min_delta=0.15), None),
        ([1, 1.1, 1.15, 1.3], dict(stop_patience=2, stop_min_delta=0.15), 3),
        ([3, 2.9, 2.5, 2.4], dict(stop_patience=1, stop_min_delta=0.2, stop_mode="min"), 2),
        ([-3, -2, -2], dict(stop_patience=1), 3),
        # Undefined in an evaluation: no improvement.
        ([1, None, None, 2], dict(stop_patience=2), 3),
        ([None, None], dict(stop_patience=2), 2),
        ([5, 1], dict(stop_patience=1), 2),
    ],
)
def test_patience(values, options, expected):
    assert stopped_after(values, **options) == expected


def test_without_a_metric_nothing_stops():
    stop = EarlyStop(EvalConfig(stop_patience=1))
    for step in range(5):
        stop.add(step, {"a/b": 0.0})
    assert not stop.reached


def test_the_same_from_the_rows(tmp_path):
    """Rows without an evaluation, later than the step, or half written do not count."""
    file = tmp_path / "metrics.jsonl"
    options = EvalConfig(stop_metric="a/b", stop_patience=2)
    assert early_stop_at(options, file, 9) == EarlyStop(options)
    rows = [
        {"step": 1, "loss/total": 3.0},
        {"step": 2, "loss/total": 2.0, "eval/a/b": 0.1 + 0.2, "eval/a/c": 1.0},
        {"step": 3, "loss/total": 2.0},
        {"step": 4, "eval/a/b": 0.3},
        {"step": 6, "eval/a/c": 1.0},
        {"step": 8, "eval/a/b": 0.9},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 3, "eval/a')
    direct = EarlyStop(options)
    for step, scores in ((2, {"a/b": 0.1 + 0.2}), (4, {"a/b": 0.3})):
        direct.add(step, scores)
    assert early_stop_at(options, file, 5) == direct and not direct.reached
    stopped = early_stop_at(options, file, 7)
    assert stopped.reached and (stopped.best, stopped.best_step) == (0.1 + 0.2, 2)
    assert "a/b was best at step 2 (0.3) and has not improved in 2 evaluations" in str(stopped)
    assert not early_stop_at(options, file, 8).reached
