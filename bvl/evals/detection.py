"""Objects detected by their names: average precision of boxes, and of masks where the model has them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from bvl.config import Config
from bvl.data.geometry import box_area
from bvl.data.regions import region_entries
from bvl.data.sources import Source
from bvl.errors import ConfigError, DataError
from bvl.evals.base import Cache, Collector, EvalResult, Suite, describe, provenance
from bvl.evals.regions import (
    REGION_BATCH,
    Picture,
    RegionScores,
    groups_of,
    instance_ious,
    read_pictures,
    some_of,
    with_regions,
)
from bvl.metrics.boxes import pairwise_iou
from bvl.metrics.detection import COCO_THRESHOLDS, Matches, average_precision, match_detections
from bvl.runs import Components
from bvl.tasks.locating import Detections, detect, detection_task_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectDetection(Suite):
    """Objects of the source's box names, detected by the run's detection task.

    ap50 and map (IoU 0.50 to 0.95) are as COCO defines them, means over the names; ap50/<name> and map/<name> are of
    each. Of a model with instance masks, on records with them, mask_ap50 and mask_map too. A name that is not boxed in
    a record counts as not there: detections of it are wrong.

    names: None = all names of the source's boxes. max_images: so many images, drawn by `seed`; None = all.
    threshold, iou_threshold, max_detections: see `bvl.tasks.locating.detect`; a low threshold is what precision over all
      recalls needs.
    """

    source: Source
    names: tuple[str, ...] | None = None
    max_images: int | None = None
    seed: int = 0
    threshold: float = 0.01
    iou_threshold: float = 0.5
    max_detections: int = 100
    region_batch_size: int = REGION_BATCH

    def __post_init__(self):
        if self.names is not None and not self.names:
            raise ConfigError("names=(): give names to detect, or None for all of the source's boxes")
        if self.max_images is not None and self.max_images < 1:
            raise ConfigError(f"max_images={self.max_images}: must be at least 1")
        for name in ("max_detections", "region_batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least 1")
        for name in ("threshold", "iou_threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must lie between 0 and 1")

    def check_config(self, config: Config) -> None:
        detection_task_of(config)

    def check_records(self) -> None:
        with_regions(self.opened())
        self._names()

    def run(self, components: Components, *, batch_size: int, cache: Cache | None = None) -> EvalResult:
        self.check_config(components.config)
        record_set, names = self.opened(), self._names()
        indices, left_out = with_regions(record_set)
        indices = some_of(indices, self.max_images, self.seed, left_out)
        unreadable: list[dict[str, str]] = []
        found: list[_Image] = []
        batch_size = min(self.region_batch_size, batch_size, len(indices))
        masks = components.config.model.region_decoder.instance_masks
        parts = read_pictures(record_set, indices, masks=masks, batch_size=batch_size, unreadable=unreadable)
        for pictures in parts:
            # Masks of many objects at the original size are large: a batch at a time.
            step = batch_size if masks else len(pictures)
            for start in range(0, len(pictures), step):
                some = pictures[start : start + step]
                detected = detect(
                    components,
                    [picture.record["image"] for picture in some],
                    names,
                    threshold=self.threshold,
                    iou_threshold=self.iou_threshold,
                    max_detections=self.max_detections,
                    batch_size=batch_size,
                )
                found += [_Image.of(p, d, names) for p, d in zip(some, detected, strict=True)]

        kept = [image.index for image in found]
        out = Collector()
        scores = RegionScores(out, groups_of(record_set, kept), record_set.group_unit())
        out.metrics |= {"num_images": len(found), "num_objects": sum(len(image.true) for image in found)}
        _add_ap(scores, "", self._matched(found, [image.ious for image in found]))
        if all(image.mask_ious is not None for image in found):
            _add_ap(scores, "mask_", self._matched(found, [image.mask_ious for image in found]))
        return EvalResult(
            out.metrics,
            provenance(
                components,
                record_set,
                kept,
                left_out=left_out,
                unreadable=unreadable,
                undefined=out.undefined,
                names=list(names),
                threshold=self.threshold,
                iou_threshold=self.iou_threshold,
                max_detections=self.max_detections,
            ),
            [{"id": record_set.describe(image.index)["id"], **image.row} for image in found],
        )

    def _names(self) -> tuple[str, ...]:
        record_set = self.opened()
        entries = (e for i in range(len(record_set)) for e in region_entries(record_set.describe(i)))
        there = sorted({entry["name"] for entry in entries if "box" in entry})
        if not there:
            raise DataError(f"{describe(record_set)}: no record has boxes to detect")
        if self.names is None:
            return tuple(there)
        if missing := [name for name in self.names if name not in there]:
            raise DataError(
                f"{describe(record_set)}: no box has the name {missing[0]!r}; there is {', '.join(there)}"
            )
        return self.names

    def _matched(self, found: Sequence[_Image], ious: Sequence[Float[np.ndarray, "d g"]]) -> Matches:
        return match_detections(
            ious,
            [image.scores for image in found],
            [image.predicted for image in found],
            [image.true for image in found],
            thresholds=COCO_THRESHOLDS,
            max_detections=self.max_detections,
        )


@dataclasses.dataclass(frozen=True)
class _Image:
    """Detections of an image against its objects. row: of the per-example file."""

    index: int
    predicted: list[str]
    scores: Float[np.ndarray, " d"]
    true: list[str]
    ious: Float[np.ndarray, "d g"]
    mask_ious: Float[np.ndarray, "d g"] | None
    row: dict[str, Any]

    @classmethod
    def of(cls, picture: Picture, detected: Detections, names: Sequence[str]) -> _Image:
        area = box_area(picture.boxes)
        members = [i for i, entry in enumerate(picture.entries) if entry["name"] in names and area[i] > 0]
        true, true_names = picture.boxes[members], [picture.entries[i]["name"] for i in members]
        masks = None
        if detected.masks is not None and picture.mask_ids is not None:
            masks = instance_ious(detected.masks > 0.5, picture.mask_ids, members)
        row = {
            "boxes": [
                {"box": box.tolist(), "name": name, "score": float(score)}
                for box, name, score in zip(detected.boxes, detected.names, detected.scores, strict=True)
            ],
            "true_boxes": [
                {"box": box.tolist(), "name": name} for box, name in zip(true, true_names, strict=True)
            ],
        }
        return cls(
            picture.index,
            detected.names,
            detected.scores,
            true_names,
            pairwise_iou(detected.boxes, true),
            masks,
            row,
        )


def _add_ap(scores: RegionScores, prefix: str, matches: Matches) -> None:
    """ap50 and map, over the names and of each; intervals of AP50 of a name and of both means."""
    half = dataclasses.replace(
        matches, thresholds=matches.thresholds[:1], hits=tuple(hits[:1] for hits in matches.hits)
    )
    scores.of_rows(f"{prefix}ap50", lambda rows: average_precision(half, rows).mean)
    scores.of_rows(f"{prefix}map", lambda rows: average_precision(matches, rows).mean)
    per_class = average_precision(matches).per_class
    for c, name in enumerate(matches.classes):
        own = dataclasses.replace(
            half,
            classes=(name,),
            hits=half.hits[c : c + 1],
            images=half.images[c : c + 1],
            num_true=half.num_true[:, c : c + 1],
        )
        scores.of_rows(f"{prefix}ap50/{name}", lambda rows, own=own: average_precision(own, rows).mean)
        scores.found.add(f"{prefix}map/{name}", per_class[name])
