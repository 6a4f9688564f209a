"""Texts for rows of visual tokens, whatever they stand for: images (captioning.py), regions of images (describing.py)."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from bvl.data.controls import OPTIONS
from bvl.decode.guidance import check_guidance, guided_merge, join_steps
from bvl.decode.options import DecodeOptions
from bvl.decode.search import Decoded, search
from bvl.errors import UserError
from bvl.mesh import BATCH_AXES, batch_sharding, place, replicated, rows_on_devices
from bvl.models.vlm import DualEncoder
from bvl.runs import Components

logger = logging.getLogger(__name__)

# (numbers of rows, whether their null rows are wanted too) -> (visual tokens [c, s, w], their mask) on the device, the
# null rows after all others.
VisualOf = Callable[[Int[np.ndarray, " b"], bool], tuple[Float[Array, "c s w"], Bool[Array, "c s"]]]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One text for a row. score: log_prob / length ** length_penalty, with guidance and constraints in it."""

    text: str
    score: float
    log_prob: float
    tokens: tuple[int, ...]


def row_scales(
    guidance: float | Sequence[float] | np.ndarray, count: int, *, noun: str = "image"
) -> Float[np.ndarray, " n"]:
    """One scale of guidance a row from one for all or one a row; UserError for what is neither."""
    return np.broadcast_to(check_guidance(guidance, count, noun=noun), count)


def write_rows(
    components: Components,
    visual_of: VisualOf,
    *,
    options: DecodeOptions,
    scale: Float[np.ndarray, " n"],
    null_has_controls: bool,
    language_model: Components | None,
    controls: Mapping[str, Any] | None,
    begin: str | Sequence[str] | None,
    seed: int,
    first_row: int | Sequence[int],
    batch_size: int,
    always_guided: bool,
    noun: str = "image",
) -> list[list[Candidate]]:
    """`options.num_return` texts for each of n rows, best first (samples: as drawn).

    visual_of: asked for batches of rows in rising order, each filled up to one shape with its first row.
    scale: of guidance. null_has_controls: the null rows keep the rows' controls. noun: what a row is, for messages.
    The rest is as in `bvl.tasks.captioning.write_captions`. Raises UserError for values that cannot be used, before
    `visual_of` is asked for anything.
    """
    count, tokenizer, mesh = len(scale), components.tokenizer, components.encoder.mesh
    guided = always_guided or language_model is not None or bool((scale != 1).any())
    prefixes = _prefixes(components, controls or {}, count, noun)
    forced, forced_mask = _forced(components, begin, count, options, noun)
    forbidden = tokenizer.no_words(components.model.vocab_size)
    numbers = _numbers(first_row, count, noun)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), numbers)
    keys = jax.random.wrap_key_data(place(jax.random.key_data(keys), replicated(mesh)))
    size = rows_on_devices(batch_size, mesh)
    plain_prefixes = _prefixes(components, {}, size, noun)
    other = None if language_model is None else _text_alone(language_model, size, mesh)
    own_null = guided and language_model is None

    out: list[list[Candidate]] = []
    for start in range(0, count, batch_size):
        rows = np.arange(start, min(start + batch_size, count))
        # A batch is filled up with its first row, so that every batch has one shape.
        filled = np.concatenate([rows, np.full(size - len(rows), start)])
        visual, visual_mask = visual_of(filled, own_null)
        prefix, mask = (x[filled] for x in prefixes)
        if own_null:
            null = (prefix, mask) if null_has_controls else plain_prefixes
            prefix, mask = (np.concatenate(pair) for pair in zip((prefix, mask), null, strict=True))
        decoded = generate(
            components.params["model"],
            visual,
            visual_mask,
            prefix,
            mask,
            scale=scale[filled] if guided else None,
            rng=keys[filled],
            forbidden=forbidden,
            forced=None if forced is None else forced[filled],
            forced_mask=None if forced is None else forced_mask[filled],
            other=other,
            mesh=mesh,
            model=components.model,
            other_model=None if language_model is None else language_model.model,
            options=options,
            end_id=tokenizer.end_id,
            pad_id=tokenizer.pad_id,
        )
        decoded = jax.tree.map(np.asarray, decoded)
        out.extend(_candidates(components, decoded, row) for row in range(len(rows)))
    return out


