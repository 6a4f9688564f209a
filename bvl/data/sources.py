"""Sources of records: files, TFDS sets, arrays in memory, phantoms. Random access, text first, pixels on demand."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bvl.data import records as records_lib
from bvl.data.arrays import Arrays
from bvl.data.batch import Need, missing
from bvl.data.images import load_mask, open_image
from bvl.data.phantoms import Phantoms, PhantomSource
from bvl.data.phrases import PhraseBank, region_texts
from bvl.data.regions import Regions, region_entries
from bvl.data.sampler import check_weight
from bvl.data.text_choice import TextChoice
from bvl.data.tfds import TfdsTable, is_expression
from bvl.data.transforms import Augment
from bvl.errors import ConfigError, DataError

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Source:
    """Where records come from and how they are read.

    The place is one of these:
    root: a folder with records.jsonl, one CSV, or Parquet or ArrayRecord files, or such a file itself.
    phantoms: generated instead.
    tfds: "name/config:version" of a set that TFDS prepared; `root` is then the folder of TFDS, if it is not the
      default. tfds_fields: record field -> feature, where names differ ({"caption": "report/impression"}).
    arrays: what `bvl.data.from_arrays` holds.

    subfolder: where below data.root this source lies, when its root comes from there.
    split: the split to read, None = all. Where no record has one, 90 % are "train" and 10 % "val", by group.
    weight: share of the mixture relative to the other sources, or a schedule of (step, weight) points, with straight
      lines between them: ((0, 1.0), (1000, 0.1)).
    balance: "labels" or another field with strings: each of its values comes equally often. A record with several
      labels stands for each of them; records without any are one more value.
    text: the field to read, or fields and templates over fields ("{modality} of the {organ}") with probabilities;
      "labels" fills `templates`.
    descriptions: label -> texts that stand for it where labels are read as text, drawn anew each time.
    sentences: "one" trains on one random sentence of a text instead of all.
    laterality: left and right matter, so horizontal flips are forbidden.
    augment: random changes of this source's training images, None = those of data.augment.
    boxes_complete: every object whose name is among the source's boxes is boxed wherever it is, so that a name
      without a box is known not to be there.
    cache: keep decoded images, and masks where they are read, in memory (for sets that fit).
    """

    name: str = ""
    root: str | None = None
    subfolder: str = ""
    phantoms: Phantoms | None = None
    tfds: str | None = None
    tfds_fields: dict[str, str] = dataclasses.field(default_factory=dict)
    arrays: Arrays | None = None
    split: str | None = "train"
    weight: float | tuple[tuple[int, float], ...] = 1.0
    balance: str | None = None
    text: str | dict[str, float] = "caption"
    templates: tuple[str, ...] = ()
    descriptions: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    sentences: Literal["all", "one"] = "all"
    laterality: bool = True
    augment: Augment | None = None
    boxes_complete: bool = False
    cache: bool = False
    image_column: str = "image"
    text_column: str | None = None

    def __post_init__(self):
        places = [n for n in ("root", "phantoms", "tfds", "arrays") if getattr(self, n) is not None]
        if len(places) > 1 and places != ["root", "tfds"]:
            raise ConfigError(f"source {self.name or self.root!r}: give {' or '.join(places)}, not both")
        if self.tfds_fields and self.tfds is None:
            raise ConfigError(f"source {self.label!r}: tfds_fields belongs to tfds=")
        try:
            check_weight(self.weight)
        except ConfigError as error:
            raise ConfigError(f"source {self.label!r}: {error}") from None
        if self.augment is not None and self.augment.flip_horizontal and self.laterality:
            raise ConfigError(
                f"source {self.label!r}: its augment.flip_horizontal=true mirrors no image while laterality=true "
                f"says that left and right matter; change one of them"
            )
        if self.phantoms is not None or self.arrays is not None:
            if self.image_column != "image" or self.text_column is not None:
                raise ConfigError(
                    f"source {self.label!r}: image_column and text_column are of records in files; the texts of "
                    f"{places[0]} are chosen with text="
                )
        if self.descriptions and not self.choice().reads_labels():
            raise ConfigError(
                f"source {self.label!r}: descriptions stand for labels, but text={self.text!r} shows no labels"
            )
        self.choice()

    @property
    def label(self) -> str:
        """The name shown in logs and evaluations."""
        if self.name:
            return self.name
        if self.phantoms is not None:
            return "phantoms"
        if self.tfds is not None:
            return self.tfds.partition(":")[0].replace("/", "_")
        if self.arrays is not None:
            return "arrays"
        return Path(self.root).stem if self.root else "unnamed"

    def choice(self, text: str | dict[str, float] | None = None) -> TextChoice:
        """Which text of its records is read; `text` in place of the source's own."""
        return TextChoice.of(
            self.text if text is None else text,
            self.templates,
            descriptions=self.descriptions,
            sentences=self.sentences,
        )

    def at_root(self, root: str) -> Source:
        """This source, reading `root` where it has no place of its own yet."""
        if self.root or self.phantoms or self.tfds or self.arrays:
            return self
        return dataclasses.replace(self, root=str(Path(root) / self.subfolder))

    def place(self) -> Source:
        """Another source with the same place and split, and so with the same images, and nothing else."""
        kept = ("root", "phantoms", "tfds", "tfds_fields", "arrays", "split", "image_column", "text_column")
        return Source(**{name: getattr(self, name) for name in kept})

    def read(self) -> records_lib.RecordFolder:
        """The records of all splits at its place, which is no phantoms.

        Raises ConfigError without a place, DataError for records that cannot be used.
        """
        # The default column need not be there: records may be texts alone.
        image_column = self.image_column if self.image_column != "image" else None
        columns = {"image_column": image_column, "text_column": self.text_column}
        if self.tfds is not None:
            fields = {
                field: feature
                for field, feature in (("image", image_column), ("caption", self.text_column))
                if feature
            }
            table = TfdsTable(
                self.tfds, split=self.split, data_dir=self.root, fields=fields | self.tfds_fields
            )
            return records_lib.collect(table, name=self.label, root=None, manifest=self.tfds)
        if self.arrays is not None:
            return records_lib.collect(
                self.arrays.table(), name=self.label, root=None, manifest=f"arrays {self.label!r}"
            )
        if self.root is not None:
            return records_lib.read_records(self.root, **columns)
        raise ConfigError(f"source {self.name!r} has no place: set data.root=DIR (or its root=)")


