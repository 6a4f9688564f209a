"""Texts longer than the context, taken apart into pieces of whole sentences."""

from __future__ import annotations

import re

from bvl.convert.torch_format.source.text import Tokenizer

# Words whose stop never ends a sentence; compared in lower case without outer stops.
NEVER_ENDS = frozenset(
    "dr drs mr mrs ms prof sr jr st approx e.g i.e eg ie cf ca vs resp incl excl esp fig figs tab eq eqs ref refs".split()
)
# Words whose stop ends a sentence only where a capital letter follows.
ENDS_BEFORE_CAPITALS = frozenset(
    "etc al est max min avg temp wt ht hx dx rx tx fx sx pt pts pat abd ant post lat sup inf med lt rt bilat dept hosp "
    "univ b.i.d t.i.d q.i.d p.o i.v a.m p.m u.s u.k".split()
)
# Words whose stop ends a sentence unless a number follows: "no. 5", but "is there pain? no. the lungs".
ENDS_UNLESS_NUMBER = frozenset("no nos nr im vol pp ch sec ser".split())
STOP = re.compile(r"[.!?…]+[\"'”’)\]]*(?=\s|$)")
BLANK_LINE = re.compile(r"\n[ \t]*\n\s*")
ITEM_LINE = re.compile(r"\n[ \t]*(?=(?:\(?\d{1,2}[.)]|[-*•])\s)")
NUMBERING = re.compile(r"\s*(?:\(?(?:\d{1,2}|[A-Za-z])|[A-Za-z /]+:\s*\(?1)[.)]")


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, in order, without line breaks; blank pieces are left out."""
    pieces = [piece for paragraph in BLANK_LINE.split(text) for piece in ITEM_LINE.split(paragraph)]
    found = []
    for piece in pieces:
        start = 0
        for stop in STOP.finditer(piece):
            if ends_sentence(piece[start : stop.end()], piece[stop.end() :].lstrip()):
                found.append(piece[start : stop.end()])
                start = stop.end()
        found.append(piece[start:])
    sentences = [" ".join(sentence.split()) for sentence in found]
    return [sentence for sentence in sentences if any(c.isalnum() for c in sentence)]


def ends_sentence(before: str, after: str) -> bool:
    """Whether the stop at the end of `before` (the sentence so far) ends it; `after` is what follows."""
    if not after:
        return True
    if after[0] in ",;:" or NUMBERING.fullmatch(before):
        return False
    if before[-1] in "!?":
        return True
    if before[-1] != "." or before.endswith(".."):
        return not after[0].islower()
    *earlier, last = before.split()
    word = last.lstrip("([\"'“‘").rstrip(".")
    low = word.lower()
    if low in NEVER_ENDS:
        return False
    if low in ENDS_BEFORE_CAPITALS:
        return after[0].isupper()
    if low in ENDS_UNLESS_NUMBER:
        return not after[0].isdigit()
    return not (len(word) == 1 and word.isupper() and earlier and names_a_person(earlier))


def names_a_person(words: list[str]) -> bool:
    """Whether a capital letter after `words` is an initial, and not the end of "hepatitis B."."""
    last = words[-1]
    if last.endswith(".") or last.lower() in ("by", "and", "with", "from"):
        return True
    return len(words) > 1 and last[0].isupper() and not last.isupper()


def split_to_context(text: str, tokenizer: Tokenizer) -> list[str]:
    """The pieces of `text`, in order, none longer than the context.

    A piece is as many sentences as fit; a sentence that is too long is split at words, a word that is too long within.
    """
    levels = ((split_sentences, " "), (str.split, " "), (list, ""))

    def fits(piece: str) -> bool:
        return len(tokenizer.ids(piece)) <= tokenizer.room

    def pack(piece: str, level: int) -> list[str]:
        if fits(piece) or level == len(levels):
            return [piece]
        split, joiner = levels[level]
        packed: list[str] = []
        for part in split(piece) or [piece]:
            if packed and fits(joined := f"{packed[-1]}{joiner}{part}"):
                packed[-1] = joined
            else:
                packed += pack(part, level + 1)
        return packed

    return pack(text, 0)
