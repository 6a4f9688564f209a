"""Evaluation of a state of training."""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import Any

from bvl.config import Config
from bvl.evals.base import Evaluation, evaluate, write_eval
from bvl.runs import Components, RunFolder
from bvl.train.lora import Adapter
from bvl.train.program import TrainState
from bvl.train.saving import DISK_FULL

logger = logging.getLogger(__name__)


class EvalFiles:
    """Writes the run's own evaluations. One for which the disk has no space waits, and training goes on."""

    def __init__(self, run: RunFolder):
        self.run = run
        self._waiting: Evaluation | None = None

    def write(self, results: Evaluation) -> None:
        """Write eval.json and what belongs to it; what still waits gives way."""
        self._waiting = results
        if (problem := self.retry()) is not None:
            logger.error("NOT WRITTEN: %s; the scores stand in %s", problem, self.run.metrics.name)

    def retry(self) -> str | None:
        """Write what waits; why that did not work. Raises OSError for another reason than a full disk."""
        if self._waiting is None:
            return None
        try:
            write_eval(self.run, self._waiting)
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            return f"{self.run.eval} and predictions of the last evaluation: {error.strerror}"
        self._waiting = None
        return None


def evaluate_state(
    files: EvalFiles,
    config: Config,
    suites: Any,
    components: Components,
    adapter: Adapter | None,
    state: TrainState,
    step: int,
    *,
    name: str | None = None,
):
    """Run the suites on the state's parameters (their average, if kept) and write eval.json, or eval/<name>.json,
    whose scores stand nowhere else; returns plain numbers."""
    if not suites:
        return {}
    average = state.ema is not None and config.eval.use_ema
    params = state.ema if average else state.params
    if adapter is not None:
        params = adapter.merged(params)
    current = dataclasses.replace(components, params=params, step=step, _hash=None)
    results = evaluate(current, suites, batch_size=config.eval.batch_size)
    if name is None:
        files.write(results)
    else:
        write_eval(files.run, results, name=name)
    return {
        k: float(v) for k, v in results.metrics.items() if isinstance(v, int | float) and math.isfinite(v)
    }
