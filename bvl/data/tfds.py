"""Sets that TFDS prepared as ArrayRecord files, read by name and without TensorFlow."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from bvl.data.images import ImageLike
from bvl.data.manifests import Row
from bvl.errors import DataError

_VALIDATION = ("validation", "valid", "dev")
_SLICE = re.compile(
    r"\s*(?P<name>[^\[\]]+?)\s*(?:\[\s*(?P<from>\d*)(?P<unit>%?)\s*:\s*(?P<to>\d*)(?P<unit2>%?)\s*\])?\s*"
)


class TfdsTable:
    """The examples of a prepared TFDS set.

    name: "name", "name/config" or "name/config:version".
    split: in TFDS's own words where it is more than a name ("train[:80%]", "train+test"); else all splits are read, and
      records say which is theirs ("validation" is "val") if there are several.
    data_dir: where TFDS keeps its sets; None = its default.
    fields: record field -> feature, "a/b" for one within another. Without it features keep their names, "text" is the
      caption, and "label" becomes `labels`. Classes appear by their names. Features of other arrays are left out.
    Raises DataError for a set that is not prepared, saying how to prepare it, and for a feature that it does not have.
    """

    free_columns = True
    holds_pixels = True

    def __init__(
        self, name: str, *, split: str | None, data_dir: str | None, fields: Mapping[str, str] | None = None
    ):
        self.name = name
        tfds = _tfds()
        builder = _prepared(tfds, name, data_dir)
        self._features = _flat(tfds, builder.info.features)
        self._fields = dict(fields or {})
        missing = [feature for feature in self._fields.values() if feature not in self._features]
        if missing:
            raise DataError(
                f"{name}: there is no feature {missing[0]!r}; there is {', '.join(self._features)}."
            )
        splits = [split] if is_expression(split) else list(builder.info.splits)
        images = [key for key, f in self._features.items() if isinstance(f, tfds.features.Image)]
        decoders: dict[str, Any] = {}
        for key in images:
            node = decoders
            *parents, last = key.split("/")
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = tfds.decode.SkipDecoding()
        try:
            self._sources = {s: builder.as_data_source(split=s, decoders=decoders) for s in splits}
        except (NotImplementedError, ValueError) as error:
            raise DataError(f"{name}: {error}\n{_how_to(name, data_dir)}") from error
        self._images = set(images)
        self._several = len(splits) > 1
        given = set(self._fields.values())
        # Record field -> feature. Only two fields of a record are pixels.
        self._mapping = {
            field: feature
            for field, feature in (
                {key.rpartition("/")[2]: key for key in self._features if key not in given} | self._fields
            ).items()
            if feature not in images or field in ("image", "mask")
        }

    def rows(self) -> Iterator[Row]:
        for split, source in self._sources.items():
            for i in range(len(source)):
                example = source[i]
                values = {
                    field: self._value(feature, _get(example, feature))
                    for field, feature in self._mapping.items()
                }
                values = {field: value for field, value in values.items() if value is not None}
                for field in {"image", "mask"} & values.keys():
                    values[field] = f"{split}-{i}"
                if isinstance(values.get("label"), str) and "labels" not in values:
                    values["labels"] = [values.pop("label")]
                if self._several:
                    values["split"] = "val" if split in _VALIDATION else split
                yield Row(f"{split} {i}", values, (split, i))

    def pixels(self, place: tuple[str, int], field: str) -> ImageLike | None:
        split, i = place
        return _get(self._sources[split][i], self._mapping[field])

    def _value(self, key: str, value: Any) -> Any:
        """The value of a feature as a record holds it; None for arrays that are no image."""
        feature = self._features[key]
        if key in self._images:
            return "image"
        names = getattr(getattr(feature, "feature", feature), "names", None)
        if isinstance(value, bytes):
            return value.decode("utf-8", "replace")
        if isinstance(value, list | np.ndarray) and (isinstance(value, list) or value.ndim == 1):
            return [v for v in (_scalar(v, names) for v in value) if v is not None]
        return _scalar(value, names)


def is_expression(split: str | None) -> bool:
    """Whether a split says more than a name."""
    return split is not None and ("[" in split or "+" in split)


def may_share_examples(a: str, b: str) -> bool:
    """Whether two splits of a TFDS set, names or expressions over them, may have examples in common."""
    return any(_may_meet(one, other) for one in a.split("+") for other in b.split("+"))


def _may_meet(a: str, b: str) -> bool:
    """`may_share_examples` for one split or slice each; slices apart are those like [:80%] and [80%:]."""
    found = _SLICE.fullmatch(a), _SLICE.fullmatch(b)
    if None in found:
        return True
    names = {"val" if part["name"] in _VALIDATION else part["name"] for part in found}
    units = {
        unit for part in found for end, unit in (part.group("from", "unit"), part.group("to", "unit2")) if end
    }
    if len(names) > 1 or len(units) > 1:
        return len(names) == 1
    starts = [int(part["from"] or 0) for part in found]
    ends = [int(part["to"]) if part["to"] else float("inf") for part in found]
    return max(starts) < min(ends)


def _scalar(value: Any, names: list[str] | None) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, str) or np.ndim(value) != 0:
        return value if isinstance(value, str) else None
    value = np.asarray(value).item()
    if names is None or not isinstance(value, int):
        return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    return names[value] if 0 <= value < len(names) else None


def _flat(tfds: Any, features: Any, prefix: str = "") -> dict[str, Any]:
    """ "a/b" -> feature of what is no dict of further features."""
    flat = {}
    for name, feature in features.items():
        if isinstance(feature, tfds.features.FeaturesDict):
            flat |= _flat(tfds, feature, f"{prefix}{name}/")
        else:
            flat[prefix + name] = feature
    return flat


def _get(example: Mapping[str, Any], key: str) -> Any:
    for name in key.split("/"):
        example = example[name]
    return example


def _prepared(tfds: Any, name: str, data_dir: str | None) -> Any:
    try:
        builder = tfds.builder(name, data_dir=data_dir, try_gcs=False)
    except Exception as error:  # unknown names, configs and versions raise several types
        first = str(error).strip().splitlines()[0]
        raise DataError(f"tfds={name!r} is not known: {first}\n{_how_to(name, data_dir)}") from error
    if not builder.info.splits:
        raise DataError(f"tfds={name!r} is not prepared in {builder.data_dir}.\n{_how_to(name, data_dir)}")
    return builder


def _how_to(name: str, data_dir: str | None) -> str:
    where = "" if data_dir is None else f", data_dir={data_dir!r}"
    return (
        f"Prepare it once, in Python:\n  import tensorflow_datasets as tfds\n"
        f"  tfds.builder({name!r}{where}, file_format='array_record').download_and_prepare()"
    )


def _tfds() -> Any:
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise DataError("TFDS sets need the package: pip install tensorflow-datasets") from error
    return tensorflow_datasets
