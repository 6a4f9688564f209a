"""Similarities and qualities written into records."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tiny_model import tiny_components

from bvl import cli
from bvl.data.array_records import write_array_records
from bvl.data.controls import Controls
from bvl.data.images import load_image
from bvl.data.records import read_records
from bvl.data.text_choice import ChosenText
from bvl.errors import ConfigError, DataError
from bvl.evals.score import quality_bins, quality_edges, score_records
from bvl.tasks.classify import Classify
from bvl.tasks.contrastive import embed_images, embed_texts

TEXTS = [
    "a nodule",
    "no nodule",
    "two cysts",
    "clear lungs",
    "a small mass",
    "normal heart",
    "one cyst",
    "a scar",
]


@pytest.fixture(scope="module")
def components():
    return tiny_components()


@pytest.fixture
def place(tmp_path):
    """Eight records, the last two of the split "val"; images and a mask in folders below."""
    folder = tmp_path / "set"
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(len(TEXTS)):
        Image.fromarray(rng.integers(0, 256, (40, 36, 3), np.uint8)).save(folder / "images" / f"{i}.png")
    write(folder)
    return folder


def write(folder, **changes):
    """`changes`: id -> fields that differ."""
    records = [
        {"id": f"r{i}", "image": f"images/{i}.png", "caption": text, "split": "train" if i < 6 else "val"}
        for i, text in enumerate(TEXTS)
    ]
    records = [{**r, **changes.get(r["id"], {})} for r in records]
    (folder / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def score(components, place, out, **options):
    bins = {} if "edges_file" in options else {"bins": 3}
    return score_records(components, place, out, **{"batch_size": 8} | bins | options)


def cosines(components, folder):
    image = embed_images(components, [folder / "images" / f"{i}.png" for i in range(8)], batch_size=8)
    return np.sum(image * embed_texts(components, TEXTS, batch_size=8), axis=1)


def test_edges_and_bins():
    values = np.array([0.0, 0.1, 0.2, 0.3, 0.9, 1.0])
    width = quality_edges(values, bins=4)
    np.testing.assert_allclose(width, [0, 0.25, 0.5, 0.75, 1.0])
    # An edge belongs to the bin above; what lies outside belongs to the nearest bin.
    assert quality_bins(np.array([-1, 0, 0.25, 0.4, 0.5, 0.75, 1.0, 2.0]), width).tolist() == [
        0,
        0,
        1,
        1,
        2,
        3,
        3,
        3,
    ]
    count = quality_edges(values, bins=3, by="count")
    assert np.bincount(quality_bins(values, count)).tolist() == [2, 2, 2]
    for values, options, error in (
        ([0.5, 0.5], {}, DataError),
        ([], {}, DataError),
        ([0, 1], {"bins": 1}, ConfigError),
        ([0, 1], {"by": "size"}, ConfigError),
    ):
        with pytest.raises(error):
            quality_edges(np.array(values), **options)


def test_what_is_written(tmp_path, place, components):
    before = (place / "records.jsonl").read_bytes()
    done = score(components, place, tmp_path / "scored")
    assert done.manifest == tmp_path / "scored" / "records.jsonl" and done.skipped == []
    folder = read_records(tmp_path / "scored")
    wanted = cosines(components, place)
    np.testing.assert_allclose([r["similarity"]["caption"] for r in folder.records], wanted, atol=2e-6)
    # The bins are those of the training records; the others fall into them.
    edges = np.linspace(wanted[:6].min(), wanted[:6].max(), 4)
    np.testing.assert_allclose(done.edges, edges, atol=2e-6)
    bins = [int((wanted[i] >= edges[1:3]).sum()) for i in range(8)]
    assert [r["quality"] for r in folder.records] == [{"caption": b} for b in bins]
    assert list(done.counts) == np.bincount(bins, minlength=3).tolist()
    about = json.loads((tmp_path / "scored" / "records.quality.json").read_text())
    assert about["edges"] == list(done.edges) and about["counts"] == list(done.counts)
    assert about["from"] == {"records": "set", "split": "train", "texts": 6}
    # The rest of a record is as it was, but for the path, which leads from here to the same picture.
    for old, new in zip(read_records(place).records, folder.records, strict=True):
        assert new["image"] == "../set/" + old["image"]
        assert {k: v for k, v in new.items() if k not in ("similarity", "quality", "image")} == {
            k: v for k, v in old.items() if k != "image"
        }
        np.testing.assert_array_equal(
            load_image(new["image"], tmp_path / "scored"), load_image(old["image"], place)
        )
    assert (place / "records.jsonl").read_bytes() == before
    # What is written is what the control reads.
    assert Controls(quality=3).quality_of(ChosenText("x", "caption"), folder.records[0]) == bins[0]


def test_lists_of_texts_and_several_fields(tmp_path, place, components):
    lists = {f"r{i}": {"captions": [TEXTS[i], None, TEXTS[0]]} for i in range(8)}
    write(place, **lists)
    once = score(components, place, tmp_path / "once.jsonl", text_field="captions", by="count")
    twice = score(components, once.manifest, tmp_path / "twice.jsonl")
    wanted = cosines(components, place)
    for i, record in enumerate(read_records(twice.manifest).records):
        first, nothing, _ = record["similarity"]["captions"]
        assert first == pytest.approx(wanted[i], abs=2e-6) and nothing is None
        assert record["similarity"]["caption"] == pytest.approx(wanted[i], abs=2e-6)
        assert set(record["quality"]) == {"captions", "caption"}
        assert record["quality"]["captions"][1] is None
    # Equally full bins of the twelve training texts, and four more of the others.
    assert sum(once.counts) == 16 and min(once.counts) >= 4


def test_records_that_cannot_be_scored(tmp_path, place, components, caplog):
    write(place, r1={"caption": None}, r2={"image": None})
    (place / "images" / "3.png").write_bytes(b"no picture")
    done = score(components, place, tmp_path / "scored")
    assert done.skipped == ["r3"] and "3.png" in caplog.text
    records = read_records(tmp_path / "scored").records
    assert ["quality" in r for r in records] == [True, False, False, False, True, True, True, True]
    assert "image" not in records[2] and records[3]["image"] == "../set/images/3.png"
    assert sum(done.counts) == 5


def test_edges_of_other_records(tmp_path, place, components):
    whole = score(components, place, tmp_path / "whole")
    val = score(components, place, tmp_path / "val", split="val", edges_file=whole.edges_file)
    assert val.edges == whole.edges
    expected = [r["quality"] for r in read_records(whole.manifest).records[6:]]
    assert [r["quality"] for r in read_records(val.manifest).records] == expected
    for content in ("{}", "no json", '{"edges": [2, 1, 0], "by": "width", "from": {}}'):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(DataError, match=r"bad\.json is not a \.quality\.json"):
            score(components, place, tmp_path / "x", edges_file=tmp_path / "bad.json")
    with pytest.raises(DataError, match="no such file"):
        score(components, place, tmp_path / "x", edges_file=tmp_path / "none.json")
    for given in ({"bins": 4}, {"by": "width"}):
        with pytest.raises(ConfigError, match="are bins already: leave out bins and by"):
            score(components, place, tmp_path / "x", edges_file=whole.edges_file, **given)


def test_pixels_within_files_are_written_beside(tmp_path, place, components):
    records = read_records(place).records
    expected = score(components, place, tmp_path / "scored")
    (tmp_path / "parquet").mkdir()
    columns = {name: [r[name] for r in records] for name in ("id", "caption", "split")}
    images = [(place / r["image"]).read_bytes() for r in records]
    pq.write_table(pa.table({**columns, "image": images}), tmp_path / "parquet" / "part-0.parquet")
    write_array_records(tmp_path / "set.arrayrecord", records, root=place)
    wanted = read_records(expected.manifest).records
    for name in ("parquet", "set.arrayrecord"):
        done = score(components, tmp_path / name, tmp_path / f"{name}_scored")
        found = read_records(done.manifest).records
        assert [r["quality"] for r in found] == [r["quality"] for r in wanted]
        for record, image in zip(found, images, strict=True):
            assert (done.manifest.parent / record["image"]).read_bytes() == image
            assert Path(record["image"]).suffix == ".png"


def test_what_is_refused(tmp_path, place, components):
    for out in (place, place / "records.jsonl"):
        with pytest.raises(DataError, match="exists already"):
            score(components, place, out)
    with pytest.raises(ConfigError, match=r"x\.csv: name a \.jsonl"):
        score(components, place, tmp_path / "x.csv")
    with pytest.raises(DataError, match="no record has an image and a text 'report'; fields .*caption"):
        score(components, place, tmp_path / "x", text_field="report")
    with pytest.raises(DataError, match="no split 'test'"):
        score(components, place, tmp_path / "x", split="test")
    config = dataclasses.replace(components.config, tasks={"diagnosis": Classify()})
    with pytest.raises(ConfigError, match="contrastive task; the tasks of this one are diagnosis"):
        score(dataclasses.replace(components, config=config), place, tmp_path / "x")
    for file in (place / "images").iterdir():
        file.write_bytes(b"")
    with pytest.raises(DataError, match="none of the 8 images can be read"):
        score(components, place, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_the_verb(tmp_path, place, components, monkeypatch, capsys):
    loaded = []
    monkeypatch.setattr("bvl.runs.load_components", lambda run, **k: loaded.append((run, k)) or components)
    (place / "images" / "7.png").write_bytes(b"")
    words = ["data", "score", "runs/clip", str(place), "--out", str(tmp_path / "out.jsonl"), "--bins", "2"]
    assert cli.main([*words, "--checkpoint", "best", "--by", "count", "--batch-size", "8"]) == 1
    assert loaded == [("runs/clip", {"checkpoint": "best"})]
    shown = capsys.readouterr()
    assert "out.jsonl and out.quality.json" in shown.out and "r7" in shown.err
    about = json.loads((tmp_path / "out.quality.json").read_text())
    assert len(about["edges"]) == 3 and about["by"] == "count"
    assert cli.main(["data", "score", "runs/clip", str(tmp_path / "nowhere"), "--out", "x"]) == 1
    assert "nowhere" in capsys.readouterr().err and len(loaded) == 1
