"""Records: what a manifest may hold, reading and checking it, groups and splits.

A record is a plain dict, one JSON object a line of `records.jsonl` or one row of a CSV or TSV file, of Parquet files,
of ArrayRecord files, of a TFDS set or of arrays in memory:

    id            string, unique; where it is missing, the image path or the line number
    image         path relative to the manifest; absent in text-only sources
    caption, alt_text, findings, impression, ...   any string field can be chosen as text
    labels        list of strings (CSV: separated by | or ;);  class_prompt: a text for the class
    labels_known  list of strings: the labels that were looked for; those not in `labels` are known not to be there
    boxes         list of {"box": [x0, y0, x1, y1] in fractions of the image, "name": string, "texts": list of strings
                  that are true of what is in the box (and of no other box that does not have them), other fields}
    mask          path of a PNG of instance ids (0 = background, id k belongs to boxes[k-1]),
                  or, with mask_name, of one named region
    quality       {"caption": 3}: bins of the texts of a field, 0 = worst; of a field with a list of texts a list of
                  bins, null for none;  similarity: likewise, what the bins were made from
    modality, view, study_id, split, patient_id | group_id, source, licence

A field that is null or blank is absent and left out of the dict. Fields not named here are kept as they are.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bvl.data.array_records import ArrayRecordTable
from bvl.data.images import ImageLike
from bvl.data.manifests import (
    PARQUET_SUFFIXES,
    TEXT_SUFFIXES,
    Table,
    TextTable,
    find_manifest,
    shards,
    shorten,
)
from bvl.data.parquet import ParquetTable
from bvl.errors import DataError

Record = dict[str, Any]

VALIDATION_PERCENT = 10
# Boxes written with rounded decimals may pass the border by this much.
BOX_TOLERANCE = 1e-6

# The usual fields of text; any other string field may be chosen as well.
TEXT_FIELDS = ("caption", "alt_text", "findings", "impression", "class_prompt")
_STRINGS = ("image", *TEXT_FIELDS, "mask", "mask_name", "modality", "view", "split", "source", "licence")
# Numbers are common here and mean the same as their digits.
_IDENTIFIERS = ("id", "patient_id", "group_id", "study_id")


@dataclasses.dataclass(frozen=True)
class RecordFolder:
    """The records of one manifest.

    root: the folder against which image and mask paths resolve, None where there are no paths.
    manifest: the file or folder, or what else names the place in errors.
    counts: how many records there are ("records") and how many have each field.
    places: where the table has the pixels of each record, by id; empty if the records hold paths.
    """

    name: str
    root: Path | None
    manifest: Path | str
    records: list[Record]
    counts: dict[str, int]
    table: Table
    places: dict[str, Any]

    def pixels(self, record: Mapping[str, Any], field: str = "image") -> ImageLike | None:
        """What `open_image` (or, for the field "mask", `load_mask`) reads, with `root`; None where there is none."""
        if record.get(field) is None or not self.places:
            return record.get(field)
        return self.table.pixels(self.places[record["id"]], field)


def read_records(
    path: str | Path, *, image_column: str | None = None, text_column: str | None = None
) -> RecordFolder:
    """Reads and checks a manifest.

    path: a folder with `records.jsonl` (or with exactly one .csv or .tsv file, or with .parquet or .arrayrecord
      files), or one of these files.
    image_column, text_column: the columns to take as `image` and `caption`; by default those named `image` and
      `text` or `caption`.
    Raises DataError, naming the file, line and record, for anything that cannot be used as it stands.
    """
    manifest = find_manifest(Path(path))
    root = manifest if manifest.is_dir() else manifest.parent
    if manifest.suffix.lower() in TEXT_SUFFIXES:
        table: Table = TextTable(manifest)
    else:
        files = shards(manifest)
        if files[0].suffix.lower() in PARQUET_SUFFIXES:
            table = ParquetTable(files, image_column=image_column or "image")
        else:
            table = ArrayRecordTable(files)
    return collect(
        table,
        name=folder_name(path),
        root=root,
        manifest=manifest,
        image_column=image_column,
        text_column=text_column,
    )


def collect(
    table: Table,
    *,
    name: str,
    root: Path | None,
    manifest: Path | str,
    image_column: str | None = None,
    text_column: str | None = None,
) -> RecordFolder:
    """Reads and checks the rows of a table; see `read_records`."""
    chosen = {
        column: field for column, field in ((image_column, "image"), (text_column, "caption")) if column
    }
    if not text_column and table.free_columns:
        chosen["text"] = "caption"
    records: list[Record] = []
    lines: dict[str, str] = {}
    places: dict[str, Any] = {}
    found: set[str] = set()
    for line, values, place in table.rows():
        where = f"{manifest}, {line}"
        found.update(values)
        record = check_record(_rename(values, chosen, where), where=where)
        if "id" not in record:
            record = {"id": _free_name(record.get("image", line.replace(" ", "-")), lines), **record}
        elif record["id"] in lines:
            raise DataError(
                f"{where}: the id {record['id']!r} is taken by {lines[record['id']]}; give every record its own."
            )
        lines[record["id"]] = line
        if table.holds_pixels:
            places[record["id"]] = place
        records.append(record)
    if not records:
        raise DataError(f"{manifest}: the manifest holds no record; write one record a line.")
    for column in (image_column, text_column):
        if column and column not in found:
            raise DataError(
                f"{manifest}: there is no column {column!r}; there is {', '.join(sorted(found))}."
            )
    _group_repeated_images(records)
    counts = collections.Counter(field for record in records for field in record)
    if not counts.keys() & {"image", *TEXT_FIELDS}:
        raise DataError(
            f"{manifest}: neither images nor texts, only {', '.join(sorted(found))}; name the columns that hold "
            f"them with image_column and text_column."
        )
    return RecordFolder(name, root, manifest, records, {"records": len(records), **counts}, table, places)


def folder_name(path: str | Path) -> str:
    """The name of the records at `path`: that of the folder, or, for another file than records.jsonl, its stem.

    Raises DataError where there is no manifest.
    """
    manifest = find_manifest(Path(path))
    if manifest.is_dir() or Path(path).is_dir() or manifest.name == "records.jsonl":
        return (manifest if manifest.is_dir() else manifest.parent).resolve().name
    return manifest.stem


def check_record(record: Mapping[str, Any], *, where: str) -> Record:
    """The record without absent fields (null or blank) and with identifiers as strings.

    Raises DataError, beginning with `where` and the record's id, for a field of the wrong type or a bad box.
    """
    record = {k: v for k, v in record.items() if v is not None and not (isinstance(v, str) and not v.strip())}
    where += f", record {record['id']!r}" if "id" in record else ""
    for field in _IDENTIFIERS:
        value = record.get(field)
        if isinstance(value, int) and not isinstance(value, bool):
            record[field] = value = str(value)
        if value is not None and not isinstance(value, str):
            raise DataError(f"{where}: {field} is {shorten(value)}; it must be a string.")
    for field in _STRINGS:
        value = record.get(field)
        if value is not None and not isinstance(value, str):
            raise DataError(f"{where}: {field} is {shorten(value)}; it must be a string, or null for none.")
    for field in ("labels", "labels_known"):
        labels = record.get(field)
        if labels is not None and not _is_strings(labels):
            raise DataError(
                f'{where}: {field} is {shorten(labels)}; it must be a list of strings such as ["a", "b"], or null.'
            )
    if "quality" in record:
        record["quality"] = _check_quality(record["quality"], where)
    boxes = record.get("boxes")
    if boxes is not None:
        if not isinstance(boxes, list):
            raise DataError(
                f'{where}: boxes is {shorten(boxes)}; it must be a list of {{"box": [...], "name": ...}}.'
            )
        record["boxes"] = [_check_box(box, f"{where}, boxes[{i}]") for i, box in enumerate(boxes)]
    return record


def _check_quality(quality: Any, where: str) -> dict[str, Any]:
    """The quality without fields that have none."""
    fields = {k: v for k, v in quality.items() if v is not None} if isinstance(quality, dict) else {"": None}
    for value in fields.values():
        bins = [v for v in value if v is not None] if isinstance(value, list) else [value]
        if not all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in bins):
            raise DataError(
                f'{where}: quality is {shorten(quality)}; it must be an object such as {{"caption": 3}}, with a bin '
                f"from 0 on for each field, or a list of bins for a field with a list of texts."
            )
    return fields


def _check_box(entry: Any, where: str) -> dict[str, Any]:
    if not isinstance(entry, dict) or "box" not in entry:
        raise DataError(f'{where}: {shorten(entry)} is no {{"box": [x0, y0, x1, y1], "name": ...}}.')
    if not isinstance(entry.get("name"), str) or not entry["name"].strip():
        raise DataError(f"{where}: the box has no name; say what it shows.")
    if entry.get("texts") is not None and not _is_strings(entry["texts"]):
        raise DataError(
            f"{where}: texts is {shorten(entry['texts'])}; it must be a list of strings that are true of the box."
        )
    problem = box_problem(entry["box"])
    if problem is not None:
        raise DataError(f"{where}: {problem}")
    return {**entry, "box": [min(max(float(v), 0.0), 1.0) for v in entry["box"]]}


def box_problem(box: Any) -> str | None:
    """What is wrong with a list [x0, y0, x1, y1] of fractions of an image; None if nothing is."""
    if not isinstance(box, list) or len(box) != 4 or not all(_is_finite(v) for v in box):
        return f"box is {shorten(box)}; it must be four numbers [x0, y0, x1, y1]."
    if min(box) < -BOX_TOLERANCE or max(box) > 1 + BOX_TOLERANCE:
        hint = " Are these pixels? Divide x by the width and y by the height." if max(box) > 1.5 else ""
        return f"box {box} reaches outside 0..1; boxes are fractions of the image.{hint}"
    x0, y0, x1, y1 = (min(max(v, 0.0), 1.0) for v in box)
    if x1 <= x0 or y1 <= y0:
        kind = "is reversed" if x1 < x0 or y1 < y0 else "has no area"
        return f"box {box} {kind}; x0 < x1 and y0 < y1 are needed in [x0, y0, x1, y1]."
    return None


def group_of(record: Mapping[str, Any]) -> str:
    """What must not be torn apart by a split or counted twice by an interval: the patient, the group, or the id."""
    return str(record.get("patient_id") or record.get("group_id") or record["id"])


def has_groups(records: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the records name patients or groups; if not, "by patient" can only mean by image."""
    # A group that is nothing but the image's path was set here, for an image with several texts.
    return any(r.get("patient_id") or r.get("group_id", r.get("image")) != r.get("image") for r in records)


