"""Search for texts: greedy, sampling, beam and diverse beam search."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch
from torch import Tensor

from bvl.convert.torch_format.source.constraints import (
    INFINITY,
    block_ngrams,
    force,
    guide,
    log_softmax,
    penalize_repetition,
    truncate,
)
from bvl.convert.torch_format.source.decoder import Decoder, DecoderState
from bvl.convert.torch_format.source.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """How a text is searched for: greedy at beams 1 and temperature 0, sampling above it, beam search above 1 beam.

    max_length: tokens written at most, END included; min_length: at least, before END. num_return: texts a row.
    length_penalty: a text's score is sum(log p) / length**length_penalty, END counted. exact_stop=False ends beam search
      as soon as no running text could win at its present length.
    groups, diversity: `beams` are split evenly into groups; a token chosen by an earlier group costs a later one
      `diversity` (Vijayakumar et al. 2018, arXiv:1610.02424).
    temperature, then top_k (0 is off), then top_p (1 is off) shape what is sampled.
    no_repeat_ngram: no n tokens in a row are written twice (0 is off). repetition_penalty: log-probabilities of tokens
      already written are multiplied by it (1 is off).
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

    def __post_init__(self):
        rules = {
            "max_length": self.max_length >= 1,
            "beams": self.beams >= 1,
            "groups": self.groups >= 1 and self.beams % self.groups == 0,
            "num_return": self.num_return >= 1 and (self.sampling or self.num_return <= self.beams),
            "top_k": self.top_k >= 0 and (self.sampling or not self.top_k),
            "top_p": 0 < self.top_p <= 1 and (self.sampling or self.top_p == 1),
            "no_repeat_ngram": self.no_repeat_ngram >= 0,
            "repetition_penalty": self.repetition_penalty > 0 and math.isfinite(self.repetition_penalty),
            "min_length": 0 <= self.min_length < self.max_length,
            "diversity": self.diversity >= 0 and math.isfinite(self.diversity),
            "length_penalty": math.isfinite(self.length_penalty),
            "temperature": self.temperature >= 0
            and math.isfinite(self.temperature)
            and not (self.sampling and self.beams > 1),
        }
        wrong = [f"{name}={getattr(self, name)}" for name, good in rules.items() if not good]
        if wrong:
            raise UserError(
                f"{', '.join(wrong)}: no search can use that. groups must divide beams; top_k and top_p need a "
                "temperature above 0, which needs beams=1; candidates are at most as many as beams, or samples"
            )

    @property
    def sampling(self) -> bool:
        return self.temperature > 0

    def length_norm(self, length: Tensor | int) -> Tensor:
        """What the sum of log-probabilities of a text is divided by."""
        return torch.as_tensor(length).clamp(min=1).float() ** self.length_penalty


@dataclasses.dataclass
class Decoded:
    """n texts a row, best first (samples: as drawn). tokens [b, n, L], followed by padding; lengths count END [b, n].

    scores: log_probs / lengths**length_penalty; log_probs are after guidance and constraints.
    """

    tokens: Tensor
    lengths: Tensor
    scores: Tensor
    log_probs: Tensor


