"""What suites of regions share: records with boxes or masks, read with their pictures, and phrases to look for."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from jaxtyping import Bool, Float, Int, Integer

from bvl.data.geometry import box_area
from bvl.data.images import open_image
from bvl.data.phrases import entry_phrases, known_absent, read_mark
from bvl.data.regions import Regions, Visible, entry_boxes, region_entries
from bvl.data.sources import RecordSet
from bvl.data.text_choice import TextChoice, text_id
from bvl.data.transforms import Transformed
from bvl.errors import ConfigError, DataError, ImageError
from bvl.evals.base import describe, fields_of, with_images
from bvl.evals.caption_scores import Scores
from bvl.metrics.bootstrap import bootstrap_interval
from bvl.metrics.boxes import pairwise_iou
from bvl.runs import Components

# Images that are encoded and searched at a time, whatever the batch of plain encoding is.
REGION_BATCH = 16
# So many batches are held decoded, and their phrases encoded together.
_BATCHES_AT_ONCE = 4

Wanted = str | Mapping[str, float] | Sequence[str] | None


@dataclasses.dataclass(frozen=True)
class Picture:
    """A record as it was read, with "image" and "mask" decoded; `boxes` are those of its `entries`.

    index: of the record.
    """

    index: int
    record: dict[str, Any]
    entries: list[dict[str, Any]]
    boxes: Float[np.ndarray, "n 4"]

    @property
    def mask_ids(self) -> Int[np.ndarray, "h w"] | None:
        """The mask where it holds an id for each box, else None."""
        return None if self.record.get("mask_name") else self.record.get("mask")

    def shown(self, members: Sequence[int], transformed: Transformed) -> Bool[np.ndarray, "h w"] | None:
        """The pixels of some entries together, at the mask's size; None where no mask shows them."""
        original = dataclasses.replace(
            transformed, boxes=self.boxes, box_valid=box_area(self.boxes) > 0, mask=self.record.get("mask")
        )
        return Visible(self.record, self.entries, original).mask(members)


@dataclasses.dataclass(frozen=True)
class Phrase:
    """A phrase and the entries of an image that it names; none of them: it is known to name nothing there."""

    text: str
    members: tuple[int, ...]

    @property
    def present(self) -> bool:
        return bool(self.members)


class PhraseLists:
    """The phrases of each record of a source, of what is there and of what is known not to be.

    wanted: what of a box entry is looked for, a field or fields with probabilities: one phrase for each entry, equal
      ones once, and one for each absent name, as training draws them, but the same ones every time. Or a list of
      phrases: each is there where it is an entry's name or one of its texts, absent where all that goes by it in the
      source is. None = as the run's `regions` say.
    """

    def __init__(self, record_set: RecordSet, wanted: Wanted, *, regions: Regions, seed: int):
        self._records, self._seed = record_set, seed
        listed = wanted is not None and not isinstance(wanted, str | Mapping)
        self._list = list(wanted) if listed else None
        self._choice = regions.phrase_choice() if wanted is None or listed else TextChoice.of(wanted)
        self._bank = record_set.phrase_bank()
        self._names: dict[int, set[int]] = collections.defaultdict(set)
        for i in range(len(record_set) if listed else 0):
            for entry in region_entries(record_set.describe(i)):
                for key in self._called(entry):
                    self._names[key].add(text_id(entry["name"]))

    def of(self, index: int) -> list[Phrase]:
        """The phrases of one record, those that are there first."""
        record = self._records.describe(index)
        entries = region_entries(record)
        called = [self._called(entry) for entry in entries]
        if self._list is not None:
            return self._listed(record, called)
        rng = np.random.default_rng([self._seed, text_id(record["id"])])
        there: dict[int, Phrase] = {}
        for entry in entries:
            for text in self._choice.pick(entry, rng):
                key = _key(text)
                there[key] = Phrase(text, tuple(i for i, keys in enumerate(called) if key in keys))
        absent: dict[int, Phrase] = {}
        refused = set().union(*called)
        for pool in self._bank.absent(record):
            entry = pool[int(rng.integers(len(pool)))]
            text = (self._choice.pick(entry, rng) or [entry["name"]])[0]
            if _key(text) not in refused:
                absent.setdefault(_key(text), Phrase(text, ()))
        return [*there.values(), *absent.values()]

    def _listed(self, record: Mapping[str, Any], called: list[set[int]]) -> list[Phrase]:
        absent = {text_id(name) for name in known_absent(record, self._bank.complete)}
        there, missing = [], []
        for text in self._list:
            key = _key(text)
            members = tuple(i for i, keys in enumerate(called) if key in keys)
            if members:
                there.append(Phrase(text, members))
            elif (self._names.get(key) or {key}) <= absent:
                missing.append(Phrase(text, ()))
        return there + missing

    def _called(self, entry: Mapping[str, Any]) -> set[int]:
        return {text_id(text) for text in entry_phrases(entry, self._choice)}


