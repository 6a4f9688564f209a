"""The phantom source: a record for any index, from the seed and the index alone."""

import dataclasses
import io
import random

import numpy as np
from jaxtyping import Int
from PIL import Image

from bvl.data.phantoms.canvas import footprint, to_uint8
from bvl.data.phantoms.catalogue import FINDINGS, MODALITIES
from bvl.data.phantoms.plan import MAX_VISITS, PAINTERS, generator, mix, plan_scene
from bvl.data.phantoms.scene import Scene
from bvl.data.phantoms.text import region_texts, write_caption, write_report
from bvl.errors import ConfigError

SPLITS = ("train", "val", "test")

# Numbers that keep the uses of one seed apart.
_COUNT, _MODALITY, _SPLIT, _NOISE, _TEXT, _DUPLICATE = 21, 22, 23, 24, 25, 26


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phantoms:
    """Options of the phantom source.

    A patient has one modality and one to three images. Records depend on the seed and their index: more
    patients add records at the end and change none. `near_duplicate_fraction` of the records repeat an
    earlier image, noised and compressed anew, under an id and a patient of their own (`duplicate_of` names
    the original). The first `leaking_patients` patients with several images have them in two splits.
    """

    num_patients: int = 5000
    image_size: int = 64
    seed: int = 0
    modalities: tuple[str, ...] = MODALITIES
    vague_fraction: float = 0.1
    num_captions: int = 3
    val_fraction: float = 0.1
    test_fraction: float = 0.1
    near_duplicate_fraction: float = 0.0
    leaking_patients: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "modalities", tuple(self.modalities))
        if self.num_patients < 1:
            raise ConfigError(f"phantoms: num_patients must be at least 1, not {self.num_patients}")
        if not 32 <= self.image_size <= 1024:
            raise ConfigError(f"phantoms: image_size must lie in 32..1024, not {self.image_size}")
        if self.seed < 0:
            raise ConfigError(f"phantoms: seed must not be negative, is {self.seed}")
        if self.num_captions < 3:
            raise ConfigError(f"phantoms: num_captions must be at least 3, not {self.num_captions}")
        if not self.modalities or len(set(self.modalities)) != len(self.modalities):
            raise ConfigError(f"phantoms: modalities must name each modality once, not {self.modalities!r}")
        for name in self.modalities:
            if name not in MODALITIES:
                raise ConfigError(f"phantoms: unknown modality {name!r}; there are {', '.join(MODALITIES)}")
        for field in ("vague_fraction", "val_fraction", "test_fraction", "near_duplicate_fraction"):
            if not 0.0 <= getattr(self, field) <= 1.0:
                raise ConfigError(f"phantoms: {field} must lie in 0..1, not {getattr(self, field)}")
        if self.val_fraction + self.test_fraction > 1.0:
            raise ConfigError("phantoms: val_fraction and test_fraction add up to more than 1")
        if self.leaking_patients < 0:
            raise ConfigError(f"phantoms: leaking_patients must not be negative, is {self.leaking_patients}")


def _uniform(seed: int, stream: int, numbers: Int[np.ndarray, "n"]) -> np.ndarray:
    """A uniform number in 0..1 for each integer: `mix`, vectorised over its last argument."""
    start = np.uint64(mix(seed, stream))
    step, first, second = (
        np.uint64(0x9E3779B97F4A7C15),
        np.uint64(0xBF58476D1CE4E5B9),
        np.uint64(0x94D049BB133111EB),
    )
    with np.errstate(over="ignore"):
        z = start + numbers.astype(np.uint64) + step
        z = (z ^ (z >> np.uint64(30))) * first
        z = (z ^ (z >> np.uint64(27))) * second
    z ^= z >> np.uint64(31)
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53


