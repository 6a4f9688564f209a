"""From sources to batches. The batch is a function of (seed, step), whatever the number of hosts and workers.

    sampler -> record -> transforms seeded by (seed, position) -> this host's contiguous rows -> batch -> prefetch

position = step * batch_size + row. Everything up to `batch` is random access (grain MapDataset), so a resume
needs the step alone.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Iterator
from typing import Any

import absl.flags
import grain
import numpy as np

from bvl.data.batch import REGION_NEEDS, Need, needs_of
from bvl.data.controls import Controls
from bvl.data.phrases import PhraseSampler, known_absent
from bvl.data.regions import PromptSampler, Regions, Visible, entry_boxes, region_entries
from bvl.data.sampler import Sampler, weight_at
from bvl.data.sources import RecordSet, Source
from bvl.data.text import Tokenizer, TokenizerConfig
from bvl.data.text_choice import drop_words, text_id
from bvl.data.transforms import Augment, Preprocess, apply
from bvl.errors import ConfigError, DataError, ImageError

logger = logging.getLogger(__name__)

# A record that cannot be read is replaced by another; after this many in a row the source is beyond help.
MAX_ATTEMPTS = 8


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """`root` is where sources without a place of their own are read from.

    workers: processes (0 = threads of this process, which is enough where PIL does the work).
    threads, prefetch: threads that build batches, and batches kept ready; with workers they are shared out
    among them, at least one each.
    texts_per_image: K of the text keys; a record with fewer different texts fills the rest with invalid ones.
    word_dropout: share of the words of a training text that are left out, drawn anew for each; one always stays.
    controls: what stands in front of captions to say which one is wanted.
    regions: how boxes and masks are shown to tasks that describe or find regions. Of the controls their texts have the
    length; their words are never dropped.
    classes: names of the label columns, None = all labels in training.
    """

    train: tuple[Source, ...] = (Source(),)
    root: str | None = None
    preprocess: Preprocess = Preprocess(image_size=224)
    augment: Augment = Augment()
    tokenizer: TokenizerConfig = TokenizerConfig()
    texts_per_image: int = 1
    word_dropout: float = 0.0
    controls: Controls = Controls()
    regions: Regions = Regions()
    classes: tuple[str, ...] | None = None
    max_bad_fraction: float = 0.01
    workers: int = 0
    threads: int = 4
    prefetch: int = 8

    def __post_init__(self):
        if not self.train:
            raise ConfigError("data.train is empty: name at least one source")
        if self.texts_per_image < 1:
            raise ConfigError(f"data.texts_per_image={self.texts_per_image}: must be at least 1")
        if not 0 <= self.word_dropout < 1:
            raise ConfigError(f"data.word_dropout={self.word_dropout}: must lie in [0, 1)")
        names = [s.label for s in self.train]
        if len(set(names)) < len(names) and self.root is None:
            raise ConfigError(f"data.train: source names must differ, got {names}; set name=")

        options = [option for s in self.train for option, _ in s.choice().options]
        for section in self.controls.sections:
            if section not in options:
                raise ConfigError(
                    f"data.controls.sections: no source reads the text {section!r}; they read "
                    f"{', '.join(dict.fromkeys(options))} (data.train.0.text)"
                )

    def augment_of(self, source: Source) -> Augment:
        """The random changes of a source's training images."""
        return self.augment if source.augment is None else source.augment

    def sources(self) -> tuple[Source, ...]:
        """The training sources with `root` filled in; phantoms give way to a root.

        Raises ConfigError for a root that no source would read.
        """
        if self.root is None:
            return self.train
        placed = tuple(s.at_root(self.root) for s in self.train)
        if placed != self.train:
            return placed
        if all(s.phantoms for s in self.train):
            return (Source(root=self.root),)
        raise ConfigError(
            f"data.root={self.root!r} is read by no source: each of data.train has a place of its own"
        )


@dataclasses.dataclass(frozen=True)
class DrawnText:
    """A training text, the same text before words were left out, and its controls as `Controls.prefix` takes them."""

    text: str
    whole: str
    controls: dict[str, Any]


