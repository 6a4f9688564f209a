"""bvl data phantoms, bvl data show, bvl data score."""

from __future__ import annotations

import argparse
from pathlib import Path

from bvl.cli.options import add_verb, checkpoint_of, exit_code_of, picture_path, positive, reading


def add_data(verbs) -> None:
    """Add the verbs that make and look at data."""
    data = verbs.add_parser(
        "data",
        help="make and look at data",
        description="Make and look at data.",
        epilog="example:\n  bvl data show configs/quickstart.py --augmented --out sheet.png",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = data.add_subparsers(dest="data_verb", required=True, metavar="WHAT")
    phantoms = add_verb(kinds, "phantoms", _data_phantoms, "write phantoms as a folder with records.jsonl",
                     "bvl data phantoms my_phantoms --n 1000 --size 128")  # fmt: skip
    phantoms.add_argument("out", help="folder to write; must be empty or new")
    phantoms.add_argument("--n", type=positive, default=1000, help="number of images (default 1000)")
    phantoms.add_argument("--size", type=positive, default=64, help="side in pixels (default 64)")
    phantoms.add_argument("--seed", type=int, default=0)
    show = add_verb(kinds, "show", _data_show, "write a contact sheet of what the model will see",
                 "bvl data show configs/quickstart.py --augmented --out sheet.png")  # fmt: skip
    show.add_argument("config", help="path/to/config.py, or path/to/config.py:ARG")
    show.add_argument("overrides", nargs="*", metavar="key=value")
    show.add_argument("--augmented", action="store_true", help="as in training; default: as in evaluation")
    show.add_argument("--n", type=positive, default=24, help="number of images (default 24)")
    show.add_argument(
        "--out", default="contact_sheet.png", help="the PNG to write (default contact_sheet.png)"
    )
    score = add_verb(kinds, "score", _data_score, "write records with the similarity of image and text, and its bin",
                  "bvl data score runs/clip my_scans --out my_scans_scored")  # fmt: skip
    score.add_argument("run_folder", metavar="RUN", help="run folder of a contrastive model")
    score.add_argument("records", metavar="DATA", help="folder or file of records; it stays as it is")
    score.add_argument(
        "--out", required=True, help="the .jsonl to write, or a folder for it; paths in it are relative"
    )
    score.add_argument(
        "--text-field", default="caption", help="field with the text or texts (default caption)"
    )
    score.add_argument("--bins", type=positive, help="number of bins of quality (default 8)")
    score.add_argument(
        "--by",
        choices=("width", "count"),
        help="bins of equal width (default), or equally full",
    )
    score.add_argument("--edges", metavar="FILE", help="take the bins of another .quality.json instead")
    score.add_argument("--split", help="split to read and write, default: all")
    reading(score)


def _data_phantoms(args: argparse.Namespace) -> int:
    from bvl.data.phantoms import Phantoms, write_phantoms

    manifest = write_phantoms(Path(args.out), Phantoms(seed=args.seed, image_size=args.size), args.n)
    print(f"{args.n} phantoms written: {manifest}")
    return 0


def _data_show(args: argparse.Namespace) -> int:
    from bvl.config import load_config
    from bvl.data.show import contact_sheet

    out = picture_path(args.out)
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
    sheet.save(out)
    print(f"written: {out}")
    return 0


def _data_score(args: argparse.Namespace) -> int:
    from bvl.data.manifests import find_manifest
    from bvl.evals.score import score_records
    from bvl.runs import load_components
    from bvl.train.environment import enable_compilation_cache

    enable_compilation_cache()
    # What is wrong with the data's place is said before the model is loaded.
    find_manifest(Path(args.records))
    components = load_components(args.run_folder, checkpoint=checkpoint_of(args.checkpoint))
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
    return exit_code_of(done.skipped, "could not be read and have no quality")
