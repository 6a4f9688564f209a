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

from bvl.data.long_texts import LongTexts, warn_of_cuts
from bvl.errors import ConfigError, DataError, ImageError
from bvl.evals.items import Item
from bvl.runs import Components
from bvl.tasks.contrastive import embed_texts

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Embedded:
    """`count` images are in the file; `skipped` names those that could not be read."""

    count: int
    skipped: list[str]


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