class PhantomSource:
    """Random access to phantom records: `source[i]`, `len(source)`, `source.describe(i)`."""

    def __init__(self, config: Phantoms) -> None:
        self.config = config
        patients = np.arange(config.num_patients)
        counts = 1 + (_uniform(config.seed, _COUNT, patients) * MAX_VISITS).astype(np.int64)
        self._start = np.concatenate([[0], np.cumsum(counts)])
        several = np.flatnonzero(counts > 1)
        if len(several) < config.leaking_patients:
            raise ConfigError(
                f"phantoms: leaking_patients={config.leaking_patients}, but only {len(several)} of "
                f"{config.num_patients} patients have several images; raise num_patients"
            )
        self._leaking = several[: config.leaking_patients]
        self._leaking_set = frozenset(self._leaking.tolist())

    def __reduce__(self):
        return PhantomSource, (self.config,)

    def __repr__(self) -> str:
        return f"PhantomSource({self.config!r})"

    def __len__(self) -> int:
        return int(self._start[-1])

    def patients(self) -> Int[np.ndarray, "n"]:
        """The number of the patient of every record."""
        return np.repeat(np.arange(self.config.num_patients), np.diff(self._start))

    def splits(self) -> np.ndarray:
        """The split of every record, as an array of strings."""
        patients = self.patients()
        codes = self._split_codes(np.arange(self.config.num_patients))[patients]
        visits = np.arange(len(self)) - self._start[patients]
        follow_up = np.isin(patients, self._leaking) & (visits > 0)
        return np.array(SPLITS)[np.where(follow_up, (codes + 1) % len(SPLITS), codes)]

    def indices(self, split: str) -> Int[np.ndarray, "n"]:
        """The indices of the records of one split."""
        if split not in SPLITS:
            raise ConfigError(f"phantoms: unknown split {split!r}; there are {', '.join(SPLITS)}")
        return np.flatnonzero(self.splits() == split)

    def describe(self, index: int) -> dict:
        """The record of an index with `image` and `mask` None: texts, labels, boxes and facts are there."""
        return self._record(self._index(index), draw=False)

    def __getitem__(self, index: int) -> dict:
        """The record of an index: image uint8 [h, w, 3], mask of instance ids [h, w] (id k is boxes[k-1])."""
        return self._record(self._index(index), draw=True)

    def scene(self, index: int) -> Scene:
        """What the image of an index shows, before it is drawn."""
        patient, visit = self._visit(self._original(self._index(index)))
        return plan_scene(self.config.seed, patient, visit, self._modality(patient))

    def _index(self, index: int) -> int:
        index = int(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"phantoms: no record {index}, there are {len(self)}")
        return index % len(self)

    def _visit(self, index: int) -> tuple[int, int]:
        patient = int(np.searchsorted(self._start, index, side="right")) - 1
        return patient, index - int(self._start[patient])

    def _modality(self, patient: int) -> str:
        names = self.config.modalities
        return names[mix(self.config.seed, _MODALITY, patient) % len(names)]

    def _split_codes(self, patients: Int[np.ndarray, "n"]) -> Int[np.ndarray, "n"]:
        u = _uniform(self.config.seed, _SPLIT, patients)
        test, val = self.config.test_fraction, self.config.val_fraction
        return np.where(u < test, 2, np.where(u < test + val, 1, 0))

    def _split(self, patient: int, visit: int) -> str:
        code = int(self._split_codes(np.array([patient]))[0])
        return SPLITS[(code + 1) % len(SPLITS) if visit and patient in self._leaking_set else code]

    def _original(self, index: int) -> int:
        """The record whose image this one shows: itself, or an earlier one that it nearly duplicates."""
        share = self.config.near_duplicate_fraction
        while share and index:
            h = mix(self.config.seed, _DUPLICATE, index)
            if (h >> 11) * 2.0**-53 >= share:
                break
            index = mix(h) % index
        return index

    def _record(self, index: int, *, draw: bool) -> dict:
        config = self.config
        original = self._original(index)
        scene = self.scene(index)
        patient, visit = self._visit(index)
        size = config.image_size

        mask = np.zeros((size, size), np.uint8) if draw else None
        boxes = []
        for number, instance in enumerate(scene.instances, start=1):
            f = footprint(instance, size)
            if draw:
                mask[f.window][f.inside] = number
            rows, cols = np.flatnonzero(f.inside.any(1)), np.flatnonzero(f.inside.any(0))
            top, left = f.rows.start, f.cols.start
            box = [left + cols[0], top + rows[0], left + cols[-1] + 1, top + rows[-1] + 1]
            fact = scene.facts["findings"][instance.finding]
            texts = region_texts(
                scene.modality, instance.finding, instance.site, fact["size"], fact["severity"]
            )
            boxes.append(
                {
                    "box": [float(edge) / size for edge in box],
                    "name": instance.finding,
                    "texts": list(texts),
                    "site": instance.site,
                }
            )

        rng = random.Random(mix(config.seed, _TEXT, index))
        captions = [
            write_caption(rng, scene.facts, vague_fraction=config.vague_fraction)
            for _ in range(config.num_captions)
        ]
        findings, impression = write_report(rng, scene.facts)
        presence = {name: fact["presence"] for name, fact in scene.facts["findings"].items()}
        return {
            "id": _record_id(config.seed, index),
            "image": self._draw(scene, original, index) if draw else None,
            "caption": captions[0].text,
            "captions": [caption.text for caption in captions],
            "caption_statements": [list(caption.statements) for caption in captions],
            "findings": findings,
            "impression": impression,
            "labels": [name for name, value in presence.items() if value != "absent"],
            "labels_known": list(FINDINGS[scene.modality]),
            "uncertain_labels": [name for name, value in presence.items() if value == "uncertain"],
            "boxes": boxes,
            "mask": mask,
            "modality": scene.modality,
            "view": scene.view,
            "study_id": f"study-{config.seed}-{patient:07d}-{visit}",
            "patient_id": f"patient-{config.seed}-{patient:07d}",
            "split": self._split(patient, visit),
            "source": "phantoms",
            "licence": "CC0-1.0",
            "laterality": True,
            "facts": scene.facts,
            "duplicate_of": _record_id(config.seed, original) if original != index else None,
        }

    def _draw(self, scene: Scene, original: int, index: int) -> np.ndarray:
        size = self.config.image_size
        rng = generator(self.config.seed, _NOISE, original)
        pixels = to_uint8(PAINTERS[scene.modality].render(scene, size, rng))
        if original != index:
            noise = generator(self.config.seed, _NOISE, index).normal(0.0, 2.0, (size, size, 1))
            pixels = np.clip(pixels + noise, 0, 255).astype(np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "JPEG", quality=92)
            pixels = np.asarray(Image.open(buffer)).copy()
        return pixels


def _record_id(seed: int, index: int) -> str:
    return f"phantom-{seed}-{index:07d}"
