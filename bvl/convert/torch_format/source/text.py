"""Text to token ids and back."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

MARKED_WORD = re.compile(r"(?<!\S)\*(\S(?:[^*]*\S)?)\*(?=$|[\s.,;:!?])")


class Tokenizer:
    """A `tokenizers` model with start, end and padding to a fixed context length.

    config: context_length, pad_id, start_id (None = no start token), end_id, and control_ids, of entries that are
    neither words nor one of the usual special tokens; no text is written with excluded_ids.
    """

    def __init__(self, path: Path, config: dict[str, Any]):
        self._model = tokenizers.Tokenizer.from_file(str(path))
        self._model.no_padding()
        self._model.no_truncation()
        # "[END]" written in a caption is text and ends nothing.
        self._model.encode_special_tokens = True
        self.context_length: int = config["context_length"]
        self.pad_id: int = config["pad_id"]
        self.start_id: int | None = config["start_id"]
        self.end_id: int = config["end_id"]
        self.control_ids = frozenset(config["control_ids"])
        self.excluded_ids: list[int] = config["excluded_ids"]
        self._is_wordpiece = isinstance(self._model.model, tokenizers.models.WordPiece)

    @property
    def room(self) -> int:
        """Tokens of a text that fit into the context."""
        return self.context_length - 1 - (self.start_id is not None)

    def encode(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """(ids [t], mask [t]): start + text + end, padded; a text that is cut keeps its end token."""
        start = [] if self.start_id is None else [self.start_id]
        ids = [*start, *self.ids(text)[: self.room], self.end_id]
        tokens = np.full(self.context_length, self.pad_id, np.int64)
        tokens[: len(ids)] = ids
        return tokens, np.arange(self.context_length) < len(ids)

    def encode_texts(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids [n, t] and masks of several texts."""
        rows = [self.encode(text) for text in texts]
        return np.stack([row[0] for row in rows]), np.stack([row[1] for row in rows])

    def ids(self, text: str) -> list[int]:
        """Token ids of the text alone, without start and end, however many."""
        return self._model.encode(text, add_special_tokens=False).ids

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """How many tokens each text has, without start and end."""
        return [len(e.ids) for e in self._model.encode_batch(list(texts), add_special_tokens=False)]

    def same_vocabulary(self, other: Tokenizer) -> bool:
        """Whether another tokenizer gives the same ids."""
        roles = ("start_id", "end_id", "pad_id")
        return self._model.to_str() == other._model.to_str() and all(
            getattr(self, role) == getattr(other, role) for role in roles
        )

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids` up to the first end token, without special tokens and controls."""
        left_out = {self.pad_id, self.start_id} | self.control_ids
        words = itertools.takewhile(lambda i: i != self.end_id, map(int, ids))
        text = self._model.decode([i for i in words if i not in left_out], skip_special_tokens=False).strip()
        return rejoin(text) if self._is_wordpiece else text


def rejoin(text: str) -> str:
    """The text without the spaces that WordPiece's splitting at punctuation left: "x - ray", "( ct )"."""
    text = re.sub(r"(?<=\w) ([-/]) (?=\w)| (') (?=s\b)", r"\1\2", text)
    return re.sub(r"(?<=[(\[]) | (?=[)\]%;:])", "", text)


def read_mark(phrase: str) -> tuple[str, int]:
    """(the phrase without asterisks, where its marked word ends): "a *nodule* here" is ("a nodule here", 8).

    Without a mark, and with more than one, the end of the phrase is where it ends.
    """
    marks = list(MARKED_WORD.finditer(phrase))
    if len(marks) != 1:
        return phrase, len(phrase)
    mark = marks[0]
    return phrase[: mark.start()] + mark[1] + phrase[mark.end() :], mark.start() + len(mark[1])


def encode_phrases(tokenizer: Tokenizer, phrases: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids [p, t], mask, place of the last token of the marked word, or of the last word where none is marked)."""
    read = [read_mark(phrase) for phrase in phrases]
    ids, mask = tokenizer.encode_texts([text for text, _ in read])
    # The start token is in front.
    marks = [len(tokenizer.ids(text[:end])) for text, end in read]
    return ids, mask, np.minimum(marks, mask.sum(1) - 2)
