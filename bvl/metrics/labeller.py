"""Which findings a text states as present, absent or uncertain: rules over words, no model.

The idea is NegEx's (Chapman et al. 2001, J Biomed Inform 34:301): words before or after a finding deny it within a
scope that other words end; uncertainty as in NegBio (Peng et al. 2018) and CheXpert (Irvin et al. 2019).
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping
from typing import Literal

from bvl.errors import UserError
from bvl.metrics import cues

Status = Literal["present", "absent", "uncertain"]
STATUSES: tuple[Status, ...] = ("present", "uncertain", "absent")  # the first that a text states counts


@dataclasses.dataclass(frozen=True)
class Lexicon:
    """The words of each finding, and of statements of normality.

    `findings`: name -> regular expressions (noun phrases will do) for whole words, matched without regard to case;
    a space stands for spaces or a hyphen. Give plurals as patterns too ("nodules?"). Where the words of one finding lie within those
    of another ("opacity" in "airspace opacity"), the longer ones count.
    `normal`: pattern of a statement, with its own negation if it has one ("no abnormality", "lungs are clear"),
    -> names of the findings that it denies. What a text says of a finding itself goes before.
    Raises UserError for a pattern that cannot be used and for names that `findings` does not have.
    """

    findings: Mapping[str, tuple[str, ...]]
    normal: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    _compiled: tuple = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for statement, names in self.normal.items():
            if unknown := [name for name in names if name not in self.findings]:
                raise UserError(
                    f"lexicon: {statement!r} denies {unknown}, which are no findings of the lexicon"
                )
        compiled = [(name, _whole_words(name, patterns)) for name, patterns in self.findings.items()]
        normal = [
            (tuple(names), _whole_words(statement, (statement,))) for statement, names in self.normal.items()
        ]
        object.__setattr__(self, "_compiled", (compiled, normal))


@dataclasses.dataclass(frozen=True)
class _Span:
    start: int
    end: int
    name: object  # of a finding; the findings denied, for a statement of normality; the kind, for a cue


def label_text(text: str, lexicon: Lexicon) -> dict[str, Status]:
    """What a text states about each finding of the lexicon; a finding it does not mention is missing.

    Of several mentions present counts before uncertain before absent. Uncertain are: a finding said to be possible,
    likely, suspected, *unlikely* or not excluded, one of alternatives ("atelectasis or infiltrate", "versus"), and
    one that is asked for ("rule out"). Present are findings that the text is "consistent with". Absent are findings
    that have resolved, and "no new", "no large" or "no definite" ones. A history, a risk and an "if" state nothing.
    """
    found: dict[str, Status] = {}
    for sentence in _sentences(text):
        for name, status in _label_sentence(sentence, lexicon):
            if STATUSES.index(status) <= STATUSES.index(found.get(name, "absent")):
                found[name] = status
    return found


def _whole_words(name: str, patterns: Iterable[str]) -> re.Pattern:
    joined = "|".join(f"(?:{pattern})" for pattern in patterns).replace(" ", r"[ \-]")
    if isinstance(patterns, str):
        raise UserError(f"lexicon: the patterns of {name!r} must be a tuple of strings, not one string")
    try:
        return re.compile(rf"(?<!\w)(?:{joined})(?!\w)", re.IGNORECASE)
    except re.error as error:
        raise UserError(f"lexicon: the patterns of {name!r} are no regular expression: {error}") from error


_STOP = re.compile(r"(?<!\bvs\.)(?<!\be\.g\.)(?<!\bi\.e\.)(?<!\bdr\.)(?:(?<=[.!])|(?<=\w\?))\s+|[;\n]+")


def _sentences(text: str) -> list[str]:
    # Reports leave out the space between sentences: "no effusion.Heart is normal".
    text = (
        re.sub(r"(?<=[a-z])\.(?=[A-Z])", ". ", text)
        .lower()
        .replace("can't", "cannot")
        .replace("n't", " not")
        .replace("\u2019", "'")
    )
    return [" ".join(sentence.split()) for sentence in _STOP.split(text) if sentence.strip()]


@functools.cache
def _cue_patterns() -> tuple[tuple[str, re.Pattern], ...]:
    kinds = {
        "neutral": cues.NEUTRAL,
        # Before the others: of equal matches the first kind counts, and these ask for the end of a clause.
        "denied after": cues.DENIED_AFTER,
        "doubted after": cues.DOUBTED_AFTER,
        "denied": cues.DENIED,
        "doubted": cues.DOUBTED,
        "unstated": cues.UNSTATED,
        "around": cues.DOUBTED_AROUND,
        "stop": cues.STOPS,
    }
    # One pattern each, since an alternation takes its first match and not its longest. Whole words or signs.
    return tuple(
        (kind, re.compile(rf"(?:(?<!\w)|(?=\W))(?:{p})(?:(?<=\W)|(?!\w))"))
        for kind, ps in kinds.items()
        for p in ps
    )


_SEPARATOR = re.compile(r",? ?\b(?:and/or|or|nor)\b|/|,? ?\b(?:and|as well as|plus)\b|,")
_OPENER = re.compile(rf"\s*(?:{cues.OPENERS})\b")
_ADJECTIVE = re.compile(rf"\s*(?:{cues.ADJECTIVES})")
_VERB = re.compile(rf"\b(?:{cues.FINITE_VERBS})\b")
_PLURAL_SEEN = re.compile(r"\b(?:are|were|have been) (?!\w+ed\b(?<!identified)(?<!noted)(?<!detected))")
# "aorta is calcified and tortuous" hides no "calcified", as a noun phrase would.
_PREDICATE = re.compile(r"\b(?:is|are|was|were|and|appears?|remains?)\b")
_ARTICLE = re.compile(r"\ban?\s*$")
_ARTICLE_NEXT = re.compile(r"\s*an?\b")
_BEFORE = ("denied", "doubted", "unstated", "around")
_AFTER = ("denied after", "doubted after", "around")


def _label_sentence(sentence: str, lexicon: Lexicon) -> list[tuple[str, Status]]:
    compiled, normal = lexicon._compiled
    mentions = _outermost(
        sentence,
        [_Span(m.start(), m.end(), name) for name, pattern in compiled for m in pattern.finditer(sentence)],
    )
    normals = [_Span(m.start(), m.end(), names) for names, p in normal for m in p.finditer(sentence)]
    if not mentions and not normals:
        return []
    clause = _Clause(sentence, mentions)
    labelled = [(mention, clause.status(mention)) for mention in mentions]
    stated = [(m, status) for m, status in labelled if status is not None]
    stated = clause.alternatives(stated)
    if sentence.rstrip(" .").endswith("?"):
        stated = [(m, "uncertain" if status == "present" else status) for m, status in stated]
    result = [(m.name, status) for m, status in stated]
    for statement in normals:
        if clause.status(statement) == "present":
            result += [(name, "absent") for name in statement.name]
    return result


def _outermost(text: str, spans: list[_Span]) -> list[_Span]:
    """Spans in order, without those that lie within a longer noun phrase."""
    phrases = [span for span in spans if not _PREDICATE.search(text, span.start, span.end)]
    kept = [
        s
        for s in spans
        if not any(
            p.start <= s.start and s.end <= p.end and p.end - p.start > s.end - s.start for p in phrases
        )
    ]
    return sorted(kept, key=lambda s: (s.start, s.end))


class _Clause:
    """A sentence with its cues; tells the status of a mention in it."""

    def __init__(self, sentence: str, mentions: list[_Span]) -> None:
        self.text, self.mentions = sentence, mentions
        spans = [
            _Span(m.start(), m.end(), kind)
            for kind, pattern in _cue_patterns()
            for m in pattern.finditer(sentence)
        ]
        self.cues: list[_Span] = []
        for span in sorted(spans, key=lambda s: (s.start, -s.end)):
            if not self.cues or span.start >= self.cues[-1].end:
                self.cues.append(span)
        # A cue within the words of a finding ("heart is not enlarged") says nothing of others.
        self.inner = {c: m for c in self.cues for m in mentions if m.start <= c.start and c.end <= m.end}

    def status(self, mention: _Span) -> Status | None:
        """Status of a mention; None where the sentence states nothing of it."""
        for cue, owner in self.inner.items():
            if owner == mention and cue.name in ("denied", "doubted"):
                return "absent" if cue.name == "denied" else "uncertain"
        outer = [c for c in self.cues if c not in self.inner]
        before = [c for c in outer if c.end <= mention.start and c.name in _BEFORE]
        after = [c for c in outer if c.start >= mention.end and c.name in _AFTER]
        reached = set()
        if before and self._reaches_right(before[-1], mention):
            kind = before[-1].name
            reached.add("denied" if kind == "doubted" and self._denied(before) else kind)
        if after and self._reaches_left(after[0], mention):
            reached.add(after[0].name.removesuffix(" after"))
        if "denied" in reached:
            return "absent"
        if "unstated" in reached:
            return None
        return "uncertain" if reached else "present"

    def alternatives(self, stated: list[tuple[_Span, Status]]) -> list[tuple[_Span, Status]]:
        """ "atelectasis or infiltrate" states neither: two findings in a row that "or" joins are uncertain."""
        result = list(stated)
        for i, ((left, first), (right, second)) in enumerate(zip(stated, stated[1:], strict=False)):
            between = self.text[left.end : right.start]
            joined = re.search(r"\bor\b", between) and not self._has_stop(left.end, right.start)
            if (
                joined
                and first == second == "present"
                and left.name != right.name
                and between.count(" ") <= 5
            ):
                result[i], result[i + 1] = (left, "uncertain"), (right, "uncertain")
        return result

    def _denied(self, before: list[_Span]) -> bool:
        """Whether the last of the cues, a doubt, is itself denied: "no opacity to suggest", "not suspicious for"."""
        *earlier, doubt = before
        if not earlier or not (earlier[-1].name == "denied" or self._denied(earlier)):
            return False
        start = earlier[-1].end
        separators = list(_SEPARATOR.finditer(self.text, start, doubt.start))
        # "no line to suggest pneumothorax or blunting to suggest effusion", but "no effusion or possible nodule".
        goes_on = self.text.startswith("suggest", doubt.start) and all(_is_or(s) for s in separators)
        return (goes_on or not separators) and not self._has_stop(start, doubt.start)

    def _has_stop(self, start: int, end: int) -> bool:
        return any(c.name == "stop" and start <= c.start < end for c in self.cues)

    def _reaches_right(self, cue: _Span, mention: _Span) -> bool:
        if self._has_stop(cue.end, mention.start):
            return False
        if any(c.name in _AFTER and cue.end <= c.start < mention.start for c in self.cues):
            return False
        clause_end = min([c.start for c in self.cues if c.start >= mention.end], default=len(self.text))
        separators = list(_SEPARATOR.finditer(self.text, cue.end, clause_end))
        for i, separator in enumerate(separators):
            if separator.end() > mention.start:
                break
            if _is_or(separator) or _ADJECTIVE.fullmatch(self.text, cue.end, separator.start()):
                continue
            if _VERB.search(self.text, cue.end, separator.start()):
                return False
            end = separators[i + 1].start() if i + 1 < len(separators) else len(self.text)
            segment = self.text[separator.end() : end]
            if _VERB.search(segment) and not _PLURAL_SEEN.search(segment):
                return False
            if any(_is_or(later) for later in separators[i + 1 :]):
                continue
            if self._begins_anew(cue, separator, mention):
                return False
            singular = _ARTICLE.search(self.text[: cue.start]) or _ARTICLE_NEXT.match(self.text, cue.end)
            if singular or _OPENER.match(segment):
                return False
        return True

    def _begins_anew(self, cue: _Span, separator: re.Match, mention: _Span) -> bool:
        """Whether "and" joins a phrase of its own: "no cyst and stones", "no nodule, no mass and consolidations"."""
        if "and" not in separator.group():
            return False
        repeated = any(c.name == cue.name for c in self.cues if c.end < cue.start)
        if repeated and self.text[: cue.start].rstrip().endswith(","):
            return True
        earlier = [m for m in self.mentions if m.end <= separator.start()]
        return bool(earlier) and not self._is_plural(earlier[-1]) and self._is_plural(mention)

    def _is_plural(self, mention: _Span) -> bool:
        return bool(re.search(r"[^siu]s$|i$", self.text[mention.start : mention.end]))

    def _reaches_left(self, cue: _Span, mention: _Span) -> bool:
        between = self.text[mention.end : cue.start]
        if self._has_stop(mention.end, cue.start) or _VERB.search(between):
            return False
        if any(c.name in _BEFORE and mention.end <= c.start < cue.start for c in self.cues):
            return False
        plural = re.match(r"(?:are|were|have)\b", self.text[cue.start :])
        clause_start = max(
            [c.end for c in self.cues if c.name == "stop" and c.end <= mention.start], default=0
        )
        spoken = _VERB.search(self.text, clause_start, mention.start) or re.search(
            r"there (?:is|are)", self.text[: mention.start]
        )
        joins = [s for s in _SEPARATOR.finditer(between) if not _is_or(s)]
        return not joins or bool(plural and not spoken)


def _is_or(separator: re.Match) -> bool:
    return bool(re.search(r"or\b|/", separator.group()))
