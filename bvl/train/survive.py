"""Stopping in good order: signals become a request that the loop reads between steps."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator

logger = logging.getLogger(__name__)

# What a shell reports for a process that a signal ended: 128 + number.
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143
EXIT_CODES = {signal.SIGINT: EXIT_INTERRUPTED, signal.SIGTERM: EXIT_TERMINATED}


class StopRequest:
    """`exit_code` is None until a signal asked to stop."""

    exit_code: int | None = None


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Ctrl-C and SIGTERM ask to stop after the running step; a second one stops at once."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        # Only the main thread may set handlers; a run started elsewhere has no such request.
        yield request
        return

    def handle(number: int, _frame: object) -> None:
        if request.exit_code is not None:
            raise KeyboardInterrupt
        request.exit_code = EXIT_CODES[signal.Signals(number)]
        logger.warning("%s: saving after this step (again to stop at once)", signal.Signals(number).name)

    old = {number: signal.signal(number, handle) for number in EXIT_CODES}
    try:
        yield request
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
