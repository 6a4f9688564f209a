"""Reading manifests: finding the file, and its lines or table rows as dicts, with the line each stands on.

Every format is a `Table` of rows; those whose files hold the pixels too are in parquet.py, array_records.py, tfds.py
and arrays.py.
"""

from __future__ import annotations

import collections
import csv
import difflib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from bvl.data.images import ImageLike
from bvl.errors import DataError

_SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
TEXT_SUFFIXES = (".jsonl", ".csv", ".tsv")
PARQUET_SUFFIXES = (".parquet",)
ARRAY_RECORD_SUFFIXES = (".arrayrecord", ".array_record")
_SHARDS = (PARQUET_SUFFIXES, ARRAY_RECORD_SUFFIXES)


class Row(NamedTuple):
    """One row of a manifest. line: its name in errors, and its id if it has none. place: what its pixels lie at."""

    line: str
    values: dict[str, Any]
    place: Any = None


class Table(Protocol):
    """A format of records. An instance can be pickled, and read by several threads.

    free_columns: whether columns may have any name, so that "text" means the caption.
    holds_pixels: whether images and masks lie with the rows; if not, the rows hold their paths.
    """

    free_columns: bool
    holds_pixels: bool

    def rows(self) -> Iterator[Row]:
        """The rows in order, without pixels; where there are some, a field holds their name.

        Raises DataError with file and line for what cannot be read.
        """
        ...

    def pixels(self, place: Any, field: str) -> ImageLike | None:
        """The image (field "image") or the mask ("mask") of the row at `place`."""
        ...


def find_manifest(path: Path) -> Path:
    """The manifest that `path`, a file or a folder, stands for; DataError saying what is there if it is none."""
    if path.is_dir():
        if (path / "records.jsonl").is_file():
            return path / "records.jsonl"
        names = sorted(entry.name for entry in path.iterdir())
        tables = [name for name in names if name.lower().endswith((".csv", ".tsv"))]
        if len(tables) == 1:
            return path / tables[0]
        if not tables and shards(path):
            return path
        if tables:
            raise DataError(
                f"{path}: no records.jsonl but several tables ({', '.join(tables)}); name one of them."
            )
        there = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "") if names else "nothing"
        raise DataError(
            f"{path}: no records.jsonl and no .csv, .tsv, .parquet or .arrayrecord file in this folder; it holds {there}."
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
    if path.suffix.lower() not in (*TEXT_SUFFIXES, *PARQUET_SUFFIXES, *ARRAY_RECORD_SUFFIXES):
        raise DataError(
            f"{path}: a manifest is a .jsonl, .csv, .tsv, .parquet or .arrayrecord file, or a folder that holds one."
        )
    return path


def shards(path: Path) -> list[Path]:
    """The Parquet or ArrayRecord files that `path`, one of them, a folder or a folder with "data" in it, stands for."""
    if path.is_file():
        return [path]
    for folder in (path, path / "data"):
        files = sorted(folder.iterdir()) if folder.is_dir() else []
        for suffixes in _SHARDS:
            if found := [file for file in files if file.suffix.lower() in suffixes]:
                return found
    return []


class TextTable:
    """A .jsonl, .csv or .tsv file.

    Cells of a .csv or .tsv are strings, but for `labels` (split at | or ;, or a JSON list) and `boxes` (a JSON list),
    and empty cells are left out. Blank lines are skipped.
    """

    holds_pixels = False

    def __init__(self, path: Path):
        self._path = path
        self.free_columns = path.suffix.lower() != ".jsonl"

    def rows(self) -> Iterator[Row]:
        read = _read_table if self.free_columns else _read_jsonl
        for line, values in read(self._path):
            yield Row(f"line {line}", values)

    def pixels(self, place: Any, field: str) -> None:
        """Nothing: the rows hold paths."""


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
        if field in record:
            record[field] = parse_list(record[field], field, where)
    if "image" in record:
        record["image"] = record["image"].strip()
    return record


def parse_list(cell: str, field: str, where: str) -> Any:
    """The list that a cell spells: JSON, or for `labels` names between | or ;."""
    value = cell.strip()
    if value.startswith("["):
        try:
            return json.loads(value)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: {field} is no JSON list ({error.msg}): {shorten(value)}.") from error
    if field != "labels":
        return cell
    return [label.strip() for label in value.split("|" if "|" in value else ";") if label.strip()]


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
