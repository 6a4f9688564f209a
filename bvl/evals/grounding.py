"""Phrases found in images: boxes, masks, and whether what a phrase names is there at all."""

from __future__ import annotations

import collections
import dataclasses
import logging
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from bvl.config import Config
from bvl.data.geometry import box_area
from bvl.data.phrases import entry_phrases, read_mark
from bvl.data.regions import entry_boxes, region_entries
from bvl.data.sources import RecordSet, Source
from bvl.data.text_choice import TextChoice, text_id
from bvl.errors import ConfigError
from bvl.evals.base import Cache, Collector, EvalResult, Suite, provenance
from bvl.evals.regions import (
    REGION_BATCH,
    Phrase,
    Picture,
    RegionScores,
    by_record,
    check_wanted,
    groups_of,
    instance_ious,
    is_held_out,
    nearest_iou,
    phrases_to_find,
    read_pictures,
    with_regions,
)
from bvl.metrics.boxes import hits_at
from bvl.metrics.classification import auroc
from bvl.metrics.detection import average_precision, match_detections
from bvl.metrics.masks import dice, instances_of
from bvl.metrics.presence import area_under_risk_coverage, conformal_p_values, false_found_rate_at
from bvl.runs import Components
from bvl.tasks.locating import (
    LocatedImage,
    calibrated_negatives,
    finds_boxes,
    finds_masks,
    grounding_task_of,
    least_negatives,
    locate,
)

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhraseGrounding(Suite):
    """Phrases looked for in images by the run's grounding task.

    Of phrases that are there: acc_at_50, acc_at_75 and miou take the IoU of the one best box with the NEAREST true box
    of the phrase, which matters where a phrase names several objects. Where records have masks, dice compares the
    mask above 0.5 with the union of what the phrase names, at the original size, and is a mean over phrases; where
    those masks hold ids of instances, instance_ap50 takes the connected parts of the predicted mask, scored by their
    mean probability.

    Of these and of phrases known to be absent (see `bvl.data.phrases.known_absent`): false_found_rate_at_90 is the
    share of absent ones found at the threshold that finds 90 % of those there; presence_auroc; aurc_at_50 is the area
    under the risk-coverage curve, where an answer is right if the phrase is there and its box has an IoU of 0.5;
    conformal_found_rate and conformal_false_found_rate are the shares of phrases there and absent with a p-value of at
    most `alpha`. What needs boxes is left out of a run whose grounding was trained without them, and what needs masks
    likewise.

    phrases: see `PhraseLists`. max_images: so many images, drawn by `seed`; None = all.
    by: a field of the records, or "phrase": dice, miou and acc_at_50 are given for each of its values too.
    baseline: source of training records; mean_box_<metric> are the metrics of the mean box of each phrase there,
      instead of the model's; a phrase that is not there has an IoU of 0.
    calibrate: which absent phrases become the held-out negatives of p-values: of "half" the groups, and the conformal
      rates are of the other half; of "all", and there are no rates; "none", and the rates are by the run's own
      calibration, if it has one that was not made of these records. Fewer negatives than `alpha` can be told by, which
      are ceil(1 / alpha) - 1, make no calibration and give no rates.
    min_area: pixels of the original that a part of a mask needs to be an instance.
    """

    source: Source
    phrases: str | dict[str, float] | tuple[str, ...] | None = None
    max_images: int | None = None
    seed: int = 0
    by: str | None = None
    baseline: Source | None = None
    calibrate: Literal["half", "all", "none"] = "half"
    alpha: float = 0.1
    min_area: int = 16
    region_batch_size: int = REGION_BATCH

    def __post_init__(self):
        check_wanted(self.phrases)
        if self.calibrate not in ("half", "all", "none"):
            raise ConfigError(f"calibrate={self.calibrate!r}: choose half, all or none")
        if not 0 < self.alpha < 1:
            raise ConfigError(f"alpha={self.alpha}: must lie between 0 and 1")
        if self.max_images is not None and self.max_images < 1:
            raise ConfigError(f"max_images={self.max_images}: must be at least 1")
        for name in ("min_area", "region_batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least 1")

    def check_config(self, config: Config) -> None:
        grounding_task_of(config)

    def check_records(self) -> None:
        with_regions(self.opened())

    def run(self, components: Components, *, batch_size: int, cache: Cache | None = None) -> EvalResult:
        self.check_config(components.config)
        record_set = self.opened()
        lists, left_out = phrases_to_find(
            record_set, components, self.phrases, max_images=self.max_images, seed=self.seed
        )
        task = grounding_task_of(components.config)
        indices, unreadable = list(lists), []
        found = _Found(boxes=finds_boxes(task), masks=finds_masks(task))
        batch_size = min(self.region_batch_size, batch_size, len(indices))
        parts = read_pictures(record_set, indices, masks=True, batch_size=batch_size, unreadable=unreadable)
        for pictures in parts:
            wanted = [lists[picture.index] for picture in pictures]
            images = [picture.record["image"] for picture in pictures]
            texts = [[phrase.text for phrase in phrases] for phrases in wanted]
            located = locate(components, images, texts, batch_size=batch_size)
            for picture, phrases, one in zip(pictures, wanted, located, strict=True):
                found.add(picture, phrases, one, min_area=self.min_area, by=self.by)
        if self.baseline is not None:
            found.mean_boxes(_MeanBoxes(self.opened("baseline"), self._choice(components.config)))

        groups = groups_of(record_set, found.column("index"))
        out = Collector()
        scores = RegionScores(out, groups, record_set.group_unit())
        self._places(found, scores)
        calibration, note = self._presence(components, found, scores)
        examples = by_record(found.rows, "by")
        return EvalResult(
            out.metrics,
            provenance(
                components,
                record_set,
                list(examples),
                left_out=left_out,
                unreadable=unreadable,
                undefined=out.undefined,
                phrases=list(self.phrases) if isinstance(self.phrases, tuple) else self.phrases,
                seed=self.seed,
                calibration=note,
            ),
            [{"id": record_set.describe(i)["id"], "phrases": phrases} for i, phrases in examples.items()],
            calibration,
        )

    def _choice(self, config: Config) -> TextChoice:
        if isinstance(self.phrases, str | dict):
            return TextChoice.of(self.phrases)
        return config.data.regions.phrase_choice()

    def _places(self, found: _Found, scores: RegionScores) -> None:
        """Boxes and masks of the phrases that are there."""
        present = found.column("present")
        scores.found.metrics |= {
            "num_images": len(set(found.column("index"))),
            "num_present": sum(present),
            "num_absent": len(present) - sum(present),
        }
        iou, overlap = found.numbers("iou"), found.numbers("dice")
        if found.boxes:
            _box_metrics(scores, "", iou)
        if np.isfinite(overlap).any():
            scores.mean("dice", overlap)
        if found.instances:
            _instance_ap50(found, scores)
        if self.baseline is not None:
            _box_metrics(scores, "mean_box_", found.numbers("mean_box_iou"))
        values = found.column("by")
        for value in sorted({v for v in values if v is not None}):
            chosen = np.array([v == value for v in values])
            for name, numbers in (("miou", iou), ("acc_at_50", hits_at(iou, 0.5)), ("dice", overlap)):
                own = np.where(chosen, numbers, np.nan)
                if np.isfinite(own).any():
                    scores.mean(f"{name}/{value}", own)

    def _presence(
        self, components: Components, found: _Found, scores: RegionScores
    ) -> tuple[dict[str, Any] | None, dict[str, Any] | str]:
        """The metrics of presence; the calibration, and what it is to the numbers."""
        present, logit = np.array(found.column("present")), found.numbers("logit")
        if not (~present).any():
            return None, "none: no phrase is known to be absent"

        def rate(rows: np.ndarray) -> float:
            rows, there = logit[rows], present[rows]
            return false_found_rate_at(rows[there], rows[~there])

        scores.of_rows("false_found_rate_at_90", rate)
        scores.of_rows("presence_auroc", lambda rows: auroc(logit[rows], present[rows]))
        if found.boxes:
            right = present & (np.nan_to_num(found.numbers("iou")) >= 0.5)
            scores.of_rows("aurc_at_50", lambda rows: area_under_risk_coverage(logit[rows], right[rows]))
        held = np.array([self.calibrate == "all" or is_held_out(str(group)) for group in scores.groups])
        split_hash = self.opened().split_hash()
        if self.calibrate == "none":
            negatives, judged = np.array(calibrated_negatives(components) or []), np.ones(len(logit), bool)
            if not len(negatives):
                return None, "none"
            if components.calibration.get("split_hash") == split_hash:
                return (
                    None,
                    "none: these records made the run's calibration, so its rates on them mean nothing",
                )
        else:
            negatives, judged = np.sort(logit[held & ~present]), ~held
        least = least_negatives(self.alpha)
        if len(negatives) < least:
            note = f"none: of {len(negatives)} absent phrases, and alpha={self.alpha:g} needs {least} or more"
            if self.calibrate == "all":
                logger.warning("%s: no calibration is made, it would be %s", self.opened().name, note[6:])
            return None, note

        p_values = conformal_p_values(logit, negatives)
        is_found = np.where(judged, p_values <= self.alpha, np.nan)
        for row, p in zip(found.rows, p_values, strict=True):
            row["p_value"] = float(p)
        if judged.any():
            scores.mean("conformal_found_rate", np.where(present, is_found, np.nan))
            scores.mean("conformal_false_found_rate", np.where(present, np.nan, is_found))
        of = {"all": "all groups", "half": "half of the groups, the rates of the others", "none": "the run"}
        note = {"of": of[self.calibrate], "alpha": self.alpha, "num_negatives": len(negatives)}
        if self.calibrate == "none":
            return None, note
        calibration = {
            "negatives": negatives.tolist(),
            "num_positives": int((held & present).sum()),
            "source": self.opened().name,
            "split": self.source.split,
            "split_hash": split_hash,
            "weights_hash": components.weights_hash(),
            "step": components.step,
        }
        return calibration, note


