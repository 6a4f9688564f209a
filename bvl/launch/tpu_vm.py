"""The hosts of a Cloud TPU, reached by gcloud: one command that runs on all of them."""

from __future__ import annotations

import dataclasses
import shlex
import subprocess
from collections.abc import Sequence
from typing import ClassVar

from bvl.errors import UserError
from bvl.hosts import DISTRIBUTED
from bvl.launch.job import Job, change_folder, require


@dataclasses.dataclass(frozen=True)
class Options:
    """tpu, zone, project: as gcloud names them. directory: where the command runs on the hosts, which have bvl and the
    config there; setup: a shell command before it, such as the activation of an environment."""

    tpu: str | None = None
    zone: str | None = None
    project: str | None = None
    directory: str | None = None
    setup: str | None = None
    # Only the TPU knows.
    hosts: ClassVar[None] = None
    num_devices: ClassVar[None] = None

    def __post_init__(self):
        for name in ("tpu", "zone"):
            if not getattr(self, name):
                raise UserError(f"--on tpu-vm needs --tpu NAME and --zone ZONE: --{name} is missing")


def command(job: Job, options: Options) -> list[str]:
    """The words of the gcloud command that runs a job on every host of the TPU."""
    folder = [change_folder(options.directory)] if options.directory else []
    setup = [options.setup] if options.setup else []
    # On a TPU no variable says how many hosts there are; JAX asks the TPU.
    remote = " && ".join([*folder, *setup, f"{DISTRIBUTED}=auto {shlex.join(job.elsewhere)}"])
    return [
        *("gcloud", "compute", "tpus", "tpu-vm", "ssh", options.tpu),
        "--worker=all",
        f"--zone={options.zone}",
        *([f"--project={options.project}"] if options.project else []),
        f"--command={remote}",
    ]


def launch(jobs: Sequence[Job], options: Options, *, dry_run: bool = False) -> int:
    """Run the jobs one after the other, or print the commands; returns the first exit code that is not 0."""
    if dry_run:
        for job in jobs:
            print(shlex.join(command(job, options)))
        return 0
    require("gcloud", "the Google Cloud CLI")
    codes = [subprocess.run(command(job, options)).returncode for job in jobs]
    return next((code for code in codes if code), 0)
