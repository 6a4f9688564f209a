"""Regions described: is the right thing named, on the right side, in as many words as were asked for."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float
from PIL import ImageOps

from bvl.config import Config
from bvl.data.geometry import box_area
from bvl.data.images import open_image
from bvl.data.region_prompts import check_boxes, check_masks, check_points, prompts_of
from bvl.data.regions import KINDS, region_entries
from bvl.data.sources import Source
from bvl.data.text import Tokenizer
from bvl.data.text_choice import TextChoice
from bvl.errors import ConfigError, DataError, UserError
from bvl.evals.base import Cache, Collector, EvalResult, Suite, describe, provenance
from bvl.evals.regions import (
    REGION_BATCH,
    Picture,
    RegionScores,
    by_record,
    groups_of,
    read_pictures,
    some_of,
    with_regions,
)
from bvl.evals.writing import decode_options
from bvl.metrics.boxes import pairwise_iou
from bvl.metrics.caption_text import length_obeyed, num_words, tokenize
from bvl.metrics.classification import balanced_accuracy
from bvl.metrics.dense_captions import dense_caption_map, match_dense_captions
from bvl.metrics.rouge import rouge_l
from bvl.runs import Components
from bvl.tasks.describing import (
    EncodedImages,
    RegionNull,
    describing_task_of,
    encode_for_regions,
)
from bvl.tasks.describing import describe as describe_regions
from bvl.tasks.locating import Detections, detect, detection_task_of


@dataclasses.dataclass(frozen=True)
class _Region:
    """A region to describe. member: of the picture's entries. prompt: what points at it. references: what it is called."""

    member: int
    prompt: dict[str, Any]
    name: str
    references: tuple[str, ...]
    asked: int | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class RegionDescriptions(Suite):
    """Texts that the run's task of describing writes of regions, against the region's name and its own texts.

    name_accuracy: share of texts whose first known name (of several at one place the longest) is the region's;
    recall/<name> is that share among regions of one name, and name_balanced_accuracy their mean over the true names.
    name_stated: share of texts that hold the region's name as whole words, wherever. rouge_l compares with the
    references. word_accuracy/<group>: among regions whose references hold exactly one word of the group, the share of
    texts with this word and no other of the group; word_stated/<group>: the share with any. length_within_1 and
    length_exact: shares of texts as long as was asked for, in words. mean_length: words written.

    kind: what points at a region. A "point" is the box's centre, or the pixel of the region's mask that is nearest to
      it; a region without a mask is left out where kind is "mask".
    jitter: each side of a box, or each coordinate of a point, is moved by up to this share of the box's width or
      height, drawn by `seed`.
    mirrored: images and regions are mirrored left to right, and names and references follow by `mirrored_words`
      ({"left": "right"} holds both ways).
    text: the field or fields of a box entry that are its references; None = the run's data.regions.text.
    name_words: name -> further words that say it; the name itself always does.
    length: words to ask for: a number, or "reference", as many as the first reference has.
    guidance, guidance_null: see `bvl.tasks.describing.describe`. beams, max_length: see `DecodeOptions`; None is the
      longest text of the training.
    max_images: so many images, drawn by `seed`; None = all. max_regions: so many regions of an image, likewise.
    dense: also the boxes that the run detects (scores from `dense_threshold`) are described, and dense_caption_map
      tells how far box and words are both right, against all boxes of the images; the score of words is ROUGE-L with
      the first reference, or the name of a box without one, so that values compare with no published ones.
    """

    source: Source
    kind: Literal["box", "point", "mask"] = "box"
    jitter: float = 0.0
    mirrored: bool = False
    mirrored_words: dict[str, str] = dataclasses.field(default_factory=lambda: {"left": "right"})
    text: str | dict[str, float] | None = None
    name_words: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    word_groups: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    length: int | Literal["reference"] | None = None
    guidance: float = 1.0
    guidance_null: RegionNull = "both"
    beams: int = 1
    max_length: int | None = None
    max_images: int | None = None
    max_regions: int | None = None
    dense: bool = False
    dense_threshold: float = 0.1
    seed: int = 0
    region_batch_size: int = REGION_BATCH
    decode_batch_size: int = 64

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ConfigError(f"kind={self.kind!r}: choose {', '.join(KINDS)}")
        if not 0 <= self.jitter < 0.5:
            raise ConfigError(f"jitter={self.jitter}: must lie in [0, 0.5)")
        if self.jitter and self.kind == "mask":
            raise ConfigError("jitter moves boxes and points; a mask stays where it is")
        if not (np.isfinite(self.guidance) and self.guidance >= 0):
            raise ConfigError(f"guidance={self.guidance}: must be a finite number of at least 0")
        if isinstance(self.length, int) and self.length < 1:
            raise ConfigError(f"length={self.length}: ask for at least 1 word")
        for name in ("max_images", "max_regions", "region_batch_size", "decode_batch_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least 1")
        for group, words in self.word_groups.items():
            if isinstance(words, str) or len(words) < 2:
                raise ConfigError(f"word_groups[{group!r}]={words!r}: give two or more words to tell apart")
        if self.text is not None:
            TextChoice.of(self.text)

    def check_config(self, config: Config) -> None:
        describing_task_of(config)
        if self.dense:
            detection_task_of(config)
        controls = config.data.controls
        if self.length is not None and not controls.lengths:
            raise ConfigError(
                f"length={self.length!r} is asked for, but the run is trained without it; set data.controls.lengths"
            )
        exact = isinstance(controls.lengths, int) and isinstance(self.length, int)
        if exact and self.length > controls.lengths:
            raise ConfigError(
                f"length={self.length}: the run knows up to {controls.lengths} words, which also stands for more"
            )
        self._decoding(config)

    def check_records(self) -> None:
        with_regions(self.opened())

    def run(self, components: Components, *, batch_size: int, cache: Cache | None = None) -> EvalResult:
        self.check_config(components.config)
        record_set, regions = self.opened(), components.config.data.regions
        choice = regions.text_choice() if self.text is None else TextChoice.of(self.text)
        candidates, left_out = with_regions(record_set)
        offers = [
            i for i in candidates if any(choice.offers(e) for e in region_entries(record_set.describe(i)))
        ]
        if len(offers) < len(candidates):
            left_out["without described regions"] += len(candidates) - len(offers)
        indices = some_of(offers, self.max_images, self.seed, left_out)
        if not indices:
            raise DataError(
                f"{describe(record_set)}: no region has the text {' or '.join(n for n, _ in choice.options)!r}"
            )
        unreadable: list[dict[str, str]] = []
        rows: list[dict[str, Any]] = []
        dense: list[dict[str, Any]] = []
        batch_size = min(self.region_batch_size, batch_size, len(indices))
        parts = read_pictures(record_set, indices, masks=True, batch_size=batch_size, unreadable=unreadable)
        for pictures in parts:
            if self.mirrored:
                pictures = [self._mirror(picture) for picture in pictures]
            images = [picture.record["image"] for picture in pictures]
            encoded = encode_for_regions(components, images, batch_size=batch_size)
            chosen = [
                self._regions(components, picture, encoded, i, choice, left_out)
                for i, picture in enumerate(pictures)
            ]
            asked = None if self.length is None else [[r.asked for r in some] for some in chosen]
            texts = self._write(components, encoded, [[r.prompt for r in some] for some in chosen], asked)
            for picture, some, written in zip(pictures, chosen, texts, strict=True):
                rows += [_row(picture, r, t) for r, t in zip(some, written, strict=True)]
            if self.dense:
                dense += self._dense(components, pictures, encoded, choice, batch_size)
        if not rows:
            raise DataError(f"{describe(record_set)}: no region can be described ({dict(left_out)})")

        out = Collector()
        scores = RegionScores(
            out, groups_of(record_set, [row["index"] for row in rows]), record_set.group_unit()
        )
        out.metrics |= {"num_images": len({row["index"] for row in rows}), "num_regions": len(rows)}
        self._score(rows, components.tokenizer, scores)
        if self.dense:
            _score_dense(
                dense,
                RegionScores(
                    out, groups_of(record_set, [d["index"] for d in dense]), record_set.group_unit()
                ),
            )
        examples = by_record(rows)
        return EvalResult(
            out.metrics,
            provenance(
                components,
                record_set,
                list(examples),
                left_out=left_out,
                unreadable=unreadable,
                undefined=out.undefined,
                text=self.text if self.text is not None else regions.text,
                **{
                    f.name: value if not isinstance(value := getattr(self, f.name), tuple) else list(value)
                    for f in dataclasses.fields(self)
                    if f.name not in ("source", "text", "region_batch_size", "decode_batch_size")
                },
            ),
            [{"id": record_set.describe(i)["id"], "regions": some} for i, some in examples.items()],
        )

    def _decoding(self, config: Config) -> Any:
        return decode_options(config, beams=self.beams, max_length=self.max_length, of_regions=True)

    def _write(
        self,
        components: Components,
        encoded: EncodedImages,
        prompts: list[list[dict[str, Any]]],
        asked: list[list[int | None]] | None,
    ) -> list[list[str]]:
        if not any(prompts):
            return [[] for _ in prompts]
        found = describe_regions(
            components,
            encoded,
            prompts,
            options=self._decoding(components.config),
            guidance=self.guidance,
            guidance_null=self.guidance_null,
            controls={"length": asked},
            seed=self.seed,
            batch_size=self.decode_batch_size,
        )
        return [[candidates[0].text for candidates in some] for some in found]

    def _mirror(self, picture: Picture) -> Picture:
        """The picture, its regions and their words mirrored left to right."""
        record = dict(picture.record)
        record["image"] = ImageOps.mirror(open_image(record["image"]))
        if record.get("mask") is not None:
            record["mask"] = np.ascontiguousarray(record["mask"][:, ::-1])
        boxes = picture.boxes.copy()
        boxes[:, [0, 2]] = 1 - boxes[:, [2, 0]]
        swap = {**{v: k for k, v in self.mirrored_words.items()}, **self.mirrored_words}
        entries = [_swapped(entry, swap) for entry in picture.entries]
        if record.get("mask_name"):
            record["mask_name"] = _swapped(record["mask_name"], swap)
        return Picture(picture.index, record, entries, boxes)

    def _regions(
        self,
        components: Components,
        picture: Picture,
        encoded: EncodedImages,
        position: int,
        choice: TextChoice,
        left_out: collections.Counter,
    ) -> list[_Region]:
        """The regions of one picture that have a text and are in view."""
        rng = np.random.default_rng([self.seed, picture.index])
        area = box_area(picture.boxes)
        members = [i for i, e in enumerate(picture.entries) if area[i] > 0 and choice.offers(e)]
        if self.max_regions is not None and len(members) > self.max_regions:
            left_out["regions beyond max_regions"] += len(members) - self.max_regions
            members = sorted(rng.permutation(members)[: self.max_regions].tolist())
        regions = []
        for i in members:
            shown = picture.shown([i], encoded.shown[position]) if self.kind != "box" else None
            if self.kind == "mask" and (shown is None or not shown.any()):
                left_out["regions without a mask"] += 1
                continue
            prompt = self._prompt(picture.boxes[i], shown, rng)
            if not _in_view(components, encoded, position, prompt):
                left_out["regions out of view"] += 1
                continue
            references = tuple(choice.for_evaluation(picture.entries[i]))
            asked = self.length
            if asked == "reference":
                controls = components.config.data.controls
                # Of exact lengths the last one stands for more, and more cannot be asked for.
                most = controls.length_values[-1] if isinstance(controls.lengths, int) else np.inf
                tokenizer = components.config.data.regions.tokenizer(components.tokenizer)
                asked = int(min(num_words(tokenizer.as_shown(references[0])), most))
            regions.append(_Region(i, prompt, picture.entries[i]["name"], references, asked))
        return regions

    def _prompt(
        self, box: Float[np.ndarray, " 4"], shown: Bool[np.ndarray, "h w"] | None, rng: np.random.Generator
    ) -> dict[str, Any]:
        if self.kind == "mask":
            return {"mask": shown}
        size = box[2:] - box[:2]
        moved = rng.uniform(-1, 1, 4) * self.jitter * np.tile(size, 2)
        if self.kind == "box":
            return {"box": np.clip(box + moved, 0, 1).tolist()}
        point = np.clip((box[:2] + box[2:]) / 2 + moved[:2], 0, 1)
        if shown is not None and shown.any():
            y, x = np.nonzero(shown)
            pixels = (np.stack([x, y], 1) + 0.5) / shown.shape[::-1]
            point = pixels[np.square(pixels - point).sum(1).argmin()]
        return {"point": point.tolist()}

    def _score(self, rows: Sequence[dict[str, Any]], tokenizer: Tokenizer, scores: RegionScores) -> None:
        texts = [row["text"] for row in rows]
        # As the tokenizer gives it back, so that what it takes apart is no error of the model.
        words = [tokenize(text) for text in texts]
        shown = lambda text: tuple(tokenize(tokenizer.as_shown(text)))  # noqa: E731
        names = list(dict.fromkeys([row["name"] for row in rows] + list(self.name_words)))
        spoken = {name: {shown(w) for w in (name, *self.name_words.get(name, ()))} for name in names}
        true = np.array([names.index(row["name"]) for row in rows])
        first = [first_name(own, spoken) for own in words]
        predicted = np.array([-1 if name is None else names.index(name) for name in first])
        held = [
            any(_holds(own, form) for form in spoken[row["name"]])
            for own, row in zip(words, rows, strict=True)
        ]
        scores.mean("name_accuracy", predicted == true)
        scores.mean("name_stated", np.array(held))
        scores.of_rows("name_balanced_accuracy", lambda r: balanced_accuracy(predicted[r], true[r]))
        for n in np.unique(true):
            scores.found.add(f"recall/{names[n]}", float((predicted == true)[true == n].mean()))
        for row, name in zip(rows, first, strict=True):
            row["named"] = name
        for group, members in self.word_groups.items():
            known, stated = [], []
            for own, row in zip(words, rows, strict=True):
                forms = {word for text in row["references"] for word in tokenize(text)} & set(members)
                said = set(own) & set(members)
                known.append(float(said == forms) if len(forms) == 1 else np.nan)
                stated.append(float(bool(said)) if len(forms) == 1 else np.nan)
            scores.mean(f"word_accuracy/{group}", np.array(known))
            scores.mean(f"word_stated/{group}", np.array(stated))
        references = [[tokenize(text) for text in row["references"]] for row in rows]
        scores.mean("rouge_l", rouge_l(words, references))
        scores.mean("mean_length", np.array([num_words(text) for text in texts]))
        if self.length is not None:
            asked = np.array([row["asked_length"] for row in rows], np.float64)
            scores.mean("length_within_1", length_obeyed(asked, texts))
            scores.mean("length_exact", length_obeyed(asked, texts, tolerance=0))

    def _dense(
        self,
        components: Components,
        pictures: Sequence[Picture],
        encoded: EncodedImages,
        choice: TextChoice,
        batch_size: int,
    ) -> list[dict[str, Any]]:
        """Detected boxes, their scores and texts, and the true ones, of each picture."""
        record_set = self.opened()
        entries = (e for i in range(len(record_set)) for e in region_entries(record_set.describe(i)))
        detected: list[Detections] = detect(
            components,
            [picture.record["image"] for picture in pictures],
            sorted({entry["name"] for entry in entries}),
            threshold=self.dense_threshold,
            batch_size=batch_size,
        )
        found = []
        for i, (picture, one) in enumerate(zip(pictures, detected, strict=True)):
            prompts = [{"box": box.tolist()} for box in one.boxes]
            kept = [k for k, prompt in enumerate(prompts) if _in_view(components, encoded, i, prompt)]
            true = np.flatnonzero(box_area(picture.boxes) > 0)
            found.append(
                {
                    "index": picture.index,
                    "prompts": [prompts[k] for k in kept],
                    "ious": pairwise_iou(one.boxes[kept], picture.boxes[true]),
                    "scores": one.scores[kept],
                    "references": [
                        choice.first(picture.entries[k]) or picture.entries[k]["name"] for k in true
                    ],
                }
            )
        asked = (
            None if not isinstance(self.length, int) else [[self.length] * len(d["prompts"]) for d in found]
        )
        texts = self._write(components, encoded, [d["prompts"] for d in found], asked)
        return [{**d, "texts": own} for d, own in zip(found, texts, strict=True)]


