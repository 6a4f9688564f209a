"""Beam search and diverse beam search.

Each row keeps `beams` running texts and, apart from them, up to `beams` kept ones, in `groups` that search on
their own. In a step the 2 beams best continuations of a group's running texts are ranked; those of the first
`beams` ranks that end are candidates to be kept, by score, and the best `beams` that do not end run on. At
max_length all end. A group stops when no running text can beat its worst kept one: as log-probabilities are
never above 0, the most that a running sum s can score is s / max_length**penalty for a penalty above 0 and, for
one of 0 or less, s / (length + 1)**penalty. A stopped group no longer counts for the diversity of later ones.

Diverse beam search: Vijayakumar et al. 2018 (arXiv:1610.02424), Hamming diversity. It decides what runs on and
what ends; the sums and scores are those of the model.
"""

from __future__ import annotations

import typing

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from bvl.decode.options import DecodeOptions
from bvl.decode.sampling import Constrain
from bvl.decode.state import Cache, Decoded, Merge, Step, advance, length_norm, reorder, spread
from bvl.decode.topk import top_k


class Group(typing.NamedTuple):
    """Running and kept texts of one group; a sum or score of -inf marks a free place."""

    tokens: Int[Array, "b k L"]
    sums: Float[Array, "b k"]
    kept_tokens: Int[Array, "b k L"]
    kept_sums: Float[Array, "b k"]
    kept_lengths: Int[Array, "b k"]
    kept_scores: Float[Array, "b k"]


def beam_search(
    logits: Float[Array, "c V"],
    cache: Cache,
    step: Step,
    *,
    options: DecodeOptions,
    end_id: int,
    pad_id: int,
    merge: Merge,
    constrain: Constrain,
) -> Decoded:
    """The best `num_return` texts a row; arguments as in `bvl.decode.search.search`.

    With several groups the best text of each group comes first, best first, then the second of each, and so on.
    """
    first = merge(logits[:, None])
    b, k, L = len(first), options.beams // options.groups, options.max_length
    copies = len(logits) // b

    def choose(groups, log_probs, t):
        """The groups after token t, each running text's parent among all beams, and its token."""
        history = jnp.concatenate([group.tokens for group in groups], axis=1)
        log_probs = constrain(log_probs, history, t)
        each = jnp.split(log_probs, options.groups, axis=1)
        diverse = options.groups > 1 and options.diversity > 0
        counts = jnp.zeros((b, log_probs.shape[-1]), jnp.float32)
        chosen, parents, tokens = [], [], []
        for i, (group, own) in enumerate(zip(groups, each, strict=True)):
            penalty = options.diversity * counts if i and diverse else None
            group, parent, token, real = extend(group, own, t, penalty, options=options, end_id=end_id, k=k)
            if diverse:
                counts = counts.at[jnp.arange(b)[:, None], token].add(real.astype(jnp.float32))
            chosen.append(group)
            parents.append(parent + i * own.shape[1])
            tokens.append(token)
        return tuple(chosen), jnp.concatenate(parents, axis=1), jnp.concatenate(tokens, axis=1)

    def more(state):
        t, _, groups, _ = state
        return (t < L) & jnp.any(jnp.stack([jnp.isfinite(group.sums) for group in groups]))

    def body(state):
        t, cache, groups, token = state
        logits, cache = advance(step, cache, token, t - 1, copies)
        groups, parents, token = choose(groups, merge(logits), t)
        return t + 1, reorder(cache, parents), groups, token

    root = Group(
        tokens=jnp.full((b, 1, L), pad_id, jnp.int32),
        sums=jnp.zeros((b, 1), jnp.float32),
        kept_tokens=jnp.full((b, k, L), pad_id, jnp.int32),
        kept_sums=jnp.full((b, k), -jnp.inf),
        kept_lengths=jnp.zeros((b, k), jnp.int32),
        kept_scores=jnp.full((b, k), -jnp.inf),
    )
    # All groups start from the one text that is empty.
    first = jnp.broadcast_to(first, (b, options.groups, first.shape[-1]))
    groups, _, token = choose((root,) * options.groups, first, jnp.int32(0))
    state = (jnp.int32(1), spread(cache, options.beams), groups, token)
    _, _, groups, _ = lax.while_loop(more, body, state)
    return best_of_groups(groups, options.num_return)


