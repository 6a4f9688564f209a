"""What the verbs of the command line share: options, their types, and what they say in the end."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from bvl.errors import UserError


def add_verb(verbs, name: str, run: Callable, text: str, example: str) -> argparse.ArgumentParser:
    """A verb that calls `run` with what was parsed; its help ends with the example."""
    parser = verbs.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def reading(parser: argparse.ArgumentParser) -> None:
    """Options of verbs that read records and their texts."""
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
    checkpoint_and_batch(parser)


def checkpoint(parser: argparse.ArgumentParser) -> None:
    """Which state of a run is loaded; see `checkpoint_of`."""
    parser.add_argument("--checkpoint", default="latest", help='"latest" (default), "best", or a step')


def checkpoint_and_batch(parser: argparse.ArgumentParser, *, batch_size: int = 64) -> None:
    """Options of verbs that load a run and read many images."""
    checkpoint(parser)
    parser.add_argument("--batch-size", type=positive, default=batch_size)


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


def decoding(parser: argparse.ArgumentParser, *names: str, **helps: str) -> None:
    """Options of DECODING by name; `helps` has those whose meaning differs."""
    group = parser.add_argument_group("decoding")
    for name in names:
        kind, text = DECODING[name]
        metavar = {int: "N", float: "X", str: name.rpartition("_")[2].upper()}[kind]
        flag = f"--{name.replace('_', '-')}"
        group.add_argument(
            flag, type=kind, metavar=metavar, help=helps.get(name, text), default=argparse.SUPPRESS
        )


def caption_suite(parser: argparse.ArgumentParser) -> None:
    """Options that only a suite of captions has, named as its fields."""
    group = parser.add_argument_group("captions and texts of regions")
    group.add_argument(
        "--length",
        type=length_to_ask_for,
        default=argparse.SUPPRESS,
        metavar="N|N:M|reference",
        help="words to ask for: a number, N to M in turns (captions only), or as many as the reference has",
    )
    group.add_argument(
        "--max-images",
        type=positive_or_all,
        default=argparse.SUPPRESS,
        metavar="N|all",
        help="images to caption (default 500), and to find or describe regions in (default all)",
    )
    group.add_argument(
        "--lexicon",
        choices=("none", "phantoms", "chest"),
        default=argparse.SUPPRESS,
        help="findings to look for in captions; default: phantoms where the records have facts, else none",
    )


def decoding_given(args: argparse.Namespace) -> dict[str, object]:
    """What was said of the options of `decoding` and `caption_suite`; a verb has no others of these names."""
    names = (*DECODING, "max_images", "lexicon")
    return {name: getattr(args, name) for name in names if hasattr(args, name)}


def exit_code_of(skipped: Sequence[str], what: str) -> int:
    """1, with the names of images that were skipped and `what` befell them, if there are any."""
    if skipped:
        names = ", ".join(skipped[:5]) + (", ..." if len(skipped) > 5 else "")
        print(f"{len(skipped)} {what}: {names}", file=sys.stderr)
    return 1 if skipped else 0


def positive(text: str) -> int:
    """A whole number above 0."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def length_to_ask_for(text: str) -> int | str | tuple[int, ...]:
    """What --length of a suite of captions says: a number, N:M, or reference."""
    if text == "reference":
        return text
    first, colon, last = text.partition(":")
    if colon and first.isdigit() and last.isdigit() and 0 < int(first) < int(last):
        return tuple(range(int(first), int(last) + 1))
    return positive(text)


def positive_or_all(text: str) -> int | None:
    """A number, or None for all."""
    return None if text == "all" else positive(text)


def checkpoint_of(text: str) -> str | int:
    """What --checkpoint says: a step, latest or best."""
    return int(text) if text.isdigit() else text


def picture_path(out: str) -> Path:
    """The file of --out; UserError where a picture cannot be written there, before any work is done for it."""
    from PIL import Image

    path = Path(out)
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise UserError(f"--out {out}: no name of a picture; end it with .png")
    if not path.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {path.parent}; make it, or choose another one")
    return path
