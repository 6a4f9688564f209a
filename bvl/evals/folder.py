"""The suites that suit any folder of records: retrieval where it has texts, zero-shot where it has labels."""

from __future__ import annotations

import logging
from pathlib import Path

from bvl.config import Config
from bvl.data.records import read_records, select_split
from bvl.data.sources import Source
from bvl.errors import DataError
from bvl.evals.base import Suite, fields_of, overlaps_training, same_place
from bvl.evals.retrieval import Retrieval
from bvl.evals.zeroshot import ZeroShot

logger = logging.getLogger(__name__)

# The first of these that a record with an image has is what retrieval reads.
TEXT_FIELDS = ("caption", "alt_text", "findings", "impression")
TEMPLATES = ("{}", "an image of {}", "a medical image showing {}")


def suites_for(
    folder: str | Path, *, split: str | None = None, name: str | None = None, config: Config | None = None
) -> dict[str, Suite]:
    """The suites of a folder of records, by name: `retrieval_<name>` and `zeroshot_<name>`; what was chosen is logged.

    Retrieval runs where records have a text. Zero-shot takes one class an image where every record that has labels
    has exactly one (named by its class_prompt, if there is one, else by its label), and each label on its own
    ("label" against "no label") otherwise.

    split: None = "test" where records name such a split, else "val", else all records; but where they name none and
    the run trained on "train" of them, the tenth "val" that it held out.
    name: None = the folder's name.
    config: of the run to evaluate. A warning says where it may have been trained on the records.
    Raises DataError if the records allow neither.
    """
    records = read_records(folder)
    name = name or records.name
    named = {record["split"] for record in records.records if record.get("split")}
    if split is None:
        split = next((s for s in ("test", "val") if s in named), None)
        why = "" if split else " (no test or val split)"
        if not named and _trained_splits(config, str(folder)) == {"train"}:
            split, why = "val", " (the tenth of these records that training held out)"
        logger.info("%s: evaluating %s%s", name, f"split {split!r}" if split else "all records", why)
    select_split(records, split)  # a split that is not there is an error of its own
    source = Source(name=name, root=str(folder), split=split)
    if config is not None and overlaps_training(config, source):
        logger.warning(
            "%s: THE MODEL MAY HAVE BEEN TRAINED ON THESE RECORDS (%s), so the results say little about new images; "
            "choose a split that was held out",
            name,
            f"split {split!r}" if split else "all splits",
        )

    suites: dict[str, Suite] = {}
    reasons = []
    for suite_name, make in (("retrieval", _retrieval), ("zeroshot", _zeroshot)):
        try:
            suite = make(source)
            suite.check_records()
        except DataError as error:
            reasons.append(f"no {suite_name}: {error}")
            logger.info("%s: no %s, since %s", name, suite_name, error)
            continue
        suites[f"{suite_name}_{name}"] = suite
    if not suites:
        raise DataError(f"{folder}: nothing to evaluate.\n  " + "\n  ".join(reasons))
    return suites


def _trained_splits(config: Config | None, folder: str) -> set[str | None]:
    """The splits of this folder that a run was trained on."""
    trained = config.data.sources() if config is not None else ()
    return {source.split for source in trained if same_place(source, Source(root=folder))}


def _retrieval(source: Source) -> Suite:
    suite = Retrieval(source=source)
    record_set = suite.opened()
    records = [record_set.describe(i) for i in range(len(record_set))]
    for field in TEXT_FIELDS:
        if any(record.get(field) and record.get("image") is not None for record in records):
            logger.info("%s: retrieval reads the field %r", source.name, field)
            return suite if field == source.text else Retrieval(source=source, text=field)
    raise DataError(
        f"no record has an image and one of {', '.join(TEXT_FIELDS)} (there is {fields_of(record_set)})"
    )


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