@functools.partial(jax.jit, static_argnames=("mesh", "model"))
def image_visual(
    params: Any, tokens: Float[Array, "b l d"], dropped: Bool[Array, " c"], *, mesh: Mesh, model: DualEncoder
) -> tuple[Float[Array, "c s w"], Bool[Array, "c s"]]:
    """Visual tokens of images, compiled, as often as there are b rows in c; the null for the `dropped` ones.

    Each device of the mesh makes those of rows of its own; b must divide by the mesh's batch shards.
    """
    tokens = jax.lax.with_sharding_constraint(tokens, batch_sharding(mesh))
    tokens = jnp.tile(tokens, (len(dropped) // len(tokens), 1, 1))
    return model.apply({"params": _decoder_params(params)}, tokens, dropped, method="visual_tokens")


@functools.partial(jax.jit, static_argnames=("mesh", "model", "other_model", "options", "end_id", "pad_id"))
def generate(
    params: Any,
    visual: Float[Array, "c s w"] | None,
    visual_mask: Bool[Array, "c s"] | None,
    prefix: Int[Array, "c p"],
    prefix_mask: Bool[Array, "c p"],
    *,
    scale: Float[Array, " b"] | None,
    rng: Array,
    forbidden: Bool[Array, " v"],
    forced: Int[Array, "b f"] | None,
    forced_mask: Bool[Array, "b f"] | None,
    other: dict[str, Any] | None,
    mesh: Mesh,
    model: DualEncoder,
    other_model: DualEncoder | None,
    options: DecodeOptions,
    end_id: int,
    pad_id: int,
) -> Decoded:
    """Texts from visual tokens, compiled: prefill and search.

    Rows c: the b rows that texts are written for, and with guidance then their null rows, unless `other`, a language
    model's parameters, visual tokens and prefix, gives these. scale: None for plain decoding. rng: a key for each of
    the b rows.
    Each device of the mesh decodes rows of its own, with the whole decoder's parameters, so that nothing is exchanged
    while it searches; b must divide by the mesh's batch shards.
    """
    whole, rows, copied = PartitionSpec(), PartitionSpec(BATCH_AXES), PartitionSpec(None, BATCH_AXES)
    decode = jax.shard_map(
        functools.partial(
            _decode_rows, model=model, other_model=other_model, options=options, end_id=end_id, pad_id=pad_id
        ),
        mesh=mesh,
        in_specs=(
            *(whole, copied, rows, rows, whole, rows, rows),
            None if other is None else {"params": whole, "start": rows},
        ),
        out_specs=rows,
        # The loops of the devices end at different times.
        check_vma=False,
    )
    start = (visual, visual_mask, prefix, prefix_mask)
    decoded = decode(
        _decoder_params(params),
        jax.tree.map(lambda x: x.reshape(-1, len(rng), *x.shape[1:]), start),
        scale,
        rng,
        forbidden,
        forced,
        forced_mask,
        None if other is None else {**other, "params": _decoder_params(other["params"])},
    )
    return jax.lax.with_sharding_constraint(decoded, replicated(mesh))


def _decoder_params(params: Any) -> Any:
    """The model's parameters without the modules around the decoder, which no device needs whole."""
    around = ("image", "text", "region_encoder", "region_decoder")
    return {name: value for name, value in params.items() if name not in around}


def _decode_rows(
    params: Any,
    starts: tuple[Array | None, ...],
    scale: Float[Array, " b"] | None,
    rng: Array,
    forbidden: Bool[Array, " v"],
    forced: Int[Array, "b f"] | None,
    forced_mask: Bool[Array, "b f"] | None,
    other: dict[str, Any] | None,
    *,
    model: DualEncoder,
    other_model: DualEncoder | None,
    options: DecodeOptions,
    end_id: int,
    pad_id: int,
) -> Decoded:
    """`generate` on one device; starts: visual tokens, prefixes and their masks [n, b, ...], n copies of its b rows."""

    def begin(model: DualEncoder, params: Any, start: tuple[Array | None, ...]):
        apply = functools.partial(model.apply, {"params": params})
        logits, context, cache = apply(*start, options.max_length, method="prefill")

        def step(cache, tokens, t):
            return apply(context, cache, tokens, t, method="decoder_step")

        return logits, cache, step

    logits, cache, step = begin(model, params, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), starts))
    if other is not None:
        other_logits, other_cache, other_step = begin(other_model, other["params"], other["start"])
        logits, cache = jnp.concatenate([logits, other_logits]), (cache, other_cache)
        step = join_steps(step, other_step)
    return search(
        logits,
        cache,
        step,
        options=options,
        end_id=end_id,
        pad_id=pad_id,
        merge=None if scale is None else guided_merge(scale),
        rng=rng,
        forbidden=forbidden,
        forced=forced,
        forced_mask=forced_mask,
    )


