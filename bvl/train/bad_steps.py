"""What each step gave, read one step late so that devices never wait for the host: bad steps stop the run or are noted."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from bvl import hosts
from bvl.config import Config
from bvl.errors import UserError
from bvl.runs import RunFolder, write_atomic
from bvl.train.guard import WATCHED
from bvl.train.saving import DISK_FULL
from bvl.train.survive import STOP

logger = logging.getLogger(__name__)

# Of so many skipped steps the records are saved.
MAX_FILES = 50


class TrainingFailed(UserError):
    """Training cannot go on: a step was bad, or too many were in a row."""


class StepReader:
    """Takes out of a step's metrics what is not to be logged, and raises TrainingFailed for a bad step.

    share: which part of a batch's rows this host has; others may have the same. describe: (source, record) ->
    {"source": name, "id": ...}. last_good: the step of the last checkpoint, or None.
    """

    def __init__(
        self,
        run: RunFolder,
        config: Config,
        *,
        share: int,
        describe: Callable[[int, int], dict[str, str]],
        last_good: Callable[[], int | None],
    ):
        self._run, self._config, self._share = run, config, share
        self._describe, self._last_good = describe, last_good
        self._unread: tuple[int, dict[str, jax.Array], jax.Array | int, dict[str, Any]] | None = None
        # What the last step that was read said of requests to stop.
        self.told_to_stop = 0

    def take(self, step: int, metrics: dict[str, Any], batch: dict[str, Any]) -> dict[str, Any]:
        """Read the step before, keep this one for later; returns the metrics to be logged."""
        self.read()
        logged = {name: metrics[name] for name in ("tasks", "step")}
        report = metrics.get("guard", logged["step"])
        self._unread = step, report, metrics.get(STOP, 0), batch
        return logged

    def read(self) -> None:
        """Read the last step now; raises TrainingFailed, with the batch's records saved, if it was bad."""
        if self._unread is None:
            return
        (step, report, stop, batch), self._unread = self._unread, None
        guarded = "bad" in report
        # Values as they are: to index an array on a device would be a program of its own.
        report = jax.device_get(report if guarded else {name: report[name] for name in WATCHED})
        self.told_to_stop = int(stop)
        values = {name: float(report[name] if guarded else report[name][0]) for name in WATCHED}
        # A finite loss can have a gradient that is none, which would spoil the parameters about to be saved.
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if not (bool(report["bad"]) if guarded else bad):
            return
        options = self._config.survive
        if bad:
            what = f"the {bad[0].replace('_', ' ')} of step {step} is not a finite number"
        else:
            name = max(values, key=lambda n: values[n] / max(float(report[f"mean_{n}"]), 1e-30))
            what = (
                f"the {name.replace('_', ' ')} of step {step}, {values[name]:.6g}, is more than "
                f"survive.spike_factor={options.spike_factor:g} times its running mean {float(report[f'mean_{name}']):.6g}"
            )
        skips = options.bad_steps == "skip"
        in_row = int(report["in_row"]) if guarded else 1
        fatal = not skips or in_row > options.max_skipped
        path = self._keep_records(step, batch, fatal)
        if not fatal:
            logger.warning(
                "%s; the step is skipped (%d in a row)%s", what, in_row, f": {path}" if path else ""
            )
            return
        hint = "try a lower optim.lr, more optim.warmup_steps or optim.clip_norm"
        if skips:
            what += f", bad step number {in_row} in a row (survive.max_skipped={options.max_skipped})"
        else:
            hint += "; survive.bad_steps=skip leaves such steps out"
        if not bad:
            hint += "; a larger survive.spike_factor lets more pass"
        good = self._last_good()
        raise TrainingFailed(
            f"{what}; the batch's records {f'are in {path}' if path else 'could not be written'}. "
            f"The last checkpoint is {'of step ' + str(good) if good is not None else 'not made yet'}; "
            f"{hint}"
        )

    def _keep_records(self, step: int, batch: dict[str, Any], fatal: bool) -> Path | None:
        """The file with the records of all rows; None where there are too many files already, or no space."""
        mine = [
            self._describe(int(source), int(record))
            for source, record in zip(batch["source"], batch["record"], strict=True)
        ]
        # Hosts with the same share have the same rows.
        shares = dict(hosts.gather([self._share, mine]))
        records = [record for share in sorted(shares) for record in shares[share]]
        path = self._run.path / "nan_batch.json"
        if not fatal:
            folder = self._run.path / "bad_batches"
            path = folder / f"{step}.json"
            if hosts.is_first() and folder.is_dir() and len(list(folder.iterdir())) >= MAX_FILES:
                return None
        text = json.dumps({"step": step, "seed": self._config.seed, "records": records}, indent=1)
        try:
            write_atomic(path, text + "\n")
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            logger.error("NOT WRITTEN: the records of the bad step %d: %s: %s", step, path, error.strerror)
            return None
        return path
