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

Prompts that point at regions to be described (bvl/data/regions.py; R = data.regions.max_regions; boxes are fractions
of the image as the batch has it; (h, w) = image size // data.regions.mask_stride):
    region_valid bool [R]     region_kind i8 [R]: place in regions.KINDS     region_box f32 [R, 4]: of a mask the tight
    box, of a point [x, y, x, y]     region_point f32 [R, 2]: of a box or mask the centre of the box
    region_mask bool [R, h, w]: the box filled in, the cell of the point, the mask
    region_text, region_text_mask [R, T]     region_prompt, region_prompt_mask [R, P]: as text and prompt

Objects and phrases that name them (bvl/data/phrases.py; M = max_objects, N = max_phrases):
    object_box f32 [M, 4]     object_valid bool [M]     object_mask bool [M, h, w]     object_mask_valid bool [M]
    object_known bool: False where the record does not say what objects it shows, or M have no room for those in view
    phrase i32 [N, T]     phrase_mask bool [N, T]     phrase_valid bool [N]     phrase_id u32 [N]: as text_id
    phrase_present bool [N]     phrase_known bool [N]: whether phrase_present can be believed; as phrase_valid here, for
    records say it of every phrase that is drawn (other builders of batches may know of boxes alone)
    phrase_object bool [N, M]: the objects it names, none where one of them is not among the M
    phrase_mark i32 [N]: the last token of its marked word
    phrase_pixels bool [N, h, w]: what it names, objects beyond M as well     phrase_pixels_valid bool [N]
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from typing import Any

from bvl.data.phrases import known_absent
from bvl.data.regions import Regions, region_entries
from bvl.data.text_choice import TextChoice
from bvl.errors import ConfigError


class Need(enum.Enum):
    """What a record must hold to give a batch key."""

    IMAGE = "image"
    TEXT = "text"
    LABELS = "labels"
    REGIONS = "boxes"
    PHRASES = "boxes or known labels"


# A task with one of these reads texts of regions.
REGION_NEEDS = frozenset({Need.REGIONS, Need.PHRASES})
REGION_NAME = Regions().text_choice()
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
    **dict.fromkeys(
        ("region_box", "region_point", "region_mask", "region_kind", "region_valid"), Need.REGIONS
    ),
    **dict.fromkeys(("region_text", "region_text_mask", "region_prompt", "region_prompt_mask"), Need.REGIONS),
    **dict.fromkeys(
        ("object_box", "object_valid", "object_mask", "object_mask_valid", "object_known"), Need.PHRASES
    ),
    **dict.fromkeys(("phrase", "phrase_mask", "phrase_valid", "phrase_id", "phrase_mark"), Need.PHRASES),
    **dict.fromkeys(
        ("phrase_present", "phrase_known", "phrase_object", "phrase_pixels", "phrase_pixels_valid"),
        Need.PHRASES,
    ),
}


def needs_of(keys: frozenset[str]) -> frozenset[Need]:
    """What a record must hold to give all of `keys`."""
    unknown = keys - KEY_NEEDS.keys() - set(BOOKKEEPING)
    if unknown:
        raise ConfigError(
            f"a task asks for batch keys that the pipeline cannot build: {', '.join(sorted(unknown))}"
        )
    needs = frozenset(KEY_NEEDS[key] for key in keys if key in KEY_NEEDS)
    return needs | {Need.IMAGE} if needs & REGION_NEEDS else needs


def missing(
    record: dict[str, Any],
    needs: frozenset[Need],
    choice: TextChoice,
    *,
    region_choice: TextChoice = REGION_NAME,
    complete: Iterable[str] = (),
) -> frozenset[Need]:
    """Which of `needs` the record cannot give.

    region_choice: which text of a region describes it. complete: as `bvl.data.phrases.known_absent` takes it.
    """
    absent = set()
    if Need.IMAGE in needs and record.get("image") is None:
        absent.add(Need.IMAGE)
    if Need.TEXT in needs and not choice.offers(record):
        absent.add(Need.TEXT)
    if Need.LABELS in needs and record.get("labels") is None:
        absent.add(Need.LABELS)
    entries = region_entries(record) if needs & REGION_NEEDS else []
    if Need.REGIONS in needs and not any(map(region_choice.offers, entries)):
        absent.add(Need.REGIONS)
    # A phrase that is not there teaches as much as one that is.
    if Need.PHRASES in needs and not entries and not known_absent(record, complete):
        absent.add(Need.PHRASES)
    return frozenset(absent)