def _text_alone(language_model: Components, size: int, mesh: Mesh) -> dict[str, Any]:
    """`other` of `generate`: rows of a captioner without image and controls, or of a model without an image tower."""
    # It was loaded onto one device; the captioner may be in training on several.
    params = place(language_model.params["model"], replicated(mesh))
    model = language_model.model
    visual = (None, None)
    if model.config.image is not None:
        nothing = np.zeros((size, 1, model.config.image_width), model.dtype)
        visual = image_visual(params, nothing, np.ones(size, bool), mesh=mesh, model=model)
    return {"params": params, "start": (*visual, *_prefixes(language_model, {}, size, "row"))}


@functools.cache
def warn_once(workdir: str | None, message: str) -> None:
    """Log a warning once for a run; a sweep would say it once a scale."""
    logger.warning(message)


def _numbers(first_row: int | Sequence[int], count: int, noun: str) -> Int[np.ndarray, " n"]:
    """The numbers of the rows, which their random draws depend on."""
    try:
        numbers = np.asarray(first_row)
    except ValueError as error:
        raise UserError(f"first_row={first_row!r}: give a number, or one for each {noun}") from error
    if not np.issubdtype(numbers.dtype, np.integer) or (numbers < 0).any():
        raise UserError(f"first_row={first_row!r}: the numbers of {noun}s are whole, from 0 on")
    if numbers.ndim == 0:
        return numbers + np.arange(count)
    if numbers.shape != (count,):
        raise UserError(
            f"first_row of shape {numbers.shape} for {count} {noun}s: give one number for each {noun}"
        )
    return numbers


def _candidates(components: Components, decoded: Decoded, row: int) -> list[Candidate]:
    return [
        Candidate(
            components.tokenizer.decode(tokens[:length]),
            float(score),
            float(log_prob),
            tuple(int(t) for t in tokens[:length]),
        )
        for tokens, length, score, log_prob in zip(
            decoded.tokens[row],
            decoded.lengths[row],
            decoded.scores[row],
            decoded.log_probs[row],
            strict=True,
        )
    ]


def _prefixes(
    components: Components, controls: Mapping[str, Any], count: int, noun: str
) -> tuple[np.ndarray, np.ndarray]:
    """(ids [n, P], mask) of the rows' prefixes."""
    unknown = controls.keys() - OPTIONS.keys()
    if unknown:
        raise UserError(f"unknown control {', '.join(sorted(unknown))}; there are {', '.join(OPTIONS)}")
    columns = {name: _each(name, value, count, noun) for name, value in controls.items() if value is not None}
    make = functools.partial(components.config.data.controls.prefix, components.tokenizer)
    rows = [make(**{name: column[i] for name, column in columns.items()}) for i in range(count)]
    return np.stack([ids for ids, _ in rows]), np.stack([mask for _, mask in rows])


def _each(name: str, value: Any, count: int, noun: str) -> Sequence[Any]:
    """One value for every row."""
    if isinstance(value, str) or not isinstance(value, Sequence | np.ndarray):
        return [value] * count
    if len(value) != count:
        raise UserError(
            f"{name}: {len(value)} values for {count} {noun}s; give one value, or one for each {noun}"
        )
    return list(value)


def _forced(
    components: Components,
    begin: str | Sequence[str] | None,
    count: int,
    options: DecodeOptions,
    noun: str,
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """(ids [n, F], mask) of the words that texts begin with."""
    if begin is None:
        return None, None
    texts = _each("begin", begin, count, noun)
    wrong = [text for text in texts if not isinstance(text, str)]
    if wrong:
        raise UserError(f"begin: {wrong[0]!r} is no text; give the first words, or an empty text for none")
    tokens, mask, truncated = zip(*(components.tokenizer.encode(text) for text in texts), strict=True)
    # Without the start token, which the prefix has, and the end token.
    lengths = [int(m.sum()) - 2 for m in mask]
    if any(truncated) or max(lengths) >= options.max_length:
        raise UserError(
            f"begin: {max(lengths)} tokens or more leave nothing to write of max_length={options.max_length}"
        )
    width = max(max(lengths), 1)
    return np.stack([t[1 : 1 + width] for t in tokens]), np.arange(width) < np.asarray(lengths)[:, None]
