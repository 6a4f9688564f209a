"""Checkpoints that cannot be saved do not end training at once: they are warned of and tried again."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable
from typing import Any

from bvl import hosts
from bvl.checkpoint import Checkpoints
from bvl.errors import CheckpointError

logger = logging.getLogger(__name__)

# What a disk that is full, or was made read-only, says.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
# Before a save is tried again where training has nothing else to do.
PAUSE_S = 5.0


class Saver:
    """Saves checkpoints; several that fail in a row are an error, of all hosts alike.

    flush: writes the rows that wait for space; those up to a step are on disk before its checkpoint is, so
    that a resume loses none.
    """

    def __init__(self, checkpoints: Checkpoints, *, max_failures: int, flush: Callable[[], None]):
        self._checkpoints, self._max_failures, self._flush = checkpoints, max_failures, flush
        self._failures, self._under_way = 0, False

    def check(self) -> None:
        """Warn of a save that has failed in the background by now; raises CheckpointError if it was one too many."""
        try:
            if self._under_way and self._checkpoints.check():
                self._failures, self._under_way = 0, False
        except CheckpointError as error:
            self._failed(error)

    def save(self, step: int, items: dict[str, Any], scores: dict[str, float] | None = None) -> bool:
        """Start a save once the last one is complete; False if that did not work.

        Raises CheckpointError, or OSError of a file of rows, if it was one failure too many.
        """
        self.wait()
        for action in (self._flush, lambda: self._checkpoints.save(step, items, scores)):
            if (error := _attempt(action)) is not None:
                self._failed(error)
                return False
        self._under_way = True
        return True

    def wait(self) -> bool:
        """Until the save under way is complete; False if it failed."""
        if (error := _attempt(self._checkpoints.wait)) is not None:
            self._failed(error)
            return False
        if self._under_way:
            self._failures, self._under_way = 0, False
        return True

    def finish(self, step: int, items: dict[str, Any], scores: dict[str, float] | None = None) -> None:
        """Save and wait, again and again until it worked or failed too often."""
        while not (self.save(step, items, scores) and self.wait()):
            time.sleep(PAUSE_S)

    def _failed(self, error: Exception) -> None:
        self._failures, self._under_way = self._failures + 1, False
        if self._failures >= self._max_failures:
            raise error
        logger.error(
            "NOT SAVED: %s. Failure %d in a row; training goes on and the next checkpoint is tried, but the run stops "
            "at checkpoint.max_failures=%d",
            error,
            self._failures,
            self._max_failures,
        )


def _attempt(action: Callable[[], None]) -> Exception | None:
    """Why `action` failed, on every host if it failed on one."""
    problem: Exception | None = None
    try:
        action()
    except CheckpointError as error:
        problem = error
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        problem = error
    told = next((text for text in hosts.gather(problem and str(problem)) if text is not None), None)
    return problem if problem is not None or told is None else CheckpointError(told)