class RecordSet:
    """The records of one split of an opened source."""

    def __init__(self, source: Source):
        self.config = source
        self.name = source.label
        self.choice = source.choice()
        # Apart, as a record without its mask must never replace one with it.
        self._cache: dict[bool, dict[int, dict[str, Any]]] = {False: {}, True: {}}
        if source.phantoms is not None:
            self._phantoms = PhantomSource(source.phantoms)
            everything = np.arange(len(self._phantoms))
            self._index = everything if source.split is None else self._phantoms.indices(source.split)
            described = (self._phantoms.describe(int(i)) for i in self._index)
            # There is always an image to draw; its name stands for it until then.
            self._records = [{**record, "image": record["id"]} for record in described]
        else:
            self._phantoms = None
            self._folder = source.read()
            # A split in the words of TFDS has selected its records already.
            split = None if source.tfds is not None and is_expression(source.split) else source.split
            self._records = records_lib.select_split(self._folder, split)

    def __len__(self) -> int:
        return len(self._records)

    def describe(self, index: int) -> dict[str, Any]:
        """The record without pixels ("image" says only whether and where there is one)."""
        return self._records[index]

    def load(self, index: int, *, mask: bool = False) -> dict[str, Any]:
        """The record with "image" decoded (PIL, mode L or RGB, or uint8 [h, w, 3]) and, if asked, "mask" as
        int [h, w]; None where absent.

        Raises ImageError for a file that cannot be read.
        """
        cached = self._cache[True].get(index)
        if cached is not None:
            return cached if mask or "mask" not in cached else {**cached, "mask": None}
        if not mask and index in self._cache[False]:
            return self._cache[False][index]
        record = dict(self._records[index])
        if self._phantoms is not None:
            drawn = self._phantoms[int(self._index[index])]
            record |= {"image": drawn["image"], "mask": drawn["mask"] if mask else None}
        else:
            for field, read in (("image", open_image), ("mask", load_mask)):
                if record.get(field) is None:
                    continue
                if field == "mask" and not mask:
                    record[field] = None
                    continue
                pixels = self._folder.pixels(record, field)
                name = None if isinstance(pixels, str | Path) else f"{self.name}: {record[field]}"
                record[field] = read(pixels, self._folder.root, name=name)
                if field == "mask":
                    record[field] = record[field].astype(np.min_scalar_type(record[field].max()))
        if self.config.cache:
            self._cache[mask][index] = record
            if mask:
                self._cache[False].pop(index, None)
        return record

    def groups(self) -> list[str]:
        return [records_lib.group_of(r) for r in self._records]

    def group_unit(self) -> str:
        """What an interval is resampled by: "patient", "group" where only groups are named, else "image"."""
        if any(record.get("patient_id") for record in self._records):
            return "patient"
        return "group" if records_lib.has_groups(self._records) else "image"

    def split_hash(self) -> str:
        """Hash of the ids of the records, in order."""
        return hashlib.sha256("\n".join(r["id"] for r in self._records).encode()).hexdigest()[:12]

    def licences(self) -> dict[str, int]:
        return dict(collections.Counter(str(r.get("licence") or "not stated") for r in self._records))

    def complete_names(self) -> tuple[str, ...]:
        """All names of regions, sorted, where a name without a box is known not to be there; else none."""
        if not self.config.boxes_complete:
            return ()
        return tuple(sorted({entry["name"] for record in self._records for entry in region_entries(record)}))

    def phrase_bank(self) -> PhraseBank:
        """What its regions are called, and what its records are known not to show."""
        return PhraseBank(self._records, self.complete_names())

    def region_texts(self, regions: Regions) -> Iterator[str]:
        """Every text and phrase of its regions, for a tokenizer to learn from."""
        return region_texts(self._records, regions, self.complete_names())

    def usable(
        self, needs_of_tasks: dict[str, frozenset[Need]], regions: Regions | None = None
    ) -> tuple[np.ndarray, dict[str, int]]:
        """(indices of records that give at least one task all it needs, count by reason of those left out).

        regions: says which texts describe regions, None = the defaults.
        """
        keep, left_out = [], collections.Counter()
        shown = {
            "region_choice": (regions or Regions()).text_choice(),
            "complete": self.complete_names(),
        }
        for i, record in enumerate(self._records):
            absent = [missing(record, needs, self.choice, **shown) for needs in needs_of_tasks.values()]
            if any(not a for a in absent):
                keep.append(i)
            else:
                left_out["without " + " and ".join(sorted(n.value for n in min(absent, key=len)))] += 1
        if not keep:
            reasons = ", ".join(f"{n} {why}" for why, n in left_out.items())
            needed = frozenset().union(*needs_of_tasks.values())
            read = f", text={self.config.text!r}" if Need.TEXT in needed else ""
            if Need.REGIONS in needed and regions is not None:
                read += f", data.regions.text={regions.text!r}"
            raise DataError(
                f"source {self.name!r} (split {self.config.split!r}{read}): none of its {len(self)} records has what the "
                f"tasks {', '.join(needs_of_tasks)} need: {reasons}. Fields that its records have: "
                f"{', '.join(self._fields())}"
            )
        return np.asarray(keep), dict(left_out)

    def unfilled_texts(self, indices: np.ndarray) -> list[str]:
        """The options of the choice of texts that none of these records can fill, as a misspelt field cannot."""
        alone = {
            name: dataclasses.replace(self.choice, options=((name, p),)) for name, p in self.choice.options
        }
        return [
            name
            for name, choice in alone.items()
            if not any(choice.offers(self._records[i]) for i in indices)
        ]

    def classes(self, indices: np.ndarray) -> list[np.ndarray] | None:
        """The positions within `indices` of the records of each value of the field `balance`; None without it.

        Raises DataError for a field that no record has or whose values are no strings.
        """
        field = self.config.balance
        if field is None:
            return None
        positions: dict[str | None, list[int]] = collections.defaultdict(list)
        for position, index in enumerate(indices):
            value = self._records[index].get(field)
            values = list(dict.fromkeys(value)) if isinstance(value, list | tuple) else [value]
            for one in values or [None]:
                if not isinstance(one, str | None):
                    raise DataError(
                        f"source {self.name!r}: balance={field!r} needs strings, record "
                        f"{self._records[index]['id']!r} has {one!r}"
                    )
                positions[one].append(position)
        if not positions.keys() - {None}:
            raise DataError(
                f"source {self.name!r}: no record has the field {field!r} to balance by; fields that its records "
                f"have: {', '.join(self._fields())}"
            )
        return [np.asarray(positions[value]) for value in sorted(positions, key=lambda v: (v is None, v))]

    def _fields(self) -> list[str]:
        return sorted({k for r in self._records[:1000] for k, v in r.items() if v is not None})
