"""Runs on disk: what state each is in, told from its run folder alone.

Folders may be of other programs, half-written or damaged; one that cannot be read is named, and stops nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bvl import config as config_lib
from bvl.checkpoint import complete_steps
from bvl.errors import UserError
from bvl.runs import RunFolder
from bvl.train.early_stop import early_stop_at

State = Literal["running", "complete", "stopped", "failed", "not started", "damaged"]
# Folders inside a run folder, in which no other run can be.
INNER = {
    "bad_batches",
    "checkpoints",
    "damaged",
    "eval",
    "launch",
    "logs",
    "predictions",
    "profile",
    "tensorboard",
}
# A row of metrics is hardly longer.
TAIL = 1 << 18
# Seconds in which a run writes something, mostly.
RECENT_S = 600


@dataclasses.dataclass(frozen=True)
class RunInfo:
    """One run folder.

    state: running (a process holds its lock), complete (all steps, or stopped early by its metric), stopped (can go
    on), failed (a bad step ended it after the last checkpoint), not started (nothing logged or saved
    yet), damaged (`note` says why). saved: step of the newest checkpoint. age_s: seconds since anything was written.
    """

    path: str
    state: State
    step: int = 0
    steps: int | None = None
    saved: int | None = None
    loss: float | None = None
    metric: str | None = None
    value: float | None = None
    age_s: float | None = None
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def list_runs(folder: str | Path) -> list[RunInfo]:
    """The runs in a folder, at any depth, or that folder itself, by name; raises UserError if there is no such folder."""
    root = Path(folder)
    if not root.is_dir():
        raise UserError(
            f"{root} is {'a file' if root.exists() else 'no folder'}; give a folder of run folders"
        )
    return [read_run(path) for path in _run_folders(root)]


def read_run(path: Path) -> RunInfo:
    """What one run folder says."""
    try:
        return _read(RunFolder(path))
    except OSError as error:
        return RunInfo(str(path), "damaged", note=f"cannot be read: {error.strerror}")


def print_runs(runs: Sequence[RunInfo], folder: str | Path) -> None:
    """A line a run."""
    table = Table("run", "state", "step", "loss", "last evaluation", "age")
    for run in runs:
        name = os.path.relpath(run.path, folder)
        value = f"{run.metric} {run.value:.4f}" if run.metric else ""
        table.add_row(
            escape(name if name != "." else run.path),
            escape(f"{run.state}: {run.note}" if run.note else run.state),
            f"{run.step}/{run.steps}" if run.steps else str(run.step),
            "" if run.loss is None else f"{run.loss:.4f}",
            escape(value),
            "" if run.age_s is None else _duration(run.age_s),
        )
    console = Console()
    # In a file or a pipe there is no width to keep to.
    if not console.is_terminal:
        console = Console(width=200 + max((len(run.path) for run in runs), default=0))
    if runs:
        console.print(table)
    else:
        console.print(f"no run folder in {escape(str(folder))}")


def _run_folders(root: Path) -> Iterator[Path]:
    for name, folders, files in os.walk(root):
        is_run = _is_run(Path(name), folders, files)
        folders[:] = sorted(f for f in folders if not (f.startswith(".") or is_run and f in INNER))
        if is_run:
            yield Path(name)


def _is_run(path: Path, folders: Sequence[str], files: Sequence[str]) -> bool:
    # The lock is the first thing a run makes; a folder that was copied or converted has only the config.
    if ".lock" in files and {"config.json", "metrics.jsonl", "checkpoints"} & {*folders, *files}:
        return True
    if "checkpoints" in folders and "metrics.jsonl" in files:
        return True
    return "config.json" in files and "format_version" in _json_object(path / "config.json")


def _read(run: RunFolder) -> RunInfo:
    held, holder = _lock(run)
    saved = max(complete_steps(run.checkpoints), default=None)
    row = _last_row(run.metrics)
    tree = _json_object(run.config)
    metric, value = _main_metric(run, tree)
    step = max(_number(row.get("step")) or 0, saved or 0)
    steps = _number(tree.get("steps"))
    info = RunInfo(
        path=str(run.path),
        state="stopped",
        step=int(step),
        steps=None if steps is None else int(steps),
        saved=saved,
        loss=_number(row.get("loss/total")),
        metric=metric,
        value=value,
        age_s=_age(run),
    )
    state, note = ("running", holder) if held else _state(run, info, tree, has_rows=bool(row))
    elsewhere = holder and not holder.endswith(f" on {os.uname().nodename}")
    if state == "stopped" and elsewhere and info.age_s is not None and info.age_s < RECENT_S:
        # Locks of some file systems do not reach other machines.
        note = f"or running, {holder} wrote {_duration(info.age_s)} ago"
    return dataclasses.replace(info, state=state, note=note)


def _state(run: RunFolder, info: RunInfo, tree: dict[str, Any], *, has_rows: bool) -> tuple[State, str]:
    """The state of a run that no process holds, and a note."""
    if "format_version" not in tree:
        missing = "cannot be read" if run.config.exists() else "is missing"
        return "damaged", f"config.json {missing}"
    if info.steps is not None and (info.saved or 0) >= info.steps:
        return "complete", ""
    if _stopped_early(run, info.saved):
        return "complete", "stopped early"
    bad_step = _number(_json_object(run.path / "nan_batch.json").get("step"))
    if bad_step is not None and bad_step > (info.saved or 0):
        return "failed", f"step {int(bad_step)} was bad"
    if info.saved is None and not has_rows:
        return "not started", ""
    return "stopped", "" if info.saved is not None else "nothing saved"


def _lock(run: RunFolder) -> tuple[bool, str]:
    """Does a process hold the lock of a run folder, and which one does, or was the last to?"""
    try:
        file = open(run.path / ".lock", errors="replace")
    except OSError:
        return False, ""
    with file:
        holder = file.read(200).strip()
        try:
            # Given back at once; only its being refused says something.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True, holder or "by another process"
    return False, holder


def _stopped_early(run: RunFolder, saved: int | None) -> bool:
    if saved is None:
        return False
    # Configs of other versions, with types that are not bvl's, or changed by hand: what cannot be read says nothing.
    with contextlib.suppress(Exception):
        options = config_lib.load_dump(run.config).eval
        return early_stop_at(options, run.metrics, saved).reached
    return False


def _last_row(path: Path) -> dict[str, Any]:
    """The last whole row of a JSONL file, {} where there is none."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
            lines = file.read().splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict) and _number(row.get("step")) is not None:
                return row
    return {}


def _main_metric(run: RunFolder, tree: dict[str, Any]) -> tuple[str | None, float | None]:
    """The metric that the run is judged by, of its last evaluation: the config's, else the first."""
    scores = {k: v for k, v in _json_object(run.eval).items() if _number(v) is not None}
    options = [("checkpoint", "best"), ("eval", "stop_metric")]
    wanted = [tree[part].get(key) for part, key in options if isinstance(tree.get(part), dict)]
    name = next((n for n in [*wanted, *scores] if isinstance(n, str) and n in scores), None)
    return name, None if name is None else float(scores[name])


def _age(run: RunFolder) -> float | None:
    times = []
    for path in (run.config, run.metrics, run.checkpoints, run.eval):
        with contextlib.suppress(OSError):
            times.append(path.stat().st_mtime)
    return max(0.0, time.time() - max(times)) if times else None


def _json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, {} where there is none that can be read."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> float | None:
    """`value` where it is a number, and a finite one."""
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return value if plain and math.isfinite(value) else None


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