class Continuations:
    """Texts that go on token by token: those of one decoder, or of a captioner and below it of a language model.

    There are c rows (with guidance the conditional ones and then their null rows), each with k texts.
    """

    def __init__(self, parts: list[tuple[Decoder, Tensor, DecoderState]]):
        self.decoders, logits, self.states = zip(*parts, strict=True)
        self.first = torch.cat(logits)
        self.copies_of = [len(x) for x in logits]
        self.k = 1

    def spread(self, k: int) -> None:
        """Go on with k equal texts a row."""
        self.states, self.k = [state.spread(k) for state in self.states], k

    def step(self, tokens: Tensor) -> Tensor:
        """Logits [c, k, v] after the tokens [b, k], which every copy of a row reads."""
        out, states = [], []
        for decoder, rows, state in zip(self.decoders, self.copies_of, self.states, strict=True):
            logits, state = decoder.step(state, tokens.repeat(rows // len(tokens), 1).flatten())
            out.append(logits.unflatten(0, (rows, self.k)))
            states.append(state)
        self.states = states
        return torch.cat(out)

    def reorder(self, parents: Tensor) -> None:
        """Text j of row i goes on from text parents[i, j] of the row."""
        states = []
        for rows, state in zip(self.copies_of, self.states, strict=True):
            start = torch.arange(rows, device=parents.device)[:, None] * self.k
            states.append(state.reorder((start + parents.repeat(rows // len(parents), 1)).flatten()))
        self.states = states


@dataclasses.dataclass
class Rules:
    """What turns the logits of c rows into log-probabilities of b rows, and what these texts may say.

    scale [b]: of guidance; None = c is b. forbidden [v]: tokens that are never written. forced, forced_mask [b, f]:
    the tokens that texts begin with, whatever else forbids them.
    """

    options: SearchOptions
    end_id: int
    pad_id: int
    scale: Tensor | None
    forbidden: Tensor
    forced: Tensor | None = None
    forced_mask: Tensor | None = None

    def merge(self, logits: Tensor) -> Tensor:
        logits = logits.float().masked_fill(self.forbidden, -INFINITY)
        return log_softmax(logits) if self.scale is None else guide(*logits.chunk(2), self.scale)

    def constrain(self, log_probs: Tensor, history: Tensor) -> Tensor:
        """Log-probabilities of the token after `history` [b, k, t]."""
        options, t = self.options, history.shape[-1]
        if options.repetition_penalty != 1.0:
            log_probs = penalize_repetition(log_probs, history, options.repetition_penalty)
        if options.no_repeat_ngram:
            log_probs = block_ngrams(log_probs, history, options.no_repeat_ngram)
        if t < options.min_length:
            log_probs = log_probs.clone()
            log_probs[..., self.end_id] = -INFINITY
        if self.forced is not None:
            log_probs = force(log_probs, self.forced, self.forced_mask, t)
        return log_probs


def sample_generators(seed: int, numbers: list[int], count: int) -> list[list[torch.Generator]]:
    """Generators that depend on the seed, the number of the row and that of the sample alone."""

    def one(number: int, j: int) -> torch.Generator:
        state = np.random.SeedSequence([seed, number, j]).generate_state(2, np.uint32)
        return torch.Generator().manual_seed(int(state[0]) << 31 ^ int(state[1]))

    return [[one(number, j) for j in range(count)] for number in numbers]


def walk(texts: Continuations, rules: Rules, draws: list[list[torch.Generator]] | None) -> Decoded:
    """Greedy search, or `num_return` samples a row."""
    options, n = rules.options, rules.options.num_return
    log_probs = rules.merge(texts.first[:, None])
    b, device = len(log_probs), log_probs.device
    log_probs = log_probs.expand(-1, n, -1)
    texts.spread(n)
    tokens = torch.full((b, n, options.max_length), rules.pad_id, device=device)
    finished = torch.zeros(b, n, dtype=torch.bool, device=device)
    total, lengths = torch.zeros(b, n, device=device), torch.zeros(b, n, dtype=torch.long, device=device)
    for t in range(options.max_length):
        log_probs = rules.constrain(log_probs, tokens[..., :t])
        token = sample(log_probs, options, draws) if options.sampling else log_probs.argmax(-1)
        gain = log_probs.gather(-1, token[..., None])[..., 0]
        # Where no token is possible the text ends here; its score, -inf, says so.
        token = torch.where(gain == -INFINITY, rules.end_id, token)
        total = total + torch.where(finished, 0.0, gain)
        lengths = lengths + ~finished
        token = torch.where(finished, rules.pad_id, token)
        tokens[..., t] = token
        finished = finished | (token == rules.end_id)
        if finished.all() or t == options.max_length - 1:
            break
        log_probs = rules.merge(texts.step(token))
    return Decoded(tokens, lengths, total / options.length_norm(lengths), total)


def sample(log_probs: Tensor, options: SearchOptions, draws: list[list[torch.Generator]]) -> Tensor:
    """Draw from what temperature, top_k and top_p leave."""
    left = truncate(log_probs / options.temperature, options.top_k, options.top_p)
    probs = log_softmax(left).exp().cpu()
    # A row without any possible token draws nothing.
    probs = torch.where(probs.sum(-1, keepdim=True) > 0, probs, torch.ones_like(probs))
    drawn = [
        [torch.multinomial(probs[i, j], 1, generator=generator) for j, generator in enumerate(row)]
        for i, row in enumerate(draws)
    ]
    return torch.tensor(drawn, device=log_probs.device)