def phrases_to_find(
    record_set: RecordSet,
    components: Components,
    wanted: Wanted,
    *,
    max_images: int | None,
    seed: int,
    absent: bool = True,
) -> tuple[dict[int, list[Phrase]], dict[str, int]]:
    """(record index -> its phrases, see `PhraseLists`, count of records and phrases left out by reason).

    absent: with phrases of what is known not to be there. Raises DataError where no phrase names anything.
    """
    indices, left_out = with_regions(record_set)
    indices = some_of(indices, max_images, seed, left_out)
    of = PhraseLists(record_set, wanted, regions=components.config.data.regions, seed=seed).of
    lists = {i: [phrase for phrase in of(i) if absent or phrase.present] for i in indices}
    distinct = list({phrase.text: None for phrases in lists.values() for phrase in phrases})
    lengths = components.tokenizer.lengths([read_mark(text)[0] for text in distinct]) if distinct else []
    longest = components.tokenizer.room
    fits = {text for text, length in zip(distinct, lengths, strict=True) if length <= longest}
    count = sum(map(len, lists.values()))
    lists = {i: [phrase for phrase in phrases if phrase.text in fits] for i, phrases in lists.items()}
    left_out["phrases beyond the context"] = count - sum(map(len, lists.values()))
    left_out["without phrases"] = sum(not phrases for phrases in lists.values())
    lists = {i: phrases for i, phrases in lists.items() if phrases}
    if not any(phrase.present for phrases in lists.values() for phrase in phrases):
        raise DataError(
            f"{describe(record_set)}: no record shows one of the phrases ({wanted or 'data.regions.phrases'})"
        )
    return lists, {reason: number for reason, number in left_out.items() if number}


def check_wanted(wanted: Wanted) -> None:
    """Raise ConfigError for `phrases` that mean none."""
    if wanted is None or isinstance(wanted, str | Mapping):
        TextChoice.of("name" if wanted is None else wanted)
    elif not wanted or not all(isinstance(text, str) and text.strip() for text in wanted):
        raise ConfigError(
            f"phrases={wanted!r}: give a field, fields with probabilities, or a list of phrases"
        )


def with_regions(record_set: RecordSet) -> tuple[list[int], collections.Counter]:
    """(indices of records with an image, count of those left out by reason); DataError where none has a region."""
    indices, left_out = with_images(record_set)
    if not any(region_entries(record_set.describe(i)) for i in indices):
        raise DataError(
            f"{describe(record_set)}: no record has an image and boxes or a named mask (there is {fields_of(record_set)})"
        )
    return indices, left_out


def some_of(
    indices: Sequence[int], max_images: int | None, seed: int, left_out: collections.Counter
) -> list[int]:
    """At most `max_images` of the indices, drawn by the seed, in order; those beyond are counted."""
    if max_images is None or len(indices) <= max_images:
        return list(indices)
    left_out["beyond max_images"] += len(indices) - max_images
    return sorted(np.random.default_rng(seed).permutation(np.asarray(indices))[:max_images].tolist())


