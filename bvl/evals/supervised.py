"""Classification by the head that a `Classify` task trained."""

from __future__ import annotations

import dataclasses

import numpy as np

from bvl.data.sources import Source
from bvl.evals.base import Cache, EvalResult, Suite, encode_records, provenance
from bvl.evals.classification import judge, label_table
from bvl.runs import Components
from bvl.tasks.classify import predict, trained_task


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
        multi_label = trained_task(components, self.task).multi_label
        table = label_table(
            record_set, by="labels", multi_label=multi_label, classes=components.classes, skip_unknown=True
        )
        pooled, kept, unreadable = encode_records(
            components, record_set, table.indices, need="pooled", batch_size=batch_size, cache=cache
        )
        scores = predict(components, pooled, self.task).astype(np.float64)
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
