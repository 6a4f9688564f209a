"""Records with their pixels in ArrayRecord files: random access, one file instead of many.

Each record of a file is

    b"bvl1" | length of the header, u32 little-endian | header | encoded image | encoded mask

The header is the record as UTF-8 JSON, its "image" and "mask" the paths they had or names by their content, with one
key more: "bytes" holds the lengths of image and mask, 0 for what is absent. Image and mask are the bytes of a file,
such as a JPEG or PNG.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bvl.data.images import ImageLike
from bvl.data.manifests import Row
from bvl.errors import DataError, ImageError

MAGIC = b"bvl1"
_START = struct.Struct("<4sI")
# Records whose headers are read at once.
_CHUNK = 256


def write_array_records(
    path: str | Path, records: Iterable[Mapping[str, Any]], *, root: str | Path | None = None
) -> int:
    """Writes records with their images and masks into one ArrayRecord file; returns how many there were.

    "image" and "mask" of a record are paths (relative ones against `root`), whose files are taken as they are, encoded
    bytes, or PIL images or uint8 arrays, which become PNG. Records with equal paths, or with equal pixels that have no
    path, are records of one image. The file is there only when it is complete.
    Raises ImageError for a file that is missing or a value that is no image, DataError for a record JSON cannot hold.
    """
    writer_class = _module().ArrayRecordWriter
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    # Groups of one: a reader gets any record without decompressing its neighbours.
    writer = writer_class(str(temporary), "group_size:1")
    count = 0
    try:
        for count, record in enumerate(records, 1):  # noqa: B007
            writer.write(encode_record(record, root))
        writer.close()
        temporary.replace(path)
    finally:
        writer.close()
        temporary.unlink(missing_ok=True)
    return count


def encode_record(record: Mapping[str, Any], root: str | Path | None = None) -> bytes:
    """One record as the bytes described above; see `write_array_records`."""
    header, blobs = dict(record), []
    for field in ("image", "mask"):
        value = record.get(field)
        blobs.append(b"" if value is None else _encoded(value, root, f"{field} of {record.get('id')!r}"))
        if value is not None and not isinstance(value, str | Path):
            # By content: records of one name are records of one image.
            header[field] = f"{field}-{hashlib.sha256(blobs[-1]).hexdigest()[:16]}"
        elif value is not None:
            header[field] = str(value)
    header["bytes"] = [len(blob) for blob in blobs]
    try:
        text = json.dumps(header, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise DataError(f"record {record.get('id')!r} cannot be written as JSON: {error}") from error
    return _START.pack(MAGIC, len(text)) + text + b"".join(blobs)


class ArrayRecordTable:
    """The records of one or more ArrayRecord files that `write_array_records` wrote."""

    free_columns = False
    holds_pixels = True

    def __init__(self, files: Sequence[Path]):
        self._files = list(files)
        module = _module("array_record_data_source")
        try:
            self._source = module.ArrayRecordDataSource([str(file) for file in files])
        except Exception as error:  # the library raises whatever its C++ part says
            names = ", ".join(file.name for file in files[:3])
            raise DataError(
                f"{files[0].parent}: no complete ArrayRecord file among {names} ({error})."
            ) from error

    def rows(self) -> Iterator[Row]:
        for start in range(0, len(self._source), _CHUNK):
            places = range(start, min(start + _CHUNK, len(self._source)))
            for place, data in zip(places, self._source.__getitems__(list(places)), strict=True):
                header, _ = self._header(data, place)
                del header["bytes"]
                yield Row(f"record {place}", header, place)

    def pixels(self, place: int, field: str) -> bytes | None:
        data = self._source[place]
        header, start = self._header(data, place)
        image, mask = header["bytes"]
        start, size = (start, image) if field == "image" else (start + image, mask)
        return data[start : start + size] if size else None

    def _header(self, data: bytes, place: int) -> tuple[dict[str, Any], int]:
        if data[:4] != MAGIC:
            raise DataError(
                f"{self._files[0].parent}, record {place}: not written by bvl.data.array_records.write_array_records; "
                f"name a set that TFDS prepared with tfds=, not by its files."
            )
        _, size = _START.unpack_from(data)
        end = _START.size + size
        return json.loads(data[_START.size : end]), end


def _encoded(value: ImageLike, root: str | Path | None, name: str) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, str | Path):
        file = Path(value) if root is None else Path(root) / value
        try:
            return file.read_bytes()
        except OSError as error:
            raise ImageError(f"{file}: cannot be read ({error.strerror}).") from error
    if isinstance(value, np.ndarray) and value.dtype == np.uint8:
        value = Image.fromarray(value)
    if not isinstance(value, Image.Image):
        raise ImageError(f"{name}: give a path, bytes, a PIL image or a uint8 array.")
    file = io.BytesIO()
    value.save(file, "PNG")
    return file.getvalue()


def _module(name: str = "array_record_module") -> Any:
    try:
        return importlib.import_module(f"array_record.python.{name}")
    except ImportError as error:
        raise DataError(
            "ArrayRecord files need the package array_record: pip install 'bvl[arrayrecord]'"
        ) from error
