"""The suites of regions that suit a folder of records with boxes or masks."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Any

from bvl.config import Config
from bvl.data.phrases import known_absent
from bvl.data.regions import region_entries
from bvl.data.sources import Source
from bvl.errors import ConfigError, DataError
from bvl.evals.base import Suite, describe, same_place
from bvl.evals.describing import RegionDescriptions
from bvl.evals.detection import ObjectDetection
from bvl.evals.grounding import PhraseGrounding
from bvl.evals.heat_maps import HeatMapPointing
from bvl.metrics.caption_text import tokenize
from bvl.tasks.caption import Caption
from bvl.tasks.detection import Detection
from bvl.tasks.grounding import Grounding
from bvl.tasks.locating import makes_heat_maps
from bvl.tasks.region_caption import RegionCaption

logger = logging.getLogger(__name__)

SIDES = ("left", "right")


# Options of captions that texts of regions have too, and the one that every suite of regions has.
OF_DESCRIPTIONS = ("guidance", "beams", "length", "max_images")
OF_REGIONS = ("max_images",)


def options_of_regions(config: Config) -> tuple[str, ...]:
    """The options of captions that some suite of regions of a run takes."""
    there = {type(task) for task in config.tasks.values()}
    if RegionCaption in there:
        return OF_DESCRIPTIONS
    return OF_REGIONS if there & {Grounding, Detection} or makes_heat_maps(config) else ()


def region_makers(
    source: Source, config: Config, *, calibrate: bool, options: Mapping[str, Any]
) -> dict[str, Callable[[], Suite]]:
    """What makes each suite of regions that the tasks of a run allow.

    "regions/describe" points with boxes and asks for the reference's length where the run knows lengths;
    "regions/grounding" looks for the phrases of the run's data.regions.phrases, "regions/detection" for the names of
    the boxes, and "regions/pointing" takes the heat maps of the contrastive part.

    options: of captions; each suite takes those that it has.
    """
    limits = {name: options[name] for name in OF_REGIONS if name in options}
    trained = [s for s in config.data.sources() if same_place(s, source)]
    if any(s.boxes_complete for s in trained):
        source = dataclasses.replace(source, boxes_complete=True)
    there = {type(task) for task in config.tasks.values()}
    makers: dict[str, Callable[[], Suite]] = {}
    if RegionCaption in there:
        makers["regions/describe"] = lambda: _descriptions(source, config, options)
    if Grounding in there:
        makers["regions/grounding"] = lambda: _grounding(source, calibrate, limits)
    if Detection in there:
        makers["regions/detection"] = lambda: ObjectDetection(source=source, **limits)
    if makes_heat_maps(config):
        makers["regions/pointing"] = lambda: HeatMapPointing(source=source, **limits)
    return makers


def _descriptions(source: Source, config: Config, options: Mapping[str, Any]) -> Suite:
    chosen = {"length": "reference" if config.data.controls.lengths else None}
    chosen |= {name: options[name] for name in OF_DESCRIPTIONS if name in options}
    if isinstance(chosen["length"], tuple):
        if any(isinstance(task, Caption) for task in config.tasks.values()):
            return _descriptions(source, config, {k: v for k, v in options.items() if k != "length"})
        raise ConfigError(
            f"length={chosen['length']}: regions are described in one number of words, or in as many as the reference has"
        )
    suite = RegionDescriptions(source=source, **chosen)
    suite.check_config(config)
    choice, record_set = config.data.regions.text_choice(), suite.opened()
    entries = [e for i in range(len(record_set)) for e in region_entries(record_set.describe(i))]
    words = {word for entry in entries for text in choice.for_evaluation(entry) for word in tokenize(text)}
    if not words:
        raise DataError(f"{describe(record_set)}: no region has the text {config.data.regions.text!r}")
    return dataclasses.replace(suite, word_groups={"side": SIDES}) if words.issuperset(SIDES) else suite


def _grounding(source: Source, calibrate: bool, limits: Mapping[str, Any]) -> Suite:
    suite = PhraseGrounding(source=source, calibrate="all" if calibrate else "none", **limits)
    record_set = suite.opened()
    complete = record_set.complete_names()
    if not any(known_absent(record_set.describe(i), complete) for i in range(len(record_set))):
        reason = (
            f"{describe(record_set)}: nothing is known to be absent; give the records labels_known, or train with "
            "boxes_complete=true"
        )
        if calibrate:
            raise DataError(reason)
        logger.info("no metrics of presence: %s", reason)
    return suite
