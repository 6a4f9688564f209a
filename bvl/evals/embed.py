"""Embeddings of any number of images, and of their texts where they come from records, into one .npz file."""

from __future__ import annotations

import dataclasses
import functools
import logging
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bvl.config import Config
from bvl.data.images import open_image
from bvl.data.long_texts import LongTexts, warn_of_cuts
from bvl.data.manifests import find_manifest
from bvl.data.sources import RecordSet
from bvl.data.text_choice import TextChoice
from bvl.errors import ConfigError, DataError, ImageError
from bvl.evals.folder import source_at
from bvl.runs import Components
from bvl.tasks.contrastive import embed_texts

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Embedded:
    """`count` images are in the file; `skipped` names those that could not be read."""

    count: int
    skipped: list[str]


@dataclasses.dataclass(frozen=True)
class Item:
    """An image to embed or caption. open: decodes it, or raises ImageError.

    text, prompt: those of its record, if it has them.
    """

    id: str
    open: Callable[[], Any]
    text: str | None = None
    prompt: str | None = None


def list_images(
    places: Sequence[str | Path],
    *,
    split: str | None = None,
    config: Config | None = None,
    image_column: str | None = None,
    text_column: str | None = None,
) -> list[Item]:
    """The images of `places`: files of records, folders with them, folders of images (searched to the bottom), files.

    The id is that of the record or the path within the folder, behind the place's own name where several are given.
    split: of records, None = all. config, image_column, text_column: see `source_at`.
    Raises DataError for a place without images, and for a split or columns where no place has records.
    """
    extensions = tuple(Image.registered_extensions())
    choice = TextChoice.of(
        {"caption": 5.0, "alt_text": 4.0, "class_prompt": 3.0, "findings": 2.0, "impression": 1.0}
    )
    found: list[Item] = []
    any_records = False
    for place in map(Path, places):
        prefix = f"{place}/" if len(places) > 1 else ""
        try:
            find_manifest(place)
        except DataError as error:
            if place.is_dir():
                files = sorted(p for p in place.rglob("*") if p.suffix.lower() in extensions and p.is_file())
                if not files:
                    raise DataError(f"no image files, and no records: {error}") from error
                found += [_file(p, f"{prefix}{p.relative_to(place)}") for p in files]
            elif place.exists():
                found.append(_file(place, str(place)))
            else:
                raise
            continue
        any_records = True
        source = source_at(
            place, split=split, config=config, image_column=image_column, text_column=text_column
        )
        record_set = RecordSet(source)
        for i in range(len(record_set)):
            record = record_set.describe(i)
            if record.get("image") is not None:
                load = functools.partial(_load, record_set, i)
                prompt = config.data.controls.prompt_of(record) if config is not None else None
                found.append(Item(prefix + record["id"], load, choice.first(record), prompt))
    if not found:
        raise DataError(f"{', '.join(map(str, places))}: no record has an image")
    if not any_records and (split or image_column or text_column):
        raise DataError(
            f"{', '.join(map(str, places))}: a split or columns are chosen, but these are images without records"
        )
    return found


def embed_to_file(
    components: Components,
    items: Sequence[Item],
    out: Path,
    *,
    long_texts: LongTexts = "cut",
    batch_size: int = 64,
) -> Embedded:
    """Write `ids` [n], `image_embed` [n, d] and, where a record has a text, `text_embed` and `text_ids` to `out`.

    Images are decoded and encoded batch by batch, and embeddings go to disk as they come. An image that cannot
    be read is left out and named. long_texts: what becomes of texts beyond the context, see `embed_texts`.
    Raises DataError if no image can be read, ConfigError for an `out` that is a folder.
    """
    if out.is_dir():
        raise ConfigError(f"{out} is a folder; name the .npz file to write")
    kept: list[Item] = []
    skipped: list[str] = []

    def images() -> Iterator[Any]:
        for item in items:
            try:
                image = item.open()
            except ImageError as error:
                logger.warning("left out: %s", error)
                skipped.append(item.id)
                continue
            kept.append(item)
            yield image

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        rows = _stream(Path(folder) / "image_embed.npy", components, images(), len(items), batch_size)
        if not rows:
            raise DataError(f"none of the {len(items)} images can be read; nothing was written")
        arrays = {"ids": np.asarray([item.id for item in kept], dtype=np.str_)}
        texts = [item.text for item in kept if item.text]
        if texts:
            if long_texts == "cut":
                warn_of_cuts(texts, components.tokenizer, option="--long-texts chunks")
            arrays["text_ids"] = np.asarray([item.id for item in kept if item.text], dtype=np.str_)
            arrays["text_embed"] = embed_texts(components, texts, long=long_texts, batch_size=batch_size)
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


def _file(path: Path, name: str) -> Item:
    return Item(name, functools.partial(open_image, path))


def _load(record_set: RecordSet, index: int) -> Any:
    return record_set.load(index)["image"]
