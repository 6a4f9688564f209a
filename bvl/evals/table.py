"""Evaluation results as a table for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table


def print_table(metrics: Mapping[str, Any]) -> None:
    """One line a metric, with its 95 % interval and chance level where there is one."""
    table = Table("metric", "value", "95 % interval", "chance")
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
    Console(soft_wrap=True).print(table)
