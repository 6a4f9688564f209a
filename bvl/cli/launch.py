"""bvl launch, bvl runs."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
from collections.abc import Sequence
from typing import Any

from bvl.cli.options import add_verb, positive
from bvl.errors import UserError

# Target -> its module in bvl.launch. The fields of a module's Options are the options of the command line.
TARGETS = {"local": "local", "slurm": "slurm", "tpu-vm": "tpu_vm", "gke": "gke"}


def add_launch(verbs) -> None:
    """Add the verbs that start runs elsewhere or in several processes, and list them."""
    launch = add_verb(verbs, "launch", _launch, "start a run, or a sweep, on several hosts",
                   "bvl launch configs/quickstart.py workdir=runs/quickstart --on slurm --hosts 2 --dry-run")  # fmt: skip
    launch.add_argument("config", help="path/to/config.py, or path/to/config.py:ARG")
    launch.add_argument("overrides", nargs="*", metavar="key=value", help="as for bvl train; workdir=DIR")
    launch.add_argument("--on", required=True, choices=TARGETS, help="where")
    launch.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="KEY=V1,V2",
        help="a run for each value; again for another key, and every combination is a run. Each has its folder "
        "below workdir",
    )
    launch.add_argument(
        "--dry-run", action="store_true", help="print what would be started or submitted, and stop"
    )
    launch.add_argument("--force", action="store_true", help="go on in run folders of another config")

    def option(flag: str, where: str, text: str, kind: type = str, **more: Any) -> None:
        name = flag.removeprefix("--").rpartition("-")[2].upper()
        more = {"metavar": "N" if kind in (positive, natural) else name} | more
        launch.add_argument(flag, type=kind, default=argparse.SUPPRESS, help=f"{where}: {text}", **more)

    everywhere = "local, slurm, gke"
    option("--hosts", everywhere, "processes, one a host (default 1)", positive)
    option(
        "--devices-per-host",
        "local, gke",
        "GPUs, TPU chips, or devices that the CPU pretends to be",
        positive,
    )
    option("--name", "slurm, gke", "of the job (default: that of the run folder)")
    option("--jobs", "local, slurm", "runs of a --sweep at the same time (local: 1, slurm: all)", positive)
    option(
        "--restarts",
        everywhere,
        "how often a run that was asked to stop or has lost a host is started again (local: 0; slurm: as often as it "
        "is asked, and after a lost host only where this is given); gke: all pods after a crash or a lost host (3)",
        natural,
    )
    option(
        "--grace",
        "slurm, gke",
        "seconds that a run gets to save in, before the time limit or when its pod is ended (default 120)",
        positive,
    )
    option("--cpus-per-task", "slurm, gke", "processor cores of a host", positive)
    option("--memory", "slurm, gke", "of a host, as 64G or 64Gi")
    option(
        "--setup", "slurm, tpu-vm", "shell command before the run, such as one that activates an environment"
    )
    option("--directory", "tpu-vm, gke", "folder there in which the command runs")
    for flag in ("--partition", "--account", "--time"):
        option(flag, "slurm", "as for sbatch")
    option("--gpus-per-node", "slurm", "as for sbatch", metavar="[TYPE:]N")
    option("--sbatch-option", "slurm", "any other, for example constraint=a100; may be repeated",
           action="append", metavar="NAME[=VALUE]")  # fmt: skip
    option("--tpu", "tpu-vm", "name of the TPU")
    option("--zone", "tpu-vm", "its zone")
    option("--project", "tpu-vm", "its project")
    option("--image", "gke", "container image with bvl")
    option("--accelerator", "gke", "its label in GKE, such as nvidia-h100-80gb or tpu-v5-lite-podslice")
    option("--topology", "gke", "of TPUs, such as 2x4")
    option("--namespace", "gke", "of Kubernetes")
    option(
        "--volume",
        "gke",
        "persistent volume claim that all pods share, for the run folder",
        metavar="CLAIM:PATH",
    )

    runs = add_verb(verbs, "runs", _runs, "list the runs in a folder: state, step, loss, last evaluation",
                 "bvl runs runs")  # fmt: skip
    runs.add_argument("folder", metavar="DIR", help="folder of run folders, at any depth")
    runs.add_argument("--json", action="store_true", help="a line of JSON for each run")


def natural(text: str) -> int:
    """A whole number, 0 or more."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, 0 or more")
    return int(text)


def _launch(args: argparse.Namespace) -> int:
    from bvl.launch.job import jobs_of

    module = importlib.import_module(f"bvl.launch.{TARGETS[args.on]}")
    options = module.Options(**_given(args, module.Options))
    if hasattr(args, "jobs") and not args.sweep:
        raise UserError(
            "--jobs goes with --sweep: it says how many of its runs are under way at the same time"
        )
    jobs = jobs_of(
        args.config,
        args.overrides,
        args.sweep,
        force=args.force,
        hosts=options.hosts,
        num_devices=options.num_devices,
    )
    return module.launch(jobs, options, dry_run=args.dry_run)


def _given(args: argparse.Namespace, options: type) -> dict[str, Any]:
    """What was said of the options of a target; raises UserError for an option of another target."""
    common = ("verb", "run", "config", "overrides", "on", "sweep", "dry_run", "force")
    given = {name: value for name, value in vars(args).items() if name not in common}
    known = [field.name for field in dataclasses.fields(options)]
    if wrong := [name for name in given if name not in known]:
        flags = _flags(known)
        raise UserError(f"--on {args.on} takes no {', '.join(_flags(wrong))}; it takes {', '.join(flags)}")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def _flags(names: Sequence[str]) -> list[str]:
    return [f"--{name.replace('_', '-')}" for name in names]


def _runs(args: argparse.Namespace) -> int:
    from bvl.cli.results import print_line
    from bvl.train.listing import list_runs, print_runs

    found = list_runs(args.folder)
    if args.json:
        for run in found:
            print_line(run.to_dict())
    else:
        print_runs(found, args.folder)
    return 0
