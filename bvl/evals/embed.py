"""Embeddings of any number of images, and of their texts where they come from records, into one .npz file."""

from __future__ import annotations

import dataclasses
import logging
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bvl.data.images import open_image
from bvl.data.records import find_manifest, read_records, select_split
from bvl.data.text_choice import TextChoice
from bvl.errors import DataError, ImageError
from bvl.runs import Components
from bvl.tasks.contrastive import embed_texts

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Embedded:
    """`count` images are in the file; `skipped` names those that could not be read."""

    count: int
    skipped: list[str]


def list_images(places: Sequence[str | Path], *, split: str | None = None) -> list[dict[str, Any]]:
    """Records of what `places` name: manifests, folders with one, folders of images (searched to the bottom), files.

    Each has "id", "image" and "root"; those of a manifest keep their texts. The id is that of the manifest or the
    path within the folder, behind the place's own name where several are given. Raises DataError for a place without images.
    """
    extensions = tuple(Image.registered_extensions())
    found: list[dict[str, Any]] = []
    for place in map(Path, places):
        prefix = f"{place}/" if len(places) > 1 else ""
        if _is_manifest(place):
            folder = read_records(place)
            records = select_split(folder, split)
            found += [
                {**r, "id": prefix + r["id"], "root": folder.root}
                for r in records
                if r.get("image") is not None
            ]
        elif place.is_dir():
            files = sorted(p for p in place.rglob("*") if p.suffix.lower() in extensions and p.is_file())
            if not files:
                raise DataError(f"{place}: no image files and no records.jsonl or CSV in this folder")
            found += [{"id": f"{prefix}{p.relative_to(place)}", "image": str(p), "root": None} for p in files]
        elif place.exists():
            found.append({"id": str(place), "image": str(place), "root": None})
        else:
            raise DataError(f"{place}: no such file or folder")
    if not found:
        raise DataError(f"no images under {', '.join(map(str, places))}")
    return found


def embed_to_file(
    components: Components, records: list[dict[str, Any]], out: Path, *, batch_size: int = 64
) -> Embedded:
    """Write `ids` [n], `image_embed` [n, d] and, where a record has a text, `text_embed` and `text_ids` to `out`.

    Images are decoded and encoded batch by batch, and embeddings go to disk as they come. An image that cannot
    be read is left out and named.
    """
    choice = TextChoice.of({"caption": 4.0, "alt_text": 3.0, "class_prompt": 2.0, "findings": 1.0})
    ids, skipped = [], []

    def images() -> Iterator[Any]:
        for record in records:
            try:
                image = open_image(record["image"], record["root"])
            except ImageError as error:
                logger.warning("left out: %s", error)
                skipped.append(record["id"])
                continue
            ids.append(record["id"])
            yield image

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        rows = _stream(Path(folder) / "image_embed.npy", components, images(), len(records), batch_size)
        arrays = {"ids": np.asarray(ids, dtype=np.str_)}
        kept = set(ids)
        texts = [(r["id"], t) for r in records if r["id"] in kept and (t := choice.first(r))]
        if texts:
            arrays["text_ids"] = np.asarray([i for i, _ in texts], dtype=np.str_)
            arrays["text_embed"] = embed_texts(components, [t for _, t in texts], batch_size=batch_size)
        for name, array in arrays.items():
            np.save(Path(folder) / f"{name}.npy", array)
        partial = Path(folder) / "all.npz"
        with zipfile.ZipFile(partial, "w") as archive:
            for file in sorted(Path(folder).glob("*.npy")):
                archive.write(file, file.name)
        partial.replace(out)
    return Embedded(rows, skipped)


def _stream(path: Path, components: Components, images: Iterator[Any], limit: int, batch_size: int) -> int:
    """Embeddings into a .npy file of as many rows as there are readable images; returns their number."""
    width = components.model.config.embed_dim
    rows = np.lib.format.open_memmap(
        path.with_suffix(".all"), mode="w+", dtype=np.float32, shape=(limit, width)
    )
    count = 0
    for features in components.encode_images(images, frozenset({"embed"}), batch_size):
        rows[count : count + len(features.embed)] = features.embed
        count += len(features.embed)
    final = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(count, width))
    final[:] = rows[:count]
    final.flush()
    return count


def _is_manifest(place: Path) -> bool:
    if place.is_file():
        return place.suffix.lower() in (".jsonl", ".csv", ".tsv")
    try:
        return place.is_dir() and find_manifest(place).is_file()
    except DataError:
        return False
