"""The suites that suit any folder of records: by its texts, its labels, its boxes and masks."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bvl.config import Config
from bvl.data.long_texts import LongTexts
from bvl.data.records import select_split
from bvl.data.sources import Source
from bvl.errors import ConfigError, DataError
from bvl.evals.base import Suite, fields_of, overlaps_training, same_place
from bvl.evals.caption import Captions, has_facts
from bvl.evals.folder_regions import options_of_regions, region_makers
from bvl.evals.retrieval import Retrieval
from bvl.evals.zeroshot import ZeroShot
from bvl.tasks.caption import Caption
from bvl.tasks.captioning import captioning_task_of, name_of
from bvl.tasks.contrastive import has_contrastive

logger = logging.getLogger(__name__)

# The first of these that a record with an image has is what retrieval reads.
TEXT_FIELDS = ("caption", "alt_text", "findings", "impression")
TEMPLATES = ("{}", "an image of {}", "a medical image showing {}")


def source_at(
    place: str | Path,
    *,
    split: str | None = None,
    config: Config | None = None,
    image_column: str | None = None,
    text_column: str | None = None,
) -> Source:
    """The folder or file of records `place` as a source, with the columns that hold its images and texts.

    image_column, text_column: None = as the run of `config` was trained, where it was trained on this place; else
    the usual ones, or, if the records have no images or no texts by those, what a training source reads.
    """
    usual = Source(root=str(place), split=split)
    trained = config.data.sources() if config is not None else ()
    # Stable: the run's own place first, else the usual columns.
    order = sorted((usual, *trained), key=lambda s: s is usual or not same_place(s, usual))
    columns = dict.fromkeys((image_column or s.image_column, text_column or s.text_column) for s in order)
    choices = [dataclasses.replace(usual, image_column=i, text_column=t) for i, t in columns]
    # There is most often nothing to choose, and then no reason to read.
    chosen = choices[0] if len(choices) == 1 else next(filter(_has_pairs, choices), choices[0])
    if chosen != usual and not (image_column or text_column):
        logger.info(
            "%s: images are in the column %r, texts in %r",
            place,
            chosen.image_column,
            chosen.text_column or "caption",
        )
    return chosen


def _has_pairs(source: Source) -> bool:
    """Whether the columns of a source are there and give images and texts."""
    try:
        counts = source.read().counts
    except DataError:
        return False
    return "image" in counts and any(field in counts for field in TEXT_FIELDS)


def suites_for(
    folder: str | Path,
    *,
    split: str | None = None,
    name: str | None = None,
    config: Config | None = None,
    image_column: str | None = None,
    text_column: str | None = None,
    texts_per_image: int | None = 1,
    long_texts: LongTexts = "cut",
    captions: Mapping[str, Any] | None = None,
    only_captions: bool = False,
    calibrate: bool = False,
) -> dict[str, Suite]:
    """The suites of a folder of records: `retrieval_<name>`, `zeroshot_<name>`, `caption_<name>`, `regions_<name>/...`.

    What was chosen is logged. Captions are for runs with a Caption task, the other two for those with a Contrastive one.
    Retrieval runs where records have a text. Zero-shot takes one class an image where every record that has labels
    has exactly one (named by its class_prompt, if there is one, else by its label), and each label on its own
    ("label" against "no label") otherwise. Where records have boxes or masks, the suites of regions that the run's tasks
    allow: see `bvl.evals.folder_regions`.

    split: None = "test" where records name such a split, else "val", else all records; but where they name none and
    the run trained on "train" of them, the tenth "val" that it held out.
    name: None = the folder's name.
    config: of the run to evaluate. A warning says where it may have been trained on the records.
    image_column, text_column: see `source_at`.
    texts_per_image: so many texts of each record, of the fields caption, alt_text, findings and impression in this
    order, None = all; 1 = that of the first of these fields that there is.
    calibrate: presence of phrases is calibrated on all absent ones of these records; see `PhraseGrounding`.
    captions: fields of the `Captions` suite; the suites of regions take those that they have too (max_images, and for
      descriptions guidance, beams and length). References of captions are the texts that the run was trained on,
      where the records have them, else those of the first field.
    Raises DataError if the records allow none, or no captions where `captions` asks for them and for no descriptions;
    ConfigError for `captions` that no task of the run is for, and for `calibrate` on records of the training.
    """
    if captions or only_captions:
        if config is None:
            raise ConfigError("captions are written by a run: give its config")
        others = () if only_captions else options_of_regions(config)
        if only_captions or not set(captions or ()) <= set(others):
            captioning_task_of(config)
    source = source_at(folder, config=config, image_column=image_column, text_column=text_column)
    records = source.read()
    name = name or records.name
    named = {record["split"] for record in records.records if record.get("split")}
    if split is None:
        split = next((s for s in ("test", "val") if s in named), None)
        why = "" if split else " (no test or val split)"
        if not named and _trained_splits(config, str(folder)) == {"train"}:
            split, why = "val", " (the tenth of these records that training held out)"
        logger.info("%s: evaluating %s%s", name, f"split {split!r}" if split else "all records", why)
    select_split(records, split)  # a split that is not there is an error of its own
    source = dataclasses.replace(source, name=name, split=split)
    if config is not None and overlaps_training(config, source):
        if calibrate:
            raise ConfigError(
                f"{name}: the model may have been trained on these records "
                f"({f'split {split!r}' if split else 'all splits'}), and what it says of them is surer than of others: "
                "calibrate on a split that was held out (--split)"
            )
        logger.warning(
            "%s: THE MODEL MAY HAVE BEEN TRAINED ON THESE RECORDS (%s), so the results say little about new images; "
            "choose a split that was held out",
            name,
            f"split {split!r}" if split else "all splits",
        )

    suites: dict[str, Suite] = {}
    reasons = []
    makers = {}
    if not only_captions and config is not None and not has_contrastive(config):
        reasons.append(
            "no retrieval and zeroshot: the run has no task of type Contrastive, only "
            + ", ".join(f"{task} ({type(options).__name__})" for task, options in config.tasks.items())
        )
    elif not only_captions:
        makers["retrieval"] = lambda: _retrieval(source, texts_per_image, long_texts)
        makers["zeroshot"] = lambda: _zeroshot(source)
    if config is not None and any(isinstance(task, Caption) for task in config.tasks.values()):
        makers["caption"] = lambda: _captions(source, config, captions or {})
    if not only_captions and config is not None:
        makers |= region_makers(source, config, calibrate=calibrate, options=captions or {})
    if calibrate and "regions/grounding" not in makers:
        raise ConfigError("calibration is of the presence of phrases: the run has no task of type Grounding")
    for suite_name, make in makers.items():
        try:
            suite = make()
            suite.check_records()
        except DataError as error:
            asked = captions and "regions/describe" not in makers
            if (suite_name == "caption" and asked) or (suite_name == "regions/grounding" and calibrate):
                raise
            reasons.append(f"no {suite_name}: {error}")
            logger.info("%s: no %s, since %s", name, suite_name, error)
            continue
        kind, slash, what = suite_name.partition("/")
        suites[f"{kind}_{name}{slash}{what}"] = suite
    taken = any(suite.startswith(("caption_", "regions_")) for suite in suites)
    if not suites or (captions and not taken):
        raise DataError(f"{folder}: nothing to evaluate.\n  " + "\n  ".join(reasons))
    return suites


def _trained_splits(config: Config | None, folder: str) -> set[str | None]:
    """The splits of this folder that a run was trained on."""
    trained = config.data.sources() if config is not None else ()
    return {source.split for source in trained if same_place(source, Source(root=folder))}


def _captions(source: Source, config: Config, options: Mapping[str, Any]) -> Suite:
    suite = Captions(source=source, task=name_of(config, captioning_task_of(config)), **options)
    suite.check_config(config)
    record_set = suite.opened()
    records = [record_set.describe(i) for i in range(len(record_set))]
    pictured = [record for record in records if record.get("image") is not None]
    if suite.text is None:
        trained = [s for s in config.data.sources() if any(s.choice().offers(record) for record in pictured)]
        fields = [field for field in TEXT_FIELDS if any(record.get(field) for record in pictured)]
        if trained:
            source = dataclasses.replace(
                source,
                text=trained[0].text,
                templates=trained[0].templates,
                descriptions=trained[0].descriptions,
            )
        elif fields:
            source = dataclasses.replace(source, text=fields[0])
        logger.info("%s: references of captions are %s", source.name, source.text)
    facts = bool(pictured) and all(has_facts(record) for record in pictured)
    lexicon = options.get("lexicon", "phantoms" if facts else "none")
    return dataclasses.replace(suite, source=source, lexicon=lexicon)


def _retrieval(source: Source, texts_per_image: int | None, long_texts: LongTexts) -> Suite:
    suite = Retrieval(source=source, texts_per_image=texts_per_image, long_texts=long_texts)
    record_set = suite.opened()
    records = [record_set.describe(i) for i in range(len(record_set))]
    pictured = [record for record in records if record.get("image") is not None]
    fields = [field for field in TEXT_FIELDS if any(record.get(field) for record in pictured)]
    if not fields:
        raise DataError(
            f"no record has an image and one of {', '.join(TEXT_FIELDS)} (there is {fields_of(record_set)}); a column of "
            f"another name is read with text_column (--text-column) or image_column (--image-column)"
        )
    if texts_per_image == 1:
        fields = fields[:1]
    logger.info("%s: retrieval reads %s", source.name, ", ".join(map(repr, fields)))
    if fields == [source.text]:
        return suite
    text = {field: float(len(fields) - i) for i, field in enumerate(fields)}
    return dataclasses.replace(suite, text=fields[0] if len(fields) == 1 else text)


def _zeroshot(source: Source) -> Suite:
    suite = ZeroShot(source=source, templates=TEMPLATES)
    record_set = suite.opened()
    labels = [
        record["labels"]
        for i in range(len(record_set))
        if (record := record_set.describe(i)).get("labels") is not None and record.get("image") is not None
    ]
    if not labels:
        raise DataError(f"no record has an image and labels (there is {fields_of(record_set)})")
    if all(len(names) == 1 for names in labels):
        return suite
    logger.info("%s: records have none or several labels, so each label is judged on its own", source.name)
    return ZeroShot(source=source, templates=TEMPLATES, multi_label=True)