def extend(
    group: Group,
    log_probs: Float[Array, "b p V"],
    t: Int[Array, ""],
    penalty: Float[Array, "b V"] | None,
    *,
    options: DecodeOptions,
    end_id: int,
    k: int,
) -> tuple[Group, Int[Array, "b k"], Int[Array, "b k"], Bool[Array, "b k"]]:
    """Token t of one group: the group with k running texts, their parents among its p, their tokens, and which
    of them are real, not free places. A token is real also where its text ends here, by length or by the stop."""
    b, p, V = log_probs.shape
    sums = (group.sums[..., None] + log_probs).reshape(b, p * V)
    ranked = sums if penalty is None else sums - jnp.tile(penalty, (1, p))
    width = min(2 * k, p * V)
    values, index = top_k(ranked, width)
    if width < 2 * k:
        values = jnp.pad(values, ((0, 0), (0, 2 * k - width)), constant_values=-jnp.inf)
        index = jnp.pad(index, ((0, 0), (0, 2 * k - width)))
    sums = jnp.where(jnp.isfinite(values), _pick(sums, index), -jnp.inf)
    parent, token = index // V, index % V
    tokens = lax.dynamic_update_slice_in_dim(_pick(group.tokens, parent), token[..., None], t, axis=-1)
    ends = token == end_id
    last = t == options.max_length - 1

    norm = length_norm(options)
    done = jnp.isfinite(sums[:, :k]) & (ends[:, :k] | last)
    kept = _keep(group, tokens[:, :k], jnp.where(done, sums[:, :k], -jnp.inf), t + 1, norm)

    _, place = lax.top_k(jnp.where(ends, -jnp.inf, values), k)
    running = jnp.where(_pick(ends, place), -jnp.inf, _pick(sums, place))
    real = jnp.isfinite(running)
    running = jnp.where(last, -jnp.inf, running)
    attainable = running.max(1) / norm[_best_length(options, t + 1)]
    running = jnp.where((kept["kept_scores"].min(1) >= attainable)[:, None], -jnp.inf, running)
    group = Group(tokens=_pick(tokens, place), sums=running, **kept)
    return group, _pick(parent, place), _pick(token, place), real


def best_of_groups(groups: tuple[Group, ...], num_return: int) -> Decoded:
    """The kept texts of all groups by rank in the group, then by score."""
    together = jax.tree.map(lambda *xs: jnp.stack(xs, axis=2), *groups)
    scores, order = lax.top_k(together.kept_scores, len(groups))
    b = len(scores)

    def sort(x: Array) -> Array:
        x = jnp.take_along_axis(x, order.reshape(order.shape + (1,) * (x.ndim - 3)), axis=2)
        return x.reshape(b, -1, *x.shape[3:])[:, :num_return]

    return Decoded(
        tokens=sort(together.kept_tokens),
        lengths=sort(together.kept_lengths),
        scores=scores.reshape(b, -1)[:, :num_return],
        log_probs=sort(together.kept_sums),
    )


def _keep(
    group: Group,
    tokens: Int[Array, "b k L"],
    sums: Float[Array, "b k"],
    length: Int[Array, ""],
    norm: Float[Array, " L+1"],
) -> dict[str, Array]:
    """The best of the kept texts and the new ones; of equal scores, so of free places too, the older first."""
    k = sums.shape[1]
    scores, order = lax.top_k(jnp.concatenate([group.kept_scores, sums / norm[length]], axis=1), k)
    new = {
        "kept_tokens": tokens,
        "kept_sums": sums,
        "kept_lengths": jnp.broadcast_to(length, sums.shape),
    }
    kept = {name: _pick(jnp.concatenate([getattr(group, name), x], axis=1), order) for name, x in new.items()}
    return kept | {"kept_scores": scores}


def _best_length(options: DecodeOptions, length: Int[Array, ""]) -> int | Int[Array, ""]:
    """The length at which a running text of `length` tokens could score best."""
    if options.length_penalty > 0:
        return options.max_length if options.exact_stop else length
    return jnp.minimum(length + 1, options.max_length)


def _pick(x: Array, index: Int[Array, "b m"]) -> Array:
    """x[i, index[i, j], ...] for each row i."""
    return x[jnp.arange(len(x))[:, None], index]