def assign_splits(records: Sequence[Record]) -> list[Record]:
    """The records with a `split` each: their own, or, where none has one, a stable tenth "val" and the rest "train".

    The tenth is taken by a hash of the group, so that it does not depend on the order or number of records. Where
    that holds out fewer than two groups, as in a small set, those with the smallest hashes are held out: two of
    four or more groups, one of two or three, none where there is no other to train on.
    Raises DataError if only some records name a split.
    """
    named = [record for record in records if record.get("split")]
    if not named:
        held_out = _held_out({group_of(record) for record in records})
        return [{**r, "split": "val" if group_of(r) in held_out else "train"} for r in records]
    if len(named) < len(records):
        example = next(record["id"] for record in records if not record.get("split"))
        raise DataError(
            f"{len(records) - len(named)} of {len(records)} records have no split (record {example!r} is one); "
            f"give every record a split, or none to have them split by group."
        )
    return list(records)


def select_split(folder: RecordFolder, split: str | None) -> list[Record]:
    """The records of one split (see `assign_splits`), or all records for None.

    Raises DataError, listing the splits there are, if there is none of this name.
    """
    if split is None:
        return folder.records
    records = assign_splits(folder.records)
    chosen = [record for record in records if record["split"] == split]
    if not chosen:
        counts = collections.Counter(record["split"] for record in records)
        there = ", ".join(f"{name} ({count})" for name, count in sorted(counts.items()))
        raise DataError(f"{folder.manifest}: there is no split {split!r}; there is {there}.")
    return chosen