class _Found:
    """What was found, a row for each image and phrase. boxes, masks: whether the model has learnt them."""

    def __init__(self, *, boxes: bool, masks: bool) -> None:
        self.boxes, self.masks = boxes, masks
        self.rows: list[dict[str, Any]] = []
        # Of rows whose true instances are known: the row, IoUs [parts, true], scores of the parts.
        self.instances: list[tuple[int, Float[np.ndarray, "d g"], Float[np.ndarray, " d"]]] = []

    def add(
        self,
        picture: Picture,
        phrases: Sequence[Phrase],
        located: LocatedImage,
        *,
        min_area: int,
        by: str | None,
    ) -> None:
        """The phrases of one image."""
        for k, phrase in enumerate(phrases):
            logit = float(located.presence[k])
            row: dict[str, Any] = {
                "index": picture.index,
                "by": phrase.text if by == "phrase" else picture.record.get(by) if by else None,
                "phrase": phrase.text,
                "present": phrase.present,
                "box": located.boxes[k].tolist() if self.boxes else None,
                "logit": logit,
            }
            if phrase.present:
                true = picture.boxes[list(phrase.members)]
                true = true[box_area(true) > 0]
                if not len(true):
                    # A named mask without a pixel.
                    continue
                row["true_boxes"] = true.tolist()
                if self.boxes:
                    row["iou"] = nearest_iou(located.boxes[k], true)
                shown = picture.shown(phrase.members, located.transformed) if self.masks else None
                if shown is not None:
                    alone = dataclasses.replace(
                        located, mask_logits=located.mask_logits[k : k + 1], size=shown.shape
                    )
                    probability = alone.masks()[0]
                    row["dice"] = float(dice(probability > 0.5, shown))
                    if picture.mask_ids is not None:
                        parts = instances_of(probability > 0.5, min_area=min_area).masks
                        ious = instance_ious(parts, picture.mask_ids, phrase.members)
                        means = np.array([probability[part].mean() for part in parts])
                        self.instances.append((len(self.rows), ious, means))
            self.rows.append(row)

    def mean_boxes(self, boxes: _MeanBoxes) -> None:
        """The IoU that the mean training box of each phrase has."""
        for row in self.rows:
            if row["present"]:
                mean = boxes.of(row["phrase"])
                iou = 0.0 if mean is None else nearest_iou(mean, np.array(row["true_boxes"]))
                row["mean_box_iou"] = iou

    def column(self, name: str) -> list[Any]:
        return [row[name] for row in self.rows]

    def numbers(self, name: str) -> Float[np.ndarray, " n"]:
        """A column of numbers, NaN where there is none."""
        return np.array([row.get(name, np.nan) for row in self.rows], np.float64)


