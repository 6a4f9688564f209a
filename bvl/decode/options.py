"""How a caption is searched for: one frozen object, static under jit."""

from __future__ import annotations

import dataclasses
import math

from bvl.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeOptions:
    """Options of `bvl.decode.search.search`. Whatever is left at its default costs nothing.

    The search is greedy at beams 1 and temperature 0, sampling at a temperature above 0, beam search at beams
    above 1, diverse beam search at groups above 1.

    max_length: tokens written at most, END included. min_length: tokens at least before END.
    num_return: texts a row; the best of the beams, or independent samples.
    length_penalty: the score of a text is sum(log p) / length**length_penalty, where the length counts the
        tokens written, END and forced ones included but no prompt, as transformers counts it. Above 0 favours
        long texts, below 0 short ones.
    groups, diversity: `beams` are split evenly into `groups`; each token chosen by a beam of an earlier group
        at the same position costs a later group `diversity`.
    exact_stop: a row ends when no running beam could still beat its worst kept text. False takes the attainable
        score to be that of the present length, as transformers does by default: sooner, and with a
        length_penalty above 0 a better long text may be missed.
    temperature, then top_k (0 is off), then top_p (1 is off) shape the distribution that is sampled.
    no_repeat_ngram: no n tokens in a row are written twice (0 is off).
    repetition_penalty: log-probabilities of tokens already written are multiplied by it (1 is off).

    Raises ConfigError for values or combinations that no search can use.
    """

    max_length: int
    beams: int = 1
    groups: int = 1
    diversity: float = 0.5
    length_penalty: float = 1.0
    exact_stop: bool = True
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    no_repeat_ngram: int = 0
    repetition_penalty: float = 1.0
    min_length: int = 0
    num_return: int = 1

    def __post_init__(self) -> None:
        for name in ("max_length", "beams", "groups", "num_return"):
            _check(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        for name in ("top_k", "no_repeat_ngram", "min_length"):
            _check(getattr(self, name) >= 0, name, getattr(self, name), "must be at least 0")
        for name in ("diversity", "length_penalty", "temperature", "top_p", "repetition_penalty"):
            _check(math.isfinite(getattr(self, name)), name, getattr(self, name), "must be a finite number")
        for name in ("diversity", "temperature"):
            _check(getattr(self, name) >= 0, name, getattr(self, name), "must be at least 0")
        _check(0 < self.top_p <= 1, "top_p", self.top_p, "must lie in (0, 1]; 1 is off")
        _check(self.repetition_penalty > 0, "repetition_penalty", self.repetition_penalty, "must be above 0")
        _check(
            self.min_length < self.max_length,
            "min_length",
            self.min_length,
            f"must be below max_length={self.max_length}, which counts END",
        )
        self._check_combination()

    @property
    def sampling(self) -> bool:
        return self.temperature > 0

    def _check_combination(self) -> None:
        if self.beams % self.groups:
            raise ConfigError(
                f"groups={self.groups} does not divide beams={self.beams}: choose beams as a multiple of groups"
            )
        if self.sampling and self.beams > 1:
            raise ConfigError(
                f"temperature={self.temperature} with beams={self.beams}: sampling has no beams; leave temperature "
                "at 0 for beam search, or set beams=1 and num_return to the number of samples"
            )
        if not self.sampling and (self.top_k > 0 or self.top_p < 1):
            raise ConfigError(
                f"top_k={self.top_k}, top_p={self.top_p} shape what is sampled: set temperature, such as 1.0"
            )
        if not self.sampling and self.num_return > self.beams:
            raise ConfigError(
                f"num_return={self.num_return} is more than beams={self.beams}: set beams as high, or a "
                "temperature above 0 for independent samples"
            )


def _check(good: bool, name: str, value: float, rule: str) -> None:
    if not good:
        raise ConfigError(f"{name}={value}: {rule}")
