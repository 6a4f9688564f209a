"""Sources: folders, tables and phantoms as record sets; what is usable and what is left out."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bvl.data.batch import Need, missing, needs_of
from bvl.data.phantoms import FINDINGS, Phantoms
from bvl.data.pipeline import DataConfig
from bvl.data.sources import RecordSet, Source
from bvl.data.text_choice import TextChoice
from bvl.errors import ConfigError, DataError, ImageError

IMAGE, TEXT, LABELS = Need.IMAGE, Need.TEXT, Need.LABELS
PHANTOMS = Phantoms(num_patients=30, image_size=32)


def write_folder(path: Path, records: list[dict]) -> str:
    """A records.jsonl folder in which every named image exists."""
    path.mkdir(parents=True, exist_ok=True)
    for i, record in enumerate(records):
        if record.get("image"):
            Image.new("L", (8, 6), i % 256).save(path / record["image"])
    (path / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    records = [
        {"id": "both", "image": "0.png", "caption": "zero", "labels": ["a"], "split": "train"},
        {"id": "text", "caption": "one", "split": "train", "patient_id": "p"},
        {"id": "image", "image": "2.png", "split": "train", "licence": "CC0"},
        {"id": "labelled", "image": "3.png", "labels": [], "split": "train"},
        {"id": "held", "image": "4.png", "caption": "four", "split": "val"},
    ]
    return write_folder(tmp_path_factory.mktemp("data") / "scans", records)


def test_a_folder(folder):
    records = RecordSet(Source(root=folder))
    assert [records.describe(i)["id"] for i in range(len(records))] == ["both", "text", "image", "labelled"]
    assert records.name == "scans"
    assert records.load(0)["image"].size == (8, 6) and records.load(1).get("image") is None
    assert records.groups() == ["both", "p", "image", "labelled"] and records.group_unit() == "patient"
    assert records.licences() == {"not stated": 3, "CC0": 1}
    assert [len(RecordSet(Source(root=folder, split=s))) for s in (None, "val")] == [5, 1]
    hashes = {RecordSet(Source(root=folder, split=s)).split_hash() for s in (None, "val", "train")}
    assert len(hashes) == 3
    with pytest.raises(DataError, match="no split 'test'"):
        RecordSet(Source(root=folder, split="test"))


def test_usable_records_and_reasons(folder):
    records = RecordSet(Source(root=folder))
    index, left_out = records.usable({"contrastive": frozenset({IMAGE, TEXT})})
    assert index.tolist() == [0]
    assert left_out == {"without image": 1, "without text": 2}
    # Enough for one of the tasks is enough.
    index, left_out = records.usable({"a": frozenset({IMAGE, TEXT}), "b": frozenset({IMAGE, LABELS})})
    assert index.tolist() == [0, 3] and left_out == {"without image": 1, "without text": 1}
    index, left_out = records.usable({"a": frozenset({TEXT})})
    assert index.tolist() == [0, 1] and left_out == {"without text": 2}


def test_no_record_has_what_the_tasks_need(folder):
    records = RecordSet(Source(name="mine", root=folder, text="findings"))
    with pytest.raises(DataError) as error:
        records.usable({"contrastive": frozenset({IMAGE, TEXT})})
    message = str(error.value)
    for part in (
        "'mine'",
        "none of its 4 records",
        "contrastive",
        "3 without text",
        "caption",
        "'train', text='findings'",
    ):
        assert part in message, message


def test_needs_of_batch_keys():
    assert needs_of(frozenset({"image", "text_id", "row"})) == {IMAGE, TEXT}
    with pytest.raises(ConfigError, match="region_colour"):
        needs_of(frozenset({"image", "region_colour"}))
    record = {"image": "x.png", "caption": " ", "labels": []}
    every = frozenset({IMAGE, TEXT, LABELS})
    assert missing(record, every, TextChoice.of("caption")) == {TEXT}


def test_an_unreadable_image(tmp_path):
    root = write_folder(tmp_path, [{"id": "x", "image": "x.png", "caption": "c"}])
    (tmp_path / "x.png").write_bytes(b"no image")
    with pytest.raises(ImageError, match="x.png"):
        RecordSet(Source(root=root, split=None)).load(0)


def test_cache_keeps_decoded_images(tmp_path):
    root = write_folder(tmp_path, [{"id": "x", "image": "x.png", "caption": "c"}])
    cached = RecordSet(Source(root=root, split=None, cache=True))
    plain = RecordSet(Source(root=root, split=None))
    first = cached.load(0)
    (tmp_path / "x.png").unlink()
    np.testing.assert_array_equal(np.asarray(cached.load(0)["image"]), np.asarray(first["image"]))
    with pytest.raises(ImageError):
        plain.load(0)


def test_phantoms():
    records = RecordSet(Source(phantoms=PHANTOMS, text="captions", cache=True))
    assert records.name == "phantoms" and records.group_unit() == "patient"
    described, loaded = records.describe(0), records.load(0)
    assert loaded["image"].shape == (32, 32, 3) and loaded["mask"] is None
    assert records.load(0, mask=True)["mask"].shape == (32, 32)
    assert records.load(0)["mask"] is None
    assert {k: v for k, v in loaded.items() if k not in ("image", "mask")} == {
        k: v for k, v in described.items() if k not in ("image", "mask")
    }
    assert described["labels_known"] == list(FINDINGS[described["modality"]])
    patients = [
        {r.describe(i)["patient_id"] for i in range(len(r))}
        for r in (RecordSet(Source(phantoms=PHANTOMS, split=s)) for s in ("train", "val", "test"))
    ]
    assert all(patients) and not (patients[0] & patients[1] or patients[0] & patients[2])
    index, left_out = records.usable({"c": frozenset({IMAGE, TEXT, LABELS})})
    assert len(index) == len(records) and left_out == {}


def test_classes_to_balance_by(folder, tmp_path):
    records = RecordSet(Source(root=folder, balance="labels"))
    assert [c.tolist() for c in records.classes(np.arange(4))] == [[0], [1, 2, 3]]
    assert [c.tolist() for c in records.classes(np.array([3, 0]))] == [[1], [0]]
    assert RecordSet(Source(root=folder)).classes(np.arange(4)) is None
    with pytest.raises(DataError, match="no record has the field 'modality'.*caption"):
        RecordSet(Source(root=folder, balance="modality")).classes(np.arange(4))
    several = [
        {"id": str(i), "caption": "x", "labels": v} for i, v in enumerate((["b", "a", "b"], ["a"], []))
    ]
    root = write_folder(tmp_path, [{**r, "age": 3} for r in several])
    records = RecordSet(Source(root=root, split=None, balance="labels"))
    assert [c.tolist() for c in records.classes(np.arange(3))] == [[0, 1], [0], [2]]
    with pytest.raises(DataError, match="needs strings, record '0' has 3"):
        RecordSet(Source(root=root, split=None, balance="age")).classes(np.arange(3))


@pytest.mark.parametrize(
    "options, match",
    [
        ({"root": "x", "phantoms": PHANTOMS}, "not both"),
        ({"weight": 0.0}, "above 0"),
        ({"weight": float("inf")}, "above 0"),
        ({"weight": ((0, float("nan")), (5, 1.0))}, "finite"),
        ({"weight": ((5, 1.0), (0, 1.0))}, "order of their steps"),
        ({"text": {}}, "field names"),
        ({"templates": ("no place",)}, "no '{}'"),
        ({"descriptions": {"cyst": ("dark",)}}, "shows no labels"),
        ({"phantoms": PHANTOMS, "text_column": "report"}, "records in files"),
    ],
)
def test_bad_sources(options, match):
    with pytest.raises(ConfigError, match=match):
        Source(**options)


def test_a_source_without_a_place():
    with pytest.raises(ConfigError, match="data.root=DIR"):
        RecordSet(Source())


# --- data.root --------------------------------------------------------------------------------------------


def test_root_is_for_sources_without_a_place():
    assert DataConfig(train=(Source(root="own"),)).sources() == (Source(root="own"),)
    assert DataConfig(root="r").sources() == (Source(root="r"),)
    mixed = (Source(name="a", root="own"), Source(name="b", text="findings"))
    assert DataConfig(train=mixed, root="r").sources() == (
        Source(name="a", root="own"),
        Source(name="b", root="r", text="findings"),
    )
    below = DataConfig(train=(Source(name="a", subfolder="x"), Source(name="b", subfolder="y")), root="r")
    assert [s.root for s in below.sources()] == ["r/x", "r/y"]


def test_root_takes_the_place_of_phantoms():
    train = (Source(phantoms=PHANTOMS, text="captions"),)
    assert DataConfig(train=train).sources() == train
    assert DataConfig(train=train, root="r").sources() == (Source(root="r"),)


def test_two_sources_of_one_name():
    with pytest.raises(ConfigError, match="names must differ"):
        DataConfig(train=(Source(root="x/scans"), Source(root="y/scans")))
    DataConfig(train=(Source(root="x/scans"), Source(name="other", root="y/scans")))
    with pytest.raises(ConfigError, match="empty"):
        DataConfig(train=())
