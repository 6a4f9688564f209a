"""Captions by a trained model: what evaluations, the Python object and the command line share."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from bvl.config import Config
from bvl.data.controls import OPTIONS
from bvl.decode.guidance import check_guidance, guided_merge, join_steps
from bvl.decode.options import DecodeOptions
from bvl.decode.search import Decoded, search
from bvl.errors import ConfigError, UserError
from bvl.mesh import BATCH_AXES, replicated, rows_on_devices
from bvl.models.vlm import DualEncoder
from bvl.runs import Components
from bvl.tasks.caption import Caption
from bvl.tasks.contrastive import embed_texts, has_contrastive

logger = logging.getLogger(__name__)

# What the null rows of guidance go without.
GuidanceNull = Literal["image", "controls", "both"]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One text for an image. score: log_prob / length ** length_penalty, with guidance and constraints in it."""

    text: str
    score: float
    log_prob: float
    tokens: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class ImageTokens:
    """Images encoded once, for several calls of `write_captions`; see `encode_for_captions`."""

    tokens: Float[np.ndarray, "n l d"]

    def __len__(self) -> int:
        return len(self.tokens)


def encode_for_captions(
    components: Components, images: Sequence[Any], *, batch_size: int = 16
) -> ImageTokens:
    """What a captioner's decoder reads of images: `write_captions` takes it in their place, with the same result.

    A sweep over scales so encodes its images once. Holds for these components alone. Raises UserError without images.
    """
    images = list(images)
    _check_batches(images, batch_size)
    return ImageTokens(np.concatenate(list(_token_batches(components, images, batch_size))))


def captioning_task_of(config: Config) -> Caption:
    """A config's captioning task; ConfigError, naming what is missing, if it has none."""
    for task in config.tasks.values():
        if isinstance(task, Caption):
            return task
    raise ConfigError(
        f"this run cannot write captions: it has no task of type Caption, only "
        f"{', '.join(f'{n} ({type(t).__name__})' for n, t in config.tasks.items())}. Train one with "
        "tasks={..., 'caption': Caption()} and model.decoder set, as configs/quickstart.py does"
    )


def longest_text(config: Config) -> int:
    """The most tokens, END included, that a run's decoder is trained to write."""
    # The start token of the context is no part of what is written.
    return config.data.tokenizer.context_length - 1


def check_max_length(config: Config, options: DecodeOptions, *, who: str = "this run") -> None:
    """Raise ConfigError for texts longer than the run of `config` is trained on."""
    if options.max_length > longest_text(config):
        raise ConfigError(
            f"max_length={options.max_length}: {who} was trained on texts of up to {longest_text(config)} tokens "
            "(data.tokenizer.context_length)"
        )


