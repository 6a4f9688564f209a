"""Embeddings of many images into a file: what can be embedded, the texts beside them, and bad input."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tiny_model import tiny_components

from bvl.data.array_records import write_array_records
from bvl.errors import ConfigError, DataError
from bvl.evals.embed import embed_to_file
from bvl.evals.items import list_images
from bvl.tasks import contrastive

TEXTS = ["a nodule", None, "no nodule " * 20, "two cysts"]


@pytest.fixture(scope="module")
def components():
    return tiny_components()


@pytest.fixture
def records(tmp_path):
    """Four records of pictures that lie in tmp_path / "jsonl", one of them without a text."""
    folder = tmp_path / "jsonl"
    folder.mkdir()
    rng = np.random.default_rng(0)
    records = []
    for i, text in enumerate(TEXTS):
        Image.fromarray(rng.integers(0, 256, (40, 36, 3), np.uint8)).save(folder / f"{i}.png")
        records.append({"id": f"r{i}", "image": f"{i}.png", "caption": text})
    (folder / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return records


def embed(components, places, out, **options):
    options = {"batch_size": 4} | options
    done = embed_to_file(components, list_images(places), out, **options)
    return done, dict(np.load(out))


def test_every_format_of_records_gives_the_same(tmp_path, records, components):
    folder = tmp_path / "jsonl"
    images = [(folder / r["image"]).read_bytes() for r in records]
    (tmp_path / "parquet").mkdir()
    columns = {name: [r[name] for r in records] for name in ("id", "caption")}
    pq.write_table(pa.table({**columns, "image": images}), tmp_path / "parquet" / "part-0.parquet")
    write_array_records(tmp_path / "set.arrayrecord", records, root=folder)
    done, expected = embed(components, [folder], tmp_path / "x.npz")
    assert (done.count, done.skipped) == (4, [])
    assert list(expected["ids"]) == ["r0", "r1", "r2", "r3"]
    assert list(expected["text_ids"]) == ["r0", "r2", "r3"]
    image = contrastive.embed_images(components, [folder / r["image"] for r in records], batch_size=4)
    np.testing.assert_array_equal(expected["image_embed"], image)
    for place in ("parquet", "parquet/part-0.parquet", "set.arrayrecord"):
        _, found = embed(components, [tmp_path / place], tmp_path / "y.npz")
        assert found.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array, err_msg=f"{place} {name}")
    # Of several places the ids say which; the pixels are still found by the records' own.
    places = [tmp_path / "set.arrayrecord", folder / "0.png", folder]
    _, several = embed(components, places, tmp_path / "z.npz")
    assert list(several["ids"][[0, 4, 5]]) == [f"{places[0]}/r0", str(places[1]), f"{folder}/r0"]
    np.testing.assert_array_equal(several["image_embed"][:4], image)
    np.testing.assert_array_equal(several["image_embed"][5:], image)


def test_a_record_gives_its_first_text(tmp_path):
    records = [
        {"image": "0.png", "findings": "a spot", "impression": "a nodule"},
        {"image": "1.png", "impression": "normal"},
    ]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    assert [item.text for item in list_images([tmp_path])] == ["a spot", "normal"]


def test_long_texts_are_cut_or_read_whole(tmp_path, records, components, caplog):
    _, cut = embed(components, [tmp_path / "jsonl"], tmp_path / "x.npz")
    assert "1 of 3 texts are longer" in caplog.text
    caplog.clear()
    _, whole = embed(components, [tmp_path / "jsonl"], tmp_path / "x.npz", long_texts="chunks")
    assert "longer" not in caplog.text
    texts = [text for text in TEXTS if text]
    np.testing.assert_array_equal(
        whole["text_embed"], contrastive.embed_texts(components, texts, long="chunks", batch_size=4)
    )
    differs = np.abs(whole["text_embed"] - cut["text_embed"]).max(1) > 1e-3
    assert differs.tolist() == [False, True, False]


def test_unreadable_images_are_left_out_with_their_texts(tmp_path, records, components):
    (tmp_path / "jsonl" / "0.png").write_bytes(b"no picture")
    done, found = embed(components, [tmp_path / "jsonl"], tmp_path / "x.npz")
    assert (done.count, done.skipped) == (3, ["r0"])
    assert list(found["ids"]) == ["r1", "r2", "r3"] and list(found["text_ids"]) == ["r2", "r3"]
    assert found["image_embed"].shape[0] == 3 and found["text_embed"].shape[0] == 2
    for file in (tmp_path / "jsonl").glob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(DataError, match="none of the 4 images can be read"):
        embed(components, [tmp_path / "jsonl"], tmp_path / "y.npz")
    assert not (tmp_path / "y.npz").exists()
    with pytest.raises(ConfigError, match="is a folder"):
        embed(components, [tmp_path / "jsonl"], tmp_path)


def test_columns_and_splits_belong_to_records(tmp_path, records):
    table = tmp_path / "jsonl" / "pairs.csv"
    table.write_text("file,report\n0.png,a nodule\n3.png,two cysts\n")
    items = list_images([table], image_column="file", text_column="report")
    assert [(item.id, item.text) for item in items] == [("0.png", "a nodule"), ("3.png", "two cysts")]
    assert items[0].open().size == (36, 40)
    with pytest.raises(DataError, match="no column 'flie'; there is file, report"):
        list_images([table], image_column="flie")
    with pytest.raises(DataError, match="images without records"):
        list_images([tmp_path / "jsonl" / "0.png"], split="test")


def test_places_without_images_are_refused(tmp_path, records):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"no image files, and no records: .*it holds notes\.txt"):
        list_images([tmp_path / "empty"])
    with pytest.raises(DataError, match=r"did you mean records\.jsonl"):
        list_images([tmp_path / "jsonl" / "record.jsonl"])
    (tmp_path / "texts.csv").write_text("id,text\na,a nodule\n")
    with pytest.raises(DataError, match=r"texts\.csv: no record has an image"):
        list_images([tmp_path / "texts.csv"])
