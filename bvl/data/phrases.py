"""Objects of an image and phrases that name some of them, or that name what is known not to be there."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32

from bvl.data.regions import Regions, Visible, mask_cells, region_entries
from bvl.data.text import Tokenizer
from bvl.data.text_choice import TextChoice, text_id

# A source with few different phrases is not asked for ever for another one.
_TRIES_A_PHRASE = 4
_MARKED = re.compile(r"(?<!\S)\*(\S(?:[^*]*\S)?)\*(?=$|[\s.,;:!?])")


def read_mark(phrase: str) -> tuple[str, int]:
    """(the phrase without asterisks, where its marked word ends): "a *nodule* here" is ("a nodule here", 8).

    Without a mark, and with more than one, the end of the phrase is where it ends.
    """
    # Most phrases have none, and there are many.
    marks = list(_MARKED.finditer(phrase)) if "*" in phrase else []
    if len(marks) != 1:
        return phrase, len(phrase)
    mark = marks[0]
    return phrase[: mark.start()] + mark[1] + phrase[mark.end() :], mark.start() + len(mark[1])


def encode_phrases(
    tokenizer: Tokenizer, phrases: Sequence[str]
) -> tuple[Int32[np.ndarray, "p t"], Bool[np.ndarray, "p t"], Int32[np.ndarray, " p"]]:
    """(ids, mask, place of the last token of the marked word, or of the last word where none is marked)."""
    read = [read_mark(phrase) for phrase in phrases]
    ids, mask = tokenizer.encode_texts([text for text, _ in read])
    last = mask.sum(1) - 2
    marks = [len(tokenizer.ids(text[:end])) for text, end in read]
    return ids, mask, np.minimum(marks, last).astype(np.int32)


def known_absent(record: Mapping[str, Any], complete: Iterable[str] = ()) -> list[str]:
    """Names that the record is known not to show.

    Of record["labels_known"], and of `complete` (all names of a source that boxes every object of these names), those
    that are neither among its boxes, nor its labels, nor the name of its mask.
    """
    there = [*(entry["name"] for entry in region_entries(record)), *(record.get("labels") or ())]
    there_ids = {text_id(name) for name in [*there, record.get("mask_name") or ""]}
    candidates = dict.fromkeys([*(record.get("labels_known") or ()), *complete])
    return [name for name in candidates if text_id(name) not in there_ids]


def entry_phrases(entry: Mapping[str, Any], choice: TextChoice) -> list[str]:
    """Every phrase that names a box entry: its name, its "texts" and what `choice` reads; without asterisks."""
    texts = dict.fromkeys([entry["name"], *(entry.get("texts") or ()), *choice.all(entry)])
    return [read_mark(text)[0] for text in texts]


def region_texts(
    records: Iterable[Mapping[str, Any]], regions: Regions, complete: Iterable[str] = ()
) -> Iterator[str]:
    """Every text and phrase of the regions of records, for a tokenizer to learn from."""
    texts, phrases, complete = regions.text_choice(), regions.phrase_choice(), tuple(complete)
    for record in records:
        for entry in region_entries(record):
            yield from texts.all(entry)
            yield from entry_phrases(entry, phrases)
        yield from known_absent(record, complete)


class PhraseBank:
    """What each name of a source is called.

    complete: all names, where the source boxes every object of these names; else none.
    """

    def __init__(self, records: Iterable[Mapping[str, Any]], complete: Iterable[str] = ()):
        self.complete = tuple(complete)
        entries: dict[int, dict[str, Mapping[str, Any]]] = {}
        for record in records:
            for entry in region_entries(record):
                words = {key: value for key, value in entry.items() if key != "box"}
                entries.setdefault(text_id(entry["name"]), {}).setdefault(repr(words), words)
        self._pools = {name: list(different.values()) for name, different in entries.items()}

    def absent(self, record: Mapping[str, Any]) -> list[list[Mapping[str, Any]]]:
        """For each name that the record is known not to show, the different entries of it in the source."""
        return [
            self._pools.get(text_id(name)) or [{"name": name}] for name in known_absent(record, self.complete)
        ]


@dataclasses.dataclass(frozen=True)
class _Phrase:
    text: str
    present: bool


class PhraseSampler:
    """Draws the objects and phrases of training images."""

    def __init__(self, regions: Regions, *, tokenizer: Tokenizer, height_width: tuple[int, int]):
        self.regions, self.tokenizer = regions, regions.tokenizer(tokenizer)
        self.grid = regions.grid(height_width)
        self._choice = regions.phrase_choice()

    def draw(
        self,
        record: Mapping[str, Any],
        visible: Visible | None,
        bank: PhraseBank,
        rng: np.random.Generator,
    ) -> dict[str, np.ndarray]:
        """The keys "object_..." and "phrase..." of one image; None for `visible` where there is none."""
        seen: list[int] = []
        kept: list[int] = []
        if visible is not None:
            seen = np.flatnonzero(visible.valid).tolist()
            kept = np.sort(rng.permutation(seen)[: self.regions.max_objects]).astype(int).tolist()
        out = self._objects(visible, kept)
        says = record.get("boxes") is not None or bool(record.get("mask_name")) or bool(bank.complete)
        # An object that had no room would be taken for background.
        out["object_known"] = np.bool_(visible is not None and says and len(kept) == len(seen))
        phrases: list[_Phrase] = []
        called: list[set[int]] = []
        if visible is not None:
            called = [{text_id(t) for t in entry_phrases(entry, self._choice)} for entry in visible.entries]
            there = set().union(*called)
            phrases = self._phrases(bank.absent(record), visible, seen, rng, there=there)
        return out | self._encode(phrases, visible, seen, kept, called)

    def _objects(self, visible: Visible | None, kept: list[int]) -> dict[str, np.ndarray]:
        rows = self.regions.max_objects
        boxes = np.zeros((rows, 4), np.float32)
        masks, masked = np.zeros((rows, *self.grid), bool), np.zeros(rows, bool)
        for row, i in enumerate(kept):
            boxes[row] = visible.boxes[i]
            pixels = visible.mask([i])
            if pixels is not None:
                masks[row], masked[row] = mask_cells(pixels, self.grid), True
        valid = np.arange(rows) < len(kept)
        return {
            "object_box": boxes,
            "object_valid": valid,
            "object_mask": masks,
            "object_mask_valid": masked,
        }

    def _phrases(
        self,
        missing: list[list[Mapping[str, Any]]],
        visible: Visible,
        seen: list[int],
        rng: np.random.Generator,
        *,
        there: set[int],
    ) -> list[_Phrase]:
        """Of the entries that are in view; then of what is not there."""
        slots = self.regions.max_phrases
        pools: dict[int, list[Mapping[str, Any]]] = {}
        for i in seen:
            if self._choice.offers(visible.entries[i]):
                pools.setdefault(text_id(visible.entries[i]["name"]), []).append(visible.entries[i])
        missing = missing if self.regions.absent else []
        count = int((rng.random(slots) < self.regions.absent).sum())
        if pools:
            count = min(count, slots - 1)
        elif missing:
            count = slots
        absent = self._different(missing, count, rng, refused=there)
        present = self._different(list(pools.values()), slots - len(absent), rng, refused=set())
        return [_Phrase(text, True) for text in present] + [_Phrase(text, False) for text in absent]

    def _different(
        self, pools: list[list[Mapping[str, Any]]], count: int, rng: np.random.Generator, *, refused: set[int]
    ) -> list[str]:
        """Up to `count` different phrases, of one pool after the other in random order."""
        picked: dict[int, str] = {}
        order = rng.permutation(len(pools))
        for attempt in range(_TRIES_A_PHRASE * count if pools else 0):
            if len(picked) == count:
                break
            pool = pools[order[attempt % len(pools)]]
            entry = pool[int(rng.integers(len(pool)))]
            chosen = self._choice.pick(entry, rng) or [entry["name"]]
            key = text_id(read_mark(chosen[0])[0])
            if key not in refused:
                picked.setdefault(key, chosen[0])
        return list(picked.values())

    def _encode(
        self,
        phrases: list[_Phrase],
        visible: Visible | None,
        seen: list[int],
        kept: list[int],
        called: list[set[int]],
    ) -> dict[str, np.ndarray]:
        slots, grid = self.regions.max_phrases, self.grid
        dropped = set(seen) - set(kept)
        texts = [phrase.text for phrase in phrases] + [""] * (slots - len(phrases))
        ids, mask, mark = encode_phrases(self.tokenizer, texts)
        keys = [text_id(read_mark(text)[0]) for text in texts]
        named = np.zeros((slots, self.regions.max_objects), bool)
        pixels, pixels_valid = np.zeros((slots, *grid), bool), np.zeros(slots, bool)
        for row, phrase in enumerate(phrases):
            if not phrase.present:
                continue
            members = [i for i, names in enumerate(called) if keys[row] in names]
            # Boxes of some of its objects would teach that the others are none.
            if dropped.isdisjoint(members):
                named[row, : len(kept)] = [i in members for i in kept]
            shown = visible.mask(members)
            if shown is not None:
                pixels[row], pixels_valid[row] = mask_cells(shown, grid), True
        valid = np.arange(slots) < len(phrases)
        return {
            "phrase": ids,
            "phrase_mask": mask,
            "phrase_valid": valid,
            "phrase_id": np.array(keys, np.uint32),
            "phrase_present": np.array([p.present for p in phrases] + [False] * (slots - len(phrases))),
            "phrase_known": valid,
            "phrase_object": named,
            "phrase_pixels": pixels,
            "phrase_pixels_valid": pixels_valid,
            "phrase_mark": mark,
        }
