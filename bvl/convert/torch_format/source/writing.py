"""Texts about images and about their regions, by the text decoder."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bvl.convert.torch_format.source.beam import search
from bvl.convert.torch_format.source.errors import UserError
from bvl.convert.torch_format.source.features import ImageFeatures
from bvl.convert.torch_format.source.images import Shown
from bvl.convert.torch_format.source.prompts import flat, joined, region_prompt
from bvl.convert.torch_format.source.region_encoder import RegionPrompts
from bvl.convert.torch_format.source.search import Continuations, Rules, SearchOptions, sample_generators

if TYPE_CHECKING:
    from bvl.convert.torch_format.source.model import Model

Visual = tuple[Tensor, Tensor]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One text. score: log_prob / length ** length_penalty, with guidance and constraints in it."""

    text: str
    score: float
    log_prob: float
    tokens: tuple[int, ...]


def write_rows(
    model: Model,
    visual_of: Callable[[list[int], bool], Visual],
    count: int,
    *,
    options: SearchOptions,
    guidance: Any,
    null_has_controls: bool,
    language_model: Model | None,
    controls: Mapping[str, Any],
    begin: Any,
    seed: int,
    first_row: Any,
    batch_size: int,
    noun: str,
) -> list[list[Candidate]]:
    """`options.num_return` texts for each of `count` rows (images, or regions: the `noun`), best first.

    visual_of: (numbers of rows, whether their null rows are wanted behind them) -> visual tokens and their mask.
    """
    scale = guidance_scales(guidance, count, noun)
    columns = {name: each(name, value, count, noun) for name, value in controls.items() if value is not None}
    prefixes = [model.controls.prefix(**{k: v[i] for k, v in columns.items()}) for i in range(count)]
    forced = forced_words(model, begin, count, options, noun)
    row_numbers = row_numbers_of(first_row, count, noun)
    guided = language_model is not None or bool((scale != 1).any())
    forbidden = torch.zeros(len(model.decoder.token_embed), dtype=torch.bool, device=model.device)
    forbidden[model.tokenizer.excluded_ids] = True

    def on_device(arrays: Sequence[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.stack(arrays)).to(model.device)

    out: list[list[Candidate]] = []
    for start in range(0, count, batch_size):
        rows = list(range(start, min(start + batch_size, count)))
        own_null = guided and language_model is None
        visual, visual_mask = visual_of(rows, own_null)
        chosen = [prefixes[i] for i in rows]
        if own_null:
            chosen += chosen if null_has_controls else [model.controls.prefix()] * len(rows)
        prefix, prefix_mask = (on_device(x) for x in zip(*chosen, strict=True))
        parts = [
            (
                model.decoder,
                *model.decoder.prefill(visual, visual_mask, prefix, prefix_mask, options.max_length),
            )
        ]
        if language_model is not None:
            parts.append(text_alone(language_model, len(rows), options.max_length))
        rules = Rules(
            options=options,
            end_id=model.tokenizer.end_id,
            pad_id=model.tokenizer.pad_id,
            scale=torch.from_numpy(scale[rows]).to(model.device) if guided else None,
            forbidden=forbidden,
        )
        if forced is not None:
            rules.forced, rules.forced_mask = (on_device(x[rows]) for x in forced)
        draws = None
        if options.sampling:
            draws = sample_generators(seed, [row_numbers[i] for i in rows], options.num_return)
        decoded = search(Continuations(parts), rules, draws)
        for texts, lengths, scores, sums in zip(
            decoded.tokens.tolist(),
            decoded.lengths.tolist(),
            decoded.scores.tolist(),
            decoded.log_probs.tolist(),
            strict=True,
        ):
            cut = [tokens[:length] for tokens, length in zip(texts, lengths, strict=True)]
            out.append(
                [
                    Candidate(model.tokenizer.decode(tokens), score, total, tuple(tokens))
                    for tokens, score, total in zip(cut, scores, sums, strict=True)
                ]
            )
    return out


def text_alone(model: Model, rows: int, max_new: int) -> tuple[Any, Tensor, Any]:
    """A captioner's decoder about no image and without controls."""
    width, visual = model.config["decoder"]["visual_width"], (None, None)
    if width:
        nothing = torch.zeros(rows, 1, width, device=model.device, dtype=model.dtype)
        dropped = torch.ones(rows, dtype=torch.bool, device=model.device)
        visual = model.decoder.visual_tokens(nothing, dropped)
    prefix = (torch.from_numpy(x).to(model.device).expand(rows, -1) for x in model.controls.prefix())
    return (model.decoder, *model.decoder.prefill(*visual, *prefix, max_new))


def guidance_scales(guidance: Any, count: int, noun: str) -> np.ndarray:
    """One scale of guidance a row."""
    try:
        scales = np.asarray(guidance, np.float32)
    except (TypeError, ValueError) as error:
        raise UserError(f"guidance={guidance!r}: give a number, or one for each {noun}") from error
    if scales.ndim > 1 or (scales.ndim == 1 and len(scales) != count):
        raise UserError(
            f"guidance of shape {scales.shape} for {count} {noun}s: give one number, or one for each"
        )
    if not np.isfinite(scales).all() or (scales < 0).any():
        raise UserError(f"guidance={guidance!r}: must be finite and at least 0; 1 is plain decoding")
    return np.broadcast_to(scales, count).copy()


def each(name: str, value: Any, count: int, noun: str) -> Sequence[Any]:
    """One value for every row."""
    if isinstance(value, str) or not isinstance(value, Sequence | np.ndarray):
        return [value] * count
    if len(value) != count:
        raise UserError(
            f"{name}: {len(value)} values for {count} {noun}s; give one value, or one for each {noun}"
        )
    return list(value)


def row_numbers_of(first_row: Any, count: int, noun: str) -> list[int]:
    """The numbers of the rows, which their random draws depend on."""
    given = np.asarray(first_row)
    if not np.issubdtype(given.dtype, np.integer) or (given < 0).any() or given.shape not in ((), (count,)):
        raise UserError(f"first_row={first_row!r}: give a whole number from 0 on, or one for each {noun}")
    return (given + np.arange(count)).tolist() if given.ndim == 0 else given.tolist()


def forced_words(
    model: Model, begin: Any, count: int, options: SearchOptions, noun: str
) -> tuple[np.ndarray, np.ndarray] | None:
    """(ids [n, f], mask) of the words that texts begin with."""
    if begin is None:
        return None
    texts = each("begin", begin, count, noun)
    for text in texts:
        if not isinstance(text, str):
            raise UserError(f"begin: {text!r} is no text; give the first words, or an empty text for none")
    ids = [model.tokenizer.ids(text) for text in texts]
    longest = max(map(len, ids))
    if longest > model.tokenizer.room or longest >= options.max_length:
        raise UserError(f"begin: {longest} tokens leave nothing to write of max_length={options.max_length}")
    width = max(longest, 1)
    tokens = np.full((count, width), model.tokenizer.end_id, np.int64)
    for row, some in zip(tokens, ids, strict=True):
        row[: len(some)] = some
    return tokens, np.arange(width) < np.array([[len(some)] for some in ids])


def caption_images(
    model: Model, images: list[Any], *, guidance_null: str, batch_size: int, **how: Any
) -> list[list[Candidate]]:
    """Candidates for each image; how: further arguments of `write_rows`."""
    if guidance_null not in ("image", "controls", "both"):
        raise UserError(f"guidance_null={guidance_null!r}: choose image, controls or both")
    needs_null = how["language_model"] is None and guidance_null != "controls"
    if needs_null and not model.config["decoder"]["null"] and np.any(np.asarray(how["guidance"]) != 1):
        raise UserError(
            "guidance other than 1 needs a null image, and this model has none: give a language_model"
        )

    def visual_of(rows: list[int], with_null: bool) -> Visual:
        features = model.features([images[i] for i in rows])[1]
        copies = (False, guidance_null != "controls") if with_null else (False,)
        dropped = torch.tensor(copies, device=model.device).repeat_interleave(len(rows))
        return model.decoder.visual_tokens(features.for_decoder.repeat(len(copies), 1, 1), dropped)

    return write_rows(
        model,
        visual_of,
        len(images),
        null_has_controls=guidance_null == "image",
        batch_size=batch_size,
        noun="image",
        **how,
    )


def describe_regions(
    model: Model,
    images: list[Any],
    regions: list[list[dict[str, Any]]],
    *,
    guidance_null: str,
    length: Any,
    begin: Any,
    first_row: Any,
    guidance: Any,
    batch_size: int,
    image_batch_size: int,
    **how: Any,
) -> list[list[list[Candidate]]]:
    """Candidates for each region of each image; an image is encoded once, however many regions it has."""
    if guidance_null not in ("image", "region", "both"):
        raise UserError(f"guidance_null={guidance_null!r}: choose image, region or both")
    counts = [len(some) for some in regions]
    rows_in_order = region_rows(model, images, regions, image_batch_size)

    def visual_of(rows: list[int], with_null: bool) -> Visual:
        features, shown, prompts = zip(*itertools.islice(rows_in_order, len(rows)), strict=True)
        image = stack_features(features)
        prompt = joined(prompts, model.device)
        regional = image
        if model.config["region_encoder"]["kind"] == "mask_channel":
            pixels = np.stack([with_mask(one, p.mask[0]) for one, p in zip(shown, prompts, strict=True)])
            regional = model.encode_image(model.normalize(torch.from_numpy(pixels)))
        drops = [(False, False)]
        if with_null:
            drops.append((guidance_null != "region", guidance_null != "image"))
        parts = []
        for pair in drops:
            no_image, no_region = (torch.full((len(rows),), drop, device=model.device) for drop in pair)
            visual = model.decoder.visual_tokens(image.tokens, no_image)
            regions_visual = model.encode_regions(regional, prompt, no_region)
            parts.append([torch.cat(x, dim=1) for x in zip(visual, regions_visual, strict=True)])
        tokens, mask = (torch.cat(x) for x in zip(*parts, strict=True))
        return tokens, mask

    written = iter(
        write_rows(
            model,
            visual_of,
            sum(counts),
            guidance=flat("guidance", guidance, counts),
            null_has_controls=True,
            controls={"length": flat("length", length, counts)},
            begin=flat("begin", begin, counts),
            first_row=flat("first_row", first_row, counts),
            batch_size=batch_size,
            noun="region",
            **how,
        )
    )
    return [list(itertools.islice(written, count)) for count in counts]


def region_rows(
    model: Model, images: list[Any], regions: list[list[dict[str, Any]]], batch_size: int
) -> Iterator[tuple[ImageFeatures, Shown, RegionPrompts]]:
    """Features of the image, the image and the prompt of each region, in order; images are encoded when due."""
    wanted = [i for i, some in enumerate(regions) if some]
    grid = tuple(model.config["region_grid"])
    for start in range(0, len(wanted), batch_size):
        chunk = wanted[start : start + batch_size]
        shown, features = model.features([images[i] for i in chunk], levels=model.config["reads_levels"])
        for row, i in enumerate(chunk):
            levels = features.levels
            one = ImageFeatures(
                pooled=features.pooled[row],
                tokens=features.tokens[row],
                grid=features.grid,
                levels=None if levels is None else tuple(level[row] for level in levels),
            )
            for k, region in enumerate(regions[i]):
                yield one, shown[row], region_prompt(region, shown[row], grid, f"images[{i}], region {k}")


def stack_features(features: Sequence[ImageFeatures]) -> ImageFeatures:
    """Features of single images as those of a batch."""
    levels = None
    if features[0].levels is not None:
        levels = tuple(map(torch.stack, zip(*(one.levels for one in features), strict=True)))
    return ImageFeatures(
        pooled=torch.stack([one.pooled for one in features]),
        tokens=torch.stack([one.tokens for one in features]),
        grid=features[0].grid,
        levels=levels,
    )


def with_mask(shown: Shown, mask: Tensor) -> np.ndarray:
    """The image with a mask [h, w] on a coarse grid as fourth channel of 0 or 255."""
    cell = [size // cells for size, cells in zip(shown.pixels.shape[:2], mask.shape, strict=True)]
    channel = np.kron(mask.numpy(), np.ones(cell, bool)).astype(np.uint8) * 255
    return np.concatenate([shown.pixels, channel[..., None]], axis=-1)
