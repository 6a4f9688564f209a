"""bvl train, bvl eval, bvl sweep-guidance."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from bvl.cli.options import (
    DECODING,
    add_verb,
    caption_suite,
    checkpoint_and_batch,
    checkpoint_of,
    decoding,
    decoding_given,
    positive_or_all,
    reading,
)

if TYPE_CHECKING:
    from bvl.config import Config


def add_runs(verbs) -> None:
    """Add the verbs that train and evaluate."""
    train = add_verb(verbs, "train", _train, "train a model from a config, or go on where its run folder stands",
                  "bvl train configs/quickstart.py workdir=runs/quickstart steps=200")  # fmt: skip
    train.add_argument("config", help="path/to/config.py, or path/to/config.py:ARG")
    train.add_argument(
        "overrides", nargs="*", metavar="key=value", help="for example optim.lr=3e-4 workdir=runs/x"
    )
    train.add_argument("--dry-run", action="store_true", help="print the resolved config and stop")
    train.add_argument("--force", action="store_true", help="go on in a run folder of another config")

    evaluate = add_verb(verbs, "eval", _eval, "evaluate a run on a folder of records",
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
        type=positive_or_all,
        default=1,
        metavar="N|all",
        help="texts of a record that retrieval reads, of the fields caption, alt_text, findings and impression "
        "in this order (default 1)",
    )
    evaluate.add_argument(
        "--calibrate",
        action="store_true",
        help="calibrate what counts as found, on the phrases that these records are known not to show: writes "
        "calibration.json into the run",
    )
    decoding(evaluate, "guidance", "beams", "scorer")
    caption_suite(evaluate)
    reading(evaluate)

    sweep = add_verb(verbs, "sweep-guidance", _sweep_guidance,
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
    decoding(sweep, *(n for n in DECODING if n not in ("guidance", "length", "prompt", "begin")))
    caption_suite(sweep)
    checkpoint_and_batch(sweep)


def _train(args: argparse.Namespace) -> int:
    from bvl import config as config_lib
    from bvl.train.survive import exit_on_signals

    config = config_lib.load_config(args.config, args.overrides)
    if args.dry_run:
        print(config_lib.dump(config), end="")
        return 0
    # Hosts may wait long for each other.
    with exit_on_signals():
        return _train_config(config, force=args.force)


def _train_config(config: Config, *, force: bool) -> int:
    from bvl import hosts

    # Before anything asks JAX for its devices.
    hosts.initialise(timeout_s=config.survive.host_timeout_s)
    from bvl.evals.table import print_captions, print_table, read_examples
    from bvl.runs import RunFolder
    from bvl.train.loop import BEFORE, train
    from bvl.train.metrics_log import quiet_other_hosts

    quiet_other_hosts()
    code = train(config, force=force)
    run = RunFolder(config.workdir)
    if code == 0 and hosts.is_first() and run.eval.is_file():
        start = run.evals / f"{BEFORE}.json"
        before = json.loads(start.read_text()) if config.eval.before and start.is_file() else None
        print_table(json.loads(run.eval.read_text()), before=before)
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
    components = load_components(args.run_folder, checkpoint=checkpoint_of(args.checkpoint))
    suites = suites_for(
        args.data,
        split=args.split,
        name=name,
        config=components.config,
        image_column=args.image_column,
        text_column=args.text_column,
        texts_per_image=args.texts_per_image,
        long_texts=args.long_texts,
        captions=decoding_given(args),
        calibrate=args.calibrate,
    )
    run = RunFolder(args.run_folder)
    evaluation = evaluate(components, suites, batch_size=args.batch_size)
    print_table(write_eval(run, evaluation, name=name))
    print_captions(evaluation.per_example)
    print(f"written: {run.evals / name}.json")
    return 0


def _sweep_guidance(args: argparse.Namespace) -> int:
    from bvl.evals.sweep import parse_gammas, suite_for, sweep_guidance, write_frontier
    from bvl.runs import RunFolder, load_components
    from bvl.train.environment import enable_compilation_cache

    enable_compilation_cache()
    gammas = parse_gammas(args.gammas)
    components = load_components(args.run_folder, checkpoint=checkpoint_of(args.checkpoint))
    suite = suite_for(components.config, data=args.data, split=args.split, **decoding_given(args))
    suite.check_records()
    points = sweep_guidance(components, suite, gammas, batch_size=args.batch_size)
    written = write_frontier(
        points, Path(args.out), title=f"Guidance of {RunFolder(args.run_folder).path.name}"
    )
    print((Path(args.out) / "frontier.md").read_text(encoding="utf-8"), end="")
    print(f"written: {', '.join(map(str, written))}")
    return 0
