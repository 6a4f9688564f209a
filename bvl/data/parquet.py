"""Records in Parquet files, with the images in them as Hugging Face datasets keep them, or as paths."""

from __future__ import annotations

import collections
import datetime
import decimal
import json
import re
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bvl.data.images import ImageLike
from bvl.data.manifests import Row, parse_list
from bvl.errors import DataError

# Pixels are read by row group, and row groups are kept up to this size: a set within it is decompressed once.
CACHE_BYTES = 2**30
_SPLIT = re.compile(r"(train|validation|valid|val|dev|test)[-_.\d].*")
_VALIDATION = ("validation", "valid", "dev")


class ParquetTable:
    """The rows of one or more Parquet files.

    An image (or "mask") is a struct {bytes, path}, bytes, or a path. Whole numbers that stand for class names, by the
    features that Hugging Face datasets write beside the schema, become the names; a column "label" with a name becomes
    `labels`. Files named train-*, validation-* and test-* give their records that split ("validation" is "val").
    Columns of other binary data are left out.
    """

    free_columns = True
    holds_pixels = True

    def __init__(self, files: Sequence[Path], *, image_column: str = "image"):
        self._files = [file.absolute() for file in files]
        self._columns = {"image": image_column, "mask": "mask"}
        self._open: dict[int, Any] = {}
        self._groups: collections.OrderedDict[tuple[int, int, str], Any] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """For another process, which opens the files itself."""
        return {"_files": self._files, "_columns": self._columns}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["_files"], image_column=state["_columns"]["image"])

    def rows(self) -> Iterator[Row]:
        splits = [_SPLIT.fullmatch(file.name) for file in self._files]
        for number, (file, split) in enumerate(zip(self._files, splits, strict=True)):
            name = None
            if all(splits):
                name = "val" if split[1] in _VALIDATION else split[1]
            yield from self._rows_of(number, file, name)

    def pixels(self, place: tuple[int, int, int], field: str) -> ImageLike | None:
        number, group, row = place
        value = self._group(number, group, self._columns[field])[row].as_py()
        if isinstance(value, dict):
            value = value["bytes"] if value.get("bytes") is not None else value.get("path")
        if isinstance(value, str):
            return self._files[number].parent / value
        return value

    def _rows_of(self, number: int, path: Path, split: str | None) -> Iterator[Row]:
        file = self._file(number)
        schema = file.schema_arrow
        class_names = _class_names(schema)
        pixels = {
            c for c in self._columns.values() if c in schema.names and _holds_bytes(schema.field(c).type)
        }
        others = [
            c
            for c in schema.names
            if c not in pixels
            and not _holds_bytes(schema.field(c).type)
            and not c.startswith("__index_level_")
        ]
        # Named, so that an error can list them.
        left_out = dict.fromkeys(set(schema.names) - pixels - set(others))
        count = 0
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=others)
            present = {column: self._present(number, group, column) for column in pixels}
            for row, values in enumerate(table.to_pylist() if others else [{}] * table.num_rows):
                line = f"{path.name} row {count}"
                values = left_out | {k: _named(_plain(v), class_names.get(k)) for k, v in values.items()}
                values |= {c: f"{path.name}#{count}" for c in pixels if present[c] is None or present[c][row]}
                yield Row(line, _labels(values, split, f"{path}, row {count}"), (number, group, row))
                count += 1

    def _present(self, number: int, group: int, column: str) -> list[bool] | None:
        """Which rows of a group have pixels; None = all."""
        metadata = self._file(number).metadata.row_group(group)
        for i in range(metadata.num_columns):
            chunk = metadata.column(i)
            if chunk.path_in_schema in (column, f"{column}.bytes") and chunk.statistics is not None:
                if chunk.statistics.has_null_count and chunk.statistics.null_count == 0:
                    return None
        values = self._group(number, group, column).to_pylist()
        return [any(v.values()) if isinstance(v, dict) else v is not None for v in values]

    def _file(self, number: int) -> Any:
        if number not in self._open:
            parquet = _parquet()
            try:
                self._open[number] = parquet.ParquetFile(self._files[number])
            except (OSError, ValueError) as error:
                raise DataError(f"{self._files[number]}: not a complete Parquet file ({error}).") from error
        return self._open[number]

    def _group(self, number: int, group: int, column: str) -> Any:
        """One column of a row group; of those read before, the newest up to CACHE_BYTES are kept."""
        key = (number, group, column)
        with self._lock:
            if key in self._groups:
                self._groups.move_to_end(key)
                return self._groups[key]
            values = self._file(number).read_row_group(group, columns=[column]).column(0)
            self._groups[key] = values
            while len(self._groups) > 1 and sum(v.nbytes for v in self._groups.values()) > CACHE_BYTES:
                self._groups.popitem(last=False)
            return values


def _labels(values: dict[str, Any], split: str | None, where: str) -> dict[str, Any]:
    """The row with lists where they are spelt out, `labels` from `label`, and the split of its file."""
    for field in ("labels", "boxes"):
        if isinstance(values.get(field), str) and values[field].strip():
            values[field] = parse_list(values[field], field, where)
    if isinstance(values.get("label"), str) and values["label"].strip() and values.get("labels") is None:
        values["labels"] = [values.pop("label")]
    if split is not None and values.get("split") is None:
        values["split"] = split
    return values


def _plain(value: Any) -> Any:
    """A value that JSON can hold."""
    if isinstance(value, datetime.date | datetime.time | datetime.timedelta | decimal.Decimal):
        return str(value)
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return value


def _named(value: Any, names: list[str] | None) -> Any:
    """Class numbers as names; -1 is an unknown class."""
    if names is None or value is None:
        return value
    if isinstance(value, list):
        return [names[v] for v in value if v is not None and 0 <= v < len(names)]
    return names[value] if 0 <= value < len(names) else None


def _class_names(schema: Any) -> dict[str, list[str]]:
    """Column -> names of its classes, from the features of a Hugging Face dataset."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    found = {}
    for column, feature in features.items():
        inner = feature.get("feature", feature) if isinstance(feature, dict) else feature
        inner = inner[0] if isinstance(inner, list) and inner else inner
        if isinstance(inner, dict) and inner.get("_type") == "ClassLabel" and inner.get("names"):
            found[column] = list(inner["names"])
    return found


def _holds_bytes(kind: Any) -> bool:
    """Whether values of an Arrow type hold binary data anywhere."""
    import pyarrow.types

    if pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind) or "binary" in str(kind):
        return True
    return any(_holds_bytes(kind.field(i).type) for i in range(kind.num_fields))


def _parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError("Parquet files need the package pyarrow: pip install 'bvl[parquet]'") from error
    return pyarrow.parquet
