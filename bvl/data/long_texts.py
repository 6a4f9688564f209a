"""Texts longer than a tower's context, taken apart into pieces that fit."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Literal

from bvl.data.sentences import split_sentences
from bvl.data.text import Tokenizer

logger = logging.getLogger(__name__)

# What becomes of a text beyond the context: its beginning is read, or all of it in pieces.
LongTexts = Literal["cut", "chunks"]

# How a piece that is too long by itself is taken apart, coarse to fine: (parts, what joins neighbours again).
_LEVELS: tuple[tuple[Callable[[str], list[str]], str], ...] = (
    (split_sentences, " "),
    (str.split, " "),
    (list, ""),
)


def warn_of_cuts(texts: Sequence[str], tokenizer: Tokenizer, *, option: str) -> None:
    """Log how many of `texts` are longer than the context, if any, and the option that reads them whole."""
    if cut := tokenizer.count_truncated(texts):
        logger.warning(
            "%d of %d texts are longer than the context of %d tokens and were cut; %s reads them whole",
            cut,
            len(texts),
            tokenizer.context_length,
            option,
        )


def split_to_context(text: str, tokenizer: Tokenizer) -> list[str]:
    """The pieces of `text`, in order, none longer than the tokenizer's context; a text that fits is one piece.

    A piece is as many consecutive sentences as fit. A sentence that is too long by itself is split at words, a
    word that is too long within. No word is left out.
    """
    room = tokenizer.room

    def fits(piece: str) -> bool:
        return tokenizer.lengths([piece])[0] <= room

    def pack(piece: str, level: int) -> list[str]:
        # A single character can be more tokens than a tiny context has; the tokenizer then cuts it.
        if fits(piece) or level == len(_LEVELS):
            return [piece]
        split, joiner = _LEVELS[level]
        packed: list[str] = []
        # Nothing but punctuation is no sentence.
        for part in split(piece) or [piece]:
            if packed and fits(joined := f"{packed[-1]}{joiner}{part}"):
                packed[-1] = joined
            else:
                packed += pack(part, level + 1)
        return packed

    return pack(text, 0)
