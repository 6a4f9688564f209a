"""Finding regions by a trained model: phrases, masks, objects and heat maps, in coordinates of the original image."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.ndimage
from einops import rearrange
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from bvl.config import Config
from bvl.data.images import open_image
from bvl.data.phrases import encode_phrases, read_mark
from bvl.data.resample import to_original_pixels
from bvl.data.transforms import Transformed, boxes_to_original
from bvl.errors import ConfigError, UserError
from bvl.losses.boxes import box_iou
from bvl.mesh import replicated
from bvl.metrics.boxes import non_maximum_suppression
from bvl.metrics.presence import conformal_p_values
from bvl.models.features import ImageFeatures, Located
from bvl.models.vlm import DualEncoder
from bvl.runs import Components
from bvl.tasks.captioning import name_of, task_of
from bvl.tasks.contrastive import embed_texts, has_contrastive
from bvl.tasks.detection import Detection
from bvl.tasks.grounding import Grounding, phrases_by_decoder
from bvl.tasks.mosaic import Mosaic

logger = logging.getLogger(__name__)

# Phrases of an image that are looked for at a time: one compiled program for any number.
PHRASES_AT_ONCE = 8


@dataclasses.dataclass(frozen=True)
class Grounded:
    """Where the phrases of one image are.

    boxes: the box of each, fractions of the original image. scores: the model's probability that it is there.
    p_values: how often a phrase that is not there scores as high, by the run's calibration; NaN without one.
    found: p_value <= alpha, or, without a calibration that alpha can be told by, scores >= 0.5.
    """

    boxes: Float[np.ndarray, "k 4"]
    scores: Float[np.ndarray, " k"]
    p_values: Float[np.ndarray, " k"]
    found: Bool[np.ndarray, " k"]


@dataclasses.dataclass(frozen=True)
class Detections:
    """The objects of one image, best first; boxes in fractions of the original image.

    masks: probabilities at the original image's size, of a model with instance masks, else None.
    """

    boxes: Float[np.ndarray, "n 4"]
    names: list[str]
    scores: Float[np.ndarray, " n"]
    masks: Float[np.ndarray, "n h w"] | None = None


@dataclasses.dataclass(frozen=True)
class LocatedImage:
    """What the model gives for the phrases of one image: best boxes and presence logits, and the way back.

    boxes: fractions of the original image. mask_logits: on the decoder's grid. size: of the original (height, width).
    """

    boxes: Float[np.ndarray, "k 4"]
    presence: Float[np.ndarray, " k"]
    mask_logits: Float[np.ndarray, "k i j"]
    transformed: Transformed
    size: tuple[int, int]

    def masks(self) -> Float[np.ndarray, "k h w"]:
        """Mask probabilities at the original image's size; 0 where the model did not see it."""
        logits = to_original_pixels(self.mask_logits, self.transformed, self.size, outside=-np.inf)
        return np.asarray(jax.nn.sigmoid(logits))


def grounding_task_of(config: Config) -> Grounding:
    """A config's grounding task; ConfigError, naming what is missing, if it has none."""
    return task_of(
        config,
        Grounding,
        "look for phrases",
        "tasks={..., 'grounding': Grounding()} and model.region_decoder set, as configs/quickstart.py does",
    )


def detection_task_of(config: Config) -> Detection:
    """A config's detection task; ConfigError, naming what is missing, if it has none."""
    return task_of(
        config,
        Detection,
        "detect objects",
        "tasks={..., 'detection': Detection()} and model.region_decoder set, as configs/own_regions.py does",
    )


def finds_boxes(task: Grounding) -> bool:
    """Whether a grounding task trains the boxes of phrases."""
    return bool(task.l1 or task.giou or task.score)


def finds_masks(task: Grounding) -> bool:
    """Whether a grounding task trains the masks of phrases."""
    return bool(task.bce or task.dice)


def check_finds_masks(config: Config) -> None:
    """ConfigError for a run without a grounding task, or with one that trains no masks."""
    task = grounding_task_of(config)
    if not finds_masks(task):
        name = name_of(config, task)
        raise ConfigError(
            f"this run was trained without masks of phrases (tasks.{name}.bce=0 and tasks.{name}.dice=0), so they mean "
            "nothing: train with one of them above 0, on records with masks"
        )


