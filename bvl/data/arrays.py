"""Training on what a notebook holds: images and texts in memory as a source of records."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from bvl.data.manifests import Row
from bvl.errors import DataError

if TYPE_CHECKING:
    from bvl.data.sources import Source


@dataclasses.dataclass(frozen=True)
class Arrays:
    """Records in memory. The fields are what a config's dump keeps of them: enough to tell whether others are the same.

    Made by `from_arrays`. One that comes from a dump describes its records but does not hold them.
    """

    num_records: int
    content_hash: str

    @classmethod
    def holding(cls, images: Sequence[Any] | np.ndarray, records: list[dict[str, Any]]) -> Arrays:
        """The records, the i-th with the i-th image, which its field "image" names by content."""
        digest = hashlib.sha256()
        for record in records:
            digest.update(repr(sorted(record.items())).encode())
        arrays = cls(len(records), digest.hexdigest()[:16])
        # Not a field: pixels have no place in a config's dump or comparison.
        object.__setattr__(arrays, "_held", (images, records))
        return arrays

    def table(self) -> ArrayTable:
        """What reads the records; raises DataError where only their description is left."""
        if not hasattr(self, "_held"):
            raise DataError(
                f"these {self.num_records} records were arrays in memory (content {self.content_hash}), and a run "
                f"folder keeps only their description: to train or evaluate on them again, make the config with "
                f"bvl.data.from_arrays(...) of the same arrays"
            )
        return ArrayTable(*self._held)


class ArrayTable:
    """The table of arrays in memory."""

    free_columns = False
    holds_pixels = True

    def __init__(self, images: Sequence[Any] | np.ndarray, records: list[dict[str, Any]]):
        self._images, self._records = images, records

    def rows(self) -> Iterator[Row]:
        for i, record in enumerate(self._records):
            yield Row(f"record {i}", record, i)

    def pixels(self, place: int, field: str) -> np.ndarray | Image.Image | None:
        return self._images[place] if field == "image" else None


def from_arrays(
    images: UInt8[np.ndarray, "n h w"] | UInt8[np.ndarray, "n h w 3"] | Sequence[np.ndarray | Image.Image],
    texts: Sequence[str | Sequence[str] | None] | None = None,
    *,
    labels: Sequence[str | Sequence[str] | None] | None = None,
    patient_ids: Sequence[str | int] | None = None,
    splits: Sequence[str] | None = None,
    name: str = "arrays",
    split: str | None = "train",
) -> Source:
    """A source of what is in memory, for `DataConfig(train=(from_arrays(...),))`.

    images: uint8, grey or RGB; a list may hold arrays of different sizes and PIL images. They are not copied.
      Equal images are one image with several texts and stay in one split.
    texts: of each image one text, several alternatives, or None.
    labels: of each image one name, several, or None where it was not looked.
    patient_ids: whose image it is, so that no patient is in two splits or counted twice by an interval.
    splits: of each record; None = 90 % "train" and 10 % "val", by patient.
    split: the one this source reads, None = all; `dataclasses.replace(source, split="val")` reads the held-out ones.

    Source.text can be changed as for any other source; one text is the field "caption", alternatives are "captions".
    Raises DataError for lengths that differ, values of the wrong type and images that are not uint8.
    """
    from bvl.data.sources import Source

    count = len(images)
    if count == 0:
        raise DataError("from_arrays: there are no images")
    lists = {"texts": texts, "labels": labels, "patient_ids": patient_ids, "splits": splits}
    given = {key: list(values) for key, values in lists.items() if values is not None}
    wrong = {key: len(values) for key, values in given.items() if len(values) != count}
    if wrong:
        lengths = ", ".join(f"{length} {key}" for key, length in wrong.items())
        raise DataError(f"from_arrays: {count} images but {lengths}; give one for each image")
    _check_images(images)
    several = any(isinstance(text, list | tuple) for text in given.get("texts", ()))
    records = []
    for i in range(count):
        record: dict[str, Any] = {"id": str(i), "image": _content(images[i])}
        if "texts" in given:
            text = _strings(given["texts"][i], f"texts[{i}]")
            record |= {"captions": text} if several else {"caption": text[0] if text else None}
        if "labels" in given:
            record["labels"] = _strings(given["labels"][i], f"labels[{i}]")
        for key, field in (("patient_ids", "patient_id"), ("splits", "split")):
            if key in given:
                record[field] = _plain_string(given[key][i], f"{key}[{i}]")
        records.append({field: value for field, value in record.items() if value is not None})
    arrays = Arrays.holding(images, records)
    return Source(name=name, arrays=arrays, split=split, text="captions" if several else "caption")


def _check_images(images: Any) -> None:
    if isinstance(images, np.ndarray):
        if (
            images.dtype != np.uint8
            or images.ndim not in (3, 4)
            or (images.ndim == 4 and images.shape[-1] != 3)
        ):
            raise DataError(
                f"from_arrays: images has type {images.dtype} and shape {images.shape}; give uint8 [n, h, w] or "
                f"[n, h, w, 3]{_scaling(images)}"
            )
        return
    for i, image in enumerate(images):
        if isinstance(image, Image.Image):
            continue
        if not isinstance(image, np.ndarray):
            raise DataError(
                f"from_arrays: images[{i}] is a {type(image).__name__}; give an array or a PIL image"
            )
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[-1] != 3):
            raise DataError(
                f"from_arrays: images[{i}] has type {image.dtype} and shape {image.shape}; give uint8 [h, w] or "
                f"[h, w, 3]{_scaling(image)}"
            )


def _content(image: np.ndarray | Image.Image) -> str:
    """A name that equal images share, so that they count as one image with several texts and stay in one split."""
    # The pixels of a palette picture are numbers of colours.
    pixels = np.asarray(image.convert("RGBA") if getattr(image, "mode", "") == "P" else image)
    digest = hashlib.sha256(f"{pixels.shape}{pixels.dtype}".encode())
    digest.update(np.ascontiguousarray(pixels).tobytes())
    return f"image-{digest.hexdigest()[:16]}"


def _scaling(image: np.ndarray) -> str:
    if not np.issubdtype(image.dtype, np.floating) or not image.size or image.min() < 0 or image.max() > 1:
        return ""
    return ": values in 0..1 become so by (x * 255).round().astype(numpy.uint8)"


def _strings(value: Any, where: str) -> list[str] | None:
    if value is None:
        return None
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list | tuple | np.ndarray) or not all(isinstance(v, str) for v in values):
        raise DataError(f"from_arrays: {where} is {value!r}; give a string, a list of strings or None")
    return [str(v) for v in values]


def _plain_string(value: Any, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | np.integer):
        raise DataError(f"from_arrays: {where} is {value!r}; give a string or a whole number")
    return str(value)
