"""Classification by the head that a `Classify` task trained."""

from __future__ import annotations

import dataclasses

import numpy as np

from bvl.data.sources import Source
from bvl.errors import DataError, ImageError
from bvl.evals.base import Cache, EvalResult, Suite, describe, load_pixels, provenance
from bvl.evals.classification import judge, label_table
from bvl.runs import Components
from bvl.tasks.classify import predict


@dataclasses.dataclass(frozen=True, kw_only=True)
class Supervised(Suite):
    """Metrics of a trained head on a source's labels. `task`: the name of the task in the config.

    Images of a class that the head was not trained on cannot be right; they are left out and counted.
    """

    source: Source
    task: str = "classify"

    def check_records(self) -> None:
        # Whether one label or several are meant is the task's to say; that there are labels must hold anyway.
        label_table(self.opened(), by="labels", multi_label=True)

    def run(self, components: Components, *, batch_size: int, cache: Cache | None = None) -> EvalResult:
        record_set = self.opened()
        # Fails first for a run without this task.
        predict(components, [], self.task, batch_size=batch_size)
        multi_label = components.config.tasks[self.task].multi_label
        table = label_table(
            record_set, by="labels", multi_label=multi_label, classes=components.classes, skip_unknown=True
        )
        kept, unreadable = [], []

        def readable():
            for index, pixels in load_pixels(components, record_set, table.indices):
                if isinstance(pixels, ImageError):
                    unreadable.append({"id": record_set.describe(index)["id"], "error": str(pixels)})
                else:
                    kept.append(index)
                    yield pixels

        scores = predict(components, readable(), self.task, batch_size=batch_size).astype(np.float64)
        if not kept:
            raise DataError(
                f"{describe(record_set)}: no image can be read; the first: {unreadable[0]['error']}"
            )
        found, per_example = judge(record_set, table, kept, scores, by="labels", multi_label=multi_label)
        return EvalResult(
            found.metrics,
            provenance(
                components,
                record_set,
                kept,
                left_out=table.left_out,
                unreadable=unreadable,
                undefined=found.undefined,
                task=self.task,
                multi_label=multi_label,
                classes=list(table.classes),
            ),
            per_example,
        )