def makes_heat_maps(config: Config) -> bool:
    """Whether some task of a run trains patches and texts in one space."""
    return has_contrastive(config) or any(isinstance(task, Mosaic) for task in config.tasks.values())


def ground(
    components: Components,
    images: Sequence[Any],
    phrases: Sequence[str] | Sequence[Sequence[str]],
    *,
    alpha: float = 0.1,
    batch_size: int = 16,
) -> list[Grounded]:
    """The box of each phrase and whether the image shows what it names.

    phrases: the same for all images, or a list for each. One word may be marked with asterisks ("a *nodule* on the
    left"), which a run with phrases="decoder" reads. alpha: share of absent phrases that may be taken as found.
    Raises ConfigError for a run without a grounding task or with one that trains no boxes, UserError for phrases that
    cannot be used.
    """
    task = grounding_task_of(components.config)
    if not finds_boxes(task):
        fields = ", ".join(f"tasks.{name_of(components.config, task)}.{x}=0" for x in ("l1", "giou", "score"))
        raise ConfigError(
            f"this run was trained without boxes of phrases ({fields}), so they mean nothing: find masks by `segment`, "
            "or train with these weights above 0, on records with boxes"
        )
    judge = presence_judge(components, alpha)
    found = locate(components, images, phrases, batch_size=batch_size)
    return [Grounded(one.boxes, *judge(one.presence)) for one in found]


