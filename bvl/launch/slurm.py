"""Slurm: a batch script with one task a node, an array where there is a sweep, that requeues itself.

Slurm tells the tasks who they are (bvl/hosts.py reads it). Before the time limit the tasks get SIGUSR1; a run that was
asked to stop saves and ends with 143, and the script then puts the job back into the queue. Where Slurm itself ends a
job (preemption, `scancel`, `scontrol requeue`) the script gets SIGTERM, and what happens next is Slurm's to decide:
a job that was cancelled must not come back. A job whose node fails is requeued by Slurm itself. Where the run ends with
75 (some hosts have lost another, and no exit code is higher) the script requeues only if `restarts` sets an end to it: a
host that crashes each time, before it can tell the others why, would come back for ever.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

from bvl.errors import RunFolderError, UserError
from bvl.launch.job import Job, base_folder, base_name, require
from bvl.train.survive import EXIT_PEER_LOST, EXIT_TERMINATED


@dataclasses.dataclass(frozen=True)
class Options:
    """partition, account, time, gpus_per_node, cpus_per_task, memory (of a node): as sbatch has them, like every
    `sbatch_option` ("constraint=a100"). grace: seconds before the time limit at which the run is asked to stop.
    restarts: how often a job requeues itself, None = as often as it is asked to stop, and not where it has lost a host.
    jobs: runs of a sweep at the same time. setup: a shell command before the run, such as `module load cuda`; the job
    ends with 1 where it fails."""

    hosts: int = 1
    partition: str | None = None
    account: str | None = None
    time: str | None = None
    gpus_per_node: str | None = None
    cpus_per_task: int | None = None
    memory: str | None = None
    sbatch_option: tuple[str, ...] = ()
    grace: int = 120
    restarts: int | None = None
    jobs: int | None = None
    setup: str | None = None
    name: str | None = None

    def __post_init__(self):
        for text in self.sbatch_option:
            if not re.fullmatch(r"[a-z][\w-]*(=.+)?", text):
                raise UserError(
                    f"--sbatch-option {text}: give a name, or name=value, for example constraint=a100"
                )

    @property
    def num_devices(self) -> int | None:
        number = re.search(r"(\d+)$", self.gpus_per_node or "")
        return self.hosts * int(number[1]) if number else None


# On lines of its own, as it may end with a comment.
SETUP = """{{
{}
}} || {{ echo "--setup failed; nothing was started" >&2; exit 1; }}"""
# What follows the choice of the run. `wait` ends early where the shell gets a signal, so it is asked again until
# srun itself has ended.
RUN = """
asked='' ended=''
forward() {{ asked=1; kill -USR1 "$step" 2>/dev/null; }}
trap forward USR1
trap 'asked=1; ended=1' TERM
srun --nodes={hosts} --ntasks={hosts} --ntasks-per-node=1{cpus} --kill-on-bad-exit=0 --wait=0 \\
  --output="$log" --open-mode=append "${{run[@]}}" &
step=$!
while true; do
  asked=''
  wait "$step"
  code=$?
  [ -n "$asked" ] || break
done
echo "$(date '+%F %T') job $SLURM_JOB_ID ended with $code"
if [[ " {again} " == *" $code "* ]] && [ -z "$ended" ]{limit}; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def script(jobs: Sequence[Job], options: Options) -> str:
    """The batch script."""
    sweep = bool(jobs[0].name)
    folder = Path(base_folder(jobs)).absolute()
    lines = {
        "job-name": options.name or base_name(jobs),
        "chdir": os.getcwd(),
        "output": f"{_percent(folder)}/logs/slurm-{'%A_%a' if sweep else '%j'}.log",
        "open-mode": "append",
        "requeue": None,
        "signal": f"USR1@{options.grace}",
        "nodes": str(options.hosts),
        "ntasks-per-node": "1",
        "array": f"0-{len(jobs) - 1}" + (f"%{options.jobs}" if options.jobs else "") if sweep else "",
        "partition": options.partition,
        "account": options.account,
        "time": options.time,
        "gpus-per-node": options.gpus_per_node,
        "cpus-per-task": options.cpus_per_task and str(options.cpus_per_task),
        "mem": options.memory,
    }
    bare = ("requeue",)
    head = [
        f"--{k}" if k in bare else f"--{k}={_sbatch_quote(v)}" for k, v in lines.items() if k in bare or v
    ]
    for text in options.sbatch_option:
        name, separator, value = text.partition("=")
        head.append(f"--{name}{separator}{_sbatch_quote(value) if value else ''}")
    cases = [
        f"{i}) log={shlex.quote(f'{_percent(Path(job.logs).absolute())}/host%t.log')}\n"
        f"   run=({shlex.join(job.here)}) ;;"
        for i, job in enumerate(jobs)
    ]
    body = RUN.format(
        hosts=options.hosts,
        # srun does not take it over from sbatch.
        cpus=f" --cpus-per-task={options.cpus_per_task}" if options.cpus_per_task else "",
        again=EXIT_TERMINATED if options.restarts is None else f"{EXIT_TERMINATED} {EXIT_PEER_LOST}",
        limit=""
        if options.restarts is None
        else f' && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {options.restarts} ]',
    )
    return "\n".join(
        [
            "#!/bin/bash",
            *(f"#SBATCH {text}" for text in head),
            *([SETUP.format(options.setup)] if options.setup else []),
            'case "${SLURM_ARRAY_TASK_ID:-0}" in',
            *cases,
            "esac",
            body.strip(),
            "",
        ]
    )


def launch(jobs: Sequence[Job], options: Options, *, dry_run: bool = False) -> int:
    """Write the batch script to <workdir>/launch and submit it, or print it; returns the exit code of sbatch."""
    text = script(jobs, options)
    if dry_run:
        print(text, end="")
        return 0
    require("sbatch", "Slurm")
    folder = Path(base_folder(jobs))
    file = folder / "launch" / "job.sbatch"
    try:
        # Slurm makes no folders for its logs.
        for path in (file.parent, folder / "logs", *(Path(job.logs) for job in jobs)):
            path.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunFolderError(f"workdir {folder} cannot be written: {error.strerror}") from error
    done = subprocess.run(["sbatch", "--parsable", str(file)], stdout=subprocess.PIPE, text=True)
    if done.returncode == 0:
        number = done.stdout.strip().partition(";")[0]
        print(f"submitted job {number} ({len(jobs)} run(s)): {file}; logs: {jobs[0].logs}/host*.log")
    return done.returncode


def _percent(path: Path) -> str:
    # In names of logs % begins a placeholder.
    return str(path).replace("%", "%%")


def _sbatch_quote(text: str) -> str:
    # In these lines # begins a comment and blanks end an option, unless they are quoted.
    return shlex.quote(text)
