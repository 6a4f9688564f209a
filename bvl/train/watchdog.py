"""Names the stage in which a run is stuck, with the stacks of all threads."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import tempfile
import threading
import time
from collections.abc import Iterator

from bvl import hosts

logger = logging.getLogger("bvl.hosts")


class Watchdog:
    """A thread that looks at how long the current stage has lasted; to enter a stage is to write one attribute.

    limit_s: after so long the stage is named in the log, again after twice the time and so on; 0 = never.
    stop_s: after so long the process is ended; None = never.
    """

    def __init__(self, limit_s: float, stop_s: float | None = None):
        self._limit, self._stop = limit_s, stop_s
        self._stage: tuple[str, float] | None = None
        self._closed = threading.Event()
        shortest = min(limit_s or float("inf"), stop_s or float("inf"))
        self._thread = None
        if shortest < float("inf"):
            look = min(shortest / 8, 10.0)
            self._thread = threading.Thread(target=self._watch, args=(look,), name="watchdog", daemon=True)
            self._thread.start()

    def enter(self, stage: str) -> None:
        """From now on the process is in this stage."""
        self._stage = stage, time.monotonic()

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """The process is in this stage, and then again in the one before, as if that began anew."""
        before = self._stage
        self.enter(name)
        try:
            yield
        finally:
            if before is not None:
                self.enter(before[0])

    def close(self) -> None:
        self._closed.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self, look: float) -> None:
        warned: tuple[str, float] | None = None
        limit = self._limit
        while not self._closed.wait(look):
            stage = self._stage
            if stage is None:
                continue
            if stage is not warned:
                limit = self._limit
            lasted = time.monotonic() - stage[1]
            if self._limit and lasted > limit:
                warned, limit = stage, 2 * lasted
                logger.error(
                    "%s: the stage %r has lasted %.0f s (survive.watchdog_s=%g); stacks of all threads:\n%s",
                    hosts.describe(),
                    stage[0],
                    lasted,
                    self._limit,
                    stacks(),
                )
            if self._stop is not None and lasted > self._stop:
                logger.error(
                    "%s: the stage %r has lasted %.0f s (survive.watchdog_stop_s=%g): ended; stacks of all threads:\n%s",
                    hosts.describe(),
                    stage[0],
                    lasted,
                    self._stop,
                    stacks(),
                )
                # A hung call would survive any exception.
                os._exit(1)


def stacks() -> str:
    """The Python stack of every thread, or why there is none."""
    try:
        # Not by the module traceback, which reads sources and could hang with the file system.
        with tempfile.TemporaryFile("w+") as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            return file.read()
    except OSError as error:
        # The watchdog must not end with a full disk.
        return f"none, no temporary file can be written: {error}"