def presence_judge(
    components: Components, alpha: float
) -> Callable[
    [Float[np.ndarray, " k"]],
    tuple[Float[np.ndarray, " k"], Float[np.ndarray, " k"], Bool[np.ndarray, " k"]],
]:
    """What gives (scores, p_values, found), as `Grounded` has them, of presence logits, by the run's calibration.

    Logs a warning where the calibration has too few negatives for `alpha`. Raises UserError for another alpha.
    """
    if not 0 < alpha < 1:
        raise UserError(f"alpha={alpha}: the share of absent phrases that may be found must lie in 0..1")
    negatives = calibrated_negatives(components)
    enough = bool(negatives) and len(negatives) >= least_negatives(alpha)
    if negatives and not enough:
        logger.warning(
            "alpha=%g needs a calibration of at least %d absent phrases, and calibration.json has %d: what scores 0.5 or "
            "more counts as found; calibrate on more with `bvl eval RUN --data DIR --calibrate`, or raise alpha",
            alpha,
            least_negatives(alpha),
            len(negatives),
        )

    def judge(presence: Float[np.ndarray, " k"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        scores = np.asarray(jax.nn.sigmoid(presence), np.float32)
        p_values = np.full(len(scores), np.nan, np.float32)
        if negatives:
            p_values = conformal_p_values(presence, np.asarray(negatives)).astype(np.float32)
        return scores, p_values, p_values <= alpha if enough else scores >= 0.5

    return judge


def least_negatives(alpha: float) -> int:
    """How many negatives a calibration needs so that some p-value is at most alpha: 1 / (1 + m) is the smallest."""
    return math.ceil(1 / alpha - 1e-9) - 1


def calibrated_negatives(components: Components) -> list[float] | None:
    """Presence logits of the run's calibration, where it is of these weights."""
    calibration = components.calibration
    if calibration is None:
        return None
    if calibration.get("weights_hash") != components.weights_hash():
        logger.warning(
            "calibration.json is of other weights than these, so it is not used: calibrate again with "
            "`bvl eval RUN --data DIR --calibrate`"
        )
        return None
    return calibration["negatives"]


def segment(
    components: Components,
    images: Sequence[Any],
    phrases: Sequence[str] | Sequence[Sequence[str]],
    *,
    batch_size: int = 16,
) -> list[Float[np.ndarray, "k h w"]]:
    """For each image the probability of every pixel of the original to belong to what each phrase names.

    Arguments and errors are those of `ground`, but for ConfigError for a run whose task trains no masks.
    """
    check_finds_masks(components.config)
    return [found.masks() for found in locate(components, images, phrases, batch_size=batch_size)]


def locate(
    components: Components,
    images: Sequence[Any],
    phrases: Sequence[str] | Sequence[Sequence[str]],
    *,
    batch_size: int = 16,
) -> Iterator[LocatedImage]:
    """What the model gives for the phrases of each image, in order; each image is encoded once."""
    task = grounding_task_of(components.config)
    images = _checked_images(images, batch_size)
    lists = _phrase_lists(components, phrases, len(images))
    distinct = list(dict.fromkeys(phrase for row in lists for phrase in row))
    place = {phrase: i for i, phrase in enumerate(distinct)}
    tokens, mask, marks = encode_phrases(components.tokenizer, distinct)
    arrays = {"tokens": tokens, "mask": mask, "marks": marks}
    if task.phrases == "text":
        texts = [read_mark(phrase)[0] for phrase in distinct]
        encoded = list(components.encode_texts(texts, frozenset({"pooled", "tokens"})))
        arrays["vectors"] = np.concatenate([np.asarray(x.pooled) for x in encoded])
        arrays["words"] = np.concatenate([np.asarray(x.tokens) for x in encoded])
    row = 0
    for transformed, sizes, features in encode_regions(components, images, batch_size):
        count = len(transformed)
        wanted = lists[row : row + count]
        row += count
        chunks = []
        for start in range(0, max(map(len, wanted)), PHRASES_AT_ONCE):
            index = np.zeros((count, PHRASES_AT_ONCE), np.int64)
            for i, names in enumerate(wanted):
                part = [place[name] for name in names[start : start + PHRASES_AT_ONCE]]
                index[i, : len(part)] = part
            chunks.append(
                _ground(
                    components.params["model"],
                    *_filled((features.tokens, features.levels), batch_size),
                    _filled({name: array[index] for name, array in arrays.items()}, batch_size),
                    grid=features.grid,
                    model=components.model,
                    mesh=components.encoder.mesh,
                )
            )
        boxes, presence, masks = (
            np.concatenate([np.asarray(part) for part in parts], axis=1)
            for parts in zip(*chunks, strict=True)
        )
        for i, names in enumerate(wanted):
            k = len(names)
            yield LocatedImage(
                boxes=boxes_to_original(boxes[i, :k], transformed[i]).astype(np.float32),
                presence=presence[i, :k],
                mask_logits=masks[i, :k],
                transformed=transformed[i],
                size=sizes[i],
            )


def detect(
    components: Components,
    images: Sequence[Any],
    names: Sequence[str],
    *,
    threshold: float = 0.3,
    iou_threshold: float = 0.5,
    max_detections: int = 100,
    batch_size: int = 16,
) -> list[Detections]:
    """The objects of each image that go by one of `names`, best first.

    threshold: least score, the geometric mean of the probabilities that there is an object and that the name fits.
    iou_threshold: of two boxes of one name that overlap more the better one stays.
    A name that is given twice counts once. Raises ConfigError for a run without a detection task, UserError for names
    that cannot be used.
    """
    detection_task_of(components.config)
    images = _checked_images(images, batch_size)
    if isinstance(names, str):
        raise UserError("names is one text; give a list of names")
    (names,) = _phrase_lists(components, names, 1)
    # A mark is for phrases that the text decoder reads.
    names = list(dict.fromkeys(read_mark(name)[0] for name in names))
    embeddings = embed_texts(components, names)
    out = []
    for transformed, sizes, features in encode_regions(components, images, batch_size):
        boxes, scores, masks = _detect(
            components.params["model"],
            *_filled((features.tokens, features.levels), batch_size),
            embeddings,
            grid=features.grid,
            model=components.model,
            mesh=components.encoder.mesh,
        )
        boxes, scores = np.asarray(boxes), np.asarray(scores)
        for i, one in enumerate(transformed):
            original = boxes_to_original(boxes[i], one)
            # Boxes on the padding have no place on the image.
            there = (original[:, 2:] > original[:, :2]).all(axis=1)
            picked = []
            for n in range(len(names)):
                candidates = np.flatnonzero(there & (scores[i, :, n] >= threshold))
                kept = non_maximum_suppression(
                    original[candidates], scores[i, candidates, n], iou_threshold=iou_threshold
                )
                picked += [(float(scores[i, q, n]), int(q), n) for q in candidates[kept]]
            picked = sorted(picked, key=lambda item: (-item[0], item[1], item[2]))[:max_detections]
            chosen = [q for _, q, _ in picked]
            own_masks = None
            if masks is not None:
                logits = to_original_pixels(np.asarray(masks[i])[chosen], one, sizes[i], outside=-np.inf)
                own_masks = np.asarray(jax.nn.sigmoid(logits))
            out.append(
                Detections(
                    boxes=original[chosen].astype(np.float32),
                    names=[names[n] for _, _, n in picked],
                    scores=np.array([score for score, _, _ in picked], np.float32),
                    masks=own_masks,
                )
            )
    return out


def heat_maps(
    components: Components,
    images: Sequence[Any],
    phrases: Sequence[str] | Sequence[Sequence[str]],
    *,
    against: Sequence[str] | Sequence[Sequence[str]] | None = None,
    sigma: float = 0.5,
    batch_size: int = 16,
) -> list[Float[np.ndarray, "k h w"]]:
    """For each image the likeness of every pixel's patch to each phrase, by a contrastive model without boxes.

    against: for each phrase another one, such as its denial, whose likeness is taken off: what both share, as the kind of
      image, then tells no place from another.
    The cosines of patch and text embeddings, smoothed by a Gaussian of `sigma` patches and interpolated (BioViL:
    Boecking et al. 2022, arXiv:2204.09817, section 4.2); NaN where the model did not see the original image.
    Raises ConfigError for a run without a contrastive task, UserError for phrases that cannot be used.
    """
    if not makes_heat_maps(components.config):
        raise ConfigError(
            "heat maps compare patches with texts, which no task of this run has trained; train one with "
            "tasks={..., 'contrastive': Contrastive()}"
        )
    if sigma < 0:
        raise UserError(f"sigma={sigma}: must not be negative")
    images = _checked_images(images, batch_size)
    lists = [
        [read_mark(phrase)[0] for phrase in row] for row in _phrase_lists(components, phrases, len(images))
    ]
    others = lists if against is None else _phrase_lists(components, against, len(images))
    if any(len(a) != len(b) for a, b in zip(lists, others, strict=True)):
        raise UserError("against: give one phrase for each of the phrases")
    distinct = list(dict.fromkeys(phrase for row in (*lists, *others) for phrase in row))
    embeddings = dict(zip(distinct, embed_texts(components, distinct), strict=True))
    out = []
    for transformed, sizes, features in encode_regions(components, images, batch_size, "patch_embed"):
        for i, one in enumerate(transformed):
            text = np.stack([embeddings[phrase] for phrase in lists[len(out)]])
            if against is not None:
                text = text - np.stack([embeddings[phrase] for phrase in others[len(out)]])
            cosines = rearrange(features.patch_embed[i] @ text.T, "(h w) k -> k h w", h=features.grid[0])
            smooth = scipy.ndimage.gaussian_filter(cosines, (0, sigma, sigma), mode="nearest")
            out.append(to_original_pixels(smooth, one, sizes[i], outside=np.nan))
    return out


def encode_regions(
    components: Components, images: Sequence[Any], batch_size: int, need: str = "regions"
) -> Iterator[tuple[list[Transformed], list[tuple[int, int]], ImageFeatures]]:
    """(transformed images, original sizes (height, width), features) of up to batch_size images at a time."""
    for start in range(0, len(images), batch_size):
        opened = [open_image(image) for image in images[start : start + batch_size]]
        transformed = [components.transform(image) for image in opened]
        pixels = [one.image for one in transformed]
        (features,) = components.encode_images(pixels, frozenset({need}), batch_size)
        yield transformed, [(image.height, image.width) for image in opened], features


@functools.partial(jax.jit, static_argnames=("grid", "model", "mesh"))
def _ground(
    params: Any,
    tokens: Float[Array, "b l d"],
    levels: tuple[Float[Array, "b h w c"], ...] | None,
    phrases: dict[str, Array],
    *,
    grid: tuple[int, int],
    model: DualEncoder,
    mesh: Mesh,
) -> tuple[Float[Array, "b p 4"], Float[Array, "b p"], Float[Array, "b p h w"]]:
    """(best box, presence logit, mask logits) of each phrase, compiled."""
    apply = functools.partial(model.apply, {"params": params})
    if "vectors" in phrases:
        vectors, words = phrases["vectors"], phrases["words"]
    else:
        vectors, words = phrases_by_decoder(
            apply, tokens, phrases["tokens"], phrases["mask"], phrases["marks"]
        )
    found: Located = apply(tokens, levels, grid, vectors, words, phrases["mask"], method="ground")
    boxes = vote_box(found.boxes, found.scores)
    return jax.lax.with_sharding_constraint((boxes, found.presence, found.mask_logits), replicated(mesh))


def vote_box(boxes: Float[Array, "*n q 4"], scores: Float[Array, "*n q"]) -> Float[Array, "*n 4"]:
    """The best candidate's box, averaged by score with those that overlap it by half (Gidaris & Komodakis 2015, section 5).

    scores: logits. Neighbouring candidates see the same thing, and the errors of their boxes cancel out in part.
    """
    best = jnp.take_along_axis(boxes, scores.argmax(-1)[..., None, None], axis=-2)
    weights = jnp.where(box_iou(best, boxes)[..., 0, :] > 0.5, jax.nn.sigmoid(scores), 0.0)
    # The best one itself counts even where its box has no area.
    weights = jnp.maximum(weights, 1e-6 * (scores == scores.max(-1, keepdims=True)))
    return jnp.einsum("...q,...qd->...d", weights, boxes) / weights.sum(-1, keepdims=True)


@functools.partial(jax.jit, static_argnames=("grid", "model", "mesh"))
def _detect(
    params: Any,
    tokens: Float[Array, "b l d"],
    levels: tuple[Float[Array, "b h w c"], ...] | None,
    names: Float[Array, "n e"],
    *,
    grid: tuple[int, int],
    model: DualEncoder,
    mesh: Mesh,
) -> tuple[Float[Array, "b q 4"], Float[Array, "b q n"], Float[Array, "b q h w"] | None]:
    """(boxes, scores by name, mask logits) of the candidates, compiled."""
    apply = functools.partial(model.apply, {"params": params})
    found: Located = apply(tokens, levels, grid, method="detect")
    names = jnp.broadcast_to(names, (len(tokens), *names.shape))
    fits = jax.nn.sigmoid(apply(found.embed, names, method="detection_logits"))
    scores = jnp.sqrt(fits * jax.nn.sigmoid(found.presence)[..., None])
    return jax.lax.with_sharding_constraint((found.boxes, scores, found.mask_logits), replicated(mesh))


def _filled(arrays: Any, rows: int) -> Any:
    """Arrays with as many rows as every batch has; the further ones repeat the first."""

    def fill(x: np.ndarray) -> np.ndarray:
        x = np.asarray(x)
        return x[np.concatenate([np.arange(len(x)), np.zeros(rows - len(x), np.int64)])]

    return jax.tree.map(fill, arrays)


def _checked_images(images: Sequence[Any], batch_size: int) -> list[Any]:
    images = list(images)
    if not images:
        raise UserError("no images: give at least one")
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size}: must be at least 1")
    return images


def _phrase_lists(
    components: Components, phrases: Sequence[str] | Sequence[Sequence[str]], count: int
) -> list[list[str]]:
    """The phrases of each image; UserError for an empty one and for one beyond the text tower's context."""
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
    distinct = list(dict.fromkeys(phrase for row in lists for phrase in row))
    longest = components.tokenizer.room
    texts = [read_mark(phrase)[0] for phrase in distinct]
    for phrase, length in zip(distinct, components.tokenizer.lengths(texts), strict=True):
        if length > longest:
            raise UserError(
                f"the phrase {phrase[:40]!r}... has {length} tokens; this run reads up to {longest} "
                "(data.tokenizer.context_length): shorten it"
            )
    return lists
