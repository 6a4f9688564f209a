"""Stopping in good order, and what exit codes say.

    0    complete
    143  asked to stop by SIGTERM or SIGUSR1: everything is saved and the same command goes on; launchers requeue on it
    130  the same by Ctrl-C; not to be requeued
    75   another host has died or gave no sign of life; the same command goes on from the last checkpoint
    1    a problem that the message explains, or a crash
    2    wrong usage

Signals become a request that the loop reads between steps. Of several hosts any may get the signal, and all must stop
after the same step: each puts its request into the batch, the step gives back the largest, and all read it there.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

import numpy as np

from bvl import hosts

logger = logging.getLogger("bvl.hosts")

# What a shell reports for a process that a signal ended: 128 + number.
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143
# EX_TEMPFAIL of sysexits.h.
EXIT_PEER_LOST = 75
EXIT_CODES = {
    signal.SIGINT: EXIT_INTERRUPTED,
    signal.SIGTERM: EXIT_TERMINATED,
    # What Slurm sends some time before the limit (sbatch --signal=USR1@120).
    signal.SIGUSR1: EXIT_TERMINATED,
}
# Batch key, and name among what a step gives, of the hosts' requests to stop: an exit code, or 0.
STOP = "stop"


class StopRequest:
    """`exit_code` is None until a signal asked this process to stop."""

    exit_code: int | None = None

    def in_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with this host's request, where there are others to be told."""
        if hosts.count() == 1:
            return batch
        rows = len(next(iter(batch.values())))
        return {**batch, STOP: np.full(rows, self.exit_code or 0, np.int32)}

    def agreed(self, told: int) -> int | None:
        """The exit code where all hosts must stop now; `told` is what the last step that all have read gave back."""
        return self.exit_code if hosts.count() == 1 else told or None


@contextlib.contextmanager
def _handled(handlers: dict[int, Any]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        # Only the main thread may set handlers; a run started elsewhere has no such request.
        yield
        return
    old = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in old.items():
            # None: a handler that is no Python function, which Python cannot put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextlib.contextmanager
def exit_on_signals() -> Iterator[None]:
    """Before training, when there is nothing to save: SIGTERM and SIGUSR1 end the process with the code of a request."""

    def handle(number: int, _frame: object) -> NoReturn:
        raise SystemExit(EXIT_CODES[signal.Signals(number)])

    with _handled({number: handle for number, code in EXIT_CODES.items() if code == EXIT_TERMINATED}):
        yield


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """SIGTERM, SIGUSR1 and Ctrl-C ask to stop after the running step; a second Ctrl-C stops at once."""
    request = StopRequest()

    def handle(number: int, _frame: object) -> None:
        name = signal.Signals(number).name
        if number == signal.SIGINT and request.exit_code is not None:
            raise KeyboardInterrupt
        # SIGTERM often follows SIGUSR1 while everything is being saved.
        request.exit_code = max(request.exit_code or 0, EXIT_CODES[signal.Signals(number)])
        logger.warning("%s: saving after this step (Ctrl-C to stop at once)", name)

    with _handled(dict.fromkeys(EXIT_CODES, handle)):
        yield request