def first_name(words: Sequence[str], spoken: Mapping[str, set[tuple[str, ...]]]) -> str | None:
    """The name of which a form comes first among the words; of several at one place that of the longest form."""
    for start in range(len(words)):
        here = [
            (len(form), name)
            for name, forms in spoken.items()
            for form in forms
            if form and tuple(words[start : start + len(form)]) == form
        ]
        if here:
            longest = max(length for length, _ in here)
            return next(name for length, name in here if length == longest)
    return None


def _holds(words: Sequence[str], form: tuple[str, ...]) -> bool:
    return bool(form) and any(
        tuple(words[start : start + len(form)]) == form for start in range(len(words) - len(form) + 1)
    )


def _row(picture: Picture, region: _Region, text: str) -> dict[str, Any]:
    pointed = {k: v for k, v in region.prompt.items() if k != "mask"}
    return {
        "index": picture.index,
        "name": region.name,
        "true_box": picture.boxes[region.member].tolist(),
        **pointed,
        "text": text,
        "references": list(region.references),
        "asked_length": region.asked,
    }


def _in_view(
    components: Components, encoded: EncodedImages, position: int, prompt: Mapping[str, Any]
) -> bool:
    """Whether the model can be shown the region: it may lie in what is cut off, or a moved box be without area.

    Raises UserError for a region that no model can be shown.
    """
    grid = components.config.data.regions.grid(components.preprocess.height_width)
    size = encoded.sizes[position]
    if "box" in prompt:
        if not box_area([prompt["box"]])[0] > 0:
            return False
        check_boxes([prompt["box"]])
    elif "point" in prompt:
        check_points([prompt["point"]])
    else:
        check_masks([prompt["mask"]], size)
    try:
        # Whatever else there is to refuse is refused above.
        prompts_of(encoded.shown[position], image_size=size, mask_size=grid, regions=[prompt])
    except UserError:
        return False
    return True


def _swapped(value: Any, swap: Mapping[str, str]) -> Any:
    """Strings, in whatever holds them, with whole words put in the place of others, in capitals where those are."""
    if isinstance(value, str):
        return re.sub(r"\w+", lambda found: _in_case_of(found[0], swap), value)
    if isinstance(value, Mapping):
        return {key: _swapped(item, swap) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_swapped(item, swap) for item in value]
    return value


def _in_case_of(word: str, swap: Mapping[str, str]) -> str:
    if word in swap or word.lower() not in swap:
        return swap.get(word, word)
    other = swap[word.lower()]
    return other.upper() if word.isupper() else other.capitalize() if word[0].isupper() else other


def _score_dense(dense: Sequence[dict[str, Any]], scores: RegionScores) -> None:
    matches = match_dense_captions(
        [d["ious"] for d in dense],
        [d["scores"] for d in dense],
        [d["texts"] for d in dense],
        [d["references"] for d in dense],
        text_score=lambda text, reference: float(rouge_l([tokenize(text)], [[tokenize(reference)]])[0]),
    )
    scores.of_rows("dense_caption_map", lambda rows: dense_caption_map(matches, rows))
