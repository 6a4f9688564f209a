"""Finding regions: phrases, masks, objects and heat maps, in coordinates of the original image."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bvl.convert.torch_format.source.errors import UserError, logger
from bvl.convert.torch_format.source.images import Shown
from bvl.convert.torch_format.source.layers import sigmoid
from bvl.convert.torch_format.source.text import encode_phrases, read_mark

if TYPE_CHECKING:
    from bvl.convert.torch_format.source.model import Model


@dataclasses.dataclass(frozen=True)
class Grounded:
    """Where the phrases of one image are: boxes [k, 4] in fractions of the original image.

    scores: the model's probability that each is there. p_values: how often a phrase that is not there scores as high,
    by calibration.json; NaN without one. found: p_value <= alpha, or, without a calibration that alpha can be told by,
    scores >= 0.5.
    """

    boxes: np.ndarray
    scores: np.ndarray
    p_values: np.ndarray
    found: np.ndarray


@dataclasses.dataclass(frozen=True)
class Detections:
    """The objects of one image, best first: boxes [n, 4] in fractions of the original image, names, scores.

    masks [n, h, w]: probabilities at the original's size, of a model with instance masks, else None.
    """

    boxes: np.ndarray
    names: list[str]
    scores: np.ndarray
    masks: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class LocatedImage:
    """What the model gives for the phrases of one image: best boxes (of the original), presence and mask logits."""

    boxes: np.ndarray
    presence: np.ndarray
    mask_logits: np.ndarray
    shown: Shown


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of every box of a [..., n, 4] with every box of b [..., m, 4]; 0 where both have no area."""

    def area(low: Tensor, high: Tensor) -> Tensor:
        return (high - low).clamp(min=0.0).prod(-1)

    a, b = a[..., :, None, :], b[..., None, :, :]
    inter = area(torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:]))
    union = area(a[..., :2], a[..., 2:]) + area(b[..., :2], b[..., 2:]) - inter
    return inter / union.clamp(min=1e-12)


def vote_box(boxes: Tensor, scores: Tensor) -> Tensor:
    """The best candidate's box [..., 4] of [..., q, 4], averaged by score (logits) with those that overlap it by half."""
    index = scores.argmax(-1)[..., None, None].expand(*scores.shape[:-1], 1, 4)
    best = boxes.gather(-2, index)
    weights = torch.where(box_iou(best, boxes)[..., 0, :] > 0.5, scores.sigmoid(), 0.0)
    # The best one itself counts even where its box has no area.
    weights = torch.maximum(weights, 1e-6 * (scores == scores.amax(-1, keepdim=True)).float())
    return torch.einsum("...q,...qd->...d", weights, boxes) / weights.sum(-1, keepdim=True)


def locate(model: Model, images: list[Any], phrases: Any, batch_size: int) -> Iterator[LocatedImage]:
    """What the model gives for the phrases of each image, in order; each image is encoded once."""
    lists = phrase_lists(model, phrases, len(images))
    task = model.need_task("ground")
    for start in range(0, len(images), batch_size):
        rows = lists[start : start + batch_size]
        shown, features = model.features(
            images[start : start + batch_size], levels=model.config["reads_levels"]
        )
        for i, names in enumerate(rows):
            one = features_of(features, i)
            tokens, mask, marks = (
                torch.from_numpy(np.asarray(x)).to(model.device)
                for x in encode_phrases(model.tokenizer, names)
            )
            if task["phrases"] == "text":
                text = model.encode_text(tokens, mask)
                vector, words = text.pooled, text.tokens
            else:
                words = model.decode(repeat_rows(one, len(names)), tokens, mask)
                vector = words[torch.arange(len(names), device=model.device), marks]
            found = model.ground_phrases(one, vector[None], words[None], mask[None])
            boxes = vote_box(found.boxes, found.scores)[0].cpu().numpy()
            yield LocatedImage(
                boxes=shown[i].boxes_to_original(boxes).astype(np.float32),
                presence=found.presence[0].cpu().numpy(),
                mask_logits=found.mask_logits[0].cpu().numpy(),
                shown=shown[i],
            )


def features_of(features: Any, i: int) -> Any:
    """The features of one image, as a batch of one."""
    changes = {name: getattr(features, name)[i : i + 1] for name in ("pooled", "tokens")}
    if features.levels is not None:
        changes["levels"] = tuple(level[i : i + 1] for level in features.levels)
    return dataclasses.replace(features, **changes)


def repeat_rows(features: Any, count: int) -> Any:
    """The features of one image `count` times; of its tokens alone, which are all that the decoder reads."""
    return dataclasses.replace(features, tokens=features.tokens.expand(count, -1, -1))


