"""Controls: vocabulary entries in front of a text that say which one is wanted.

[pad ...] [START] [SECTION_x] [LENGTH_n] [QUALITY_q] prompt ... [PROMPT_END] | text
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bvl.convert.torch_format.source.errors import UserError
from bvl.convert.torch_format.source.text import Tokenizer


class Controls:
    """The controls that this model was trained with.

    config: num_slots, the length of every prefix; sections: name -> token id; lengths: (number of words, token id),
    rising; open_ended: whether more words than the last may be asked for; quality: token ids of the bins; prompt:
    {"tokens": room, "end_id": ...} or None.
    """

    def __init__(self, config: dict[str, Any], tokenizer: Tokenizer):
        self.config, self.tokenizer = config, tokenizer

    def prefix(
        self,
        *,
        section: str | None = None,
        length: int | None = None,
        quality: int | None = None,
        prompt: str | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """(ids [p], mask) of the start token and the given controls, padded on the left."""
        ids = [self.tokenizer.start_id]
        if section is not None:
            sections = self._trained("section", section, self.config["sections"])
            if section not in sections:
                raise UserError(f"section={section!r} is unknown; there is {', '.join(sections)}")
            ids.append(sections[section])
        if length is not None:
            ids.append(self._length_id(length, self._trained("length", length, self.config["lengths"])))
        if quality is not None:
            bins = self._trained("quality", quality, self.config["quality"])
            if not is_whole(quality) or not 0 <= quality < len(bins):
                raise UserError(f"quality={quality!r}: give a bin from 0 (worst) to {len(bins) - 1} (best)")
            ids.append(bins[quality])
        if prompt is not None:
            room = self._trained("prompt", prompt, self.config["prompt"])
            if not isinstance(prompt, str) or not prompt.strip():
                raise UserError(f"prompt={prompt!r}: give a text, or None for no prompt")
            words = self.tokenizer.ids(prompt)
            if len(words) > room["tokens"]:
                raise UserError(
                    f"the prompt {prompt[:40]!r}... has {len(words)} tokens; there is room for {room['tokens']}"
                )
            ids += [*words, room["end_id"]]
        slots = self.config["num_slots"]
        mask = np.arange(slots) >= slots - len(ids)
        out = np.full(slots, self.tokenizer.pad_id, np.int64)
        out[mask] = ids
        return out, mask

    def _trained(self, name: str, value: Any, known: Any) -> Any:
        if not known:
            raise UserError(f"{name}={value!r}: this model was trained without it")
        return known

    def _length_id(self, length: int, values: Sequence[tuple[int, int]]) -> int:
        highest = values[-1][0]
        if not is_whole(length) or length < 1 or (length > highest and not self.config["open_ended"]):
            most = "on" if self.config["open_ended"] else f"to {highest} (which also stands for more)"
            raise UserError(f"length={length!r}: give a number of words from 1 {most}")
        return next((token for words, token in values[:-1] if length <= words), values[-1][1])


def is_whole(value: Any) -> bool:
    """Whether a value is an integer and no truth value."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
