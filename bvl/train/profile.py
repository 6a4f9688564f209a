"""A profiler trace of a few training steps, for TensorBoard or xprof."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from bvl.errors import ConfigError

logger = logging.getLogger(__name__)


class StepTrace:
    """Traces the steps first..last, both included, into `folder`; a run that goes on among them traces the rest.

    Raises ConfigError for steps that the run does not have.
    """

    def __init__(self, span: tuple[int, int] | None, folder: Path, *, last_step: int):
        if span is not None and span[1] > last_step:
            raise ConfigError(
                f"log.profile={span[0]}:{span[1]} goes beyond the last step, steps={last_step}; "
                f"name steps among 1 to {last_step}"
            )
        self._first, self._last = span or (0, 0)
        self._folder = folder
        self._tracing = False

    def note_start(self, start: int) -> None:
        """Say so where training goes on after the steps to be traced."""
        if 0 < self._last <= start:
            logger.warning(
                "log.profile=%d:%d: training goes on after step %d, nothing is left to trace",
                self._first,
                self._last,
                start,
            )

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around the work of one step."""
        if not self._first <= step <= self._last:
            yield
            return
        if not self._tracing:
            jax.profiler.start_trace(str(self._folder))
            self._tracing = True
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield

    def stop_after(self, step: int, outputs: Any) -> None:
        """End the trace if this was its last step, once the devices have made the step's `outputs`."""
        if self._tracing and step >= self._last:
            jax.block_until_ready(outputs)
            self.close()
            logger.info("trace of the steps up to %d in %s", step, self._folder)

    def close(self) -> None:
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
