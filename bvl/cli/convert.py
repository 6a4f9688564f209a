"""bvl convert: models of other libraries in, and ours out."""

from __future__ import annotations

import argparse
from pathlib import Path

from bvl.cli.options import add_verb, checkpoint_of, positive


def add_convert(verbs) -> None:
    """Add the verb that converts."""
    convert = add_verb(verbs, "convert", _convert, "take over a model of open_clip or transformers, or hand one on, with a proof",
                    "bvl convert open_clip:biomedclip runs/biomedclip")  # fmt: skip
    convert.add_argument(
        "source",
        metavar="SRC",
        help="open_clip:DIR, hf:DIR, hf-hub:NAME, or a run folder (with --to, as in: bvl convert runs/mine handed_on --to hf)",
    )
    convert.add_argument("out", metavar="OUT", help="folder to write")
    convert.add_argument(
        "--to",
        choices=("open_clip", "hf", "torch"),
        help="library to write for; torch: plain PyTorch with every method. Default: a run folder",
    )
    convert.add_argument(
        "--hub-id",
        metavar="NAME",
        help="with --to open_clip: public name of the BERT whose config open_clip reads, instead of the folder",
    )
    convert.add_argument(
        "--context-length",
        type=positive,
        metavar="N",
        help="tokens of a text, where fewer than the model allows (BERT, rotary positions)",
    )
    convert.add_argument(
        "--checkpoint", default="latest", help="of a run folder: latest (default), best or a step"
    )
    convert.add_argument(
        "--tolerance-embed",
        type=float,
        metavar="X",
        help="largest difference of embeddings of unit norm (default 2e-5)",
    )
    convert.add_argument(
        "--tolerance-relative",
        type=float,
        metavar="X",
        help="largest relative difference of a layer (default 1e-4)",
    )
    convert.add_argument(
        "--no-check", action="store_true", help="convert without comparing; needs no PyTorch for safetensors"
    )


def _convert(args: argparse.Namespace) -> int:
    import dataclasses
    import os

    # The libraries' warnings and progress bars hide the report.
    for name, value in (("TRANSFORMERS_VERBOSITY", "error"), ("HF_HUB_DISABLE_PROGRESS_BARS", "1")):
        os.environ.setdefault(name, value)
    import bvl
    from bvl.conversion import import_run
    from bvl.convert.parity import Tolerance
    from bvl.convert.registry import is_foreign, looks_foreign
    from bvl.errors import UserError

    given = {"embed": args.tolerance_embed, "relative": args.tolerance_relative}
    tolerance = dataclasses.replace(Tolerance(), **{k: v for k, v in given.items() if v is not None})
    foreign = is_foreign(args.source) or looks_foreign(Path(args.source))
    if args.to is None:
        if not foreign:
            raise UserError(
                f"{args.source} is a run folder: say what for with --to open_clip, --to hf or --to torch"
            )
        if args.hub_id is not None:
            raise UserError("--hub-id belongs to --to open_clip")
        report = import_run(
            args.source,
            Path(args.out),
            check=not args.no_check,
            tolerance=tolerance,
            context_length=args.context_length,
        )
    else:
        if args.context_length is not None:
            raise UserError("--context-length belongs to taking a model over, without --to")
        model = bvl.load(args.source, checkpoint=checkpoint_of(args.checkpoint))
        report = model.export(
            args.out,
            format=args.to,
            check=not args.no_check,
            tolerance=tolerance,
            hub_id=args.hub_id,
            raises=False,
        )
    print("\n".join(report.lines()))
    print(f"written: {args.out}")
    return 0 if report.passed or args.no_check else 1
