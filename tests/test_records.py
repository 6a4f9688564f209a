import json

import pytest

from bvl.data.records import assign_splits, folder_name, group_of, has_groups, read_records, select_split
from bvl.errors import DataError


def write_jsonl(folder, *records):
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    (folder / "records.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write_table(folder, text, *, name="set.csv", encoding="utf-8"):
    (folder / name).write_bytes(text.encode(encoding))
    return folder / name


def error_of(path, **options):
    with pytest.raises(DataError) as caught:
        read_records(path, **options)
    return str(caught.value)


def test_reads_a_folder(tmp_path):
    folder = read_records(
        write_jsonl(
            tmp_path,
            {"id": "a", "image": "a.png", "caption": None, "labels": ["x"], "extra": {"k": 1}},
            "",
            {"id": 7, "caption": " ", "findings": "clear", "patient_id": 3},
        )
    )
    assert folder.name == tmp_path.name and folder.root == tmp_path
    assert folder.records == [
        {"id": "a", "image": "a.png", "labels": ["x"], "extra": {"k": 1}},
        {"id": "7", "findings": "clear", "patient_id": "3"},
    ]
    assert folder.counts["records"] == 2 and folder.counts["image"] == 1 and "caption" not in folder.counts


def test_a_manifest_file_is_named_by_its_stem(tmp_path):
    path = tmp_path / "small.jsonl"
    path.write_text('{"image": "a.png"}')
    folder = read_records(path)
    assert (folder.name, folder.records) == ("small", [{"id": "a.png", "image": "a.png"}])


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_two_column_tables(tmp_path, separator, ending, bom):
    rows = [("Image", "text"), ("a.png", f'"one{separator} two;{ending}three, ""four"""'), ("b.png", "É")]
    text = bom + ending.join(separator.join(row) for row in rows) + ending
    folder = read_records(write_table(tmp_path, text))
    assert folder.records == [
        {"id": "a.png", "image": "a.png", "caption": f'one{separator} two;{ending}three, "four"'},
        {"id": "b.png", "image": "b.png", "caption": "É"},
    ]


def test_table_columns(tmp_path):
    text = (
        ",id,image,text,labels,boxes,age\n"
        '0,r1,a.png,,x y|z,"[{""box"": [0, 0, 0.5, 1], ""name"": ""n""}]",41\n'
        "1,r2,b.png,words,x; y,,\n"
    )
    boxes = [{"box": [0.0, 0.0, 0.5, 1.0], "name": "n"}]
    assert read_records(write_table(tmp_path, text)).records == [
        {"id": "r1", "image": "a.png", "labels": ["x y", "z"], "boxes": boxes, "age": "41"},
        {"id": "r2", "image": "b.png", "caption": "words", "labels": ["x", "y"]},
    ]


def test_other_columns_can_be_chosen(tmp_path):
    path = write_table(tmp_path, "file,report,text\na.png,long,short\n")
    folder = read_records(path, image_column="file", text_column="report")
    assert folder.records == [{"id": "a.png", "image": "a.png", "caption": "long", "text": "short"}]
    assert "'filee'" in error_of(path, image_column="filee") and "file, report" in error_of(
        path, image_column="filee"
    )
    assert "image_column" in error_of(write_table(tmp_path, "file,report\na.png,long\n"))


def test_text_keeps_its_name_beside_a_caption(tmp_path):
    record = read_records(write_table(tmp_path, "image,text,caption\na.png,t,c\n")).records[0]
    assert (record["text"], record["caption"]) == ("t", "c")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("image,text\na.png,one, two\n", ["line 2", "3 fields", "double quotes"]),
        ('image,text\na.png,fine\nb.png,"open\nc.png,x\n', ["line 3", "quote"]),
        ("image,image\na,b\n", ["line 1", "'image' more than once"]),
        ("image,text,boxes\na.png,x,[1\n", ["line 2", "boxes", "JSON"]),
        ("image,text\n", ["no record"]),
        ("", ["no record"]),
    ],
)
def test_bad_tables(tmp_path, text, expected):
    message = error_of(write_table(tmp_path, text))
    assert str(tmp_path / "set.csv") in message and all(part in message for part in expected), message


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (['{"id": "a", "caption": "x"}', "", '{"id": '], ["line 3", "not JSON"]),
        (["[1, 2]"], ["line 1", "no JSON object"]),
        (["", ""], ["no record"]),
        ([{"id": "a", "image": "x"}, {"id": "a", "image": "y"}], ["line 2", "'a'", "line 1"]),
        ([{"id": "a", "labels": "x"}], ["'a'", "labels", "list of strings"]),
        ([{"id": "a", "labels": ["x", 1]}], ["labels", "list of strings"]),
        ([{"id": "a", "labels_known": "x"}], ["'a'", "labels_known", "list of strings"]),
        ([{"id": "a", "caption": ["x"]}], ["caption", "string"]),
        ([{"id": 1.5}], ["id is 1.5", "string"]),
        ([{"id": True}], ["id is True", "string"]),
        ([{"image": 3}], ["image is 3"]),
        ([{"id": "a", "boxes": {}}], ["boxes is {}", "list"]),
    ],
)
def test_bad_manifests(tmp_path, lines, expected):
    message = error_of(write_jsonl(tmp_path, *lines))
    assert "records.jsonl" in message and all(part in message for part in expected), message


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"box": [0, 0, 1], "name": "n"}, "four numbers"),
        ({"box": [0, 0, 1, "1"], "name": "n"}, "four numbers"),
        ({"box": [0, 0, 1, float("nan")], "name": "n"}, "four numbers"),
        ({"box": [0, 0, 1, 1.01], "name": "n"}, "outside 0..1"),
        ({"box": [-0.01, 0, 1, 1], "name": "n"}, "outside 0..1"),
        ({"box": [10, 20, 200, 180], "name": "n"}, "pixels"),
        ({"box": [0.5, 0, 0.2, 1], "name": "n"}, "reversed"),
        ({"box": [0.5, 0, 0.5, 1], "name": "n"}, "no area"),
        ({"box": [0, 0, 1, 1]}, "no name"),
        ({"box": [0, 0, 1, 1], "name": "n", "texts": "n"}, "list of strings"),
        ({"name": "n"}, '"box"'),
        ([0, 0, 1, 1], '"box"'),
    ],
)
def test_bad_boxes(tmp_path, entry, expected):
    good = {"box": [0, 0, 1, 1], "name": "n"}
    write_jsonl(tmp_path, {"id": "a", "image": "a"}, {"id": "b", "image": "b", "boxes": [good, entry]})
    message = error_of(tmp_path)
    assert "line 2" in message and "'b'" in message and "boxes[1]" in message and expected in message, message
    assert ("pixels" in expected) == ("pixels" in message)


