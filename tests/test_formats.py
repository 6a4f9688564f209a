"""Formats whose files hold the pixels too: Parquet, ArrayRecord and sets that TFDS prepared."""

import builtins
import dataclasses
import io
import json
import pickle
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from bvl.data.array_records import write_array_records
from bvl.data.arrays import from_arrays
from bvl.data.phantoms import Phantoms
from bvl.data.pipeline import DataConfig, Pipeline
from bvl.data.records import group_of, read_records
from bvl.data.sources import RecordSet, Source
from bvl.data.text import Tokenizer, TokenizerConfig
from bvl.data.text_choice import text_id
from bvl.data.tfds import may_share_examples
from bvl.data.transforms import Preprocess
from bvl.errors import ConfigError, DataError, ImageError
from bvl.evals.base import same_place


def png(level, size=(8, 6)):
    file = io.BytesIO()
    Image.new("L", size, level).save(file, "PNG")
    return file.getvalue()


def levels(record_set):
    """The grey level of each record's image, None where there is none."""
    images = (record_set.load(i).get("image") for i in range(len(record_set)))
    return [None if image is None else np.asarray(image).flat[0] for image in images]


def write_parquet(path, columns, *, features=None, **options):
    table = pa.table(columns)
    if features is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **options)
    return path


def without(monkeypatch, *packages):
    """Makes imports of the packages fail."""
    real = builtins.__import__

    def fake(name, *args, **kwargs):
        if name.split(".")[0] in packages:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fake)


# --- Parquet ----------------------------------------------------------------------------------------------


def test_parquet_as_hugging_face_writes_it(tmp_path):
    features = {
        "image": {"_type": "Image"},
        "label": {"_type": "ClassLabel", "names": ["cyst", "mass"]},
        "tags": {"feature": {"_type": "ClassLabel", "names": ["x", "y"]}, "_type": "Sequence"},
    }
    start = 0
    for name, count in (
        ("train-00000-of-00002", 5),
        ("train-00001-of-00002", 2),
        ("validation-00000-of-00001", 3),
    ):
        columns = {
            "image": [{"bytes": png(start + i), "path": "scan.png"} for i in range(count)],
            "label": [i % 2 for i in range(count - 1)] + [-1],
            "tags": [[0, 1], [], None][:count] + [[1]] * (count - 3),
            "text": [f"text {start + i}" for i in range(count)],
            "age": [None, *range(1, count)],
        }
        write_parquet(
            tmp_path / "set" / "data" / f"{name}.parquet", columns, features=features, row_group_size=2
        )
        start += count
    train = RecordSet(Source(root=str(tmp_path / "set")))
    held = RecordSet(Source(root=str(tmp_path / "set"), split="val"))
    assert train.name == "set" and levels(train) == [0, 1, 2, 3, 4, 5, 6] and levels(held) == [7, 8, 9]
    first, second = train.describe(0), train.describe(1)
    assert first["caption"] == "text 0" and first["labels"] == ["cyst"] and first["tags"] == ["x", "y"]
    assert "age" not in first and second["age"] == 1 and "labels" not in train.describe(4)
    # Equal paths inside the files do not make images equal.
    assert len({train.describe(i)["id"] for i in range(7)}) == 7 and train.group_unit() == "image"
    assert levels(pickle.loads(pickle.dumps(train))) == levels(train)


def test_parquet_with_bytes_paths_and_nulls(tmp_path):
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / "1.png").write_bytes(png(11))
    columns = {
        "scan": [{"bytes": png(10), "path": None}, {"bytes": None, "path": "scans/1.png"}, None],
        "report": ["a", "b", "c"],
        "labels": ["x|y", '["z"]', None],
        "boxes": ['[{"box": [0, 0, 1, 1], "name": "all"}]', None, None],
        "raw": [b"1", b"2", b"3"],
    }
    path = write_parquet(tmp_path / "set.parquet", columns)
    source = Source(root=str(path), split=None, image_column="scan", text_column="report")
    records = RecordSet(source)
    assert records.name == "set" and levels(records) == [10, 11, None]
    assert [records.describe(i)["caption"] for i in range(3)] == ["a", "b", "c"]
    assert [records.describe(i).get("labels") for i in range(3)] == [["x", "y"], ["z"], None]
    assert records.describe(0)["boxes"][0]["name"] == "all" and "raw" not in records.describe(0)
    plain = write_parquet(tmp_path / "bytes.parquet", {"image": [png(3), None], "text": ["a", "b"]})
    assert levels(RecordSet(Source(root=str(plain), split=None))) == [3, None]
    paths = write_parquet(tmp_path / "paths.parquet", {"image": ["scans/1.png"], "text": ["a"]})
    assert levels(RecordSet(Source(root=str(paths), split=None))) == [11]


