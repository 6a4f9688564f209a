"""What an evaluation suite is, how suites are run together, and how their results are written.

A suite reads one or more sources and returns metrics, what they depend on, and a line for every example. Names
of metrics carry their averaging; "<name>/ci95" is the 95 % percentile bootstrap interval of "<name>", by patient
where the records name patients. What is undefined (an area without positives, say) is absent and listed.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
from jaxtyping import Float

from bvl import config as config_lib
from bvl.config import Config
from bvl.data.manifests import find_manifest
from bvl.data.sources import RecordSet, Source
from bvl.data.tfds import may_share_examples
from bvl.errors import ConfigError, DataError, ImageError
from bvl.metrics.bootstrap import Interval
from bvl.runs import Components, RunFolder, write_atomic

LEVEL = 0.95
BOOTSTRAP_SAMPLES = 1000

Value = int | float | list[float]
# Encoded images that the suites of one evaluation share: (source, need) -> record index -> vector or error.
Cache = dict[tuple[str, str], dict[int, Any]]


@dataclasses.dataclass(frozen=True)
class EvalResult:
    """One suite's result.

    metrics: "accuracy" -> value, "accuracy/ci95" -> [low, high].
    provenance: what the numbers depend on, ready for JSON. per_example: one dict a record, ready for JSON.
    calibration: of presence, as calibration.json holds it, from a suite that makes one.
    """

    metrics: dict[str, Value]
    provenance: dict[str, Any]
    per_example: list[dict[str, Any]]
    calibration: dict[str, Any] | None = None


class Evaluation(NamedTuple):
    """Results of several suites: "<suite>/<metric>" -> value, and by suite what they depend on and the examples.

    calibration: of the first suite that made one.
    """

    metrics: dict[str, Value]
    provenance: dict[str, dict[str, Any]]
    per_example: dict[str, list[dict[str, Any]]]
    calibration: dict[str, Any] | None = None

    def flat(self) -> dict[str, Any]:
        """The metrics, with "<suite>/provenance" beside them."""
        return {**self.metrics, **{f"{name}/provenance": value for name, value in self.provenance.items()}}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suite:
    """Base of all suites. Fields of type Source are what it reads; they are opened once and kept."""

    def at_root(self, root: str) -> Suite:
        """This suite, reading `root` where a source has no place of its own."""
        return dataclasses.replace(self, **{k: s.at_root(root) for k, s in self.sources().items()})

    def sources(self) -> dict[str, Source]:
        """Field name -> source."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Source)}

    def reads_phantoms(self) -> bool:
        return any(source.phantoms is not None for source in self.sources().values())

    def opened(self, field: str = "source") -> RecordSet:
        """The records of the source in `field`."""
        return self._opened(field)

    @functools.cached_property
    def _opened(self) -> Callable[[str], RecordSet]:
        # A suite runs many times in a training run; its manifests are read once, and again by a new suite.
        return functools.cache(lambda field: RecordSet(getattr(self, field)))

    def check(self) -> None:
        """Raise DataError, with a way out, now for what `run` could not use later in a training run."""
        try:
            self.check_records()
        except DataError as error:
            raise DataError(
                f"evaluation suite {type(self).__name__}: {error}\n  Mend that, hold out more records, or train without "
                f"evaluation: eval.suites={{}} checkpoint.best=null"
            ) from error

    def check_config(self, config: Config) -> None:
        """Raise ConfigError for a run whose model cannot do what the suite asks for."""

    def check_records(self) -> None:
        """Raise DataError for records that `run` cannot use."""
        raise NotImplementedError

    def run(self, components: Components, *, batch_size: int, cache: Cache | None = None) -> EvalResult:
        """Evaluate a model. `cache` is shared by suites that see the same parameters."""
        raise NotImplementedError


def evaluate(components: Components, suites: Mapping[str, Suite], *, batch_size: int = 256) -> Evaluation:
    """Run suites on one model; images that several of them read are decoded and encoded once."""
    cache: Cache = {}
    metrics: dict[str, Value] = {}
    provenance: dict[str, dict[str, Any]] = {}
    per_example: dict[str, list[dict[str, Any]]] = {}
    calibration = None
    for name, suite in suites.items():
        try:
            result = suite.run(components, batch_size=batch_size, cache=cache)
        except (ConfigError, DataError) as error:
            raise type(error)(f"evaluation {name}: {error}") from error
        metrics |= {f"{name}/{key}": value for key, value in result.metrics.items()}
        provenance[name], per_example[name] = result.provenance, result.per_example
        calibration = calibration or result.calibration
    return Evaluation(metrics, provenance, per_example, calibration)


