"""Early stopping: the end of a run whose evaluations no longer improve."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from bvl.config import EvalConfig
from bvl.train.metrics_log import rows_up_to


@dataclasses.dataclass
class EarlyStop:
    """Counts evaluations in a row in which `options.stop_metric` did not improve.

    All it knows follows from the run's rows of metrics, so that a resume, and a second start of a run that has
    stopped, come to the same decision. Prechelt, "Early Stopping - But When?" (1998), the criterion UP.
    """

    options: EvalConfig
    best: float | None = None
    best_step: int = 0
    waited: int = 0

    def add(self, step: int, scores: dict[str, float]) -> None:
        """Count one evaluation, {} being none. One that could not give the metric did not improve it."""
        if self.options.stop_metric is None or not scores:
            return
        value = scores.get(self.options.stop_metric)
        sign = 1.0 if self.options.stop_mode == "max" else -1.0
        if value is not None and (
            self.best is None or sign * (value - self.best) > self.options.stop_min_delta
        ):
            self.best, self.best_step, self.waited = value, step, 0
        else:
            self.waited += 1

    @property
    def reached(self) -> bool:
        """Is it time to stop?"""
        return self.options.stop_metric is not None and self.waited >= self.options.stop_patience

    def __str__(self) -> str:
        best = "never defined" if self.best is None else f"best at step {self.best_step} ({self.best:.6g})"
        return (
            f"{self.options.stop_metric} was {best} and has not improved in {self.waited} evaluations "
            f"(eval.stop_patience={self.options.stop_patience})"
        )


def early_stop_at(options: EvalConfig, metrics: Path, step: int) -> EarlyStop:
    """What the rows of metrics.jsonl up to `step` say. Evaluations of another run (resume_from) do not count."""
    stop = EarlyStop(options)
    for row in rows_up_to(metrics, step):
        scores = {k.removeprefix("eval/"): v for k, v in row.items() if k.startswith("eval/")}
        stop.add(row["step"], scores)
    return stop
