"""Captions and reports made of statements that the image decides.

A statement names a finding and some of its facts: presence and, if it is there, any of count, site, size and
severity. Which statements a caption makes, their wording and its length are random; what they say is not.
"""

import dataclasses
import functools
import itertools
import random

from bvl.data.phantoms.catalogue import CATALOGUE, FINDING_OF, Modality, indefinite

SHORTEST, LONGEST = 4, 20  # words in a caption

_COUNTS = {1: ("single", "solitary"), 2: ("two",), 3: ("three",)}
# Words that say nothing, by how many they are: they fill a caption up to its length.
_OPENERS = {
    2: ("this is", "here is"),
    3: ("the figure shows", "shown here is"),
    4: ("the figure here shows", "the image displayed is"),
    5: ("this is an example of",),
    6: ("this image is an example of",),
}
_TAILS = ("shown here", "as an example", "for reference", "without further description", "in this figure")
_ATTEMPTS = 8


@dataclasses.dataclass(frozen=True)
class Caption:
    """A text and the statements it makes about findings and view; a vague one makes none."""

    text: str
    statements: tuple[dict, ...]
    vague: bool


def _words(text: str) -> int:
    return text.count(" ") + 1


def _nouns(rng: random.Random, name: str, most: int) -> tuple[str, str]:
    """Singular and plural noun of a finding, of at most `most` words where there is a choice."""
    common, other = FINDING_OF[name].nouns
    chosen = common if rng.random() < 0.7 else other
    return chosen if _words(chosen[0]) <= most else min(common, other, key=lambda pair: _words(pair[0]))


def _positive(rng: random.Random, modality: Modality, name: str, fact: dict, most: int) -> tuple[str, dict]:
    """A noun phrase about a drawn finding, of at most `most` words where possible, and its statement.

    Facts are added in random order as long as they fit.
    """
    uncertain, one = fact["presence"] == "uncertain", fact["count"] == 1
    fixed = 2 if uncertain else int(one)  # "a possible", "a"
    singular, plural = _nouns(rng, name, most - fixed)
    noun = singular if one else plural
    left = most - fixed - _words(noun)
    used = {}
    wanted = ["size", "site"] if uncertain else ["count", "size", "severity", "site"]
    rng.shuffle(wanted)
    for key in wanted:
        if key == "count":
            options = _COUNTS[fact["count"]]
        elif key == "size":
            options = (fact["size"],)
        elif key == "severity":
            options = FINDING_OF[name].severity_words[fact["severity"] == "marked"]
        else:
            options = modality.sites[fact["site"]]
        fitting = [option for option in options if _words(option) <= left]
        if fitting:
            used[key] = rng.choice(fitting)
            left -= _words(used[key])
    core = " ".join([used[key] for key in ("count", "size", "severity") if key in used] + [noun])
    if uncertain:
        core = f"a {rng.choice(('possible', 'questionable'))} {core}"
    elif one:
        core = indefinite(core)
    statement = {"finding": name, "presence": fact["presence"]} | {key: fact[key] for key in used}
    return (f"{core} {used['site']}" if "site" in used else core), statement


@functools.cache
def region_texts(modality: str, name: str, site: str, size: str, severity: str) -> tuple[str, ...]:
    """Every phrase, worded as in captions, that is true of one drawn finding.

    As they are all there is to say, two findings of which the same is true share the phrase that says it. That a
    finding is equivocal is not said.
    """
    finding = FINDING_OF[name]
    severities = () if severity == "equivocal" else finding.severity_words[severity == "marked"]
    return tuple(
        " ".join(word for word in words if word)
        for words in itertools.product(
            ("", size),
            ("", *severities),
            (singular for singular, _ in finding.nouns),
            ("", *CATALOGUE[modality].sites[site]),
        )
    )


def _negative(rng: random.Random, name: str, most: int, *, after_lead: bool) -> str:
    """A phrase of at most `most` words, where possible, that denies a finding."""
    singular, plural = _nouns(rng, name, most - 1)
    options = [
        f"no {singular}",
        f"no {plural}",
        f"no visible {singular}",
        f"no evidence of {indefinite(singular)}",
    ]
    if after_lead:
        options += [f"without {indefinite(singular)}", f"without {plural}"] * 2
    fitting = [option for option in options if _words(option) <= most]
    return rng.choice(fitting) if fitting else options[0]


def _lead(rng: random.Random, modality: Modality, view: str, most: int) -> tuple[str, bool]:
    """How a caption names the modality, of at most `most` words, and whether it tells the view."""
    name = rng.choice((modality.name, modality.name, *modality.synonyms[1:]))
    tells_view = len(modality.views) > 1 and rng.random() < 0.5
    if tells_view:
        name = f"{name} of the {view}" if view.endswith("eye") else f"{view} of a {name}"
    if rng.random() < 0.3:
        name = indefinite(name)
    return (name, tells_view) if _words(name) <= most else ("", False)


def _join(pieces: list[str]) -> str:
    return pieces[0] if len(pieces) == 1 else ", ".join(pieces[:-1]) + " and " + pieces[-1]


