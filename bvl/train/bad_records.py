"""Records that could not be read: named in bad_records.jsonl, counted, and a reason to stop when too many."""

from __future__ import annotations

import json
import logging

from bvl import hosts
from bvl.errors import DataError
from bvl.runs import RunFolder
from bvl.train.metrics_log import JsonLines, drop_rows_after

logger = logging.getLogger(__name__)


class BadRecords:
    """Stops the run when distinct unreadable records exceed `max_fraction` of all records in use, and are several.

    One is always allowed: in a small set it alone would be more than any sensible fraction. Of several hosts each
    notes those of its own rows, the others than the first in bad_records.<host>.jsonl, and stops the run at its share
    of the limit.
    """

    def __init__(self, run: RunFolder, *, num_records: int, max_fraction: float, resume_step: int):
        self._path = run.bad_records
        if not hosts.is_first():
            self._path = self._path.with_suffix(f".{hosts.index()}.jsonl")
        drop_rows_after(self._path, resume_step)
        self._fraction, self._num_records = max_fraction, num_records
        self._limit = max(1, max_fraction * num_records / hosts.count())
        self._seen: set[tuple[str, str]] = set()
        if self._path.is_file():
            for line in self._path.read_text().splitlines():
                row = json.loads(line)
                self._seen.add((row["source"], row["id"]))
        self._file: JsonLines | None = None

    def add(self, step: int, records: list[dict[str, str]]) -> None:
        """Note the unreadable records of a step's batch; raises DataError above the limit."""
        for record in records:
            key = record["source"], record["id"]
            if key in self._seen:
                continue
            self._seen.add(key)
            logger.warning("unreadable record, another takes its place: %s", record["error"])
            self._file = self._file or JsonLines(self._path)
            self._file.write({"step": step, **record})
            if len(self._seen) > self._limit:
                raise DataError(
                    f"{len(self._seen)} of {self._num_records} records cannot be read, more than "
                    f"data.max_bad_fraction={self._fraction:g}; they are listed in {self._path}. The last: {record['error']}"
                )

    def flush(self) -> None:
        """Write the rows that wait for space; raises OSError where there is still none."""
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
