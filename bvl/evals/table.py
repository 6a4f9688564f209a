"""Evaluation results as a table for people."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Column, Table


def print_table(metrics: Mapping[str, Any]) -> None:
    """One line a metric, with its 95 % interval and chance level where there is one."""
    table = Table(Column("metric", no_wrap=True), "value", Column("95 % interval", no_wrap=True), "chance")
    for name, value in metrics.items():
        if not isinstance(value, int | float) or name.endswith("/chance"):
            continue
        interval, chance = metrics.get(f"{name}/ci95"), metrics.get(f"{name}/chance")
        table.add_row(
            name,
            str(value) if isinstance(value, int) else f"{value:.4f}",
            f"{interval[0]:.4f} to {interval[1]:.4f}" if interval else "",
            f"{chance:.4f}" if chance is not None else "",
        )
    # In a file or a pipe there is no width to keep to, and a cut name is no name.
    Console(width=None if sys.stdout.isatty() else 120).print(table)
