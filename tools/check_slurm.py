"""Train under a real Slurm on two nodes, interrupt the jobs, and compare their ends with uninterrupted runs.

    python tools/check_slurm.py

Needs sbatch on the PATH (and SLURM_CONF, where Slurm is not set up for the whole machine), two idle nodes, and a folder
that they share. Three things are tried, each by `bvl launch`: a job that is put back into the queue by `scontrol
requeue`, a sweep one of whose runs gets SIGUSR1 and requeues itself, and a job that is cancelled and must not come
back. Slurm holds a requeued job back for up to two minutes. Exits 1 if parameters, optimiser, average, metric sums or
metrics.jsonl (but time/) differ in one bit.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

HOSTS, DEVICES = 2, 1


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], epilog="example:\n  python tools/check_slurm.py --folder /shared/check",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "--folder", type=Path, default=Path("slurm_check"), help="a new one that the nodes share"
    )
    parser.add_argument("--steps", type=int, default=60, help="of every run (default 60)")
    args = parser.parse_args()
    if shutil.which("sbatch") is None:
        print("skipped: sbatch is not on the PATH, so there is no Slurm here")
        return 0
    nodes = slurm("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").split()
    if len(set(nodes)) < HOSTS:
        print(f"skipped: {HOSTS} idle nodes are needed, there are {len(set(nodes))}")
        return 0
    if args.folder.exists():
        print(f"{args.folder} exists; choose another --folder")
        return 2
    check = Check(args.folder.absolute(), args.steps, sorted(set(nodes))[0])
    with check.no_job_left():
        for part in (check.references, check.requeued, check.sweep, check.cancelled):
            started = time.monotonic()
            print(f"{part.__name__}: {part()} ({time.monotonic() - started:.0f} s)", flush=True)
    print("all as uninterrupted")
    return 0


class Check:
    """The runs of one folder; each part says what was seen, or raises."""

    def __init__(self, folder: Path, steps: int, node: str):
        from kill_and_resume import Runner
        from two_processes import free_port

        self.runner = Runner(folder, steps=steps)
        self.runner.environment |= {"JAX_NUM_CPU_DEVICES": str(DEVICES)}
        self.steps = steps
        self.jobs: list[str] = []
        with contextlib.suppress(OSError):
            socket.gethostbyname(node)
            return
        # Nodes that only Slurm knows by their names: all on this machine.
        self.runner.environment |= {"BVL_COORDINATOR": f"127.0.0.1:{free_port()}"}
        print(f"{node} is no name of a machine: its processes meet on this one")

    def references(self) -> str:
        """The same runs with two processes on this machine."""
        for seed in (0, 1):
            words = self._words(f"whole_{seed}", f"seed={seed}")
            code = self.runner.run(*words, "--on", "local", "--hosts", HOSTS)
            assert code == 0, f"exit code {code}:\n{self.runner.log()[-3000:]}"
        return f"{self.steps} steps of seeds 0 and 1 on {HOSTS} processes x {DEVICES} devices"

    def requeued(self) -> str:
        job = self._submit("requeued")
        self._until(lambda: self._trains("requeued"), job)
        at = self.runner.rows("requeued")
        slurm("scontrol", "requeue", job)
        self._until(lambda: self._state(job) == "PENDING", job)
        saved = self.runner.steps("requeued")
        assert saved and saved[-1] < self.steps, f"it was complete before: {saved}"
        self._ends(job, "requeued", 0)
        return f"requeued after {at} rows of metrics, checkpoints {saved}; then complete"

    def sweep(self) -> str:
        job = self._submit("sweep", "--sweep", "seed=0,1", "--jobs", "1")
        self._until(lambda: self._trains("sweep/seed=0"), job)
        slurm("scancel", "--signal=USR1", f"{job}_0")
        self._until(lambda: "SIGUSR1" in self._log("sweep/seed=0") or self._starts("sweep/seed=0") > 1, job)
        saved = self.runner.steps("sweep/seed=0")
        assert saved and saved[-1] < self.steps, f"it was complete before: {saved}"
        for seed in (0, 1):
            self._ends(f"{job}_{seed}", f"sweep/seed={seed}", seed)
        assert self._starts("sweep/seed=0") > 1, "it was not started again"
        return f"run 0 was asked to stop, checkpoints {saved}; both complete"

    def cancelled(self) -> str:
        job = self._submit("cancelled")
        self._until(lambda: self._trains("cancelled"), job)
        slurm("scancel", job)
        self._until(lambda: self._state(job) not in ("RUNNING", "COMPLETING"), job)
        # The script had its time to do something silly.
        time.sleep(5)
        state = self._state(job)
        assert state in ("", "CANCELLED"), f"the job is {state}"
        return f"checkpoints {self.runner.steps('cancelled')}; it stays cancelled"

    @contextlib.contextmanager
    def no_job_left(self) -> Iterator[None]:
        try:
            yield
        finally:
            for job in self.jobs:
                subprocess.run(["scancel", job], stderr=subprocess.DEVNULL)

    def _words(self, workdir: str, *overrides: str) -> tuple[object, ...]:
        return "launch", self.runner.config, f"workdir={workdir}", *overrides

    def _submit(self, workdir: str, *options: str) -> str:
        code = self.runner.run(*self._words(workdir), "--on", "slurm", "--hosts", HOSTS, *options)
        log = self.runner.log()
        assert code == 0 and "submitted job" in log, f"exit code {code}:\n{log[-3000:]}"
        job = log.rpartition("submitted job ")[2].split()[0]
        self.jobs.append(job)
        return job

    def _ends(self, job: str, workdir: str, seed: int) -> None:
        from kill_and_resume import assert_same_runs

        self._until(lambda: self.steps in self.runner.steps(workdir), job)
        self._until(lambda: self._state(job) in ("", "COMPLETED"), job)
        for host in range(HOSTS):
            log = self._log(workdir, host)
            assert "Traceback" not in log, f"host {host} of {workdir}:\n{log[-3000:]}"
        assert_same_runs(self.runner.folder / workdir, self.runner.folder / f"whole_{seed}")

    def _trains(self, workdir: str) -> bool:
        """Has it logged a while, and has some way to go?"""
        return self.runner.rows(workdir) >= 3 and bool(self.runner.steps(workdir))

    def _log(self, workdir: str, host: int = 0) -> str:
        file = self.runner.folder / workdir / "logs" / f"host{host}.log"
        return file.read_text() if file.exists() else ""

    def _starts(self, workdir: str) -> int:
        return self._log(workdir).count("M parameters, ")

    def _state(self, job: str) -> str:
        """The state of a job, "" where Slurm has forgotten it."""
        found = subprocess.run(
            ["squeue", "-h", "-t", "all", "-j", job, "-o", "%T"], capture_output=True, text=True
        )
        return found.stdout.split()[0] if found.stdout.split() else ""

    def _until(self, condition: Callable[[], bool], job: str, seconds: float = 400.0) -> None:
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                subprocess.run(["scontrol", "show", "job", job])
                raise TimeoutError(f"job {job} did not get there; logs are in {self.runner.folder}")
            time.sleep(0.2)


def slurm(*words: str) -> str:
    """What a command of Slurm prints; CalledProcessError where it fails."""
    return subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.exit(main())