def write_eval(run: RunFolder, evaluation: Evaluation, *, name: str | None = None) -> dict[str, Value]:
    """Write the results into a run folder and return the flat metrics.

    Without `name` they are the training run's own: eval.json and predictions/<suite>.jsonl. With it they go to
    eval/<name>.json and predictions/<name>.<suite>.jsonl and touch neither. "<suite>/provenance" stands in the
    same file as the numbers. calibration.json is written where a suite has made a calibration.
    """
    if name is not None:
        check_name(name)
    for suite, rows in evaluation.per_example.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_atomic(predictions_path(run, suite, name=name), lines)
    path = run.eval if name is None else run.evals / f"{name}.json"
    write_atomic(path, json.dumps(evaluation.flat(), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    if evaluation.calibration is not None:
        write_atomic(run.calibration, json.dumps(evaluation.calibration) + "\n")
    return evaluation.metrics


def predictions_path(run: RunFolder, suite: str, *, name: str | None = None) -> Path:
    """Where the examples of a suite are written."""
    file = f"{suite}.jsonl" if name is None else f"{name}.{suite}.jsonl"
    return run.predictions / file.replace("/", "_")


def check_name(name: str) -> None:
    """Raises ConfigError for a name of an evaluation that cannot be that of a file."""
    if not name or set(name) & set('/\\:*?"<>|') or name.startswith("."):
        raise ConfigError(
            f'evaluation name {name!r}: it becomes a file name, so leave out / \\ : * ? " < > | and dots in front'
        )


class Collector:
    """Metrics as they are found: undefined ones are named instead of written, intervals stand beside values."""

    def __init__(self):
        self.metrics: dict[str, Value] = {}
        self.undefined: list[str] = []

    def add(self, name: str, value: float, interval: Interval | None = None) -> None:
        if not math.isfinite(value):
            self.undefined.append(name)
            return
        self.metrics[name] = float(value)
        if interval is not None and math.isfinite(interval.low):
            self.metrics[f"{name}/ci95"] = [interval.low, interval.high]


def overlaps_training(config: Config, source: Source) -> bool:
    """Whether a run of `config` may have trained on records of `source`: the same place, and no other split."""

    def meet(a: str | None, b: str | None) -> bool:
        if a is None or b is None or source.tfds is None:
            return a is None or b is None or a == b
        return may_share_examples(a, b)

    return any(
        same_place(trained, source) and meet(trained.split, source.split) for trained in config.data.sources()
    )


def same_place(a: Source, b: Source) -> bool:
    """Whether two sources read the same file of records, the same set of TFDS, arrays or phantoms."""
    if a.tfds or b.tfds:
        # Versions of a set have examples in common.
        names = [(s.tfds or "").partition(":")[0] for s in (a, b)]
        return names[0] == names[1]
    if a.root is None or b.root is None:
        places = [(s.phantoms, s.arrays) for s in (a, b)]
        return places[0] == places[1] != (None, None)
    try:
        return find_manifest(Path(a.root)).samefile(find_manifest(Path(b.root)))
    except DataError:
        # What a run was trained on may be gone since.
        return False


def provenance(
    components: Components,
    record_set: RecordSet,
    indices: Sequence[int],
    *,
    left_out: Mapping[str, int],
    unreadable: Sequence[dict[str, str]],
    undefined: Sequence[str],
    **more: Any,
) -> dict[str, Any]:
    """What a suite's numbers depend on: the records, the intervals, the preprocessing and the weights.

    indices: the records that were evaluated. "overlaps_training" is there, and true, where the model may have been
    trained on them.
    """
    groups = record_set.groups()
    overlaps = overlaps_training(components.config, record_set.config)
    return {
        "source": record_set.name,
        "split": record_set.config.split,
        "split_hash": record_set.split_hash(),
        "num_records": len(record_set),
        "num_evaluated": len(indices),
        "left_out": dict(left_out),
        "unreadable": list(unreadable),
        "undefined": list(undefined),
        "interval": {
            "unit": record_set.group_unit(),
            "num_groups": len({groups[i] for i in indices}),
            "level": LEVEL,
            "num_samples": BOOTSTRAP_SAMPLES,
        },
        "preprocess": components.preprocess.to_dict(),
        "preprocess_hash": config_lib.content_hash(components.preprocess.to_dict()),
        "tokenizer_hash": components.tokenizer.hash,
        "weights_hash": components.weights_hash(),
        "step": components.step,
        **({"overlaps_training": True} if overlaps else {}),
        **more,
    }


def encode_records(
    components: Components,
    record_set: RecordSet,
    indices: Sequence[int],
    *,
    need: str,
    batch_size: int,
    cache: Cache | None = None,
) -> tuple[Float[np.ndarray, "m d"], np.ndarray, list[dict[str, str]]]:
    """(features, their record indices, unreadable records) of the images of `indices`, in order.

    need: "embed" or "pooled". Unreadable images are left out and named. Raises DataError if none can be read.
    """
    known = (cache if cache is not None else {}).setdefault((_place(record_set.config), need), {})
    todo = [int(i) for i in indices if int(i) not in known]
    read: list[int] = []

    def readable() -> Iterator[Any]:
        for index, pixels in load_pixels(components, record_set, todo):
            if isinstance(pixels, ImageError):
                known[index] = pixels
            else:
                read.append(index)
                yield pixels

    done = 0
    for features in components.encode_images(readable(), frozenset({need}), batch_size):
        rows = np.asarray(getattr(features, need), np.float32)
        known.update(zip(read[done : done + len(rows)], rows, strict=True))
        done += len(rows)
    kept = np.array([i for i in indices if not isinstance(known[int(i)], ImageError)], np.int64)
    unreadable = [
        {"id": record_set.describe(int(i))["id"], "error": str(known[int(i)])}
        for i in indices
        if isinstance(known[int(i)], ImageError)
    ]
    if not len(kept):
        raise DataError(
            f"source {record_set.name!r}: none of its {len(unreadable)} images can be read; the first: "
            f"{unreadable[0]['error']}"
        )
    return np.stack([known[int(i)] for i in kept]), kept, unreadable


def load_pixels(
    components: Components, record_set: RecordSet, indices: Sequence[int]
) -> Iterator[tuple[int, np.ndarray | ImageError]]:
    """(record index, evaluation view uint8 [H, W, 3] or the error) in order, decoded by threads ahead of use."""
    if not len(indices):
        return

    def load(position: int) -> tuple[int, np.ndarray | ImageError]:
        index = int(indices[position])
        try:
            return index, components.pixels(record_set.load(index)["image"])
        except ImageError as error:
            return index, error

    dataset = grain.MapDataset.range(len(indices)).map(load)
    yield from dataset.to_iter_dataset(grain.ReadOptions(num_threads=4, prefetch_buffer_size=64))


def with_images(record_set: RecordSet) -> tuple[list[int], collections.Counter]:
    """(indices of records that have an image, count of those left out by reason); DataError if there is none."""
    indices = [i for i in range(len(record_set)) if record_set.describe(i).get("image") is not None]
    left_out: collections.Counter = collections.Counter()
    if len(indices) < len(record_set):
        left_out["without image"] = len(record_set) - len(indices)
    if not indices:
        raise DataError(f"{describe(record_set)}: none of its {len(record_set)} records has an image")
    return indices, left_out


def describe(record_set: RecordSet) -> str:
    """A source as an error message names it."""
    split = record_set.config.split
    return f"source {record_set.name!r} ({'all records' if split is None else f'split {split!r}'})"


def fields_of(record_set: RecordSet) -> str:
    """The fields that some record has, for an error message."""
    return ", ".join(
        sorted(
            {k for i in range(len(record_set)) for k, v in record_set.describe(i).items() if v is not None}
        )
    )


def _place(source: Source) -> str:
    """Sources with the same place and split have the same images, whatever is read beside them."""
    return json.dumps(config_lib.to_dict(source.place()), sort_keys=True)
