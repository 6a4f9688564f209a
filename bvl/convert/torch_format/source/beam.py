"""Beam search and diverse beam search, and which search is done."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from bvl.convert.torch_format.source.constraints import INFINITY
from bvl.convert.torch_format.source.search import Continuations, Decoded, Rules, SearchOptions, walk


def search(texts: Continuations, rules: Rules, draws: list[list[torch.Generator]] | None) -> Decoded:
    """Search by `rules.options`; draws: a generator for each sample of each row, for sampling."""
    return beam_search(texts, rules) if rules.options.beams > 1 else walk(texts, rules, draws)


@dataclasses.dataclass
class Group:
    """Running and kept texts of one group of beams; a sum or score of -inf marks a free place."""

    tokens: Tensor
    sums: Tensor
    kept_tokens: Tensor
    kept_sums: Tensor
    kept_lengths: Tensor
    kept_scores: Tensor


def beam_search(texts: Continuations, rules: Rules) -> Decoded:
    """Each row keeps k running texts and, apart from them, up to k finished ones, in groups that search on their own.

    Of the 2 k best continuations of a group those of the first k ranks that end are candidates to be kept, by score,
    and the k best that do not end run on. A group stops when no running text can beat its worst kept one.
    """
    options = rules.options
    k, length = options.beams // options.groups, options.max_length
    log_probs = rules.merge(texts.first[:, None])
    b, device = len(log_probs), log_probs.device
    root = Group(
        tokens=torch.full((b, 1, length), rules.pad_id, device=device),
        sums=torch.zeros(b, 1, device=device),
        kept_tokens=torch.full((b, k, length), rules.pad_id, device=device),
        kept_sums=torch.full((b, k), -INFINITY, device=device),
        kept_lengths=torch.zeros(b, k, dtype=torch.long, device=device),
        kept_scores=torch.full((b, k), -INFINITY, device=device),
    )
    groups = [root] * options.groups
    log_probs = log_probs.expand(-1, options.groups, -1)
    texts.spread(options.beams)
    for t in range(length):
        history = torch.cat([group.tokens for group in groups], dim=1)[..., :t]
        each = rules.constrain(log_probs, history).chunk(options.groups, dim=1)
        counts = torch.zeros(b, log_probs.shape[-1], device=device)
        chosen, parents, tokens = [], [], []
        for i, (group, own) in enumerate(zip(groups, each, strict=True)):
            penalty = options.diversity * counts if i and options.diversity > 0 else None
            group, parent, token, real = extend(group, own, t, penalty, rules, k)
            counts = counts.scatter_add(1, token, real.float())
            chosen.append(group)
            parents.append(parent + i * own.shape[1])
            tokens.append(token)
        groups = chosen
        if not any(bool(group.sums.isfinite().any()) for group in groups):
            break
        if t:
            texts.reorder(torch.cat(parents, dim=1))
        log_probs = rules.merge(texts.step(torch.cat(tokens, dim=1)))
    return best_of_groups(groups, options.num_return)


def extend(
    group: Group, log_probs: Tensor, t: int, penalty: Tensor | None, rules: Rules, k: int
) -> tuple[Group, Tensor, Tensor, Tensor]:
    """Token t of one group: the group with k running texts, their parents, their tokens, and which of them are real."""
    options = rules.options
    b, p, size = log_probs.shape
    sums = (group.sums[..., None] + log_probs).flatten(1)
    ranked = sums if penalty is None else sums - penalty.repeat(1, p)
    width = min(2 * k, p * size)
    values, index = ranked.topk(width)
    values = F.pad(values, (0, 2 * k - width), value=-INFINITY)
    index = F.pad(index, (0, 2 * k - width))
    sums = torch.where(values.isfinite(), sums.gather(1, index), -INFINITY)
    parent, token = index // size, index % size
    tokens = pick(group.tokens, parent).clone()
    tokens[..., t] = token
    ends, last = token == rules.end_id, t == options.max_length - 1

    done = sums[:, :k].isfinite() & (ends[:, :k] | last)
    new_sums = torch.where(done, sums[:, :k], -INFINITY)
    kept = keep(group, tokens[:, :k], new_sums, t + 1, options)

    place = first_of_sorted(values.masked_fill(ends, -INFINITY), k)
    running = torch.where(ends.gather(1, place), -INFINITY, sums.gather(1, place))
    real = running.isfinite()
    if last:
        running = torch.full_like(running, -INFINITY)
    if options.length_penalty > 0:
        best_length = options.max_length if options.exact_stop else t + 1
    else:
        best_length = min(t + 2, options.max_length)
    attainable = running.amax(1) / options.length_norm(best_length).to(running.device)
    beaten = kept["kept_scores"].amin(1) >= attainable
    running = running.masked_fill(beaten[:, None], -INFINITY)
    group = Group(tokens=pick(tokens, place), sums=running, **kept)
    return group, parent.gather(1, place), token.gather(1, place), real


def keep(
    group: Group, tokens: Tensor, sums: Tensor, length: int, options: SearchOptions
) -> dict[str, Tensor]:
    """The best of the kept texts and the new ones; of equal scores the older first."""
    scores = torch.cat([group.kept_scores, sums / options.length_norm(length).to(sums.device)], dim=1)
    order = first_of_sorted(scores, sums.shape[1])
    lengths = torch.full_like(group.kept_lengths, length)
    return {
        "kept_tokens": pick(torch.cat([group.kept_tokens, tokens], dim=1), order),
        "kept_sums": torch.cat([group.kept_sums, sums], dim=1).gather(1, order),
        "kept_lengths": torch.cat([group.kept_lengths, lengths], dim=1).gather(1, order),
        "kept_scores": scores.gather(1, order),
    }


def best_of_groups(groups: list[Group], count: int) -> Decoded:
    """The kept texts of all groups by rank in the group, then by score."""
    scores = torch.stack([group.kept_scores for group in groups], dim=2)
    order = scores.argsort(dim=2, descending=True, stable=True)

    def sort(values: list[Tensor]) -> Tensor:
        x = torch.stack(values, dim=2)
        index = order.reshape(*order.shape, *(1,) * (x.ndim - 3)).expand_as(x)
        return x.gather(2, index).flatten(1, 2)[:, :count]

    return Decoded(
        tokens=sort([group.kept_tokens for group in groups]),
        lengths=sort([group.kept_lengths for group in groups]),
        scores=sort([group.kept_scores for group in groups]),
        log_probs=sort([group.kept_sums for group in groups]),
    )


def first_of_sorted(values: Tensor, k: int) -> Tensor:
    """Indices of the k largest of each row; of equal ones the first."""
    return values.argsort(dim=1, descending=True, stable=True)[:, :k]


def pick(x: Tensor, index: Tensor) -> Tensor:
    """x[i, index[i, j], ...] for each row i."""
    return x[torch.arange(len(x), device=x.device)[:, None], index]
