"""The command line: one thin verb per function. `bvl VERB --help` shows an example of each."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from bvl.cli.convert import add_convert
from bvl.cli.data import add_data
from bvl.cli.images import add_images
from bvl.cli.launch import add_launch
from bvl.cli.plan import add_plan
from bvl.cli.regions import add_regions
from bvl.cli.runs import add_runs
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

    add_runs(verbs)
    add_plan(verbs)
    add_launch(verbs)
    add_images(verbs)
    add_regions(verbs)
    add_convert(verbs)
    add_data(verbs)
    return parser
