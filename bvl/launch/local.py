"""This machine: every host of a run is a process, with a log of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from bvl.errors import UserError
from bvl.hosts import COORDINATOR, DISTRIBUTED, NUM_PROCESSES, PROCESS_ID
from bvl.launch.job import Job
from bvl.train.survive import EXIT_INTERRUPTED, EXIT_PEER_LOST, EXIT_TERMINATED

# Codes of a run that was asked to stop: it ends by itself, on all hosts.
ASKED = (EXIT_TERMINATED, EXIT_INTERRUPTED)
# Codes of a run that has lost a host; the second as a shell has it.
LOST = (EXIT_PEER_LOST, 128 + signal.SIGKILL)
# Seconds that the other hosts get, once one has failed, to say what they know of it; then, to obey SIGTERM.
TIME_TO_FAIL, TIME_TO_END = 30.0, 10.0
POLL = 0.1
PASSED_ON = {
    signal.SIGINT: signal.SIGINT,
    signal.SIGTERM: signal.SIGTERM,
    # The terminal has gone.
    signal.SIGHUP: signal.SIGTERM,
    signal.SIGUSR1: signal.SIGUSR1,
}


@dataclasses.dataclass(frozen=True)
class Options:
    """devices_per_host: devices that the CPU pretends to be, or GPUs, where the machine has some.
    restarts: how often a run is started again that ends with 143, or that has lost a host: one was killed by SIGKILL, or
    the others end with 75. jobs: runs of a sweep at the same time."""

    hosts: int = 1
    devices_per_host: int | None = None
    restarts: int = 0
    jobs: int = 1

    @property
    def num_devices(self) -> int | None:
        return None if self.devices_per_host is None else self.hosts * self.devices_per_host


def variables(options: Options, host: int, port: int, gpus: Sequence[str] = ()) -> dict[str, str]:
    """What the environment of a host has that the others' do not.

    gpus: those of the run. Raises UserError where they are too few.
    """
    found = {}
    if options.hosts > 1:
        found |= {
            COORDINATOR: f"127.0.0.1:{port}",
            NUM_PROCESSES: str(options.hosts),
            PROCESS_ID: str(host),
        }
    if options.devices_per_host:
        found["JAX_NUM_CPU_DEVICES"] = str(options.devices_per_host)
    if gpus and (options.hosts > 1 or options.jobs > 1 or options.devices_per_host):
        # Processes cannot share a GPU: each takes most of its memory.
        share = options.devices_per_host or len(gpus) // options.hosts
        if not share or share * options.hosts > len(gpus):
            asked = f"--hosts {options.hosts}" + (f" --devices-per-host {share}" if share else "")
            raise UserError(
                f"{asked}: there are {len(gpus)} GPU(s) for a run; set JAX_PLATFORMS=cpu to try several hosts "
                f"without them"
            )
        found["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[host * share : (host + 1) * share])
    return found


def gpus_here(environment: Mapping[str, str] = os.environ, devices: Path = Path("/dev")) -> list[str]:
    """The GPUs that a process may use, by the names that CUDA_VISIBLE_DEVICES takes."""
    if environment.get("JAX_PLATFORMS") == "cpu":
        return []
    if (visible := environment.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in visible.split(",") if name]
    numbers = [path.name.removeprefix("nvidia") for path in devices.glob("nvidia[0-9]*")]
    return sorted(numbers, key=int)


def launch(jobs: Sequence[Job], options: Options, *, dry_run: bool = False) -> int:
    """Run the jobs, or print the commands of their processes; returns the first exit code that is not 0."""
    gpus = gpus_here()
    options = dataclasses.replace(options, jobs=min(options.jobs, len(jobs)))
    if gpus and options.jobs > len(gpus):
        raise UserError(f"--jobs {options.jobs}: this machine has {len(gpus)} GPU(s), and each run needs one")
    if dry_run:
        for number, job in enumerate(jobs):
            mine = _part(gpus, number % options.jobs, options.jobs)
            port = _free_port()
            for host in range(options.hosts):
                values = variables(options, host, port, mine)
                words = ["env", *(f"{k}={v}" for k, v in values.items()), *job.here]
                print(f"{shlex.join(words)} >>{shlex.quote(f'{job.logs}/host{host}.log')} 2>&1")
        return 0
    return _Supervisor(jobs, options, gpus).run()


class _Run:
    """The processes of one job. place: its number among the runs that are under way at the same time."""

    def __init__(self, job: Job, options: Options, gpus: Sequence[str], place: int):
        self.job, self.place, self._options = job, place, options
        self._gpus = _part(gpus, place, options.jobs)
        self.restarts = options.restarts
        self._processes: dict[int, subprocess.Popen] = {}

    def start(self) -> None:
        self.code = 0
        self._kill_at: list[tuple[float, int]] = []
        self._told_to_end = False
        port = _free_port()
        inherited = {
            k: v
            for k, v in os.environ.items()
            if k not in (COORDINATOR, NUM_PROCESSES, PROCESS_ID, DISTRIBUTED)
        }
        folder = Path(self.job.logs)
        folder.mkdir(parents=True, exist_ok=True)
        self._logs = [folder / f"host{host}.log" for host in range(self._options.hosts)]
        # What earlier starts have written stays there.
        self._begins = [path.stat().st_size if path.exists() else 0 for path in self._logs]
        self._echoed = self._begins[0]
        for host, path in enumerate(self._logs):
            with open(path, "ab") as log:
                self._processes[host] = subprocess.Popen(
                    self.job.here,
                    env=inherited | variables(self._options, host, port, self._gpus),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    # Ctrl-C reaches this process alone, which passes it on: twice would mean "at once".
                    start_new_session=True,
                )

    def send(self, number: int) -> None:
        for process in self._processes.values():
            process.send_signal(number)

    def poll(self) -> bool:
        """Look after the processes; are any left?"""
        ended = {h: p.poll() for h, p in self._processes.items() if p.poll() is not None}
        for host in ended:
            del self._processes[host]
        # As a shell has them: 128 + the number of the signal. Of two at the same time the higher counts, as in Slurm.
        codes = {host: code if code >= 0 else 128 - code for host, code in ended.items()}
        failed = {host: code for host, code in codes.items() if code}
        # Who has lost another host has not failed itself: the other counts, unless it was ended from here.
        first = {host: code for host, code in failed.items() if code != EXIT_PEER_LOST}
        if (failed and self.code == 0) or (first and self.code == EXIT_PEER_LOST and not self._told_to_end):
            named = first or failed
            host = max(named, key=named.get)
            self.code = named[host]
            if self.code not in ASKED:
                self._note_failure(host)
        now = time.monotonic()
        while self._kill_at and self._kill_at[0][0] <= now:
            self._told_to_end = True
            self.send(self._kill_at.pop(0)[1])
        return bool(self._processes)

    def echo(self) -> None:
        """Show what host 0 has written since the last time."""
        with open(self._logs[0], "rb") as log:
            log.seek(self._echoed)
            text = log.read()
        self._echoed += len(text)
        try:
            sys.stdout.write(text.decode(errors="replace"))
            sys.stdout.flush()
        except BrokenPipeError:
            # Who read it (head, less) has gone; the run goes on.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def _note_failure(self, host: int) -> None:
        others = f"; the others get {TIME_TO_FAIL:.0f} s" if self._processes else ""
        _say(
            f"host {host} of {self.job.workdir} ended with exit code {self.code}: {self._logs[host]}{others}"
        )
        if host > 0:
            said = self._logs[host].read_bytes()[self._begins[host] :]
            lines = said.decode(errors="replace").splitlines()[-10:]
            print(*(f"  {line}" for line in lines), sep="\n", file=sys.stderr)
        now = time.monotonic()
        self._kill_at = [
            (now + TIME_TO_FAIL, signal.SIGTERM),
            (now + TIME_TO_FAIL + TIME_TO_END, signal.SIGKILL),
        ]


class _Supervisor:
    """Starts runs, passes signals on to them, starts again what may go on."""

    def __init__(self, jobs: Sequence[Job], options: Options, gpus: Sequence[str]):
        self._waiting, self._options, self._gpus = list(jobs), options, gpus
        self._places = list(range(options.jobs))
        self._sweep = len(jobs) > 1
        self._running: list[_Run] = []
        self._codes: list[int] = []
        self._stopping = False

    def run(self) -> int:
        with self._handlers():
            while self._running or (self._waiting and not self._stopping):
                while self._waiting and self._places and not self._stopping:
                    job = self._waiting.pop(0)
                    if self._sweep:
                        _say(f"starts: {job.workdir}")
                    run = _Run(job, self._options, self._gpus, self._places.pop(0))
                    self._running.append(run)
                    self._start(run)
                time.sleep(POLL)
                for run in list(self._running):
                    self._look_after(run)
        if self._waiting:
            _say(f"not started: {', '.join(job.workdir for job in self._waiting)}")
        return next((code for code in self._codes if code), 0)

    def _start(self, run: _Run) -> None:
        run.start()
        if self._stopping:
            # The signal came before all its processes were there. SIGTERM, as a second Ctrl-C would mean "at once".
            run.send(signal.SIGTERM)

    def _look_after(self, run: _Run) -> None:
        alive = run.poll()
        if self._options.jobs == 1:
            run.echo()
        if alive:
            return
        if run.code in (EXIT_TERMINATED, *LOST) and run.restarts and not self._stopping:
            run.restarts -= 1
            what = "has lost a host" if run.code in LOST else "was asked to stop and saved"
            _say(f"{run.job.workdir} {what}; it goes on ({run.restarts} restart(s) left)")
            self._start(run)
            return
        if self._sweep:
            _say(f"ends with {run.code}: {run.job.workdir}")
        self._running.remove(run)
        self._places.append(run.place)
        self._codes.append(run.code)

    @contextlib.contextmanager
    def _handlers(self) -> Iterator[None]:
        def handle(number: int, _frame: object) -> None:
            self._stopping = self._stopping or number != signal.SIGUSR1
            for run in self._running:
                run.send(PASSED_ON[signal.Signals(number)])

        old = {number: signal.signal(number, handle) for number in PASSED_ON}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
            # After a problem of our own nobody would end them.
            for run in self._running:
                run.send(signal.SIGKILL)


def _part(gpus: Sequence[str], place: int, places: int) -> Sequence[str]:
    """The GPUs of one of the runs that are under way at the same time."""
    share = len(gpus) // places
    return gpus[place * share : (place + 1) * share]


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def _say(text: str) -> None:
    print(f"bvl launch: {text}", file=sys.stderr, flush=True)
