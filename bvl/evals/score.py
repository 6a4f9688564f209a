"""How well the texts of records fit their images, by a contrastive model, written into new records.

The bins are what the control `data.controls.quality` trains captions with (NoC: Kang et al. 2023, arXiv:2212.13563,
section 3.2), so that a captioner learns from all pairs and is asked for the best.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from bvl.data.images import open_image
from bvl.data.long_texts import LongTexts, warn_of_cuts
from bvl.data.manifests import ARRAY_RECORD_SUFFIXES, PARQUET_SUFFIXES, TEXT_SUFFIXES
from bvl.data.records import Record, RecordFolder, assign_splits, select_split
from bvl.errors import ConfigError, DataError, ImageError
from bvl.evals.folder import source_at
from bvl.runs import Components, write_atomic
from bvl.tasks.contrastive import embed_images, embed_texts, has_contrastive

logger = logging.getLogger(__name__)

# Decimals of a written similarity; bins are made from what is written.
_DECIMALS = 6


@dataclasses.dataclass(frozen=True)
class Scored:
    """manifest, edges_file: what was written. counts: texts in each bin. skipped: records with unreadable images."""

    manifest: Path
    edges_file: Path
    edges: tuple[float, ...]
    counts: tuple[int, ...]
    skipped: list[str]


def quality_edges(
    similarities: Float[np.ndarray, " n"], *, bins: int = 8, by: Literal["width", "count"] = "width"
) -> Float[np.ndarray, " bins+1"]:
    """The bins + 1 edges of bins of equal width (NoC), or with equally many of `similarities` in each.

    Raises ConfigError for fewer than two bins, DataError where all similarities are the same.
    """
    if bins < 2:
        raise ConfigError(f"bins={bins}: give at least 2")
    if by not in ("width", "count"):
        raise ConfigError(f"by={by!r}: bins are of equal 'width' or hold an equal 'count'")
    if len(similarities) == 0 or similarities.min() == similarities.max():
        raise DataError(f"{len(similarities)} texts with one similarity in all: there is nothing to bin")
    if by == "count":
        return np.quantile(similarities, np.linspace(0, 1, bins + 1))
    return np.linspace(similarities.min(), similarities.max(), bins + 1)


def quality_bins(
    similarities: Float[np.ndarray, " n"], edges: Sequence[float] | Float[np.ndarray, " bins+1"]
) -> Int[np.ndarray, " n"]:
    """The bin of each similarity, 0 = worst; an edge belongs to the bin above it, and the outer bins are open."""
    return np.searchsorted(np.asarray(edges)[1:-1], similarities, side="right")


def score_records(
    components: Components,
    place: str | Path,
    out: str | Path,
    *,
    text_field: str = "caption",
    bins: int | None = None,
    by: Literal["width", "count"] | None = None,
    edges_file: str | Path | None = None,
    split: str | None = None,
    image_column: str | None = None,
    text_column: str | None = None,
    long_texts: LongTexts = "cut",
    batch_size: int = 64,
) -> Scored:
    """Write the records at `place` with "similarity" and "quality" of the texts in `text_field` to `out`.

    Both fields are objects {text_field: value}, with a list of values where the field holds a list of texts. The
    similarity is the cosine of the embeddings of image and text. Records without text or image, or with an image
    that cannot be read, are written as they are. Paths of images and masks are written relative to `out`, so that
    both can move together; images that lie within Parquet or ArrayRecord files are written beside `out`.

    out: a new .jsonl file, or a folder, in which it becomes records.jsonl. Beside it goes a .quality.json with the
      edges of the bins, which come from the split "train" where there is one among the records.
    bins, by: number and kind of the bins, see `quality_edges`; None = 8 of equal "width".
    edges_file: such a file of other records, whose edges are taken: a quality then means the same in both.
    split: which records are written, None = all. image_column, text_column: see `source_at`.
    Raises ConfigError for a run without a contrastive task, and for `bins` or `by` beside `edges_file`; DataError if `out` exists or nothing can be scored.
    """
    if not has_contrastive(components.config):
        raise ConfigError(
            f"scoring needs a run with a contrastive task; the tasks of this one are "
            f"{', '.join(components.config.tasks)}"
        )
    if edges_file is not None and not (bins is None and by is None):
        raise ConfigError(
            f"the edges of {edges_file} are bins already: leave out bins and by (--bins, --by), or edges_file (--edges)"
        )
    bins, by = 8 if bins is None else bins, by or "width"
    manifest = _new_manifest(Path(out))
    given = None if edges_file is None else _read_edges(Path(edges_file))
    source = source_at(
        place,
        split=split,
        config=components.config,
        image_column=image_column,
        text_column=text_column,
    )
    folder = source.read()
    records = select_split(folder, split)
    similarities, skipped = _similarities(
        components, folder, records, text_field, long_texts=long_texts, batch_size=batch_size
    )
    if given is None:
        name, indices = _records_of_edges(records)
        chosen = np.array([s for i in indices for s in similarities.get(i, {}).values()])
        edges = quality_edges(chosen, bins=bins, by=by)
        made_from = {"records": folder.name, "split": name, "texts": len(chosen)}
    else:
        edges, made_from = np.asarray(given["edges"]), given["from"]
    manifest.parent.mkdir(parents=True, exist_ok=True)
    lines, counts = [], np.zeros(len(edges) - 1, int)
    for i, record in enumerate(records):
        record = _with_paths(record, folder, manifest.parent)
        if i in similarities:
            values = similarities[i]
            quality = dict(
                zip(values, quality_bins(np.array([*values.values()]), edges).tolist(), strict=True)
            )
            np.add.at(counts, [*quality.values()], 1)
            for name, by_place in (("similarity", values), ("quality", quality)):
                record[name] = {**record.get(name, {}), text_field: _like(record[text_field], by_place)}
        lines.append(json.dumps(record, ensure_ascii=False, default=str) + "\n")
    about = {
        "field": text_field,
        "by": by if given is None else given["by"],
        "edges": edges.tolist(),
        "from": made_from,
        "counts": counts.tolist(),
        "model": {"weights": components.weights_hash(), "step": components.step},
    }
    beside = manifest.with_suffix(".quality.json")
    write_atomic(beside, json.dumps(about, indent=2) + "\n")
    # Last, so that what has a manifest is complete.
    write_atomic(manifest, "".join(lines))
    return Scored(manifest, beside, tuple(edges.tolist()), tuple(counts.tolist()), skipped)


def _new_manifest(out: Path) -> Path:
    manifest = out if out.suffix == ".jsonl" else out / "records.jsonl"
    if out != manifest and out.suffix in (*TEXT_SUFFIXES, *PARQUET_SUFFIXES, *ARRAY_RECORD_SUFFIXES, ".json"):
        raise ConfigError(f"{out}: name a .jsonl file to write, or a folder")
    if manifest.is_dir() or manifest.exists():
        raise DataError(f"{manifest} exists already; name another file or folder")
    return manifest


def _read_edges(path: Path) -> dict[str, Any]:
    try:
        about = json.loads(path.read_text())
        edges = about["edges"]
        if len(edges) >= 3 and edges == sorted(edges) and {"by", "from"} <= about.keys():
            return about
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; `bvl data score` writes one beside its records") from None
    except (ValueError, KeyError, TypeError):
        pass
    raise DataError(f"{path} is not a .quality.json as `bvl data score` writes it beside its records")


def _records_of_edges(records: list[Record]) -> tuple[str | None, list[int]]:
    """(split, indices) of the records whose similarities make the bins: those in "train", else all."""
    named = any(record.get("split") for record in records)
    splits = [record.get("split") for record in (records if named else assign_splits(records))]
    if "train" in splits:
        return "train", [i for i, split in enumerate(splits) if split == "train"]
    return None, list(range(len(records)))


def _similarities(
    components: Components,
    folder: RecordFolder,
    records: list[Record],
    field: str,
    *,
    long_texts: LongTexts,
    batch_size: int,
) -> tuple[dict[int, dict[int, float]], list[str]]:
    """(index of a record -> place of a text in its field -> similarity, ids of records with unreadable images)."""
    texts = {i: _texts(record, field) for i, record in enumerate(records) if record.get("image") is not None}
    texts = {i: found for i, found in texts.items() if found}
    if not texts:
        there = ", ".join(sorted({name for record in records[:1000] for name in record}))
        raise DataError(
            f"{folder.manifest}: no record has an image and a text {field!r}; fields that they have: {there} "
            f"(--text-field)"
        )
    pictured: list[int] = []
    skipped: list[str] = []

    def images() -> Iterator[Image.Image]:
        for i in texts:
            try:
                pixels = folder.pixels(records[i])
                name = None if isinstance(pixels, str | Path) else f"{folder.name}: {records[i]['image']}"
                image = open_image(pixels, folder.root, name=name)
            except ImageError as error:
                logger.warning("left without a quality: %s", error)
                skipped.append(records[i]["id"])
                continue
            pictured.append(i)
            yield image

    image_embed = embed_images(components, images(), batch_size=batch_size)
    if not pictured:
        raise DataError(
            f"{folder.manifest}: none of the {len(texts)} images can be read; nothing was written"
        )
    flat = [text for i in pictured for text in texts[i].values()]
    if long_texts == "cut":
        warn_of_cuts(flat, components.tokenizer, option="--long-texts chunks")
    text_embed = embed_texts(components, flat, long=long_texts, batch_size=batch_size)
    rows = np.repeat(image_embed, [len(texts[i]) for i in pictured], axis=0)
    cosines = iter(np.round(np.sum(rows * text_embed, axis=1, dtype=np.float64), _DECIMALS).tolist())
    return {i: {place: next(cosines) for place in texts[i]} for i in pictured}, skipped


def _texts(record: Record, field: str) -> dict[int, str]:
    """Place -> text of a field that holds one text or a list of them."""
    value = record.get(field)
    values = value if isinstance(value, list) else [value]
    return {i: text for i, text in enumerate(values) if isinstance(text, str) and text.strip()}


def _like(field: Any, by_place: dict[int, Any]) -> Any:
    """The values in the form of the field that they belong to."""
    return [by_place.get(i) for i in range(len(field))] if isinstance(field, list) else by_place[0]


def _with_paths(record: Record, folder: RecordFolder, target: Path) -> Record:
    """The record with paths that hold from the folder `target` on, into which it writes what has no path."""
    record = dict(record)
    for field, files in (("image", "images"), ("mask", "masks")):
        pixels = folder.pixels(record, field)
        if isinstance(pixels, bytes):
            path = target / files / f"{hashlib.sha256(pixels).hexdigest()[:16]}{_suffix(pixels)}"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(pixels)
            record[field] = path.relative_to(target).as_posix()
        elif pixels is not None and not Path(pixels).is_absolute():
            # Links are followed first, for ".." behind a link leads elsewhere than its name says.
            image = (folder.root / pixels).resolve()
            record[field] = Path(os.path.relpath(image, target.resolve())).as_posix()
    return record


def _suffix(encoded: bytes) -> str:
    try:
        with Image.open(io.BytesIO(encoded)) as picture:
            return f".{picture.format.lower()}"
    except OSError:
        return ""