class Pipeline:
    """Training batches of a weighted mixture of record sets."""

    def __init__(
        self,
        config: DataConfig,
        *,
        sets: list[RecordSet],
        keys_of_tasks: dict[str, frozenset[str]],
        tokenizer: Tokenizer | None,
        classes: tuple[str, ...],
        batch_size: int,
        seed: int,
    ):
        self.config, self.sets, self.tokenizer, self.classes = config, sets, tokenizer, classes
        self.batch_size, self.seed = batch_size, seed
        self.keys = frozenset().union(*keys_of_tasks.values())
        self.needs = needs_of(self.keys)
        if self.needs & (REGION_NEEDS | {Need.TEXT}) and tokenizer is None:
            raise ConfigError("a task reads text, but no tokenizer was given")
        self._with_prompt = bool(self.keys & {"prompt", "prompt_mask"})
        flipped = [s.config.laterality for s in sets if config.augment_of(s.config).flip_horizontal]
        if flipped and all(flipped):
            raise ConfigError(
                "data.augment.flip_horizontal=true mirrors no image, since every source says that left and right "
                "matter: set data.train.0.laterality=false where they do not, or leave the flip out"
            )
        needs = {name: needs_of(keys) for name, keys in keys_of_tasks.items()}
        self.indices, self.left_out = zip(*(s.usable(needs, config.regions) for s in sets), strict=True)
        self.sampler = Sampler(
            [len(i) for i in self.indices],
            [s.config.weight for s in sets],
            seed,
            batch_size=batch_size,
            classes=[s.classes(i) for s, i in zip(sets, self.indices, strict=True)],
        )
        self._class_index = {name: i for i, name in enumerate(classes)}
        shown = {"tokenizer": tokenizer, "height_width": config.preprocess.height_width}
        self._prompts = self._phrases = None
        if Need.REGIONS in self.needs:
            self._prompts = PromptSampler(config.regions, controls=config.controls, **shown)
        if Need.PHRASES in self.needs:
            self._phrases = PhraseSampler(config.regions, **shown)
            self._banks = [s.phrase_bank() for s in sets]
        self._control_notes: list[str] = []
        if self._with_prompt and {"quality", "prompt"} & set(config.controls.enabled):
            records = (
                (record := s.describe(int(i)), s.choice.in_order(record))
                for s, index in zip(sets, self.indices, strict=True)
                for i in index
            )
            self._control_notes = config.controls.check_records(records, tokenizer)

    @property
    def num_records(self) -> int:
        return sum(len(i) for i in self.indices)

    def summary(self) -> list[str]:
        """A line for each source: how many records, what was left out and why."""
        weights = [s.config.weight for s in self.sets]
        scheduled = sorted({step for w in weights if isinstance(w, tuple) for step, _ in w})
        totals = {step: sum(weight_at(w, step) for w in weights) for step in scheduled or [0]}
        lines = []
        for record_set, index, left_out in zip(self.sets, self.indices, self.left_out, strict=True):
            why = f" ({', '.join(f'{n} {reason}' for reason, n in left_out.items())})" if left_out else ""
            shares = ", ".join(
                f"{weight_at(record_set.config.weight, step) / total:.1%}"
                + (f" at step {step}" if scheduled else "")
                for step, total in totals.items()
            )
            balanced = f", balanced by {record_set.config.balance}" if record_set.config.balance else ""
            unfilled = record_set.unfilled_texts(index) if Need.TEXT in self.needs else []
            notes = f"; none has the text {' or '.join(map(repr, unfilled))}" if unfilled else ""
            if record_set.config.templates and "labels" not in dict(record_set.choice.options):
                notes += "; templates are not read, since they are forms of the text 'labels'"
            if Need.PHRASES in self.needs:
                room = self.config.regions.max_objects
                more = sum(len(region_entries(record_set.describe(int(i)))) > room for i in index)
                if more:
                    notes += (
                        f"; {more} have more than {room} objects: they teach no detection, and no boxes of phrases "
                        f"that name what is beyond; raise data.regions.max_objects"
                    )
            lines.append(
                f"source {record_set.name}: {len(index)} of {len(record_set)} records{why}, share {shares}{balanced}"
                f"{notes}"
            )
        if Need.PHRASES in self.needs and not self._tells_absence():
            lines.append(
                "no phrase is known to be absent anywhere: presence cannot be learned, and every phrase will be found; "
                "set boxes_complete=True on sources that box every object, or give records labels_known"
            )
        return lines + self._control_notes

    def _tells_absence(self) -> bool:
        """Whether some record is known not to show some name."""
        return any(
            known_absent(record_set.describe(int(i)), bank.complete)
            for record_set, index, bank in zip(self.sets, self.indices, self._banks, strict=True)
            for i in index
        )

    def example(self, position: int) -> dict[str, Any]:
        """The example at `position`: the declared batch keys, and "bad" with what could not be read."""
        source, place = self.sampler(position)
        bad = []
        for attempt in range(MAX_ATTEMPTS):
            record = int(self.indices[source][place])
            try:
                values = self.build(source, record, np.random.default_rng((self.seed, position)))
            except ImageError as error:
                bad.append(
                    {
                        "source": self.sets[source].name,
                        "id": self.sets[source].describe(record)["id"],
                        "error": str(error),
                    }
                )
                place = self.sampler.replacement(source, position, attempt)
                continue
            row = position % self.batch_size
            return {
                "row": np.int32(row),
                "record": np.int32(record),
                "source": np.int32(source),
                "valid": np.bool_(True),
                **values,
                "bad": bad,
            }
        raise DataError(
            f"source {self.sets[source].name!r}: {MAX_ATTEMPTS} records in a row could not be read; the last: {bad[-1]['error']}"
        )

    def build(self, source: int, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """The declared keys of one record, augmented with `rng`."""
        record_set, config = self.sets[source], self.config
        height, width = config.preprocess.height_width
        with_regions = bool(self.needs & REGION_NEEDS)
        record = record_set.load(index, mask=with_regions)
        entries = region_entries(record) if with_regions else []
        out: dict[str, np.ndarray] = {}
        shown = None
        if Need.IMAGE in self.needs:
            if record.get("image") is None:
                out["image"] = np.zeros((height, width, 3), np.uint8)
                out["image_box"] = np.zeros(4, np.float32)
            else:
                shown = apply(
                    record["image"],
                    preprocess=config.preprocess,
                    augment=config.augment_of(record_set.config),
                    rng=rng,
                    boxes=entry_boxes(entries, record.get("mask")) if with_regions else None,
                    mask=record.get("mask"),
                    allow_horizontal_flip=not record_set.config.laterality,
                )
                out["image"], out["image_box"] = shown.image, np.asarray(shown.image_box, np.float32)
            out["image_valid"] = np.bool_(record.get("image") is not None)
        if Need.TEXT in self.needs:
            count = config.texts_per_image
            drawn = self.draw_texts(record_set, record, rng)
            out["text_valid"] = np.arange(count) < len(drawn)
            missing = [""] * (count - len(drawn))
            # Two texts with the same meaning stay each other's positives, whichever words are left out.
            out["text_id"] = np.array(
                [text_id(text) for text in [d.whole for d in drawn] + missing], np.uint32
            )
            out["text"], out["text_mask"] = self.tokenizer.encode_texts([d.text for d in drawn] + missing)
            if self._with_prompt:
                rows = [config.controls.prefix(self.tokenizer, **d.controls, cut=True) for d in drawn]
                rows += [config.controls.prefix(self.tokenizer)] * len(missing)
                out["prompt"], out["prompt_mask"] = (np.stack(arrays) for arrays in zip(*rows, strict=True))
        if Need.LABELS in self.needs:
            out["labels"], out["label_valid"] = encode_labels(record, self._class_index)
        if with_regions:
            visible = Visible(record, entries, shown) if shown is not None else None
            # Generators of their own: what one task reads changes no other task's examples.
            prompt_rng, phrase_rng = rng.spawn(2)
            if self._prompts is not None:
                out |= self._prompts.draw(visible, out["image_box"], prompt_rng)
            if self._phrases is not None:
                out |= self._phrases.draw(record, visible, self._banks[source], phrase_rng)
        return {k: v for k, v in out.items() if k in self.keys}

    def draw_texts(
        self, record_set: RecordSet, record: dict[str, Any], rng: np.random.Generator
    ) -> list[DrawnText]:
        """The texts that training shows of a record, in this order of draws: texts, words, controls."""
        config, controls = self.config, self.config.controls
        chosen = record_set.choice.draw(record, rng, config.texts_per_image)
        texts = [
            drop_words(c.text, config.word_dropout, rng) if config.word_dropout else c.text for c in chosen
        ]
        given: list[dict[str, Any]] = [{} for _ in chosen]
        if self._with_prompt and controls.enabled:
            # The same number of draws, whatever the record has.
            kept = rng.random((len(chosen), len(controls.enabled))) >= controls.dropout
            for i, (origin, text) in enumerate(zip(chosen, texts, strict=True)):
                shown = dataclasses.replace(origin, text=text)
                known = controls.of_text(shown, record, self.tokenizer)
                names = itertools.compress(controls.enabled, kept[i])
                given[i] = {name: known[name] for name in names if name in known}
        return [
            DrawnText(text, whole.text, values)
            for text, whole, values in zip(texts, chosen, given, strict=True)
        ]

    def batches(
        self, *, start: int, stop: int, host: int = 0, num_hosts: int = 1
    ) -> Iterator[tuple[dict[str, np.ndarray], list[dict[str, str]]]]:
        """(batch, unreadable records met on the way) of steps start .. stop-1: this host's contiguous rows."""
        if self.batch_size % num_hosts:
            raise ConfigError(f"batch_size={self.batch_size} cannot be split over {num_hosts} hosts")
        if start >= stop:
            return
        rows = self.batch_size // num_hosts

        def example(local: int) -> dict[str, Any]:
            step, row = divmod(local, rows)
            return self.example(step * self.batch_size + host * rows + row)

        dataset = (
            grain.MapDataset.range(start * rows, stop * rows).map(example).batch(rows, batch_fn=_collate)
        )
        threads, prefetch, workers = self.config.threads, self.config.prefetch, self.config.workers
        if workers:
            # grain's worker processes read absl flags, which nobody parsed in a library call.
            if not absl.flags.FLAGS.is_parsed():
                absl.flags.FLAGS.mark_as_parsed()
            threads = max(1, threads // workers)
            # Each thread needs a place of its own in the buffer it fills; what is ready moves on to the worker's.
            options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
            stream = dataset.to_iter_dataset(options).mp_prefetch(
                grain.MultiprocessingOptions(
                    num_workers=workers, per_worker_buffer_size=max(1, prefetch // workers)
                )
            )
        else:
            options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
            stream = dataset.to_iter_dataset(options)
        for batch in stream:
            bad = batch.pop("bad")
            yield batch, bad


def _collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
    batch = {k: np.stack([e[k] for e in examples]) for k in examples[0] if k != "bad"}
    batch["bad"] = [b for e in examples for b in e["bad"]]
    return batch


def encode_labels(record: dict[str, Any], class_index: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """(labels f32 [C], label_valid bool [C]).

    A record without "labels" is valid for no class. With "labels_known" (names that were looked for) it is
    valid for those, else for all classes.
    """
    labels = np.zeros(len(class_index), np.float32)
    names = record.get("labels")
    if names is None:
        return labels, np.zeros(len(class_index), bool)
    for name in names:
        if name in class_index:
            labels[class_index[name]] = 1.0
    known = record.get("labels_known")
    if known is None:
        return labels, np.ones(len(class_index), bool)
    return labels, np.array([name in known or labels[i] > 0 for name, i in class_index.items()], bool)


def label_names(sets: list[RecordSet]) -> tuple[str, ...]:
    """All labels of the records, sorted."""
    return tuple(
        sorted({name for s in sets for i in range(len(s)) for name in s.describe(i).get("labels") or ()})
    )


def training_texts(
    sets: list[RecordSet], controls: Controls | None = None, regions: Regions | None = None
) -> Iterator[str]:
    """Every text that training could show, once for each record and field.

    controls: also the prompts. regions: also the texts and phrases of the regions, for tasks that read them.
    """
    for record_set in sets:
        for i in range(len(record_set)):
            record = record_set.describe(i)
            yield from record_set.choice.all(record)
            prompt = controls.prompt_of(record) if controls is not None else None
            if prompt is not None:
                yield prompt
        if regions is not None:
            yield from record_set.region_texts(regions)