def _held_out(groups: set[str]) -> set[str]:
    """The groups that are "val"."""
    hashes = {}
    for group in groups:
        digest = hashlib.blake2b(group.encode(), digest_size=8).digest()
        value = int.from_bytes(digest, "big")
        hashes[group] = (value % 100, value)
    count = sum(percent < VALIDATION_PERCENT for percent, _ in hashes.values())
    count = max(count, 2 if len(groups) >= 4 else 1)
    return set(sorted(groups, key=hashes.__getitem__)[: min(count, len(groups) - 1)])


def _group_repeated_images(records: list[Record]) -> None:
    """Makes the records of one image a group where no other is named, lest a split put it on both sides."""
    repeats = collections.Counter(record["image"] for record in records if "image" in record)
    for record in records:
        if repeats[record.get("image")] > 1 and "patient_id" not in record and "group_id" not in record:
            record["group_id"] = record["image"]


def _rename(row: Record, chosen: Mapping[str, str], where: str) -> Record:
    for column, field in chosen.items():
        if column == field or column not in row:
            continue
        if row.get(field) is None:
            row = {field if key == column else key: v for key, v in row.items() if key != field}
        elif column != "text":
            raise DataError(f"{where}: {column!r} was chosen as {field}, but {field!r} is a field already.")
    return row


def _free_name(base: str, taken: Mapping[str, int]) -> str:
    """`base`, or with #2, #3, ... where several records share an image; their order tells them apart."""
    if base not in taken:
        return base
    repeat = 2
    while f"{base}#{repeat}" in taken:
        repeat += 1
    return f"{base}#{repeat}"


def _is_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
