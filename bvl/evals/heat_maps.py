"""Heat maps of a contrastive model against boxes: does the model look where it should?"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float

from bvl.config import Config
from bvl.data.geometry import box_area
from bvl.data.sources import Source
from bvl.errors import ConfigError
from bvl.evals.base import Cache, Collector, EvalResult, Suite, provenance
from bvl.evals.regions import (
    REGION_BATCH,
    RegionScores,
    by_record,
    check_wanted,
    groups_of,
    phrases_to_find,
    read_pictures,
    with_regions,
)
from bvl.metrics.heat_maps import contrast_to_noise, inside_boxes, pointing_hit
from bvl.runs import Components
from bvl.tasks.locating import heat_maps, makes_heat_maps


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeatMapPointing(Suite):
    """Zero-shot heat maps of phrases that are there, against the boxes of what each names.

    pointing_game: share of phrases whose highest pixel lies in a box; its chance is the mean share of the image that
    the boxes cover, also given as area_share. cnr: the contrast-to-noise ratio of the inside of the boxes and the
    rest, a mean over phrases; cnr_signed is below 0 where the map is lower inside.

    phrases: see `PhraseLists`. template: what is said of a phrase, such as "with a {}"; against: what its map is taken
      off for, such as "without a {}". sigma: smoothing, in patches. max_images: so many images, drawn by `seed`; None = all.
    """

    source: Source
    phrases: str | dict[str, float] | tuple[str, ...] | None = None
    template: str = "{}"
    against: str | None = None
    sigma: float = 0.5
    max_images: int | None = None
    seed: int = 0
    region_batch_size: int = REGION_BATCH

    def __post_init__(self):
        check_wanted(self.phrases)
        for name in ("template", "against"):
            if "{}" not in (getattr(self, name) or "{}"):
                raise ConfigError(f"{name}={getattr(self, name)!r} has no {{}} for the phrase")
        if self.sigma < 0:
            raise ConfigError(f"sigma={self.sigma}: must not be negative")
        for name in ("max_images", "region_batch_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least 1")

    def check_config(self, config: Config) -> None:
        if not makes_heat_maps(config):
            raise ConfigError(
                "heat maps compare patches with texts, which no task of this run trains; add "
                "tasks={..., 'contrastive': Contrastive()}"
            )

    def check_records(self) -> None:
        with_regions(self.opened())

    def run(self, components: Components, *, batch_size: int, cache: Cache | None = None) -> EvalResult:
        self.check_config(components.config)
        record_set = self.opened()
        lists, left_out = phrases_to_find(
            record_set,
            components,
            self.phrases,
            max_images=self.max_images,
            seed=self.seed,
            absent=False,
        )
        indices = list(lists)
        unreadable: list[dict[str, str]] = []
        rows: list[dict[str, Any]] = []
        batch_size = min(self.region_batch_size, batch_size, len(indices))
        for pictures in read_pictures(
            record_set, indices, masks=True, batch_size=batch_size, unreadable=unreadable
        ):
            # Maps are as large as the originals: a batch at a time.
            for start in range(0, len(pictures), batch_size):
                some = pictures[start : start + batch_size]
                named = [[phrase.text for phrase in lists[picture.index]] for picture in some]
                told, denied = (
                    template and [[template.replace("{}", text) for text in row] for row in named]
                    for template in (self.template, self.against)
                )
                maps = heat_maps(
                    components,
                    [picture.record["image"] for picture in some],
                    told,
                    against=denied,
                    sigma=self.sigma,
                    batch_size=batch_size,
                )
                for picture, own in zip(some, maps, strict=True):
                    for phrase, heat in zip(lists[picture.index], own, strict=True):
                        boxes = picture.boxes[list(phrase.members)]
                        boxes = boxes[box_area(boxes) > 0]
                        if len(boxes):
                            rows.append(
                                {"index": picture.index, "phrase": phrase.text, **_pointed(heat, boxes)}
                            )

        out = Collector()
        scores = RegionScores(
            out, groups_of(record_set, [row["index"] for row in rows]), record_set.group_unit()
        )
        out.metrics |= {"num_images": len({row["index"] for row in rows}), "num_phrases": len(rows)}
        columns = {
            name: np.array([row[name] for row in rows], np.float64)
            for name in ("pointing_game", "cnr", "cnr_signed", "area_share")
        }
        chance = float(np.mean(columns["area_share"]))
        for name, values in columns.items():
            scores.mean(name, values, chance=chance if name == "pointing_game" else None)
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
                phrases=list(self.phrases) if isinstance(self.phrases, tuple) else self.phrases,
                sigma=self.sigma,
                seed=self.seed,
            ),
            [{"id": record_set.describe(i)["id"], "phrases": some} for i, some in examples.items()],
        )


def _pointed(heat: Float[np.ndarray, "h w"], boxes: Float[np.ndarray, "n 4"]) -> dict[str, Any]:
    inside = inside_boxes(boxes, heat.shape)
    y, x = np.unravel_index(np.nanargmax(heat), heat.shape)
    return {
        "true_boxes": boxes.tolist(),
        "point": [float((x + 0.5) / heat.shape[1]), float((y + 0.5) / heat.shape[0])],
        "pointing_game": pointing_hit(heat, inside),
        "cnr": contrast_to_noise(heat, inside),
        "cnr_signed": contrast_to_noise(heat, inside, signed=True),
        "area_share": float(inside.mean()),
    }