def test_parquet_masks(tmp_path):
    mask = io.BytesIO()
    Image.fromarray(np.array([[0, 1], [2, 2]], np.uint8)).save(mask, "PNG")
    path = write_parquet(tmp_path / "set.parquet", {"image": [png(3, (2, 2))], "mask": [mask.getvalue()]})
    records = RecordSet(Source(root=str(path), split=None))
    np.testing.assert_array_equal(records.load(0, mask=True)["mask"], [[0, 1], [2, 2]])
    assert records.load(0)["mask"] is None


def test_bad_parquet(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "set.parquet", {"image": [png(3)], "report": ["a"]})
    with pytest.raises(DataError, match="no column 'finding'; there is image, report"):
        RecordSet(Source(root=str(path), split=None, text_column="finding"))
    with pytest.raises(DataError, match="no column 'scan'; there is image, report"):
        RecordSet(Source(root=str(path), split=None, image_column="scan"))
    broken = write_parquet(tmp_path / "broken.parquet", {"image": [b"no image"], "text": ["a"]})
    with pytest.raises(ImageError, match="broken: broken.parquet#0: no image"):
        RecordSet(Source(root=str(broken), split=None)).load(0)
    (tmp_path / "cut.parquet").write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match="cut.parquet: not a complete Parquet file"):
        RecordSet(Source(root=str(tmp_path / "cut.parquet")))
    without(monkeypatch, "pyarrow")
    with pytest.raises(DataError, match=r"pip install 'bvl\[parquet\]'"):
        RecordSet(Source(root=str(path)))


# --- ArrayRecord ------------------------------------------------------------------------------------------


def test_array_records_give_back_what_was_written(tmp_path):
    (tmp_path / "a.png").write_bytes(png(5))
    records = [
        {"id": "a", "image": "a.png", "caption": "é", "labels": ["x"], "split": "train"},
        {"id": "b", "image": "a.png", "caption": "the same image", "split": "train"},
        {
            "id": "c",
            "image": np.full((4, 4, 3), 7, np.uint8),
            "mask": np.eye(4, dtype=np.uint8),
            "split": "train",
        },
        {"id": "d", "caption": "text alone", "split": "train", "boxes": [{"box": [0, 0, 1, 1], "name": "n"}]},
        {"id": "e", "image": Image.new("L", (3, 3), 9), "split": "val"},
        {"id": "f", "image": png(10), "split": "val"},
    ]
    folder = tmp_path / "shards"
    assert write_array_records(folder / "part-0.arrayrecord", records[:3], root=tmp_path) == 3
    assert write_array_records(folder / "part-1.array_record", records[3:]) == 3
    train = RecordSet(Source(root=str(folder)))
    assert train.name == "shards" and levels(train) == [5, 5, 7, None]
    assert train.describe(0) == {**records[0], "group_id": "a.png"}
    assert train.describe(3) == {**records[3], "boxes": [{"box": [0.0, 0.0, 1.0, 1.0], "name": "n"}]}
    np.testing.assert_array_equal(train.load(2, mask=True)["mask"], np.eye(4))
    assert train.load(2)["mask"] is None
    # The bytes of a file are kept as they are.
    assert train._folder.pixels(train.describe(0)) == (tmp_path / "a.png").read_bytes()
    assert levels(pickle.loads(pickle.dumps(RecordSet(Source(root=str(folder), split="val"))))) == [9, 10]
    one = RecordSet(Source(root=str(folder / "part-0.arrayrecord"), split=None))
    assert one.name == "part-0" and levels(one) == [5, 5, 7]


def test_array_records_without_ids_are_different_images(tmp_path):
    grey = [np.full((4, 4), value, np.uint8) for value in (*range(10), 0)]
    path = tmp_path / "set.arrayrecord"
    write_array_records(path, [{"image": image, "caption": f"text {i}"} for i, image in enumerate(grey)])
    groups = [group_of(record) for record in read_records(path).records]
    assert len(set(groups)) == 10 and groups[0] == groups[-1]


