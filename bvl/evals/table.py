"""Evaluation results as a table for people."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from bvl.evals.base import predictions_path
from bvl.runs import RunFolder


def print_table(metrics: Mapping[str, Any], *, before: Mapping[str, Any] | None = None) -> None:
    """One line a metric, with its 95 % interval and chance level where there is one.

    before: the metrics of the model that training started from, for a column of their own.
    """
    columns = ("metric", *(("before",) if before is not None else ()), "value", "95 % interval", "chance")
    table = Table(*(Column(name, no_wrap=True) for name in columns))
    for name, value in metrics.items():
        if not isinstance(value, int | float) or name.endswith("/chance"):
            continue
        interval, chance = metrics.get(f"{name}/ci95"), metrics.get(f"{name}/chance")
        start = [] if before is None else [_number(before.get(name, ""))]
        table.add_row(
            name,
            *start,
            _number(value),
            f"{interval[0]:.4f} to {interval[1]:.4f}" if interval else "",
            f"{chance:.4f}" if chance is not None else "",
        )
    _console(max(map(len, metrics), default=0) + 60).print(table)


def print_captions(per_example: Mapping[str, Sequence[Mapping[str, Any]]], *, count: int = 5) -> None:
    """Of every suite of captions, a few evenly spaced over its images: a reference beside what was written."""
    for name, rows in per_example.items():
        if not rows or not {"caption", "references"} <= rows[0].keys():
            continue
        table = Table("reference", "caption", title=name, title_justify="left", show_lines=True)
        shown = rows[:: max(len(rows) // count, 1)][:count]
        for row in shown:
            table.add_row(escape(row["references"][0]), escape(row["caption"]))
        _console().print(table)


def read_examples(run: RunFolder, suites: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """The examples that a training run's last evaluation wrote, by suite."""
    paths = {name: predictions_path(run, name) for name in suites}
    return {
        name: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for name, path in paths.items()
        if path.is_file()
    }


def _number(value: float | str) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _console(width: int = 120) -> Console:
    # In a file or a pipe there is no width to keep to, and a cut name or number is none.
    return Console(width=None if sys.stdout.isatty() else max(width, 120))