def test_boxes_a_rounding_error_outside_are_clipped(tmp_path):
    entry = {"box": [-1e-7, 0, 1 + 1e-7, 1], "name": "n", "score": 2}
    write_jsonl(tmp_path, {"image": "a", "boxes": [entry]})
    expected = {"box": [0.0, 0.0, 1.0, 1.0], "name": "n", "score": 2}
    assert read_records(tmp_path).records[0]["boxes"] == [expected]


@pytest.mark.parametrize(
    ("raw", "hint"),
    [
        ('{"id": "a", "caption": "ok"}\n{"id": "b", "caption": "café"}'.encode("latin-1"), "café"),
        ('{"id": "a"}\n'.encode("utf-16"), "UTF-16"),
    ],
)
def test_not_utf8(tmp_path, raw, hint):
    (tmp_path / "records.jsonl").write_bytes(raw)
    message = error_of(tmp_path)
    assert "not UTF-8" in message and hint in message and ("line 2" in message) == (hint == "café")
    path = tmp_path / "set.csv"
    path.write_bytes("image,text\na.png,café\n".encode("latin-1"))
    assert "line 2" in error_of(path) and "not UTF-8" in error_of(path)


def test_names_keep_their_dots(tmp_path):
    folder = tmp_path / "set.v2"
    folder.mkdir()
    write_jsonl(folder, {"image": "a.png"})
    assert (
        folder_name(folder) == folder_name(folder / "records.jsonl") == read_records(folder).name == "set.v2"
    )


