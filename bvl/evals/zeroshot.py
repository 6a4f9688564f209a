"""Zero-shot classification: an image is compared with texts that name the classes (Radford et al. 2021, section 3.1).

A class with several prompts is represented by the normalised mean of their embeddings (prompt ensemble).
"""

from __future__ import annotations

import collections
import dataclasses
import functools

import numpy as np
import scipy.special

from bvl.data.sources import Source
from bvl.errors import ConfigError, DataError
from bvl.evals.base import Cache, EvalResult, Suite, describe, encode_records, provenance
from bvl.evals.classification import (
    LabelTable,
    judge,
    label_table,
    require_outcomes,
)
from bvl.runs import Components
from bvl.tasks.contrastive import embed_prompts

Prompts = tuple[str, ...] | dict[str, tuple[str, ...]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZeroShot(Suite):
    """Zero-shot classification of a source's images.

    by: the field that names the class, "labels" or any other such as "modality".
    prompts: class -> prompts; with multi_label also class -> {"positive": prompts, "negative": prompts}. The classes
    are its keys. None: the classes are the values that occur; a class is named by the field `prompt_field` of its
    records (single label, by="labels"), else by its name in lower case, put into `templates`.
    multi_label: each class on its own, scored by positive minus negative prompts; without negative ones by the
    positive alone. Labels that are no class are ignored then, while a single label must be a class.
    """

    source: Source
    by: str = "labels"
    prompts: dict[str, tuple[str, ...] | dict[str, tuple[str, ...]]] | None = None
    templates: tuple[str, ...] = ("{}",)
    multi_label: bool = False
    prompt_field: str | None = "class_prompt"

    def __post_init__(self):
        if not self.templates or any("{}" not in t for t in self.templates):
            raise ConfigError(f"templates={self.templates!r}: each needs '{{}}' for the name of the class")
        for name, prompts in (self.prompts or {}).items():
            self._check_prompts(name, prompts)
        if self.prompts is not None and len(self.prompts) < (1 if self.multi_label else 2):
            raise ConfigError(f"prompts name {len(self.prompts)} classes; choosing needs at least two")

    def _check_prompts(self, name: str, prompts: Prompts) -> None:
        if isinstance(prompts, str):
            raise ConfigError(f"prompts[{name!r}] is one string; write ({prompts!r},)")
        if isinstance(prompts, dict):
            if not self.multi_label:
                raise ConfigError(
                    f"prompts[{name!r}]: positive and negative prompts are for multi_label=True; list plain prompts"
                )
            if set(prompts) != {"positive", "negative"}:
                raise ConfigError(
                    f"prompts[{name!r}]: give 'positive' and 'negative', not {', '.join(prompts)}"
                )
        for part in prompts.values() if isinstance(prompts, dict) else (prompts,):
            if isinstance(part, str) or not part or not all(isinstance(p, str) and p.strip() for p in part):
                raise ConfigError(f"prompts[{name!r}]={prompts!r}: give one or more texts")

    @functools.cached_property
    def table(self) -> LabelTable:
        """Labels of the records; DataError where they do not fit the classes."""
        return label_table(
            self.opened(),
            by=self.by,
            multi_label=self.multi_label,
            classes=tuple(self.prompts) if self.prompts else None,
        )

    def check_records(self) -> None:
        if self.multi_label:
            require_outcomes(self.table, self.opened(), self.by)
        elif len(self.table.classes) < 2:
            raise DataError(
                f"{describe(self.opened())}: every record has the same {self.by!r}, {self.table.classes[0]!r}; name "
                f"the classes to choose from by prompts="
            )

    def class_prompts(self) -> dict[str, Prompts]:
        """The prompts of every class, in the order of the columns."""
        if self.prompts is not None:
            return {name: self.prompts[name] for name in self.table.classes}
        named: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
        if self.prompt_field and self.by == "labels" and not self.multi_label:
            for i in self.table.indices:
                record = self.opened().describe(int(i))
                if isinstance(text := record.get(self.prompt_field), str):
                    named[record["labels"][0]][text] += 1
        out: dict[str, Prompts] = {}
        for name in self.table.classes:
            plain = name.lower().replace("_", " ")
            positive = tuple(sorted(named[name])) or tuple(t.replace("{}", plain) for t in self.templates)
            if self.multi_label:
                out[name] = {
                    "positive": positive,
                    "negative": tuple(t.replace("{}", f"no {plain}") for t in self.templates),
                }
            else:
                out[name] = positive
        return out

    def run(self, components: Components, *, batch_size: int, cache: Cache | None = None) -> EvalResult:
        self.check_records()
        record_set, table, prompts = self.opened(), self.table, self.class_prompts()
        image, kept, unreadable = encode_records(
            components, record_set, table.indices, need="embed", batch_size=batch_size, cache=cache
        )
        scores = _scores(components, image, prompts)
        if not self.multi_label:
            # In double precision, lest a sharp temperature makes ties of unequal probabilities.
            scores = scipy.special.softmax(components.scale_and_bias()[0] * scores, axis=1)
        found, per_example = judge(record_set, table, kept, scores, by=self.by, multi_label=self.multi_label)
        return EvalResult(
            found.metrics,
            provenance(
                components,
                record_set,
                kept,
                left_out=table.left_out,
                unreadable=unreadable,
                undefined=found.undefined,
                by=self.by,
                multi_label=self.multi_label,
                prompts={
                    name: {k: list(v) for k, v in p.items()} if isinstance(p, dict) else list(p)
                    for name, p in prompts.items()
                },
            ),
            per_example,
        )


def _scores(components: Components, image: np.ndarray, prompts: dict[str, Prompts]) -> np.ndarray:
    """Cosines [n, c] in double precision: of the class's prompts, minus those of its negative prompts if it has any."""
    groups, sign_and_class = [], []
    for c, prompt in enumerate(prompts.values()):
        parts = {"positive": prompt} if not isinstance(prompt, dict) else prompt
        for kind, texts in parts.items():
            groups.append(list(texts))
            sign_and_class.append((1.0 if kind == "positive" else -1.0, c))
    direction = np.zeros((len(prompts), image.shape[1]))
    for (sign, c), embed in zip(sign_and_class, embed_prompts(components, groups), strict=True):
        direction[c] += sign * embed
    return image.astype(np.float64) @ direction.T