def _order(rng: random.Random, facts: dict) -> list[str]:
    """The findings in random order, those that are there a little earlier."""
    findings = facts["findings"]
    return sorted(findings, key=lambda name: rng.random() - 0.3 * (findings[name]["presence"] != "absent"))


def _compose(rng: random.Random, modality: Modality, facts: dict, target: int) -> tuple[str, list[dict]]:
    """One attempt at a caption of `target` words, and what it states."""
    lead, tells_view = _lead(rng, modality, facts["view"], target - 3) if rng.random() < 0.85 else ("", False)
    statements: list[dict] = [{"view": facts["view"]}] if tells_view else []
    left = target - (_words(lead) if lead else 0)
    pieces: list[str] = []
    # A list continues after "with"; after "without" it needs a new "with".
    listing = not lead
    findings = facts["findings"]
    names = _order(rng, facts)
    if left >= 3 and rng.random() < 0.3 and all(fact["presence"] == "absent" for fact in findings.values()):
        pieces.append("with no abnormality" if lead else "no abnormality")
        statements.extend({"finding": name, "presence": "absent"} for name in names)
        left -= _words(pieces[0])
        listing = True
    for name in names:
        room = left - (len(pieces) == 1)  # one "and" as soon as there are two; commas are free
        if findings[name]["presence"] == "absent":
            phrase = _negative(rng, name, room - (not listing), after_lead=bool(lead))
            statement = {"finding": name, "presence": "absent"}
        else:
            room_for_facts = room - (not listing)
            if room_for_facts > 6 and rng.random() < 0.4:
                room_for_facts = rng.randint(3, 6)
            phrase, statement = _positive(rng, modality, name, findings[name], room_for_facts)
        negated = phrase.startswith("without")
        if not listing and not negated:
            phrase = ("showing " if not pieces and rng.random() < 0.25 else "with ") + phrase
        if _words(phrase) > room:
            continue
        listing = not negated
        left = room - _words(phrase)
        pieces.append(phrase)
        statements.append(statement)
    if not pieces:
        return "", []
    body = _join(pieces)
    if not lead:
        return body, statements
    if left and not lead.startswith(("a ", "an ")):
        lead, left = indefinite(lead), left - 1
    opener = f"{rng.choice(_OPENERS[left])} " if left in _OPENERS else ""
    return f"{opener}{lead} {body}", statements


def _vague(rng: random.Random, modality: Modality, target: int) -> str:
    """A generic caption of about `target` words: the modality and nothing else."""
    text = indefinite(rng.choice(modality.synonyms))
    if _words(text) < SHORTEST or (rng.random() < 0.6 and _words(text) + _words(modality.subject) < target):
        text = f"{text} of {modality.subject}"
    for tail in rng.sample(_TAILS, len(_TAILS)):
        if _words(text) + _words(tail) <= target:
            text = f"{text} {tail}"
    opener = min(max(_OPENERS), target - _words(text))
    return f"{rng.choice(_OPENERS[opener])} {text}" if opener in _OPENERS else text


def write_caption(rng: random.Random, facts: dict, *, vague_fraction: float) -> Caption:
    """A caption of about 4 to 20 words about the facts; with chance `vague_fraction` a generic one."""
    modality = CATALOGUE[facts["modality"]]
    target = rng.randint(SHORTEST, LONGEST)
    if rng.random() < vague_fraction:
        return Caption(_vague(rng, modality, target), (), True)
    best, least = ("", []), LONGEST
    for _ in range(_ATTEMPTS):
        text, statements = _compose(rng, modality, facts, target)
        miss = abs(_words(text) - target) if text else LONGEST
        if miss < least:
            best, least = (text, statements), miss
        if not miss:
            break
    text, statements = best
    if _words(text) < SHORTEST:
        text = f"{modality.name} {'' if text.startswith('with') else 'with '}{text}"
    return Caption(text, tuple(statements), False)


def write_report(rng: random.Random, facts: dict) -> tuple[str, str]:
    """Findings, one sentence for each that the modality can show, and an impression."""
    modality = CATALOGUE[facts["modality"]]
    sentences, present, uncertain = [], [], []
    names = list(facts["findings"])
    rng.shuffle(names)
    for name in names:
        fact = facts["findings"][name]
        singular, plural = _nouns(rng, name, LONGEST)
        if fact["presence"] == "absent":
            no = (
                f"no {singular}",
                f"no evidence of {indefinite(singular)}",
                f"no {plural} are seen",
                f"{plural} are absent",
            )
            sentence = rng.choice(no)
        else:
            phrase, _ = _positive(rng, modality, name, fact, rng.randint(4, 14))
            there = "there is" if fact["count"] == 1 else "there are"
            sentence = rng.choice((phrase, f"{there} {phrase}"))
            if fact["presence"] == "uncertain":
                uncertain.append(singular)
            else:
                present.append(singular if fact["count"] == 1 else plural)
        sentences.append(sentence)
    impression = [_join(present)] if present else []
    if uncertain:
        impression.append("possible " + " or ".join(uncertain))
    return _sentences(sentences), _sentences(impression or ["no abnormality"])


def _sentences(parts: list[str]) -> str:
    return " ".join(part[0].upper() + part[1:] + "." for part in parts)
