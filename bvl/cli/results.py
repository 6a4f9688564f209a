"""Results of one image: lines of JSON, files of masks, and the picture of --out."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def file_names(phrases: Sequence[str]) -> list[str]:
    """A file name for each phrase, none of them twice, whatever the file system thinks of capital letters."""
    out: list[str] = []
    for phrase in phrases:
        stem = re.sub(r"\W+", "_", phrase.lower()).strip("_")[:80] or "phrase"
        names = (f"{stem}{end}.png" for end in ["", *(f"_{n}" for n in range(2, len(phrases) + 2))])
        out.append(next(name for name in names if name not in out))
    return out


def print_line(row: dict[str, Any]) -> None:
    """Prints a JSON object of plain values, numbers with 4 decimals; NaN is null."""
    print(json.dumps({name: _plain(value) for name, value in row.items()}, ensure_ascii=False))


def _plain(value: Any) -> Any:
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return round(value, 4) if math.isfinite(value) else None
    return value


def save_picture(out: Path | None, draw: Callable[[], Any]) -> None:
    """Draws and writes the picture of --out, if there is one, and says so."""
    if out is not None:
        draw().save(out)
        # The lines of results on stdout are for programs.
        print(f"written: {out}", file=sys.stderr)
