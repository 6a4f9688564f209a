"""Evaluation of a state of training."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from bvl.config import Config
from bvl.evals.base import evaluate, write_eval
from bvl.runs import Components, RunFolder
from bvl.train.lora import Adapter
from bvl.train.program import TrainState


def evaluate_state(
    run: RunFolder,
    config: Config,
    suites: Any,
    components: Components,
    adapter: Adapter | None,
    state: TrainState,
    step: int,
    *,
    name: str | None = None,
):
    """Run the suites on the state's parameters (their average, if kept) and write eval.json, or eval/<name>.json;
    returns plain numbers."""
    if not suites:
        return {}
    average = state.ema is not None and config.eval.use_ema
    params = state.ema if average else state.params
    if adapter is not None:
        params = adapter.merged(params)
    current = dataclasses.replace(components, params=params, step=step, _hash=None)
    results = evaluate(current, suites, batch_size=config.eval.batch_size)
    metrics = write_eval(run, results, name=name)
    return {k: float(v) for k, v in metrics.items() if isinstance(v, int | float) and math.isfinite(v)}
