"""Metrics to metrics.jsonl, TensorBoard, Weights & Biases and the console."""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from bvl import hosts
from bvl.train.saving import DISK_FULL
from bvl.train.tensorboard import TensorBoard
from bvl.train.wandb_log import WandbLog

logger = logging.getLogger(__name__)


def rows_up_to(path: Path, step: int) -> Iterator[dict[str, Any]]:
    """The rows of a JSONL file up to `step`; none where there is no file."""
    for _, row in _lines_up_to(path, step):
        yield row


def drop_rows_after(path: Path, step: int) -> None:
    """Keep the rows of a JSONL file up to `step`; later ones, and a half-written last line, will be written again."""
    if not path.is_file():
        return
    kept = [line for line, _ in _lines_up_to(path, step)]
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(b"".join(kept))
    temporary.replace(path)


def _lines_up_to(path: Path, step: int) -> Iterator[tuple[bytes, dict[str, Any]]]:
    if not path.is_file():
        return
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            row = json.loads(line)
            if line.endswith(b"\n") and row["step"] <= step:
                yield line, row
        except (ValueError, KeyError):
            continue


class JsonLines:
    """Append-only JSONL; every row is handed to the operating system at once, so that kill -9 loses none.

    Rows for which the disk has no space wait in memory and are written, in order, once it has.
    """

    def __init__(self, path: Path):
        self._path = path
        self._file = open(path, "ab", buffering=0)
        self._waiting = b""

    def write(self, row: dict[str, Any]) -> None:
        self._waiting += (json.dumps(row) + "\n").encode()
        try:
            self.flush()
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            logger.error(
                "NOT WRITTEN: %s: %s. %d rows wait in memory and training goes on; free space",
                self._path,
                error.strerror,
                self._waiting.count(b"\n"),
            )

    def flush(self) -> None:
        """Write what waits; raises OSError where there is still no space."""
        while self._waiting:
            self._waiting = self._waiting[self._file.write(self._waiting) :]

    def close(self) -> None:
        self._file.close()


class MetricsLog:
    """One row a logged step, {"step", "loss/...", "lr", "time/..."}, with "eval/..." where it was evaluated.

    Rows after `resume_step` are dropped first. Of several hosts, which all have the same rows, the first one writes.
    """

    def __init__(self, path: Path, *, resume_step: int, tensorboard: bool, wandb: WandbLog | None = None):
        self._rows = self._tensorboard = None
        self._wandb = wandb
        if not hosts.is_first():
            return
        drop_rows_after(path, resume_step)
        self._rows = JsonLines(path)
        if tensorboard:
            self._tensorboard = TensorBoard(path.parent / "tensorboard", resume_step=resume_step)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Keys of `metrics` keep their order; numbers that are not finite are written as null."""
        row = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        if self._rows is not None:
            self._rows.write({"step": step, **row})
        if self._tensorboard is not None:
            self._tensorboard.write(step, row)
        if self._wandb is not None:
            self._wandb.write(step, metrics)

    def flush(self) -> None:
        """Write the rows that wait for space; raises OSError where there is still none."""
        if self._rows is not None:
            self._rows.flush()

    def close(self) -> None:
        if self._rows is not None:
            self._rows.close()
        if self._wandb is not None:
            self._wandb.close()
        if self._tensorboard is not None:
            self._tensorboard.close()


class ProgressLines:
    """Loss, examples a second, time left and the share of data waiting: a bar on a terminal, plain lines elsewhere."""

    def __init__(self, start: int, total: int):
        self._total = total
        self._bar: Progress | None = None
        self._started = time.perf_counter()
        self._start = start
        if sys.stderr.isatty() and hosts.is_first():
            self._bar = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(),
                TaskProgressColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}"),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task("train", total=total, completed=start, text="")

    def advance(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def row(self, step: int, metrics: dict[str, float]) -> None:
        wait = metrics.get("time/data_wait_share", 0.0)
        text = f"loss {metrics['loss/total']:.4f}  {metrics['time/examples_per_s']:.0f} examples/s  data wait {wait:.0%}"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=text)
            return
        elapsed = time.perf_counter() - self._started
        left = elapsed / max(step - self._start, 1) * (self._total - step)
        logger.info("step %d/%d  %s  time left %d:%02d", step, self._total, text, left // 60, left % 60)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def set_up_logging() -> None:
    """Messages of bvl to standard error: coloured on a terminal, plain elsewhere."""
    # What orbax logs as an error it raises as well, and then we report it.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    root = logging.getLogger("bvl")
    if root.handlers:
        return
    if sys.stderr.isatty():
        handler: logging.Handler = RichHandler(console=Console(stderr=True), show_path=False)
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(message)s", "%H:%M:%S"))
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    root.propagate = False


def quiet_other_hosts() -> None:
    """Hosts but the first say only what is theirs alone (the logger "bvl.hosts") and warnings."""
    logging.getLogger("bvl.hosts").setLevel(logging.INFO)
    if not hosts.is_first():
        logging.getLogger("bvl").setLevel(logging.WARNING)
