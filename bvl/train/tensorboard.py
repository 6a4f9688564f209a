"""Metrics as points for TensorBoard."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

logger = logging.getLogger(__name__)


class TensorBoard:
    """Event files in `folder`; points after `resume_step` take the place of earlier ones.

    A full disk ends the points, not the run: metrics.jsonl has the same numbers.
    """

    def __init__(self, folder: Path, *, resume_step: int):
        # It imports torch where that is installed, which takes seconds.
        import tensorboardX

        self._folder = folder
        # A queue without limit: the thread that writes dies of a full disk, and a full queue would wait for it for ever.
        self._writer = tensorboardX.SummaryWriter(str(folder), purge_step=resume_step + 1, max_queue=0)
        events = self._writer.file_writer.event_writer
        self._thread = events._worker
        # Nor may the process wait for it at its end.
        events._event_queue.cancel_join_thread()
        self._warned = False

    def write(self, step: int, row: dict[str, float | None]) -> None:
        if not self._thread.is_alive():
            if not self._warned:
                logger.error("%s cannot be written: no more points for TensorBoard", self._folder)
            self._warned = True
            return
        for key, value in row.items():
            # Where nothing was counted there is no point to draw.
            if value is not None:
                self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._writer.close()
