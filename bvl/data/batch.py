"""The batch keys: what each one needs of a record, and its shape without the leading batch axis.

A task names the keys it reads; the pipeline builds those, plus the bookkeeping keys, and nothing else.

    row, record, source   i32      row in the global batch; index of the record within its source; source
    valid                 bool     False for padding rows of an evaluation
    image                 u8 [H, W, 3]      image_valid  bool     image_box  f32 [4]: the part that is not padding
    text                  i32 [K, T]        text_mask    bool [K, T]
    text_valid            bool [K]: False where a record has fewer than K different texts
    text_id               u32 [K]: equal texts have equal ids
    prompt                i32 [K, P]        prompt_mask  bool [K, P]: start token and controls of each text, padded on
                          the left (bvl/data/controls.py)
    labels                f32 [C]           label_valid  bool [C]
"""

from __future__ import annotations

import enum
from typing import Any

from bvl.data.text_choice import TextChoice
from bvl.errors import ConfigError


class Need(enum.Enum):
    """What a record must hold to give a batch key."""

    IMAGE = "image"
    TEXT = "text"
    LABELS = "labels"


BOOKKEEPING = ("row", "record", "source", "valid")
KEY_NEEDS: dict[str, Need] = {
    "image": Need.IMAGE,
    "image_valid": Need.IMAGE,
    "image_box": Need.IMAGE,
    "text": Need.TEXT,
    "text_mask": Need.TEXT,
    "text_valid": Need.TEXT,
    "text_id": Need.TEXT,
    "prompt": Need.TEXT,
    "prompt_mask": Need.TEXT,
    "labels": Need.LABELS,
    "label_valid": Need.LABELS,
}


def needs_of(keys: frozenset[str]) -> frozenset[Need]:
    """What a record must hold to give all of `keys`."""
    unknown = keys - KEY_NEEDS.keys() - set(BOOKKEEPING)
    if unknown:
        raise ConfigError(
            f"a task asks for batch keys that the pipeline cannot build: {', '.join(sorted(unknown))}"
        )
    return frozenset(KEY_NEEDS[key] for key in keys if key in KEY_NEEDS)


def missing(record: dict[str, Any], needs: frozenset[Need], choice: TextChoice) -> frozenset[Need]:
    """Which of `needs` the record cannot give."""
    absent = set()
    if Need.IMAGE in needs and record.get("image") is None:
        absent.add(Need.IMAGE)
    if Need.TEXT in needs and not choice.offers(record):
        absent.add(Need.TEXT)
    if Need.LABELS in needs and record.get("labels") is None:
        absent.add(Need.LABELS)
    return frozenset(absent)
