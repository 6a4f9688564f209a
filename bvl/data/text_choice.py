"""Which text of a record is read, and when two texts count as equal."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from bvl.errors import ConfigError


def text_id(text: str) -> int:
    """32-bit hash of a text without regard to case and spacing; equal texts are each other's positives."""
    return zlib.crc32(" ".join(text.lower().split()).encode())


@dataclasses.dataclass(frozen=True)
class TextChoice:
    """Which text of a record is read: fields with probabilities, or labels through templates.

    Fields that are null or empty in a record are left out and the rest renormalised. A field may hold one
    string or a list of alternatives. `templates` hold "{}", which is filled with the record's labels,
    comma-separated; they come into play through the field name "labels".
    """

    fields: tuple[tuple[str, float], ...]
    templates: tuple[str, ...] = ("{}",)

    @classmethod
    def of(cls, text: str | dict[str, float], templates: Sequence[str] = ()) -> TextChoice:
        fields = {text: 1.0} if isinstance(text, str) else text
        if not fields or any(p <= 0 for p in fields.values()):
            raise ConfigError(f"text={text!r}: give field names with probabilities above 0")
        bad = [t for t in templates if "{}" not in t]
        if bad:
            raise ConfigError(f"template {bad[0]!r} has no '{{}}' for the label")
        return cls(tuple(fields.items()), tuple(templates) or ("{}",))

    def candidates(self, record: dict[str, Any]) -> Iterator[tuple[float, list[str]]]:
        """(probability before renormalising, alternatives) of every field that the record has."""
        for name, probability in self.fields:
            value = record.get(name)
            if name == "labels":
                value = [t.replace("{}", ", ".join(value)) for t in self.templates] if value else None
            options = value if isinstance(value, list | tuple) else [value]
            options = [o for o in options if isinstance(o, str) and o.strip()]
            if options:
                yield probability, options

    def all(self, record: dict[str, Any]) -> list[str]:
        """Every text that `pick` could return."""
        return [text for _, options in self.candidates(record) for text in options]

    def pick(self, record: dict[str, Any], rng: np.random.Generator, count: int = 1) -> list[str]:
        """`count` texts: different fields first, then other alternatives of a field, then repetitions."""
        candidates = list(self.candidates(record))
        if not candidates:
            return []
        weights = np.array([p for p, _ in candidates])
        unused = [list(options) for _, options in candidates]
        picked: list[str] = []
        while len(picked) < count:
            size = min(count - len(picked), len(candidates))
            for i in rng.choice(len(candidates), size, replace=False, p=weights / weights.sum()):
                unused[i] = unused[i] or list(candidates[i][1])
                picked.append(unused[i].pop(int(rng.integers(len(unused[i])))))
        return picked

    def first(self, record: dict[str, Any]) -> str | None:
        """The text for evaluation: the first option of the most probable field; no randomness."""
        candidates = sorted(self.candidates(record), key=lambda c: -c[0])
        return candidates[0][1][0] if candidates else None
