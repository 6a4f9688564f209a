"""Search for texts with a step function: greedy, sampling, beam and diverse beam search, all inside one jit."""

from __future__ import annotations

from jaxtyping import Array, Bool, Float, Int, Key

from bvl.decode.beam import beam_search
from bvl.decode.constraints import Constraints, without
from bvl.decode.options import DecodeOptions
from bvl.decode.sampling import walk
from bvl.decode.state import Cache, Decoded, Merge, Step, log_softmax
from bvl.errors import UserError


def search(
    logits: Float[Array, "c V"],
    cache: Cache,
    step: Step,
    *,
    options: DecodeOptions,
    end_id: int,
    pad_id: int,
    merge: Merge | None = None,
    rng: Key[Array, ""] | Key[Array, " b"] | None = None,
    forbidden: Bool[Array, " V"] | None = None,
    forced: Int[Array, "b F"] | None = None,
    forced_mask: Bool[Array, "b F"] | None = None,
) -> Decoded:
    """Search for the continuation of a prefilled batch.

    `logits` are those of the first token and `cache` has one beam, [c, 1, ...]; both come from a prefill of
    c = copies * b rows. `merge` makes the log-probabilities of b rows of them (default: log_softmax, c = b);
    `guided_merge` guides. `step(cache, tokens, t)` reads the t-th generated tokens and gives the logits of the
    next ones. It is run no more once every text has ended, and never for the last token of max_length.

    `rng` is needed for sampling: one key, folded with the row's place in the batch, or a key a row. What a row
    draws depends on its key alone, so rows that fill up a batch change nothing for the others.

    `forbidden[v]`: token v is never written, and its probability is shared among the others before `merge`, so that
    log-probabilities, guided ones too, are of what may be written. Row i's t-th token is forced[i, t] where forced_mask[i, t] (default:
    everywhere), whatever else forbids it. Raises UserError for sampling without `rng`.
    """
    constrain = Constraints(options=options, end_id=end_id, forced=forced, forced_mask=forced_mask)
    merge = merge or log_softmax
    shared = dict(
        options=options, end_id=end_id, pad_id=pad_id, merge=without(merge, forbidden), constrain=constrain
    )
    if options.beams > 1:
        return beam_search(logits, cache, step, **shared)
    if options.sampling and rng is None:
        raise UserError(f"temperature={options.temperature} samples at random: give `rng`, a key")
    return walk(logits, cache, step, rng=rng, **shared)
