"""Which text of a record is read, and when two texts count as equal."""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from bvl.data.sentences import split_sentences
from bvl.errors import ConfigError

_PLACE = re.compile(r"\{\s*([^{}]*?)\s*\}")


def text_id(text: str) -> int:
    """32-bit hash of a text without regard to case and spacing; equal texts are each other's positives."""
    return zlib.crc32(" ".join(text.lower().split()).encode())


def drop_words(text: str, rate: float, rng: np.random.Generator) -> str:
    """The text with each word left out with probability `rate`; one word stays where all would go."""
    words = text.split()
    kept = [word for word, number in zip(words, rng.random(len(words)), strict=True) if number >= rate]
    return " ".join(kept) if kept or not words else words[int(rng.integers(len(words)))]


@dataclasses.dataclass(frozen=True)
class ChosenText:
    """A text of a record and where it came from.

    option: of the choice. alternative: place in the field's list of texts, 0 where it holds one.
    """

    text: str
    option: str
    alternative: int = 0


@dataclasses.dataclass(frozen=True)
class TextChoice:
    """Which text of a record is read: options with probabilities.

    An option is the name of a field, which holds one string or a list of alternatives, or a template such as
    "{modality} of the {organ}" over the record's fields, lists in it joined by commas. Options that want a field
    which is null or empty in a record are left out and the rest renormalised (BioCLIP draws its types of text this
    way: Stevens et al. 2024, arXiv:2311.18803).

    templates: forms of the option "labels"; each holds "{}", which is filled with the labels, comma-separated.
    descriptions: label -> texts that say what it means; in training each label is replaced by one drawn at random,
      in evaluation by the first; one without stands for itself (FLAIR: Silva-Rodriguez et al. 2023,
      arXiv:2308.07898).
    sentences: "one" trains on one random sentence instead of the whole text (ConVIRT: Zhang et al. 2020,
      arXiv:2010.00747); evaluation always reads the whole text.
    """

    options: tuple[tuple[str, float], ...]
    templates: tuple[str, ...] = ("{}",)
    descriptions: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    sentences: Literal["all", "one"] = "all"

    @classmethod
    def of(
        cls,
        text: str | Mapping[str, float],
        templates: Sequence[str] = (),
        *,
        descriptions: Mapping[str, Sequence[str]] | None = None,
        sentences: Literal["all", "one"] = "all",
    ) -> TextChoice:
        """The choice that a config's values mean; raises ConfigError for values that mean none."""
        options = {text: 1.0} if isinstance(text, str) else dict(text)
        if not options or any(p <= 0 for p in options.values()):
            raise ConfigError(f"text={text!r}: give field names with probabilities above 0")
        for option in options:
            rest = _PLACE.sub("", option)
            if any(not name for name in _PLACE.findall(option)) or "{" in rest or "}" in rest:
                raise ConfigError(f"text {option!r}: each pair of braces holds the name of a field")
        bad = [t for t in templates if "{}" not in t]
        if bad:
            raise ConfigError(f"template {bad[0]!r} has no '{{}}' for the label")
        for label, texts in (descriptions or {}).items():
            if isinstance(texts, str) or not texts or not all(t.strip() for t in texts):
                raise ConfigError(f"descriptions[{label!r}]={texts!r}: give a list of one or more texts")
        if sentences not in ("all", "one"):
            raise ConfigError(f"sentences={sentences!r}: choose 'all' or 'one'")
        described = {label: tuple(texts) for label, texts in (descriptions or {}).items()}
        return cls(tuple(options.items()), tuple(templates) or ("{}",), described, sentences)

    def reads_labels(self) -> bool:
        """Whether some option shows the record's labels."""
        return any(name == "labels" or "labels" in _PLACE.findall(name) for name, _ in self.options)

    def offers(self, record: Mapping[str, Any]) -> bool:
        """Whether the record has any text."""
        return any(True for _ in self._candidates(record, {}))

    def all(self, record: Mapping[str, Any]) -> list[str]:
        """Every text that `pick` could return, but of several described labels not every combination."""
        texts = [
            shown.text
            for labels in self._descriptions_in_turn(record)
            for _, alternatives in self._candidates(record, labels)
            for shown in self._as_shown(alternatives)
        ]
        # In turn, every option without labels comes again.
        return list(dict.fromkeys(texts)) if self._known(record) else texts

    def pick(self, record: Mapping[str, Any], rng: np.random.Generator, count: int = 1) -> list[str]:
        """Up to `count` different texts: of different options first, then other alternatives of an option."""
        return [chosen.text for chosen in self.draw(record, rng, count)]

    def draw(self, record: Mapping[str, Any], rng: np.random.Generator, count: int = 1) -> list[ChosenText]:
        """The texts of `pick`, and where each came from."""
        candidates = list(self._candidates(record, self._draw_descriptions(record, rng)))
        weights = np.array([p for p, _ in candidates])
        unused = [self._as_shown(alternatives) for _, alternatives in candidates]
        picked: dict[int, ChosenText] = {}
        while len(picked) < count and any(unused):
            left = [i for i, texts in enumerate(unused) if texts]
            share = weights[left] / weights[left].sum()
            for i in rng.choice(len(left), min(count - len(picked), len(left)), replace=False, p=share):
                texts = unused[left[i]]
                chosen = texts.pop(int(rng.integers(len(texts))))
                picked.setdefault(text_id(chosen.text), chosen)
        return list(picked.values())

    def for_evaluation(self, record: Mapping[str, Any]) -> list[str]:
        """The record's different texts, those of the most probable option first; no randomness."""
        return [chosen.text for chosen in self.in_order(record)]

    def in_order(self, record: Mapping[str, Any]) -> list[ChosenText]:
        """The texts of `for_evaluation`, and where each came from."""
        first = {label: texts[0] for label, texts in self.descriptions.items()}
        candidates = sorted(self._candidates(record, first), key=lambda c: -c[0])
        different: dict[int, ChosenText] = {}
        for _, alternatives in candidates:
            for chosen in alternatives:
                different.setdefault(text_id(chosen.text), chosen)
        return list(different.values())

    def first(self, record: Mapping[str, Any]) -> str | None:
        """The one text for evaluation: the first of the most probable option."""
        texts = self.for_evaluation(record)
        return texts[0] if texts else None

    def _candidates(
        self, record: Mapping[str, Any], described: Mapping[str, str]
    ) -> Iterator[tuple[float, list[ChosenText]]]:
        """(probability before renormalising, alternatives) of every option that the record can fill."""
        labels = record.get("labels")
        if isinstance(labels, list | tuple):
            labels = [described.get(label, label) for label in labels]
        for option, probability in self.options:
            if option == "labels":
                shown = ", ".join(labels) if labels else None
                value: Any = [t.replace("{}", shown) for t in self.templates] if shown else None
            elif _PLACE.search(option):
                value = _fill(option, {**record, "labels": labels})
            else:
                value = record.get(option)
            alternatives = [
                ChosenText(text, option, i)
                for i, text in enumerate(value if isinstance(value, list | tuple) else [value])
                if isinstance(text, str) and text.strip()
            ]
            if alternatives:
                yield probability, alternatives

    def _as_shown(self, alternatives: list[ChosenText]) -> list[ChosenText]:
        """A new list of what training shows of them."""
        if self.sentences == "all":
            return list(alternatives)
        return [
            dataclasses.replace(whole, text=sentence)
            for whole in alternatives
            for sentence in split_sentences(whole.text) or [whole.text]
        ]

    def _draw_descriptions(self, record: Mapping[str, Any], rng: np.random.Generator) -> dict[str, str]:
        return {label: texts[int(rng.integers(len(texts)))] for label, texts in self._known(record)}

    def _descriptions_in_turn(self, record: Mapping[str, Any]) -> Iterator[dict[str, str]]:
        """Choices of descriptions in which each one of the record's labels comes up."""
        known = self._known(record)
        for i in range(max((len(texts) for _, texts in known), default=1)):
            yield {label: texts[i % len(texts)] for label, texts in known}

    def _known(self, record: Mapping[str, Any]) -> list[tuple[str, tuple[str, ...]]]:
        if not self.descriptions or not self.reads_labels():
            return []
        return [
            (label, self.descriptions[label])
            for label in record.get("labels") or ()
            if label in self.descriptions
        ]


def _fill(template: str, record: Mapping[str, Any]) -> str | None:
    """The template with the record's values in it; None where one is absent."""
    values = {name: _as_text(record.get(name)) for name in _PLACE.findall(template)}
    if not all(values.values()):
        return None
    return _PLACE.sub(lambda place: values[place[1]], template)


def _as_text(value: Any) -> str:
    """A field's value within a sentence; empty for what is absent or is no text."""
    if isinstance(value, list | tuple):
        parts = [_as_text(v) for v in value]
        return ", ".join(parts) if all(parts) else ""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return ""
    return str(value).strip()