def test_bad_array_records(tmp_path, monkeypatch):
    path = tmp_path / "x.arrayrecord"
    with pytest.raises(ImageError, match="nowhere.png"):
        write_array_records(path, [{"id": "a", "image": "nowhere.png"}], root=tmp_path)
    with pytest.raises(DataError, match="record 'a' cannot be written as JSON"):
        write_array_records(path, [{"id": "a", "caption": {1, 2}}])
    with pytest.raises(ImageError, match="image of 'a': give a path"):
        write_array_records(path, [{"id": "a", "image": np.zeros((2, 2))}])
    assert not list(tmp_path.iterdir())
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")
    writer.write(b"something else")
    writer.close()
    with pytest.raises(DataError, match="record 0: not written by"):
        RecordSet(Source(root=str(path)))
    path.write_bytes(b"short")
    with pytest.raises(DataError, match="no complete ArrayRecord file among x.arrayrecord"):
        RecordSet(Source(root=str(path)))
    monkeypatch.setitem(sys.modules, "array_record.python", None)
    monkeypatch.delitem(sys.modules, "array_record.python.array_record_data_source", raising=False)
    with pytest.raises(DataError, match=r"pip install 'bvl\[arrayrecord\]'"):
        RecordSet(Source(root=str(path)))


# --- TFDS -------------------------------------------------------------------------------------------------

