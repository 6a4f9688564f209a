"""The command line: one thin verb per function. `bvl VERB --help` shows an example of each."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from bvl.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit code (0 done, 1 a problem the message explains, 2 wrong usage, 130 Ctrl-C)."""
    # Quiet libraries: their start-up notes hide ours.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    args = _parse(argv)
    from bvl.train.environment import keep_freed_memory
    from bvl.train.metrics_log import set_up_logging

    set_up_logging()
    keep_freed_memory()
    try:
        return args.run(args) or 0
    except UserError as error:
        print(f"bvl {args.verb}: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # The reader of our output (head, less) has gone; that is no error of ours.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        # A path that the user gave (--out, a folder without permission); anything else is ours to mend.
        if error.filename is None:
            raise
        print(f"bvl {args.verb}: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"bvl {args.verb}: interrupted", file=sys.stderr)
        return 130


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    # argparse takes no positional arguments behind an option; key=value may stand anywhere.
    if rest and hasattr(args, "overrides") and all("=" in word and not word.startswith("-") for word in rest):
        args.overrides += rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)} (see bvl {args.verb} --help)")
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bvl",
        description="Biomedical vision-language models in JAX.",
        epilog="example:\n  bvl train configs/quickstart.py workdir=runs/quickstart",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    train = _verb(verbs, "train", _train, "train a model from a config, or go on where its run folder stands",
                  "bvl train configs/quickstart.py workdir=runs/quickstart steps=200")  # fmt: skip
    train.add_argument("config", help="path/to/config.py, or path/to/config.py:ARG")
    train.add_argument(
        "overrides", nargs="*", metavar="key=value", help="for example optim.lr=3e-4 workdir=runs/x"
    )
    train.add_argument("--dry-run", action="store_true", help="print the resolved config and stop")
    train.add_argument("--force", action="store_true", help="go on in a run folder of another config")

    evaluate = _verb(verbs, "eval", _eval, "evaluate a run on a folder of records",
                     "bvl eval runs/quickstart --data my_scans --split test")  # fmt: skip
    evaluate.add_argument("run_folder", metavar="RUN", help="run folder")
    evaluate.add_argument(
        "--data",
        required=True,
        help="folder with records.jsonl, a CSV, Parquet or ArrayRecord files, or such a file itself",
    )
    evaluate.add_argument(
        "--split",
        help="split to read; default: test, else val (where the run held some out), else all records",
    )
    evaluate.add_argument("--name", help="name of the result, default: the folder's name")
    evaluate.add_argument(
        "--texts-per-image",
        type=_positive_or_all,
        default=1,
        metavar="N|all",
        help="texts of a record that retrieval reads, of the fields caption, alt_text, findings and impression "
        "in this order (default 1)",
    )
    _decoding(evaluate, "guidance", "beams", "scorer")
    _caption_suite(evaluate)
    _reading(evaluate)

    embed = _verb(verbs, "embed", _embed, "embed any number of images, and the texts of records, into an .npz",
                  "bvl embed runs/quickstart my_scans --out my_scans.npz")  # fmt: skip
    embed.add_argument("run_folder", metavar="RUN", help="run folder")
    embed.add_argument(
        "images", nargs="+", help="image files, folders of images, or a folder or file of records"
    )
    embed.add_argument(
        "--out", required=True, help="the .npz to write: ids, image_embed [n, d] and, for records, text_embed"
    )
    embed.add_argument("--split", help="split of the records, default: all")
    _reading(embed)

    caption = _verb(verbs, "caption", _caption, "write a caption for each image",
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
    _decoding(caption, *DECODING)
    _checkpoint_and_batch(caption, batch_size=16)

    sweep = _verb(verbs, "sweep-guidance", _sweep_guidance,
                  "write the trade-off of guidance as frontier.csv, .md and .png",
                  "bvl sweep-guidance runs/quickstart --gammas 0.5:4:0.5 --out frontier")  # fmt: skip
    sweep.add_argument("run_folder", metavar="RUN", help="run folder of a captioner")
    sweep.add_argument(
        "--data", help="folder or file of records; default: what the run's own suite of captions reads"
    )
    sweep.add_argument("--split", help="split of --data; default as in bvl eval")
    sweep.add_argument(
        "--gammas", default="0.5:4:0.5", help="scales: first:last:step (default 0.5:4:0.5), or 1,2,3"
    )
    sweep.add_argument("--out", required=True, help="folder to write")
    _decoding(sweep, *(n for n in DECODING if n not in ("guidance", "length", "prompt", "begin")))
    _caption_suite(sweep)
    _checkpoint_and_batch(sweep)

    data = verbs.add_parser(
        "data",
        help="make and look at data",
        description="Make and look at data.",
        epilog="example:\n  bvl data show configs/quickstart.py --augmented --out sheet.png",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = data.add_subparsers(dest="data_verb", required=True, metavar="WHAT")
    phantoms = _verb(kinds, "phantoms", _data_phantoms, "write phantoms as a folder with records.jsonl",
                     "bvl data phantoms my_phantoms --n 1000 --size 128")  # fmt: skip
    phantoms.add_argument("out", help="folder to write; must be empty or new")
    phantoms.add_argument("--n", type=_positive, default=1000, help="number of images (default 1000)")
    phantoms.add_argument("--size", type=_positive, default=64, help="side in pixels (default 64)")
    phantoms.add_argument("--seed", type=int, default=0)
    show = _verb(kinds, "show", _data_show, "write a contact sheet of what the model will see",
                 "bvl data show configs/quickstart.py --augmented --out sheet.png")  # fmt: skip
    show.add_argument("config", help="path/to/config.py, or path/to/config.py:ARG")
    show.add_argument("overrides", nargs="*", metavar="key=value")
    show.add_argument("--augmented", action="store_true", help="as in training; default: as in evaluation")
    show.add_argument("--n", type=_positive, default=24, help="number of images (default 24)")
    show.add_argument(
        "--out", default="contact_sheet.png", help="the PNG to write (default contact_sheet.png)"
    )
    score = _verb(kinds, "score", _data_score, "write records with the similarity of image and text, and its bin",
                  "bvl data score runs/clip my_scans --out my_scans_scored")  # fmt: skip
    score.add_argument("run_folder", metavar="RUN", help="run folder of a contrastive model")
    score.add_argument("records", metavar="DATA", help="folder or file of records; it stays as it is")
    score.add_argument(
        "--out", required=True, help="the .jsonl to write, or a folder for it; paths in it are relative"
    )
    score.add_argument(
        "--text-field", default="caption", help="field with the text or texts (default caption)"
    )
    score.add_argument("--bins", type=_positive, help="number of bins of quality (default 8)")
    score.add_argument(
        "--by",
        choices=("width", "count"),
        help="bins of equal width (default), or equally full",
    )
    score.add_argument("--edges", metavar="FILE", help="take the bins of another .quality.json instead")
    score.add_argument("--split", help="split to read and write, default: all")
    _reading(score)
    return parser


def _verb(verbs, name: str, run, text: str, example: str) -> argparse.ArgumentParser:
    parser = verbs.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _reading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image-column", metavar="NAME", help="column of the records that holds the images")
    parser.add_argument(
        "--text-column",
        metavar="NAME",
        help="column that holds the texts; default of both: image and caption or text, else as in the training",
    )
    parser.add_argument(
        "--long-texts",
        choices=("cut", "chunks"),
        default="cut",
        help="texts beyond the model's context: read their beginning (cut, the default), or all of them in pieces "
        "of whole sentences, whose embeddings are averaged (chunks)",
    )
    _checkpoint_and_batch(parser)


def _checkpoint_and_batch(parser: argparse.ArgumentParser, *, batch_size: int = 64) -> None:
    parser.add_argument("--checkpoint", default="latest", help='"latest" (default), "best", or a step')
    parser.add_argument("--batch-size", type=_positive, default=batch_size)


# Options of decoding: type, and help. They are named as the arguments of Model.caption, which has the defaults.
DECODING: dict[str, tuple[type, str]] = {
    "guidance": (float, "scale of classifier-free guidance; 1 (default) is plain, 2 is more specific"),
    "guidance_null": (str, 'what the null of guidance goes without: "image" (default), "controls" or "both"'),
    "language_model": (str, "run folder of a captioner whose texts without image are the null instead"),
    "beams": (int, "beams of the search (default 1, greedy)"),
    "groups": (int, "groups of diverse beam search; divides beams"),
    "diversity": (float, "what a token costs that an earlier group has taken (default 0.5)"),
    "length_penalty": (float, "above 0 favours long captions in beam search (default 1)"),
    "temperature": (float, "above 0: sample (default 0)"),
    "top_k": (int, "sample of the K most likely tokens"),
    "top_p": (float, "sample of the most likely tokens that have this probability together"),
    "no_repeat_ngram": (int, "never write the same N tokens twice"),
    "repetition_penalty": (float, "above 1: tokens already written are less likely"),
    "min_length": (int, "tokens at least"),
    "max_length": (int, "tokens at most (default: as in training)"),
    "length": (int, "words to ask for, if the run was trained with lengths"),
    "section": (str, "section to ask for, if the run was trained with sections"),
    "quality": (int, "bin of quality to ask for, if the run was trained with quality"),
    "prompt": (str, "text to put in front; default: that of the record, if the run was trained with one"),
    "begin": (str, "first words of every caption"),
    "best_of": (int, "write so many candidates and take the one that the scorer finds most like the image"),
    "scorer": (str, "run folder of a contrastive model; default: the run itself"),
    "seed": (int, "of sampling (default 0)"),
}


def _decoding(parser: argparse.ArgumentParser, *names: str) -> None:
    group = parser.add_argument_group("decoding")
    for name in names:
        kind, text = DECODING[name]
        metavar = {int: "N", float: "X", str: name.rpartition("_")[2].upper()}[kind]
        flag = f"--{name.replace('_', '-')}"
        group.add_argument(flag, type=kind, metavar=metavar, help=text, default=argparse.SUPPRESS)


def _caption_suite(parser: argparse.ArgumentParser) -> None:
    """Options that only a suite of captions has, named as its fields."""
    group = parser.add_argument_group("captions")
    group.add_argument(
        "--length",
        type=_length,
        default=argparse.SUPPRESS,
        metavar="N|N:M|reference",
        help="words to ask for: a number, N to M in turns, or as many as the reference has",
    )
    group.add_argument(
        "--max-images",
        type=_positive_or_all,
        default=argparse.SUPPRESS,
        metavar="N|all",
        help="images to caption (default 500)",
    )
    group.add_argument(
        "--lexicon",
        choices=("none", "phantoms", "chest"),
        default=argparse.SUPPRESS,
        help="findings to look for in captions; default: phantoms where the records have facts, else none",
    )


def _decoding_given(args: argparse.Namespace) -> dict[str, object]:
    """What was said of the options of `_decoding` and `_caption_suite`; a verb has no others of these names."""
    names = (*DECODING, "max_images", "lexicon")
    return {name: getattr(args, name) for name in names if hasattr(args, name)}


def _train(args: argparse.Namespace) -> int:
    from bvl import config as config_lib

    config = config_lib.load_config(args.config, args.overrides)
    if args.dry_run:
        print(config_lib.dump(config), end="")
        return 0
    from bvl.evals.table import print_captions, print_table, read_examples
    from bvl.runs import RunFolder
    from bvl.train.loop import train

    code = train(config, force=args.force)
    run = RunFolder(config.workdir)
    if code == 0 and run.eval.is_file():
        print_table(json.loads(run.eval.read_text()))
        print_captions(read_examples(run, tuple(config.eval.suites)))
    return code


def _eval(args: argparse.Namespace) -> int:
    from bvl.data.records import folder_name
    from bvl.evals.base import check_name, evaluate, write_eval
    from bvl.evals.folder import suites_for
    from bvl.evals.table import print_captions, print_table
    from bvl.runs import RunFolder, load_components
    from bvl.train.environment import enable_compilation_cache

    enable_compilation_cache()
    # Whatever is wrong with the data's place or the name is said before the model is loaded.
    name = folder_name(args.data) if args.name is None else args.name
    check_name(name)
    components = load_components(args.run_folder, checkpoint=_checkpoint(args.checkpoint))
    suites = suites_for(
        args.data,
        split=args.split,
        name=name,
        config=components.config,
        image_column=args.image_column,
        text_column=args.text_column,
        texts_per_image=args.texts_per_image,
        long_texts=args.long_texts,
        captions=_decoding_given(args),
    )
    run = RunFolder(args.run_folder)
    evaluation = evaluate(components, suites, batch_size=args.batch_size)
    print_table(write_eval(run, evaluation, name=name))
    print_captions(evaluation.per_example)
    print(f"written: {run.evals / name}.json")
    return 0


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
    components = load_components(args.run_folder, checkpoint=_checkpoint(args.checkpoint))
    out = Path(args.out)
    done = embed_to_file(components, items, out, long_texts=args.long_texts, batch_size=args.batch_size)
    print(f"{done.count} images embedded: {out}")
    return _exit_code_of(done.skipped, "could not be read and were left out")


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
    model = load(args.run_folder, checkpoint=_checkpoint(args.checkpoint))
    options = _decoding_given(args)
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
    return _exit_code_of(skipped, "got no caption")


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


def _sweep_guidance(args: argparse.Namespace) -> int:
    from bvl.evals.sweep import parse_gammas, suite_for, sweep_guidance, write_frontier
    from bvl.runs import RunFolder, load_components
    from bvl.train.environment import enable_compilation_cache

    enable_compilation_cache()
    gammas = parse_gammas(args.gammas)
    components = load_components(args.run_folder, checkpoint=_checkpoint(args.checkpoint))
    suite = suite_for(components.config, data=args.data, split=args.split, **_decoding_given(args))
    suite.check_records()
    points = sweep_guidance(components, suite, gammas, batch_size=args.batch_size)
    written = write_frontier(
        points, Path(args.out), title=f"Guidance of {RunFolder(args.run_folder).path.name}"
    )
    print((Path(args.out) / "frontier.md").read_text(encoding="utf-8"), end="")
    print(f"written: {', '.join(map(str, written))}")
    return 0


def _exit_code_of(skipped: Sequence[str], what: str) -> int:
    """1, with the names of images that were skipped and `what` befell them, if there are any."""
    if skipped:
        names = ", ".join(skipped[:5]) + (", ..." if len(skipped) > 5 else "")
        print(f"{len(skipped)} {what}: {names}", file=sys.stderr)
    return 1 if skipped else 0


def _data_phantoms(args: argparse.Namespace) -> int:
    from bvl.data.phantoms import Phantoms, write_phantoms

    manifest = write_phantoms(Path(args.out), Phantoms(seed=args.seed, image_size=args.size), args.n)
    print(f"{args.n} phantoms written: {manifest}")
    return 0


def _data_show(args: argparse.Namespace) -> int:
    from PIL import Image

    from bvl.config import load_config
    from bvl.data.show import contact_sheet

    if Path(args.out).suffix.lower() not in Image.registered_extensions():
        raise UserError(f"--out {args.out}: no name of a picture; end it with .png")
    config = load_config(args.config, args.overrides)
    keys = {name: task.fields() for name, task in config.tasks.items()}
    sheet = contact_sheet(
        config.data,
        keys_of_tasks=keys,
        seed=config.seed,
        batch_size=config.batch_size,
        count=args.n,
        augmented=args.augmented,
    )
    sheet.save(args.out)
    print(f"written: {args.out}")
    return 0


def _data_score(args: argparse.Namespace) -> int:
    from bvl.data.manifests import find_manifest
    from bvl.evals.score import score_records
    from bvl.runs import load_components
    from bvl.train.environment import enable_compilation_cache

    enable_compilation_cache()
    # What is wrong with the data's place is said before the model is loaded.
    find_manifest(Path(args.records))
    components = load_components(args.run_folder, checkpoint=_checkpoint(args.checkpoint))
    done = score_records(
        components,
        args.records,
        args.out,
        text_field=args.text_field,
        bins=args.bins,
        by=args.by,
        edges_file=args.edges,
        split=args.split,
        image_column=args.image_column,
        text_column=args.text_column,
        long_texts=args.long_texts,
        batch_size=args.batch_size,
    )
    print(f"written: {done.manifest} and {done.edges_file.name}")
    print("texts in each bin, worst first: " + " ".join(map(str, done.counts)))
    return _exit_code_of(done.skipped, "could not be read and have no quality")


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _length(text: str) -> int | str | tuple[int, ...]:
    if text == "reference":
        return text
    first, colon, last = text.partition(":")
    if colon and first.isdigit() and last.isdigit() and 0 < int(first) < int(last):
        return tuple(range(int(first), int(last) + 1))
    return _positive(text)


def _positive_or_all(text: str) -> int | None:
    return None if text == "all" else _positive(text)


def _checkpoint(text: str) -> str | int:
    return int(text) if text.isdigit() else text


if __name__ == "__main__":
    sys.exit(main())