class _MeanBoxes:
    """The mean box of every phrase of a source."""

    def __init__(self, record_set: RecordSet, choice: TextChoice):
        self._sums: dict[int, np.ndarray] = collections.defaultdict(lambda: np.zeros(5))
        for i in range(len(record_set)):
            entries = region_entries(record_set.describe(i))
            boxes = entry_boxes(entries, None)
            for entry, box in zip(entries, boxes, strict=True):
                if "box" in entry:
                    for text in {text_id(text) for text in entry_phrases(entry, choice)}:
                        self._sums[text] += np.array([*box, 1.0])

    def of(self, phrase: str) -> Float[np.ndarray, " 4"] | None:
        total = self._sums.get(text_id(read_mark(phrase)[0]))
        return None if total is None else total[:4] / total[4]


def _box_metrics(scores: RegionScores, prefix: str, iou: Float[np.ndarray, " n"]) -> None:
    scores.mean(f"{prefix}acc_at_50", hits_at(iou, 0.5))
    scores.mean(f"{prefix}acc_at_75", hits_at(iou, 0.75))
    scores.mean(f"{prefix}miou", iou)


def _instance_ap50(found: _Found, scores: RegionScores) -> None:
    rows, ious, means = zip(*found.instances, strict=True)
    matches = match_detections(
        ious,
        means,
        [["part"] * len(x) for x in means],
        [["part"] * x.shape[1] for x in ious],
        thresholds=(0.5,),
        # Of cells there are more than COCO's hundred in an image.
        max_detections=max(map(len, means)) or 1,
    )
    own = RegionScores(scores.found, [scores.groups[row] for row in rows], scores.unit)
    own.of_rows("instance_ap50", lambda chosen: average_precision(matches, chosen).at(0.5))
