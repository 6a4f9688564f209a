"""Splitting a report, note or caption into its sentences."""

from __future__ import annotations

import re

# Words whose stop never ends a sentence; compared in lower case without outer stops.
_NEVER = frozenset(
    "dr drs mr mrs ms prof sr jr st approx e.g i.e eg ie cf ca vs resp incl excl esp fig figs tab eq eqs ref refs".split()
)
# Words whose stop ends a sentence only where a capital letter follows.
_BEFORE_CAPITALS = frozenset(
    "etc al est max min avg temp wt ht hx dx rx tx fx sx pt pts pat abd ant post lat sup inf med lt rt bilat dept hosp "
    "univ b.i.d t.i.d q.i.d p.o i.v a.m p.m u.s u.k".split()
)
# Words whose stop ends a sentence unless a number follows: "no. 5", but "is there pain? no. the lungs".
_BEFORE_NUMBERS = frozenset("no nos nr im vol pp ch sec ser".split())

_STOP = re.compile(r"[.!?…]+[\"'”’)\]]*(?=\s|$)")
_BLANK_LINE = re.compile(r"\n[ \t]*\n\s*")
# A number with its stop, or a mark, at the beginning of a line.
_ITEM_LINE = re.compile(r"\n[ \t]*(?=(?:\(?\d{1,2}[.)]|[-*•])\s)")
# The number of an item, and that of the first item behind a heading ("IMPRESSION: 1.").
_NUMBERING = re.compile(r"\s*(?:\(?(?:\d{1,2}|[A-Za-z])|[A-Za-z /]+:\s*\(?1)[.)]")
_OPENING = "([\"'“‘"


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, in order, each without line breaks and outer spaces; blank pieces are left out.

    A sentence ends at `.`, `!`, `?` or `…` before white space, at a blank line, and before an item of a list that
    begins a line. Stops of abbreviations ("e.g.", "Dr.", "approx."), of initials ("by J. Doe") and of list
    numbers ("1. Clear lungs", "IMPRESSION: 1. Clear lungs") do not end one, nor do stops within words ("1.5 cm"). Blanks left by
    de-identification ("XXXX.") are words like others. A text without any stop is one sentence.
    """
    pieces = (piece for paragraph in _BLANK_LINE.split(text) for piece in _ITEM_LINE.split(paragraph))
    return [sentence for piece in pieces for sentence in _split_piece(piece)]


def _split_piece(piece: str) -> list[str]:
    found, start = [], 0
    for stop in _STOP.finditer(piece):
        if _ends_sentence(piece[start : stop.end()], piece[stop.end() :].lstrip()):
            found.append(piece[start : stop.end()])
            start = stop.end()
    joined = [" ".join(sentence.split()) for sentence in [*found, piece[start:]]]
    # A stop by itself, as in "XXXX . .", says nothing.
    return [sentence for sentence in joined if any(c.isalnum() for c in sentence)]


def _ends_sentence(before: str, after: str) -> bool:
    """Whether the stop at the end of `before` (the sentence so far) ends it; `after` is what follows."""
    if not after:
        return True
    if after[0] in ",;:" or _NUMBERING.fullmatch(before):
        return False
    if before[-1] in "!?":
        return True
    if before[-1] != "." or before.endswith(".."):
        # An ellipsis, or a stop inside quotes or brackets: a small letter goes on with the sentence.
        return not after[0].islower()
    *earlier, last = before.split()
    word = last.lstrip(_OPENING).rstrip(".")
    low = word.lower()
    if low in _NEVER:
        return False
    if low in _BEFORE_CAPITALS:
        return after[0].isupper()
    if low in _BEFORE_NUMBERS:
        return not after[0].isdigit()
    return not (len(word) == 1 and word.isupper() and earlier and _names_a_person(earlier))


def _names_a_person(words: list[str]) -> bool:
    """Whether a capital letter after `words` is an initial, and not the end of "hepatitis B." or "vitamin K."."""
    last = words[-1]
    if last.endswith(".") or last.lower() in ("by", "and", "with", "from"):
        return True
    return len(words) > 1 and last[0].isupper() and not last.isupper()
