"""What a text may not say, and guidance: functions of log-probabilities [b, k, v] of k texts a row."""

from __future__ import annotations

import torch
from torch import Tensor

INFINITY = float("inf")


def log_softmax(logits: Tensor) -> Tensor:
    """log_softmax in float32 over the last axis; all -inf where all logits are."""
    logits = logits.float()
    top = logits.amax(-1, keepdim=True)
    shifted = logits - torch.where(top.isfinite(), top, torch.zeros_like(top))
    total = shifted.exp().sum(-1, keepdim=True)
    return shifted - torch.where(total > 0, total, torch.ones_like(total)).log()


def guide(conditional: Tensor, null: Tensor, scale: Tensor) -> Tensor:
    """Classifier-free guidance: normalised (1 - g) log p_null + g log p_conditional from logits [b, k, v].

    Kornblith et al. 2023, arXiv:2307.16686, equation 3; g = `scale` [b]. A token that is -inf on either side is so
    in the result.
    """
    possible = conditional.isfinite() & null.isfinite()

    def below_top(logits: Tensor) -> Tensor:
        top = logits.masked_fill(~possible, -INFINITY).amax(-1, keepdim=True)
        return logits.float() - top

    g = scale[:, None, None]
    mixed = (1 - g) * below_top(null) + g * below_top(conditional)
    return log_softmax(mixed.masked_fill(~possible, -INFINITY))


def penalize_repetition(log_probs: Tensor, history: Tensor, penalty: float) -> Tensor:
    """Multiply the log-probabilities of the tokens of `history` [b, k, t] by `penalty`, once however often they occur.

    Log-probabilities are never above 0, so a penalty above 1 always makes a token less likely.
    """
    return log_probs.scatter(-1, history, log_probs.gather(-1, history) * penalty)


def block_ngrams(log_probs: Tensor, history: Tensor, n: int) -> Tensor:
    """-inf for each token that would complete an n-gram of `history` [b, k, t] a second time."""
    length = history.shape[-1]
    if length < n:
        return log_probs
    windows = history.unfold(-1, n, 1)
    last = history[..., length - n + 1 :]
    repeats = (windows[..., :-1] == last[..., None, :]).all(-1)
    blocked = torch.zeros_like(log_probs, dtype=torch.int32)
    blocked.scatter_add_(-1, windows[..., -1], repeats.int())
    return log_probs.masked_fill(blocked > 0, -INFINITY)


def force(log_probs: Tensor, forced: Tensor, mask: Tensor, t: int) -> Tensor:
    """0 for the token that a row is forced [b, f] to write at place t, -inf for all others; other rows unchanged."""
    if t >= forced.shape[1]:
        return log_probs
    wanted = torch.full_like(log_probs, -INFINITY)
    index = forced[:, t, None, None].expand(*log_probs.shape[:2], 1)
    wanted.scatter_(-1, index, 0.0)
    return torch.where(mask[:, t, None, None], wanted, log_probs)


def truncate(log_probs: Tensor, top_k: int, top_p: float) -> Tensor:
    """-inf for all but the top_k likeliest tokens (0: all stay) and, of what is left, for all but the nucleus.

    The nucleus is the smallest set of likeliest tokens whose probability reaches top_p (Holtzman et al. 2020,
    arXiv:1904.09751).
    """
    values, order = log_probs.sort(dim=-1, descending=True, stable=True)
    if top_k:
        values[..., top_k:] = -INFINITY
    if top_p < 1:
        probs = log_softmax(values).exp()
        values = values.masked_fill(probs.cumsum(-1) - probs >= top_p, -INFINITY)
    return torch.full_like(log_probs, -INFINITY).scatter(-1, order, values)
