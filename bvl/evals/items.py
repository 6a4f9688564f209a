"""Images from anywhere, read when their turn comes: for embeddings and captions of files, folders and records."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from bvl.config import Config
from bvl.data.images import open_image
from bvl.data.manifests import find_manifest
from bvl.data.sources import RecordSet
from bvl.data.text_choice import TextChoice
from bvl.errors import DataError, ImageError
from bvl.evals.folder import source_at
from bvl.runs import Components

logger = logging.getLogger(__name__)


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


def caption_items(
    components: Components,
    items: Sequence[Item],
    write: Callable[..., list[str]],
    *,
    batch_size: int,
) -> Iterator[tuple[Item, str | None]]:
    """(item, caption) in order, `batch_size` images in memory at a time.

    The caption is None, and a warning says why, for an image that cannot be read and for a prompt beyond its room.

    write: (images, first_row=their numbers among the items, prompt=what they come with, or None) -> captions. The
      images are as they were opened, for a captioner and a scorer make them ready each in its own way.
    """
    for start in range(0, len(items), batch_size):
        part = dict(enumerate(items[start : start + batch_size], start))
        opened: dict[int, Any] = {}
        for i, item in part.items():
            try:
                _check_prompt(components, item)
                opened[i] = item.open()
            except (ImageError, DataError) as error:
                logger.warning("left out: %s", error)
        captions: dict[int, str] = {}
        if opened:
            prompts = [part[i].prompt for i in opened]
            given = prompts if any(prompt is not None for prompt in prompts) else None
            texts = write(list(opened.values()), first_row=list(opened), prompt=given)
            captions = dict(zip(opened, texts, strict=True))
        yield from ((item, captions.get(i)) for i, item in part.items())


def _check_prompt(components: Components, item: Item) -> None:
    if item.prompt is None:
        return
    tokens, room = len(components.tokenizer.ids(item.prompt)), components.config.data.controls.prompt_tokens
    if tokens > room:
        raise DataError(
            f"{item.id}: its prompt has {tokens} tokens, and the run has room for {room} "
            "(data.controls.prompt_tokens)"
        )


def _file(path: Path, name: str) -> Item:
    return Item(name, functools.partial(open_image, path))


def _load(record_set: RecordSet, index: int) -> Any:
    return record_set.load(index)["image"]
