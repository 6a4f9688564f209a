"""Reading manifests: finding the file, and its lines or table rows as dicts, with the line each stands on."""

from __future__ import annotations

import collections
import csv
import difflib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bvl.errors import DataError

_SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}


def find_manifest(path: Path) -> Path:
    """The manifest that `path`, a file or a folder, stands for; DataError saying what is there if it is none."""
    if path.is_dir():
        if (path / "records.jsonl").is_file():
            return path / "records.jsonl"
        names = sorted(entry.name for entry in path.iterdir())
        tables = [name for name in names if name.lower().endswith((".csv", ".tsv"))]
        if len(tables) == 1:
            return path / tables[0]
        if tables:
            raise DataError(
                f"{path}: no records.jsonl but several tables ({', '.join(tables)}); name one of them."
            )
        there = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "") if names else "nothing"
        raise DataError(
            f"{path}: no records.jsonl and no .csv or .tsv file in this folder; it holds {there}."
        )
    if not path.exists():
        parent = path.parent
        if not parent.is_dir():
            raise DataError(f"{path}: no such file or folder, nor is there a folder {parent}.")
        names = sorted(entry.name for entry in parent.iterdir())
        close = difflib.get_close_matches(path.name, names, n=1)
        hint = (
            f"did you mean {close[0]}?" if close else f"{parent} holds {', '.join(names[:10]) or 'nothing'}."
        )
        raise DataError(f"{path}: no such file or folder; {hint}")
    if path.suffix.lower() not in (".jsonl", ".csv", ".tsv"):
        raise DataError(f"{path}: a manifest is a .jsonl, .csv or .tsv file, or a folder that holds one.")
    return path


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a .jsonl file or the rows of a table, each with the number of its first line.

    Table cells are strings, but for `labels` (split at | or ;, or a JSON list) and `boxes` (a JSON list), and
    empty cells are left out. Blank lines are skipped.
    Raises DataError with file and line for what cannot be read.
    """
    return _read_jsonl(path) if path.suffix.lower() == ".jsonl" else _read_table(path)


def _read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open("rb") as file:
        for line, raw in enumerate(file, 1):
            where = f"{path}, line {line}"
            text = _decode(raw, where).strip()
            if not text:
                continue
            try:
                value = json.loads(text)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{where}: not JSON ({error.msg} at column {error.colno}): {shorten(text)}; "
                    f"write one JSON object a line."
                ) from error
            if not isinstance(value, dict):
                raise DataError(
                    f"{where}: {shorten(value)} is no JSON object; write one object {{...}} a line."
                )
            yield line, value


def _read_table(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    raw = path.read_bytes()
    # Decoded line by line, so that a wrong byte is found where it stands.
    text = "".join(_decode(r, f"{path}, line {n}") for n, r in enumerate(raw.splitlines(keepends=True), 1))
    if not text.strip():
        return
    separator = _find_separator(text)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        where = f"{path}, line {line}"
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(
                f"{where}: not readable as a table separated by {_SEPARATORS[separator]} ({error}); is a quote "
                f'left open? Write " inside a quoted field as "".'
            ) from error
        if not any(cell.strip() for cell in row):
            continue
        if header is None:
            header = _check_header(row, where)
            continue
        if len(row) != len(header):
            raise DataError(
                f"{where}: {len(row)} fields, but the header has {len(header)} ({', '.join(header)}); put a field "
                f"that contains a {_SEPARATORS[separator]} in double quotes."
            )
        yield line, _parse_cells(dict(zip(header, row, strict=True)), where)


def _find_separator(text: str) -> str:
    """The separator that parses the header into the most columns; known column names decide first."""
    known = {"image", "text", "caption"}

    def score(separator: str) -> tuple[int, int]:
        try:
            header = next(csv.reader(io.StringIO(text, newline=""), delimiter=separator))
        except (StopIteration, csv.Error):
            return -1, -1
        names = [name.strip().lower() for name in header]
        return len(known.intersection(names)), len(names)

    return max(_SEPARATORS, key=score)


def _check_header(row: list[str], where: str) -> list[str]:
    header = [name.strip() for name in row]
    lowered = [name.lower() for name in header]
    # "Image" and "TEXT" mean what they say; other names keep their case.
    header = [
        low if low in ("id", "image", "text", "caption") else name
        for low, name in zip(lowered, header, strict=True)
    ]
    repeated = [name for name, count in collections.Counter(header).items() if name and count > 1]
    if repeated:
        raise DataError(f"{where}: the header names {', '.join(map(repr, repeated))} more than once.")
    return header


def _parse_cells(cells: dict[str, str], where: str) -> dict[str, Any]:
    """A row as a record: empty cells are absent, labels and boxes become lists."""
    # Columns without a name are the row numbers of a data frame, or the trailing commas of a spreadsheet.
    record: dict[str, Any] = {key: value for key, value in cells.items() if key and value.strip()}
    for field in ("labels", "boxes"):
        value = record.get(field, "").strip()
        if value.startswith("["):
            try:
                record[field] = json.loads(value)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{where}: {field} is no JSON list ({error.msg}): {shorten(value)}."
                ) from error
        elif value and field == "labels":
            mark = "|" if "|" in value else ";"
            record[field] = [label.strip() for label in value.split(mark) if label.strip()]
    if "image" in record:
        record["image"] = record["image"].strip()
    return record


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
            hint = "it looks like UTF-16"
        else:
            around = raw[max(0, error.start - 15) : error.end + 15].decode("cp1252", "replace")
            hint = f"as Windows-1252 it would read {around!r}"
        raise DataError(
            f"{where}: byte {error.start + 1} is not UTF-8 ({hint}); save the file as UTF-8."
        ) from error


def shorten(value: Any) -> str:
    """A value as an error message shows it: at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
