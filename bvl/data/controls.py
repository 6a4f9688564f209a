"""Controls: ordinary vocabulary entries in front of a caption that say which one is wanted.

    [pad ...] [START] [SECTION_x] [LENGTH_n] [QUALITY_q] prompt ... [PROMPT_END] | caption

One mechanism for sections of a report, the length in words, the quality of the pair (NoC: Kang et al. 2023,
arXiv:2212.13563) and free text such as a question (PromptCap: Hu et al. 2022, arXiv:2211.09699). What is not given is
left out, and nothing but the caption is ever a target.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32

from bvl.data.text import Tokenizer
from bvl.data.text_choice import ChosenText
from bvl.errors import ConfigError, DataError, UserError

PROMPT_END = "[PROMPT_END]"
# What may be asked for, in the order of the prefix -> the field of `Controls` that a run is trained with.
OPTIONS = {"section": "sections", "length": "lengths", "quality": "quality", "prompt": "prompt"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Controls:
    """The controls that captions are trained with; by default none.

    sections: options of a source's `text` that have a token of their own, such as ("findings", "impression").
    lengths: n = one token for each number of words from 1 to n, where n also stands for more; or rising upper edges
      of bins, such as (5, 10, 20), with one bin more above them. Counted are the words that training shows: those
      that are left after word_dropout, up to where the context ends.
      Words are those of the text as the tokenizer gives it back, which is how the words of a written caption are
      counted.
    quality: number of bins of a record's "quality", the last one best (`bvl data score` writes them); 0 = off.
    prompt: field of the record with free text to put in front, such as a question. prompt_tokens: room for it.
    dropout: each control of a training text is left out with this probability, so that it can be left out later.
    """

    sections: tuple[str, ...] = ()
    lengths: int | tuple[int, ...] = 0
    quality: int = 0
    prompt: str | None = None
    prompt_tokens: int = 32
    dropout: float = 0.1

    def __post_init__(self):
        object.__setattr__(self, "sections", tuple(self.sections))
        names = [_section_token(section) for section in self.sections]
        if len(set(names)) < len(names):
            raise ConfigError(f"sections={self.sections}: two of them would share a token")
        if isinstance(self.lengths, int):
            if self.lengths < 0 or self.lengths == 1:
                raise ConfigError(
                    f"lengths={self.lengths}: give at least 2 words, or 0 for no length control"
                )
        else:
            edges = tuple(self.lengths)
            object.__setattr__(self, "lengths", edges)
            if not edges or edges[0] < 1 or list(edges) != sorted(set(edges)):
                raise ConfigError(f"lengths={edges}: upper edges of bins must rise, from at least 1 word on")
        if self.quality < 0 or self.quality == 1:
            raise ConfigError(f"quality={self.quality}: give at least 2 bins, or 0 for no quality control")
        if self.prompt_tokens < 1:
            raise ConfigError(f"prompt_tokens={self.prompt_tokens}: must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout={self.dropout}: must lie in [0, 1)")

    @property
    def enabled(self) -> tuple[str, ...]:
        """The controls in use, in their order: of "section", "length", "quality", "prompt"."""
        given = {
            "section": self.sections,
            "length": self.lengths,
            "quality": self.quality,
            "prompt": self.prompt is not None,
        }
        return tuple(name for name, value in given.items() if value)

    @property
    def num_slots(self) -> int:
        """P, the length of every prefix: the start token, one for each control, and the room of the prompt."""
        return 1 + len(self.enabled) + (self.prompt_tokens if self.prompt is not None else 0)

    @property
    def length_values(self) -> tuple[int, ...]:
        """What a length token may say; the last one stands for so many words or more."""
        if isinstance(self.lengths, int):
            return tuple(range(1, self.lengths + 1))
        return (*self.lengths, self.lengths[-1] + 1)

    def tokens(self) -> tuple[str, ...]:
        """The vocabulary entries of all controls."""
        return (
            *map(_section_token, self.sections),
            *map(_length_token, self.length_values if self.lengths else ()),
            *map(_quality_token, range(self.quality)),
            *((PROMPT_END,) if self.prompt is not None else ()),
        )

    def length_of(self, text: str) -> int:
        """The value of the length token of a text: its words, or the upper edge of their bin."""
        return self._length_value(len(text.split()))

    def of_text(self, text: ChosenText, record: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
        """What `prefix` takes for a record's text: every control that is in use and known of it.

        Raises DataError for a quality beyond the bins, and for a prompt that is no text.
        """
        known: dict[str, Any] = {
            "section": text.option if text.option in self.sections else None,
            "length": self.length_of(tokenizer.as_shown(text.text)) if self.lengths else None,
            "quality": self.quality_of(text, record) if self.quality else None,
            "prompt": self.prompt_of(record),
        }
        return {name: value for name, value in known.items() if value is not None}

    def quality_of(self, text: ChosenText, record: Mapping[str, Any]) -> int | None:
        """The quality bin of one of the record's texts, None where it has none; DataError for one beyond the bins."""
        value = (record.get("quality") or {}).get(text.option)
        if isinstance(value, list | tuple):
            value = value[text.alternative] if text.alternative < len(value) else None
        if value is not None and value >= self.quality:
            raise DataError(
                f"record {record.get('id')!r}: the quality of its {text.option!r} is {value}, but "
                f"data.controls.quality={self.quality} knows the bins 0 to {self.quality - 1}"
            )
        return value

    def prompt_of(self, record: Mapping[str, Any]) -> str | None:
        """The record's prompt, None where it has none; DataError where it is no text."""
        value = record.get(self.prompt) if self.prompt is not None else None
        if value is not None and not isinstance(value, str):
            raise DataError(
                f"record {record.get('id')!r}: {self.prompt} is {value!r}; data.controls.prompt needs a field of "
                f"strings"
            )
        return value if value and value.strip() else None

    def check_records(
        self, records: Iterable[tuple[Mapping[str, Any], Sequence[ChosenText]]], tokenizer: Tokenizer
    ) -> list[str]:
        """What a log should say of records and their texts; raises DataError for a control that none of them has."""
        num_records = num_texts = unscored = num_prompts = cut = 0
        for record, texts in records:
            num_records += 1
            if self.quality:
                num_texts += len(texts)
                unscored += sum(self.quality_of(text, record) is None for text in texts)
            if (prompt := self.prompt_of(record)) is not None:
                num_prompts += 1
                cut += len(tokenizer.ids(prompt)) > self.prompt_tokens
        notes = []
        if self.quality:
            if unscored == num_texts:
                raise DataError(
                    f"data.controls.quality={self.quality}, but no text that is read has a quality; `bvl data score` "
                    f"writes it into the records"
                )
            notes.append(f"controls: {unscored} of {num_texts} texts have no quality")
        if self.prompt is not None:
            if not num_prompts:
                raise DataError(f"data.controls.prompt={self.prompt!r}, but no record has this field")
            absent = num_records - num_prompts
            notes.append(f"controls: {absent} of {num_records} records have no {self.prompt!r}")
            if cut:
                notes.append(
                    f"controls: {cut} of {num_prompts} prompts are longer than their room of {self.prompt_tokens} "
                    f"tokens and are cut (data.controls.prompt_tokens)"
                )
        return notes

    def prefix(
        self,
        tokenizer: Tokenizer,
        *,
        section: str | None = None,
        length: int | None = None,
        quality: int | None = None,
        prompt: str | None = None,
        cut: bool = False,
    ) -> tuple[Int32[np.ndarray, " P"], Bool[np.ndarray, " P"]]:
        """(ids, mask) of the start token and the given controls, padded on the left.

        cut: a prompt beyond its room is cut, as texts are in training, and not refused.
        Raises UserError for a control the run was not trained with, and for a value it does not know.
        """
        given = {"section": section, "length": length, "quality": quality, "prompt": prompt}
        for name, value in given.items():
            if value is not None and name not in self.enabled:
                raise UserError(
                    f"{name}={value!r}: this run was trained without it; train with data.controls.{OPTIONS[name]} set"
                )
        if tokenizer.start_id is None:
            raise ConfigError(
                "this tokenizer puts no start token in front of a text, and a decoder begins with one: name one in "
                "data.tokenizer.start"
            )
        ids = [tokenizer.start_id]
        if section is not None:
            if section not in self.sections:
                near = difflib.get_close_matches(section, self.sections, n=1, cutoff=0.0)
                raise UserError(
                    f"section={section!r} is unknown, nearest is {near[0]!r}; there is {', '.join(self.sections)}"
                )
            ids.append(tokenizer.token_id(_section_token(section)))
        if length is not None:
            ids.append(tokenizer.token_id(_length_token(self._asked_length(length))))
        if quality is not None:
            if not _is_int(quality) or not 0 <= quality < self.quality:
                raise UserError(
                    f"quality={quality!r}: give a bin from 0 (worst) to {self.quality - 1} (best)"
                )
            ids.append(tokenizer.token_id(_quality_token(quality)))
        if prompt is not None:
            if not isinstance(prompt, str) or not prompt.strip():
                raise UserError(f"prompt={prompt!r}: give a text, or None for no prompt")
            words = tokenizer.ids(prompt)
            if len(words) > self.prompt_tokens and not cut:
                raise UserError(
                    f"the prompt {prompt[:40]!r}... has {len(words)} tokens; this run has room for "
                    f"{self.prompt_tokens} (data.controls.prompt_tokens)"
                )
            ids += [*words[: self.prompt_tokens], tokenizer.token_id(PROMPT_END)]
        mask = np.arange(self.num_slots) >= self.num_slots - len(ids)
        out = np.full(self.num_slots, tokenizer.pad_id, np.int32)
        out[mask] = ids
        return out, mask

    def _length_value(self, words: int) -> int:
        values = self.length_values
        return next((value for value in values[:-1] if words <= value), values[-1])

    def _asked_length(self, length: Any) -> int:
        highest = self.length_values[-1]
        open_ended = not isinstance(self.lengths, int)
        if not _is_int(length) or length < 1 or (length > highest and not open_ended):
            most = "on" if open_ended else f"to {highest} (which also stands for more)"
            raise UserError(f"length={length!r}: give a number of words from 1 {most}")
        return self._length_value(int(length))


def _section_token(section: str) -> str:
    return f"[SECTION_{re.sub(r'[^A-Z0-9]+', '_', section.upper()).strip('_')}]"


def _length_token(value: int) -> str:
    return f"[LENGTH_{value}]"


def _quality_token(value: int) -> str:
    return f"[QUALITY_{int(value)}]"


def _is_int(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