def test_missing_paths_name_what_is_there(tmp_path):
    write_jsonl(tmp_path, {"image": "a"})
    assert "did you mean records.jsonl" in error_of(tmp_path / "record.jsonl")
    assert "no such file or folder" in error_of(tmp_path / "none" / "records.jsonl")
    (tmp_path / "sub").mkdir()
    assert "it holds nothing" in error_of(tmp_path / "sub")
    write_table(tmp_path / "sub", "image,text\na,b\n", name="one.csv")
    assert read_records(tmp_path / "sub").name == "sub"
    write_table(tmp_path / "sub", "image,text\na,b\n", name="two.tsv")
    assert "one.csv, two.tsv" in error_of(tmp_path / "sub")
    (tmp_path / "notes.txt").write_text("x")
    assert ".jsonl, .csv, .tsv, .parquet" in error_of(tmp_path / "notes.txt")


def test_texts_of_one_image_get_ids_and_one_group(tmp_path):
    path = write_table(tmp_path, "image,text\na.png,one\na.png,two\nb.png,three\n")
    folder = read_records(path)
    assert [r["id"] for r in folder.records] == ["a.png", "a.png#2", "b.png"]
    assert [group_of(r) for r in folder.records] == ["a.png", "a.png", "b.png"]
    assert not has_groups(folder.records)


def test_text_only_records_are_named_by_line(tmp_path):
    write_jsonl(tmp_path, {"caption": "one"}, "", {"caption": "two"})
    assert [r["id"] for r in read_records(tmp_path).records] == ["line-1", "line-3"]


def test_groups():
    assert group_of({"id": "a", "group_id": "g", "patient_id": "p"}) == "p"
    assert group_of({"id": "a", "group_id": "g"}) == "g"
    assert group_of({"id": "a"}) == "a"
    assert has_groups([{"id": "a", "image": "x"}, {"id": "b", "group_id": "g"}])
    assert not has_groups([{"id": "a", "image": "x"}, {"id": "b"}])


def test_hashed_splits_keep_patients_together_and_do_not_depend_on_the_rest():
    records = [{"id": str(i), "patient_id": f"p{i // 3}"} for i in range(6000)]
    split = {r["id"]: r["split"] for r in assign_splits(records)}
    assert all(len({split[str(3 * p + k)] for k in range(3)}) == 1 for p in range(2000))
    share = sum(value == "val" for value in split.values()) / len(split)
    assert set(split.values()) == {"train", "val"} and 0.08 < share < 0.12
    assert {r["id"]: r["split"] for r in assign_splits(records[::-7])} == {
        r["id"]: split[r["id"]] for r in records[::-7]
    }
    assert "split" not in records[0]


@pytest.mark.parametrize("count, fewest", [(1, 0), (2, 1), (3, 1), (4, 2), (20, 2), (30, 2)])
def test_small_sets_hold_some_groups_out_and_keep_some(count, fewest):
    for start in range(0, 3000, 100):
        records = [{"id": str(start + i)} for i in range(count)]
        split = {r["id"]: r["split"] for r in assign_splits(records)}
        held_out = sum(value == "val" for value in split.values())
        assert fewest <= held_out <= count - 1
        assert {r["id"]: r["split"] for r in assign_splits(records[::-1])} == split


def test_select_split(tmp_path):
    splits = ["train", "train", "test"]
    folder = read_records(
        write_jsonl(tmp_path, *({"image": str(i), "split": s} for i, s in enumerate(splits)))
    )
    assert [r["id"] for r in select_split(folder, "train")] == ["0", "1"]
    assert len(select_split(folder, None)) == 3
    with pytest.raises(DataError, match=r"no split 'val'; there is test \(1\), train \(2\)"):
        select_split(folder, "val")


def test_a_partly_named_split_is_refused():
    with pytest.raises(DataError, match="1 of 2 records have no split.*'b'"):
        assign_splits([{"id": "a", "split": "train"}, {"id": "b"}])


def test_quality(tmp_path):
    quality = {"caption": 3, "findings": None, "captions": [0, None, 7]}
    folder = read_records(write_jsonl(tmp_path, {"id": "a", "caption": "x", "quality": quality}))
    assert folder.records[0]["quality"] == {"caption": 3, "captions": [0, None, 7]}
    for bad in (3, [1], {"caption": "3"}, {"caption": -1}, {"caption": True}, {"captions": [1, 0.5]}):
        message = error_of(write_jsonl(tmp_path, {"id": "a", "caption": "x", "quality": bad}))
        assert "line 1, record 'a': quality is" in message and '{"caption": 3}' in message