BUILDER = """
import io, sys
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

class TinyScans(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
            "image": tfds.features.Image(shape=(None, None, 1)),
            "label": tfds.features.ClassLabel(names=["cyst", "mass"]),
            "tags": tfds.features.Sequence(tfds.features.ClassLabel(names=["x", "y"])),
            "report": {"impression": tfds.features.Text()},
            "text": tfds.features.Text(),
            "age": np.int32,
            "spectrum": tfds.features.Tensor(shape=(2, 2), dtype=np.float32),
        }))

    def _split_generators(self, downloads):
        return {"train": self._generate_examples(range(6)), "validation": self._generate_examples(range(6, 9))}

    def _generate_examples(self, numbers):
        for i in numbers:
            file = io.BytesIO()
            Image.new("L", (8, 6), i).save(file, "PNG")
            file.seek(0)
            yield i, {"image": file, "label": i % 2, "tags": ["x"] * (i % 2), "text": f"text {i}", "age": i,
                      "report": {"impression": f"impression {i}"}, "spectrum": np.zeros((2, 2), np.float32)}

TinyScans(data_dir=sys.argv[1], file_format=sys.argv[2]).download_and_prepare()
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder of TFDS with the set tiny_scans; prepared elsewhere, so that this process knows only the files."""
    folder = tmp_path_factory.mktemp("tfds")
    done = subprocess.run(
        [sys.executable, "-c", BUILDER, str(folder), "array_record"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return str(folder)


def test_a_tfds_set_without_tensorflow(prepared):
    source = Source(tfds="tiny_scans:1.0.0", root=prepared)
    train, held = RecordSet(source), RecordSet(dataclasses.replace(source, split="val"))
    assert (
        train.name == "tiny_scans"
        and sorted(levels(train)) == list(range(6))
        and sorted(levels(held)) == [6, 7, 8]
    )
    for i, level in enumerate(levels(train)):
        record = train.describe(i)
        assert record["labels"] == [("cyst", "mass")[level % 2]] and record["caption"] == f"text {level}"
        assert record["tags"] == ["x"] * (level % 2) and record["age"] == level
        assert record["impression"] == f"impression {level}" and "spectrum" not in record
    assert levels(pickle.loads(pickle.dumps(train))) == levels(train)
    assert "tensorflow" not in sys.modules


def test_tfds_fields_and_splits(prepared):
    fields = {"caption": "report/impression", "group_id": "age"}
    mapped = RecordSet(Source(tfds="tiny_scans", root=prepared, split=None, tfds_fields=fields))
    assert len(mapped) == 9
    for i, level in enumerate(levels(mapped)):
        assert mapped.describe(i)["caption"] == f"impression {level}" and mapped.groups()[i] == str(level)
    part = RecordSet(Source(tfds="tiny_scans", root=prepared, split="train[:50%]+validation"))
    assert len(part) == 6
    with pytest.raises(DataError, match=r"no split 'test'; there is train \(6\), val \(3\)"):
        RecordSet(Source(tfds="tiny_scans", root=prepared, split="test"))
    with pytest.raises(DataError, match="no feature 'report/caption'; there is .*report/impression"):
        RecordSet(Source(tfds="tiny_scans", root=prepared, tfds_fields={"caption": "report/caption"}))


@pytest.mark.parametrize("name", ["tiny_scanz", "mnist", "mnist/no_such:3.0.1", "tiny_scans:9.9.9"])
def test_a_tfds_set_that_is_not_prepared(prepared, name):
    with pytest.raises(DataError) as error:
        RecordSet(Source(tfds=name, root=prepared))
    message = str(error.value)
    assert (
        repr(name) in message
        and "download_and_prepare()" in message
        and "file_format='array_record'" in message
    )
    assert prepared in message and len(message) < 1000


def test_a_tfds_set_in_another_format(tmp_path):
    folder = tmp_path / "tiny_scans" / "1.0.0"
    done = subprocess.run(
        [sys.executable, "-c", BUILDER, str(tmp_path), "array_record"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps({**info, "fileFormat": "tfrecord"}))
    with pytest.raises(DataError, match="(?s)array_record.*download_and_prepare"):
        RecordSet(Source(tfds="tiny_scans", root=str(tmp_path)))


def test_worker_processes_read_every_format(tmp_path, prepared):
    texts = [f"text {i}" for i in range(6)]
    write_parquet(
        tmp_path / "set.parquet", {"image": [png(i) for i in range(6)], "text": texts}, row_group_size=2
    )
    records = ({"id": str(i), "image": png(i), "caption": text} for i, text in enumerate(texts))
    write_array_records(tmp_path / "set.arrayrecord", records)
    sources = (
        Source(name="a", root=str(tmp_path / "set.parquet"), split=None),
        Source(name="b", root=str(tmp_path / "set.arrayrecord"), split=None),
        Source(name="c", tfds="tiny_scans", root=prepared, split=None),
        from_arrays(np.stack([np.full((6, 8), i, np.uint8) for i in range(6)]), texts, split=None),
    )
    pipeline = Pipeline(
        DataConfig(train=sources, preprocess=Preprocess(image_size=4), workers=1),
        sets=[RecordSet(source) for source in sources],
        keys_of_tasks={"task": frozenset({"image", "text_id"})},
        tokenizer=Tokenizer.train(texts, TokenizerConfig(vocab_size=60, context_length=8)),
        classes=(),
        batch_size=8,
        seed=0,
    )
    stream = list(pipeline.batches(start=0, stop=4))
    assert {int(source) for batch, _ in stream for source in batch["source"]} == {0, 1, 2, 3}
    pipeline.config = dataclasses.replace(pipeline.config, workers=0)
    for (batch, bad), (again, _) in zip(stream, pipeline.batches(start=0, stop=4), strict=True):
        assert not bad
        for key in batch:
            np.testing.assert_array_equal(batch[key], again[key])
        expected = [text_id(f"text {image.flat[0]}") for image in batch["image"]]
        assert batch["text_id"][:, 0].tolist() == expected


def test_sources_at_one_place():
    train, held = Source(tfds="a:1.0.0"), Source(tfds="a:2.0.0", split="val", text_column="findings")
    assert same_place(train, held) and not same_place(train, Source(tfds="b:1.0.0"))
    assert not same_place(Source(), Source()) and not same_place(train, Source(root="a"))


@pytest.mark.parametrize(
    "a, b, share",
    [
        ("train", "train", True),
        ("train", "val", False),
        ("fold-1", "fold-2[:5]", False),
        ("val", "validation", True),
        ("train", "train[:80%]", True),
        ("train[:80%]", "train[80%:]", False),
        ("train[:80%]", "train[70%:90%]", True),
        ("train[:80%]", "train[80:]", True),
        ("train[:80%]+test", "train[90%:]", False),
        ("train[:80%]+test", "test[:5]", True),
        ("train[:-5]", "val", True),
    ],
)
def test_splits_that_may_share_examples(a, b, share):
    assert may_share_examples(a, b) == may_share_examples(b, a) == share


def test_importing_needs_none_of_the_packages():
    code = (
        "import bvl.data.pipeline, sys\n"
        "assert not {'tensorflow_datasets', 'tensorflow', 'pyarrow'} & sys.modules.keys(), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_one_place_only():
    with pytest.raises(ConfigError, match="tfds_fields belongs to tfds="):
        Source(root="x", tfds_fields={"caption": "x"})
    with pytest.raises(ConfigError, match="phantoms or tfds, not both"):
        Source(phantoms=Phantoms(num_patients=3), tfds="a")
    assert Source(tfds="a/b:1.0.0").label == "a_b" and Source(tfds="a").at_root("r") == Source(tfds="a")
