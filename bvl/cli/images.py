"""bvl embed, bvl caption: embeddings and captions of any number of images."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from bvl.cli.options import (
    DECODING,
    add_verb,
    checkpoint_and_batch,
    checkpoint_of,
    decoding,
    decoding_given,
    exit_code_of,
    reading,
)
from bvl.errors import UserError


def add_images(verbs) -> None:
    """Add the verbs that embed and caption images."""
    embed = add_verb(verbs, "embed", _embed, "embed any number of images, and the texts of records, into an .npz",
                  "bvl embed runs/quickstart my_scans --out my_scans.npz")  # fmt: skip
    embed.add_argument("run_folder", metavar="RUN", help="run folder")
    embed.add_argument(
        "images", nargs="+", help="image files, folders of images, or a folder or file of records"
    )
    embed.add_argument(
        "--out", required=True, help="the .npz to write: ids, image_embed [n, d] and, for records, text_embed"
    )
    embed.add_argument("--split", help="split of the records, default: all")
    reading(embed)

    caption = add_verb(verbs, "caption", _caption, "write a caption for each image",
                    "bvl caption runs/quickstart my_scans --guidance 2 --beams 4 --out captions.jsonl")  # fmt: skip
    caption.add_argument("run_folder", metavar="RUN", help="run folder of a captioner")
    caption.add_argument(
        "images", nargs="+", help="image files, folders of images, or a folder or file of records"
    )
    caption.add_argument(
        "--out", help="a .jsonl to write; default: lines of path, tab and caption on the screen"
    )
    caption.add_argument("--split", help="split of the records, default: all")
    caption.add_argument("--image-column", metavar="NAME", help="column of the records that holds the images")
    decoding(caption, *DECODING)
    checkpoint_and_batch(caption, batch_size=16)


def _embed(args: argparse.Namespace) -> int:
    from bvl.config import load_dump
    from bvl.evals.embed import embed_to_file
    from bvl.evals.items import list_images
    from bvl.runs import RunFolder, load_components
    from bvl.train.environment import enable_compilation_cache

    enable_compilation_cache()
    # Whatever is wrong with the images' places is said before the model is loaded.
    dump = RunFolder(args.run_folder).config
    items = list_images(
        args.images,
        split=args.split,
        config=load_dump(dump) if dump.is_file() else None,
        image_column=args.image_column,
        text_column=args.text_column,
    )
    components = load_components(args.run_folder, checkpoint=checkpoint_of(args.checkpoint))
    out = Path(args.out)
    done = embed_to_file(components, items, out, long_texts=args.long_texts, batch_size=args.batch_size)
    print(f"{done.count} images embedded: {out}")
    return exit_code_of(done.skipped, "could not be read and were left out")


def _caption(args: argparse.Namespace) -> int:
    from bvl.api import load
    from bvl.config import load_dump
    from bvl.evals.items import caption_items, list_images
    from bvl.runs import RunFolder
    from bvl.train.environment import enable_compilation_cache

    enable_compilation_cache()
    if args.out is not None and Path(args.out).suffix != ".jsonl":
        raise UserError(f"--out {args.out}: end it with .jsonl, for one object a line")
    dump = RunFolder(args.run_folder).config
    items = list_images(
        args.images,
        split=args.split,
        config=load_dump(dump) if dump.is_file() else None,
        image_column=args.image_column,
    )
    model = load(args.run_folder, checkpoint=checkpoint_of(args.checkpoint))
    options = decoding_given(args)
    if "prompt" in options:
        items = [dataclasses.replace(item, prompt=None) for item in items]
    options |= {
        name: load(options[name]) for name in ("language_model", "scorer") if options.get(name) is not None
    }

    def write(images, **of_items):
        return model.caption(images, batch_size=args.batch_size, **{**of_items, **options})

    captions = caption_items(model.components, items, write, batch_size=args.batch_size)
    skipped, count = [], 0
    with contextlib.ExitStack() as stack:
        file = sys.stdout if args.out is None else stack.enter_context(_whole_file(Path(args.out)))
        for item, text in captions:
            if text is None:
                skipped.append(item.id)
                continue
            count += 1
            if args.out is None:
                print(item.id, " ".join(text.splitlines()), sep="\t", file=file)
            else:
                print(json.dumps({"id": item.id, "caption": text}, ensure_ascii=False), file=file)
    if args.out is not None:
        print(f"{count} captions written: {args.out}")
    return exit_code_of(skipped, "got no caption")


@contextlib.contextmanager
def _whole_file(path: Path) -> Iterator[TextIO]:
    """A text file that is there once all is written, and not at all where that fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            yield file
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