def read_pictures(
    record_set: RecordSet,
    indices: Sequence[int],
    *,
    masks: bool,
    batch_size: int,
    unreadable: list[dict[str, str]],
) -> Iterator[list[Picture]]:
    """The records' pictures in order, a few batches at a time, decoded by threads; those without are added to `unreadable`.

    Masks of another resolution are brought to their image's. Raises DataError if none can be read.
    """

    def load(position: int) -> Picture | ImageError:
        index = int(indices[position])
        try:
            record = record_set.load(index, mask=masks)
        except ImageError as error:
            return error
        if record.get("mask") is not None:
            record = record | {"mask": _of_size(record["mask"], open_image(record["image"]).size[::-1])}
        entries = region_entries(record)
        return Picture(index, record, entries, entry_boxes(entries, record.get("mask")))

    read = grain.MapDataset.range(len(indices)).map(load)
    options = grain.ReadOptions(num_threads=4, prefetch_buffer_size=2 * batch_size)
    numbered = zip(indices, read.to_iter_dataset(options), strict=True)
    any_read = False
    while part := list(itertools.islice(numbered, _BATCHES_AT_ONCE * batch_size)):
        unreadable += [
            {"id": record_set.describe(int(i))["id"], "error": str(x)}
            for i, x in part
            if isinstance(x, ImageError)
        ]
        pictures = [x for _, x in part if isinstance(x, Picture)]
        any_read = any_read or bool(pictures)
        if pictures:
            yield pictures
    if not any_read:
        raise DataError(f"{describe(record_set)}: no image can be read; the first: {unreadable[0]['error']}")


def _of_size(mask: Int[np.ndarray, "i j"], size: tuple[int, int]) -> Int[np.ndarray, "h w"]:
    """The mask's nearest pixels at another size (height, width)."""
    if mask.shape == size:
        return mask
    rows, columns = (
        ((np.arange(n) + 0.5) * m / n).astype(int) for n, m in zip(size, mask.shape, strict=True)
    )
    return mask[rows[:, None], columns]


def nearest_iou(box: Float[np.ndarray, " 4"], true: Float[np.ndarray, "n 4"]) -> float:
    """The greatest IoU of a box with one of those that are true."""
    return float(pairwise_iou(np.asarray(box)[None], true).max())


def instance_ious(
    masks: Bool[np.ndarray, "d h w"], ids: Int[np.ndarray, "h w"], members: Sequence[int]
) -> Float[np.ndarray, "d g"]:
    """IoU of each mask with the pixels of each member of a mask of ids (entry i has the id i + 1).

    Counts ids within each mask, for instances do not overlap and there may be hundreds.
    """
    wanted = np.asarray(members, np.int64) + 1
    size = int(max(ids.max(initial=0), wanted.max(initial=0))) + 1
    areas = np.bincount(ids.reshape(-1), minlength=size)[wanted]
    out = np.zeros((len(masks), len(wanted)))
    for row, mask in enumerate(masks):
        both = np.bincount(ids[mask], minlength=size)[wanted]
        union = mask.sum() + areas - both
        out[row] = np.divide(both, union, out=np.zeros(len(wanted)), where=union > 0)
    return out


def is_held_out(group: str) -> bool:
    """Whether a group is of the half whose absent phrases calibrate presence; by its name alone."""
    return hashlib.sha256(group.encode()).digest()[0] % 2 == 0


class RegionScores(Scores):
    """`Scores` whose rows are regions or phrases, several of them a group, with statistics of any kind."""

    def of_rows(self, name: str, statistic: Callable[[Integer[np.ndarray, " rows"]], float]) -> None:
        """A statistic of the rows, which are given by their numbers."""
        everything = statistic(np.arange(len(self.groups)))
        self.found.add(name, everything, bootstrap_interval(statistic, self.groups, **self._options))


def by_record(rows: Sequence[Mapping[str, Any]], *without: str) -> dict[int, list[dict[str, Any]]]:
    """Index of the record -> its rows, for a suite's examples: no "index", nothing of `without`, no None and no NaN."""
    out: dict[int, list[dict[str, Any]]] = collections.defaultdict(list)
    for row in rows:
        # NaN is the one value that is not itself.
        known = {k: v for k, v in row.items() if k not in ("index", *without) and v is not None and v == v}
        out[row["index"]].append(known)
    return out


def groups_of(record_set: RecordSet, indices: Sequence[int]) -> list[Hashable]:
    """The group of each record."""
    groups = record_set.groups()
    return [groups[i] for i in indices]


def _key(text: str) -> int:
    return text_id(read_mark(text)[0])