def judge_presence(
    presence: np.ndarray, negatives: Sequence[float] | None, alpha: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(scores, p_values, found), as `Grounded` has them, of presence logits.

    negatives: presence logits of held-out phrases that were absent. p = (1 + how many of m are at least as high) / (1 + m):
    of absent phrases the share alpha at most is found (conformal p-values).
    """
    scores = sigmoid(presence).astype(np.float32)
    p_values = np.full(len(scores), np.nan, np.float32)
    if not negatives:
        return scores, p_values, scores >= 0.5
    ordered = np.sort(np.asarray(negatives, np.float64))
    reached = len(ordered) - np.searchsorted(ordered, presence.astype(np.float64), side="left")
    p_values = ((1 + reached) / (1 + len(ordered))).astype(np.float32)
    least = math.ceil(1 / alpha - 1e-9) - 1
    if len(ordered) < least:
        logger.warning(
            "alpha=%g needs a calibration of at least %d absent phrases, and calibration.json has %d: what scores 0.5 or "
            "more counts as found",
            alpha,
            least,
            len(ordered),
        )
        return scores, p_values, scores >= 0.5
    return scores, p_values, p_values <= alpha


def detect_objects(
    model: Model,
    images: list[Any],
    names: list[str],
    *,
    threshold: float,
    iou_threshold: float,
    max_detections: int,
    batch_size: int,
) -> Iterator[Detections]:
    """The objects of each image that go by one of `names`, best first."""
    embeddings = torch.from_numpy(model.embed_texts(names)).to(model.device)
    for start in range(0, len(images), batch_size):
        shown, features = model.features(
            images[start : start + batch_size], levels=model.config["reads_levels"]
        )
        found = model.region_decoder.detect(features)
        fits = model.region_decoder.detection_logits(found.embed, embeddings).sigmoid()
        scores = (fits * found.presence.sigmoid()[..., None]).sqrt().cpu().numpy()
        boxes = found.boxes.cpu().numpy()
        for i, one in enumerate(shown):
            original = one.boxes_to_original(boxes[i])
            # Boxes on the padding have no place on the image.
            there = (original[:, 2:] > original[:, :2]).all(axis=1)
            picked = []
            for n in range(len(names)):
                candidates = np.flatnonzero(there & (scores[i, :, n] >= threshold))
                kept = non_maximum_suppression(original[candidates], scores[i, candidates, n], iou_threshold)
                picked += [(float(scores[i, q, n]), int(q), n) for q in candidates[kept]]
            picked = sorted(picked, key=lambda item: (-item[0], item[1], item[2]))[:max_detections]
            chosen = [q for _, q, _ in picked]
            masks = None
            if found.mask_logits is not None:
                logits = found.mask_logits[i].cpu().numpy()[chosen]
                masks = sigmoid(one.to_original_pixels(logits, outside=-np.inf))
            yield Detections(
                boxes=original[chosen].astype(np.float32),
                names=[names[n] for _, _, n in picked],
                scores=np.array([score for score, _, _ in picked], np.float32),
                masks=masks,
            )


def non_maximum_suppression(boxes: np.ndarray, scores: np.ndarray, iou_threshold: float) -> np.ndarray:
    """Indices of the boxes that stay, best score first: a kept box removes all worse ones above the threshold."""
    iou = box_iou(torch.from_numpy(boxes), torch.from_numpy(boxes)).numpy()
    left, kept = np.argsort(-scores.astype(np.float64), kind="stable"), []
    while len(left):
        best, left = left[0], left[1:]
        kept.append(best)
        left = left[iou[best, left] <= iou_threshold]
    return np.array(kept, np.int64)


def smooth(maps: np.ndarray, sigma: float) -> np.ndarray:
    """Maps [k, h, w] under a Gaussian of `sigma` cells, cut off at four of them; the border goes on unchanged."""
    if not sigma:
        return maps
    radius = int(4 * sigma + 0.5)
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    weights /= weights.sum()
    for axis in (1, 2):
        around = [(0, 0), (0, 0), (0, 0)]
        around[axis] = (radius, radius)
        wide = np.pad(maps.astype(np.float64), around, mode="edge")
        windows = np.lib.stride_tricks.sliding_window_view(wide, 2 * radius + 1, axis=axis)
        maps = (windows @ weights).astype(np.float32)
    return maps


def phrase_lists(model: Model, phrases: Any, count: int) -> list[list[str]]:
    """The phrases of each image; UserError for an empty one and for one beyond the context."""
    if isinstance(phrases, str):
        raise UserError("phrases is one text; give a list of phrases")
    phrases = list(phrases)
    shared = all(isinstance(phrase, str) for phrase in phrases)
    lists = [phrases] * count if shared else [[row] if isinstance(row, str) else list(row) for row in phrases]
    if len(lists) != count:
        raise UserError(f"{len(lists)} lists of phrases for {count} images; give one list, or one an image")
    for i, row in enumerate(lists):
        if not row:
            raise UserError(f"no phrases for image {i}: give at least one")
        for phrase in row:
            if not isinstance(phrase, str) or not phrase.strip():
                raise UserError(f"phrase {phrase!r} of image {i}: give a text that is not empty")
            length, room = len(model.tokenizer.ids(read_mark(phrase)[0])), model.tokenizer.room
            if length > room:
                raise UserError(
                    f"the phrase {phrase[:40]!r}... has {length} tokens; this model reads up to {room}: shorten it"
                )
    return lists