def write_captions(
    components: Components,
    images: Sequence[Any] | ImageTokens,
    *,
    options: DecodeOptions,
    guidance: float | Sequence[float] | np.ndarray = 1.0,
    guidance_null: GuidanceNull = "image",
    language_model: Components | None = None,
    controls: Mapping[str, Any] | None = None,
    begin: str | Sequence[str] | None = None,
    seed: int = 0,
    first_row: int | Sequence[int] = 0,
    batch_size: int = 16,
    always_guided: bool = False,
) -> list[list[Candidate]]:
    """`options.num_return` texts for each image, best first (samples: as drawn).

    images: paths, PIL images or arrays, or what `encode_for_captions` made of them.
    guidance: one scale or one an image; 1 is plain decoding.
    guidance_null: what the null rows go without. language_model: another captioner with the same vocabulary whose
      text without an image is the null instead.
    controls: "section", "length" (words), "quality" (bin), "prompt" -> a value, or a sequence with one an image; what
      is absent or None is left out.
    begin: the captions' first words, one text or one an image.
    seed: of sampling; what an image gets depends on the seed and its number alone.
    first_row: number of the first image, where the others count on from, or one number an image: with the numbers of
      the whole, neither its division into several calls nor images left out change what the others get.
    always_guided: decode null rows even at scale 1, so that a sweep over scales compiles one program.
    Raises ConfigError for a run without a captioning task, UserError for values that cannot be used.
    """
    captioning_task_of(components.config)
    images = images if isinstance(images, ImageTokens) else list(images)
    _check_batches(images, batch_size)
    check_max_length(components.config, options)
    tokenizer = components.tokenizer
    scale = np.broadcast_to(check_guidance(guidance, len(images)), len(images))
    guided = always_guided or language_model is not None or bool((scale != 1).any())
    if guidance_null not in ("image", "controls", "both"):
        raise UserError(f"guidance_null={guidance_null!r}: choose image, controls or both")
    if language_model is None and (scale != 1).any():
        _warn_of_untrained_null(components.config, guidance_null)
    if language_model is not None:
        captioning_task_of(language_model.config)
        if language_model.tokenizer.hash != tokenizer.hash:
            raise UserError(
                "the language model reads another vocabulary than the captioner: train it with "
                "data.tokenizer.path set to the captioner's tokenizer.json"
            )
        check_max_length(language_model.config, options, who="the language model")
    prefixes = _prefixes(components, controls or {}, len(images))
    forced, forced_mask = _forced(components, begin, len(images), options)
    forbidden = np.zeros(tokenizer.vocab_size, bool)
    no_words = {*tokenizer.special_ids, tokenizer.mask_id, tokenizer.unknown_id} - {tokenizer.end_id, None}
    forbidden[list(no_words)] = True
    numbers = _numbers(first_row, len(images))
    mesh = components.encoder.mesh
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), numbers)
    keys = jax.device_put(keys, replicated(mesh))
    size = rows_on_devices(batch_size, mesh)
    plain_prefixes = _prefixes(components, {}, size)

    other = None
    if language_model is not None:
        start, start_mask = _prefixes(language_model, {}, size)
        # It was loaded onto one device; the captioner may be in training on several.
        other_params = jax.device_put(language_model.params["model"], replicated(mesh))
        other = {"params": other_params, "prefix": start, "mask": start_mask}

    out: list[list[Candidate]] = []
    for tokens in _token_batches(components, images, batch_size):
        rows = np.arange(len(out), len(out) + len(tokens))
        # A batch is filled up with its first image, so that every batch has one shape.
        filled = np.concatenate([rows, np.full(size - len(rows), rows[0])])
        tokens = tokens[filled - rows[0]]
        prefix, mask = (x[filled] for x in prefixes)
        dropped = np.zeros(size, bool)
        if guided and language_model is None:
            null = (prefix, mask) if guidance_null == "image" else plain_prefixes
            prefix, mask = (np.concatenate(pair) for pair in zip((prefix, mask), null, strict=True))
            dropped = np.concatenate([dropped, np.full(size, guidance_null != "controls")])
        decoded = generate(
            components.params["model"],
            tokens,
            dropped,
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


@functools.partial(jax.jit, static_argnames=("mesh", "model", "other_model", "options", "end_id", "pad_id"))
def generate(
    params: Any,
    image_tokens: Float[Array, "b l d"],
    dropped: Bool[Array, " c"],
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
    """Texts from image tokens, compiled: visual tokens, prefill and search.

    Rows c: the b images, and with guidance then their null rows, unless `other`, a language model's parameters and
    prefix, gives these. scale: None for plain decoding.
    Each device of the mesh decodes rows of its own, with the whole decoder's parameters, so that nothing is exchanged
    while it searches; b must divide by the mesh's batch shards.
    """
    count = len(image_tokens)
    whole, rows, copied = PartitionSpec(), PartitionSpec(BATCH_AXES), PartitionSpec(None, BATCH_AXES)
    decode = jax.shard_map(
        functools.partial(
            _decode_rows, model=model, other_model=other_model, options=options, end_id=end_id, pad_id=pad_id
        ),
        mesh=mesh,
        in_specs=(
            *(whole, rows, copied, copied, copied, rows, rows, whole, rows, rows),
            None if other is None else {"params": whole, "prefix": rows, "mask": rows},
        ),
        out_specs=rows,
        # The loops of the devices end at different times.
        check_vma=False,
    )
    decoded = decode(
        _decoder_params(params),
        image_tokens,
        *(x.reshape(-1, count, *x.shape[1:]) for x in (dropped, prefix, prefix_mask)),
        scale,
        rng,
        forbidden,
        forced,
        forced_mask,
        None if other is None else {**other, "params": _decoder_params(other["params"])},
    )
    return jax.lax.with_sharding_constraint(decoded, replicated(mesh))


def _decoder_params(params: Any) -> Any:
    """The model's parameters without the towers, which no device needs whole."""
    return {name: value for name, value in params.items() if name not in ("image", "text")}


def _decode_rows(
    params: Any,
    image_tokens: Float[Array, "b l d"],
    dropped: Bool[Array, "n b"],
    prefix: Int[Array, "n b p"],
    prefix_mask: Bool[Array, "n b p"],
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
    """`generate` on one device; n copies of its b rows."""
    copies, count = dropped.shape
    dropped, prefix, prefix_mask = (
        x.reshape(copies * count, *x.shape[2:]) for x in (dropped, prefix, prefix_mask)
    )

    def start(model: DualEncoder, params: Any, tokens: Any, dropped: Any, prefix: Any, mask: Any):
        apply = functools.partial(model.apply, {"params": params})
        visual = apply(tokens, dropped, method="visual_tokens")
        logits, context, cache = apply(*visual, prefix, mask, options.max_length, method="prefill")

        def step(cache, tokens, t):
            return apply(context, cache, tokens, t, method="decoder_step")

        return logits, cache, step

    tokens = jnp.tile(image_tokens, (copies, 1, 1))
    logits, cache, step = start(model, params, tokens, dropped, prefix, prefix_mask)
    if other is not None:
        nothing = jnp.zeros((count, 1, other_model.config.image.output_width), image_tokens.dtype)
        other_logits, other_cache, other_step = start(
            other_model, other["params"], nothing, jnp.ones(count, bool), other["prefix"], other["mask"]
        )
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


def rerank(
    scorer: Components,
    image_embed: Float[np.ndarray, "n d"],
    candidates: Sequence[Sequence[Candidate]],
    *,
    batch_size: int = 64,
) -> list[str]:
    """For each image the candidate most like it by the cosine of a contrastive model; the first of equal ones.

    image_embed: the images' embeddings by the scorer. See `check_scorer` for what scorers there are.
    """
    texts = [candidate.text for row in candidates for candidate in row]
    text = embed_texts(scorer, texts, batch_size=batch_size)
    chosen, start = [], 0
    for embedding, row in zip(image_embed, candidates, strict=True):
        similarity = text[start : start + len(row)] @ embedding
        chosen.append(row[int(similarity.argmax())].text)
        start += len(row)
    return chosen


def check_scorer(scorer: Components) -> None:
    """Raise UserError for a model without trained embeddings of texts to score captions with."""
    if not scorer.model.config.embeds_text:
        raise UserError(
            "scoring captions needs a contrastive model, and this run has no text tower: name one as scorer"
        )
    # A captioner's config may have a text tower that no task has trained.
    if not has_contrastive(scorer.config):
        raise UserError(
            "scoring captions needs a contrastive model, and the tasks of this run are "
            f"{', '.join(scorer.config.tasks)}: name one with a task of type Contrastive as scorer"
        )


def _check_batches(images: Sequence[Any] | ImageTokens, batch_size: int) -> None:
    if not len(images):
        raise UserError("no images to caption: give at least one")
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size}: must be at least 1")


def _token_batches(
    components: Components, images: Sequence[Any] | ImageTokens, batch_size: int
) -> Iterator[Float[np.ndarray, "b l d"]]:
    """The image tokens of up to batch_size images at a time."""
    if isinstance(images, ImageTokens):
        for start in range(0, len(images), batch_size):
            yield images.tokens[start : start + batch_size]
        return
    for features in components.encode_images(images, frozenset({"tokens"}), batch_size):
        yield np.asarray(features.tokens)


def _numbers(first_row: int | Sequence[int], count: int) -> Int[np.ndarray, " n"]:
    """The numbers of the images, which their random draws depend on."""
    try:
        numbers = np.asarray(first_row)
    except ValueError as error:
        raise UserError(f"first_row={first_row!r}: give a number, or one an image") from error
    if not np.issubdtype(numbers.dtype, np.integer) or (numbers < 0).any():
        raise UserError(f"first_row={first_row!r}: the numbers of images are whole, from 0 on")
    if numbers.ndim == 0:
        return numbers + np.arange(count)
    if numbers.shape != (count,):
        raise UserError(f"first_row of shape {numbers.shape} for {count} images: give one number an image")
    return numbers


def _warn_of_untrained_null(config: Config, guidance_null: GuidanceNull) -> None:
    """Warn, once for a run, of a null that training has never shown."""
    if guidance_null != "controls" and not captioning_task_of(config).image_dropout:
        _warn_once(
            config.workdir,
            "guidance: this run was trained with image_dropout=0, so its null image means nothing; train with "
            "tasks.caption.image_dropout=0.2",
        )
    controls = config.data.controls
    if guidance_null != "image" and controls.enabled and not controls.dropout:
        _warn_once(
            config.workdir,
            f"guidance_null={guidance_null!r}: this run was trained with controls.dropout=0, so it has not seen a "
            "caption without controls; train with data.controls.dropout=0.1",
        )


@functools.cache
def _warn_once(workdir: str | None, message: str) -> None:
    """A sweep would say it once a scale."""
    logger.warning(message)


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
    components: Components, controls: Mapping[str, Any], count: int
) -> tuple[np.ndarray, np.ndarray]:
    """(ids [n, P], mask) of the images' prefixes."""
    unknown = controls.keys() - OPTIONS.keys()
    if unknown:
        raise UserError(f"unknown control {', '.join(sorted(unknown))}; there are {', '.join(OPTIONS)}")
    columns = {name: _each(name, value, count) for name, value in controls.items() if value is not None}
    make = functools.partial(components.config.data.controls.prefix, components.tokenizer)
    rows = [make(**{name: column[i] for name, column in columns.items()}) for i in range(count)]
    return np.stack([ids for ids, _ in rows]), np.stack([mask for _, mask in rows])


def _each(name: str, value: Any, count: int) -> Sequence[Any]:
    """One value for every image."""
    if isinstance(value, str) or not isinstance(value, Sequence | np.ndarray):
        return [value] * count
    if len(value) != count:
        raise UserError(f"{name}: {len(value)} values for {count} images; give one value, or one an image")
    return list(value)


def _forced(
    components: Components, begin: str | Sequence[str] | None, count: int, options: DecodeOptions
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """(ids [n, F], mask) of the words that captions begin with."""
    if begin is None:
        return None, None
    texts = _each("begin", begin, count)
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
