"""Regions in batches: prompts, objects and phrases follow the image; what is absent, shared or too many."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bvl.data.batch import KEY_NEEDS, Need, missing, needs_of
from bvl.data.controls import Controls
from bvl.data.phantoms import Phantoms
from bvl.data.phrases import PhraseBank, encode_phrases, entry_phrases, known_absent, read_mark
from bvl.data.pipeline import DataConfig, Pipeline, training_texts
from bvl.data.regions import KINDS, Regions, box_cells, mask_cells, region_entries, tight_box
from bvl.data.sources import RecordSet, Source
from bvl.data.text import Tokenizer, TokenizerConfig
from bvl.data.text_choice import TextChoice, text_id
from bvl.data.transforms import Augment, Preprocess
from bvl.errors import ConfigError, DataError

SIZE, STRIDE, CONTEXT = 32, 4, 12
CELLS = SIZE // STRIDE
PROMPT_KEYS = frozenset(k for k, need in KEY_NEEDS.items() if need is Need.REGIONS)
PHRASE_KEYS = frozenset(k for k, need in KEY_NEEDS.items() if need is Need.PHRASES)
KEYS = PROMPT_KEYS | PHRASE_KEYS | {"image", "image_box"}
ALL_KINDS = {"box": 1.0, "point": 1.0, "mask": 1.0}
FLIPS = Augment(crop_scale=(0.5, 1.0), flip_horizontal=True, flip_vertical=True)
NAMES = ("round spot", "long spot", "dark spot", "pale spot")


def draw_record(number: int, rng: np.random.Generator, size=(48, 40)) -> tuple[dict, np.ndarray, np.ndarray]:
    """(record, image, mask): disjoint rectangles, one level of grey each, so that pixels tell the instance."""
    height, width = size
    image, mask = np.zeros(size, np.uint8), np.zeros(size, np.uint8)
    boxes = []
    for k, (x, y) in enumerate([(2, 3), (22, 4), (4, 26), (21, 27)], start=1):
        w, h = rng.integers(8, 16, 2)
        image[y : y + h, x : x + w], mask[y : y + h, x : x + w] = 60 * k, k
        name = NAMES[int(rng.integers(2))]
        boxes.append(
            {
                "box": [x / width, y / height, (x + w) / width, (y + h) / height],
                "name": name,
                "texts": [f"grey {name}", name.split()[1]],
                "level": f"level {k}",
            }
        )
    record = {"id": f"r{number}", "boxes": boxes, "labels_known": list(NAMES), "labels": []}
    return record | {"image": f"{number}.png", "mask": f"m{number}.png"}, image, mask


def write(path: Path, drawn: list[tuple[dict, np.ndarray, np.ndarray | None]]) -> str:
    path.mkdir(parents=True, exist_ok=True)
    for record, image, mask in drawn:
        Image.fromarray(image).save(path / record["image"])
        if record.get("mask"):
            Image.fromarray(mask).save(path / record["mask"])
    (path / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r, _, _ in drawn))
    return str(path)


def make(*sources, keys=KEYS, regions=None, batch_size=8, seed=0, tasks=None, context=CONTEXT, **options):
    options = {"augment": FLIPS, "preprocess": Preprocess(image_size=SIZE, resize="squash")} | options
    regions = Regions(kinds=ALL_KINDS, max_regions=5, max_phrases=5) if regions is None else regions
    config = DataConfig(train=sources, regions=regions, **options)
    sets = [RecordSet(source) for source in config.sources()]
    tokenizer = Tokenizer.train(
        training_texts(sets, config.controls, regions),
        TokenizerConfig(vocab_size=400, context_length=context),
        config.controls.tokens(),
    )
    return Pipeline(
        config,
        sets=sets,
        keys_of_tasks=tasks or {"task": keys},
        tokenizer=tokenizer,
        classes=(),
        batch_size=batch_size,
        seed=seed,
    )


def batches(pipeline, start, stop):
    return [batch for batch, _ in pipeline.batches(start=start, stop=stop)]


def source(root, **options):
    return Source(root=root, split=None, laterality=False, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    rng = np.random.default_rng(0)
    return write(tmp_path_factory.mktemp("data") / "spots", [draw_record(i, rng) for i in range(6)])


@pytest.fixture(scope="module")
def spots(folder):
    return make(source(folder), regions=Regions(kinds=ALL_KINDS, text="level", max_regions=5, max_phrases=5))


@pytest.fixture(scope="module")
def stream(spots):
    return batches(spots, 0, 4)


def rows_of(stream):
    return [
        {key: value[i] for key, value in batch.items()} for batch in stream for i in range(len(batch["row"]))
    ]


def level_at(image, x, y):
    """The instance under a point of the image by its grey value; None near an edge, where resampling blurs it."""
    i, j = min(int(y * SIZE), SIZE - 1), min(int(x * SIZE), SIZE - 1)
    around = image[max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2, 0] / 60
    level = round(around.mean())
    return level if level and np.abs(around - level).max() < 0.15 else None


def assert_fills(cells, box):
    """The cells are those of the box, give or take the pixels that its sides cut."""
    box, pixel = box.astype(float), np.array([1, 1, -1, -1]) / SIZE
    inner, outer = box_cells(box + pixel, cells.shape), box_cells(box - pixel, cells.shape)
    assert (cells | outer == outer).all() and (cells | inner == cells).all()


# --- Prompts ----------------------------------------------------------------------------------------------


def test_shapes_and_types(stream):
    expected = {
        "region_box": (np.float32, (5, 4)),
        "region_point": (np.float32, (5, 2)),
        "region_mask": (np.bool_, (5, CELLS, CELLS)),
        "region_kind": (np.int8, (5,)),
        "region_valid": (np.bool_, (5,)),
        "region_text": (np.int32, (5, CONTEXT)),
        "region_text_mask": (np.bool_, (5, CONTEXT)),
        "region_prompt": (np.int32, (5, 1)),
        "region_prompt_mask": (np.bool_, (5, 1)),
        "object_box": (np.float32, (16, 4)),
        "object_valid": (np.bool_, (16,)),
        "object_mask": (np.bool_, (16, CELLS, CELLS)),
        "object_mask_valid": (np.bool_, (16,)),
        "object_known": (np.bool_, ()),
        "phrase": (np.int32, (5, CONTEXT)),
        "phrase_mask": (np.bool_, (5, CONTEXT)),
        "phrase_valid": (np.bool_, (5,)),
        "phrase_id": (np.uint32, (5,)),
        "phrase_present": (np.bool_, (5,)),
        "phrase_known": (np.bool_, (5,)),
        "phrase_object": (np.bool_, (5, 16)),
        "phrase_pixels": (np.bool_, (5, CELLS, CELLS)),
        "phrase_pixels_valid": (np.bool_, (5,)),
        "phrase_mark": (np.int32, (5,)),
    }
    assert expected.keys() == PROMPT_KEYS | PHRASE_KEYS
    for batch in stream:
        assert {k: (batch[k].dtype.type, batch[k].shape[1:]) for k in expected} == expected


def test_prompts_follow_flips_and_crops(spots, stream):
    """The level of grey under a prompt's centre is the one that its text tells, whatever its kind."""
    checked = {kind: 0 for kind in KINDS}
    for row in rows_of(stream):
        texts = [spots.tokenizer.decode(t) for t in row["region_text"]]
        shown = texts[: row["region_valid"].sum()]
        assert row["region_valid"].sum() >= 1 and len(set(shown)) == len(shown)
        for k in np.flatnonzero(row["region_valid"]):
            kind = KINDS[row["region_kind"][k]]
            box, point, cells = row["region_box"][k], row["region_point"][k], row["region_mask"][k]
            assert (box >= 0).all() and (box <= 1).all() and cells.any()
            if kind == "point":
                np.testing.assert_array_equal(box, np.tile(point, 2))
                assert cells.sum() == 1 and cells[int(point[1] * CELLS), int(point[0] * CELLS)]
            else:
                np.testing.assert_allclose(point, (box[:2] + box[2:]) / 2, atol=1e-6)
                np.testing.assert_array_equal(cells, box_cells(box.astype(float), (CELLS, CELLS)))
            level = level_at(row["image"], *point)
            if level is not None:
                assert texts[k] == f"level {level}"
                checked[kind] += 1
    assert min(checked.values()) > 8, checked


def test_rows_without_a_prompt_are_blank(spots, stream):
    for row in rows_of(stream):
        off = ~row["region_valid"]
        assert not row["region_box"][off].any() and not row["region_mask"][off].any()
        assert (row["region_text_mask"][off].sum(1) == 2).all()
        assert (row["region_prompt"] == spots.tokenizer.start_id).all() and row["region_prompt_mask"].all()


def test_the_same_for_every_start_and_whatever_else_is_read(folder, spots, stream):
    for a, b in zip(batches(spots, 2, 4), stream[2:], strict=True):
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)
    alone = make(source(folder), keys=PHRASE_KEYS, regions=spots.config.regions)
    for a, b in zip(batches(alone, 0, 2), stream[:2], strict=True):
        for key in PHRASE_KEYS:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)
    plain = make(source(folder), keys=frozenset({"image"}))
    np.testing.assert_array_equal(batches(plain, 0, 1)[0]["image"], stream[0]["image"])
    other = batches(make(source(folder), regions=spots.config.regions, seed=1), 0, 1)[0]
    assert not np.array_equal(other["region_box"], stream[0]["region_box"])


def test_a_random_part_of_more_boxes_than_rows(folder):
    pipeline = make(
        source(folder), regions=Regions(max_regions=2, max_objects=3, text="level"), augment=Augment()
    )
    seen = set()
    for row in rows_of(batches(pipeline, 0, 6)):
        assert row["region_valid"].all() and row["object_valid"].all()
        seen.update(pipeline.tokenizer.decode(t) for t in row["region_text"])
    assert len(seen) == 4
    assert "6 have more than 3 objects: they teach no detection" in pipeline.summary()[0]
    assert "more than" not in make(source(folder)).summary()[0]


def test_balanced_prompts_take_each_name_in_turn(tmp_path):
    rng = np.random.default_rng(3)
    record, image, _ = draw_record(0, rng)
    record["boxes"] = [
        {"box": [0.1, 0.1, 0.3 + 0.02 * i, 0.4], "name": name}
        for i, name in enumerate(["red"] * 12 + ["blue", "blue"])
    ]
    record.pop("mask", None)
    root = write(tmp_path, [(record, image, None)])
    options = {"keys": frozenset({"region_box"}), "augment": Augment()}
    made = make(source(root), regions=Regions(max_regions=4, balanced=True), **options)
    for batch in batches(made, 0, 3):
        wide = np.rint((batch["region_box"][:, :, 2] - 0.3) / 0.02)
        assert ((wide >= 12).sum(axis=1) == 2).all()
    plain = make(source(root), regions=Regions(max_regions=4), **options)
    (batch,) = batches(plain, 0, 1)
    assert (np.rint((batch["region_box"][:, :, 2] - 0.3) / 0.02) >= 12).sum() < 2 * len(batch["region_box"])


def test_jitter_moves_each_side_by_no_more_than_its_share(folder):
    options = {"augment": Augment(), "keys": PROMPT_KEYS}
    still = make(source(folder), regions=Regions(max_regions=4), **options)
    moved = make(source(folder), regions=Regions(max_regions=4, box_jitter=0.2), **options)
    true = {
        s.describe(i)["id"]: np.array([b["box"] for b in s.describe(i)["boxes"]])
        for s in still.sets
        for i in range(len(s))
    }
    ids = [still.sets[0].describe(i)["id"] for i in range(len(still.sets[0]))]
    shares = []
    for batch in batches(moved, 0, 3):
        for i, record in enumerate(batch["record"]):
            boxes = true[ids[record]]
            for box in batch["region_box"][i]:
                nearest = boxes[np.abs(boxes - box).sum(1).argmin()]
                shares.append((box - nearest) / np.tile(nearest[2:] - nearest[:2], 2))
    assert np.abs(shares).max() <= 0.2 + 1e-5 and np.abs(shares).mean(0).min() > 0.05
    for batch in batches(still, 0, 1):
        for i, record in enumerate(batch["record"]):
            got = batch["region_box"][i][np.lexsort(batch["region_box"][i].T)]
            want = true[ids[record]]
            np.testing.assert_allclose(got, want[np.lexsort(want.T)], atol=1e-6)


def test_without_a_mask_a_mask_prompt_is_a_box_and_a_point_lies_in_its_middle(tmp_path):
    record, image, _ = draw_record(0, np.random.default_rng(3))
    del record["mask"]
    root = write(tmp_path / "set", [(record, image, None)])
    pipeline = make(
        source(root), regions=Regions(kinds={"mask": 1.0, "point": 1.0}, text="level"), augment=Augment()
    )
    boxes = {entry["level"]: np.array(entry["box"]) for entry in record["boxes"]}
    kinds, offsets = set(), []
    for row in rows_of(batches(pipeline, 0, 4)):
        assert not row["object_mask_valid"].any() and not row["phrase_pixels_valid"].any()
        for k in np.flatnonzero(row["region_valid"]):
            box = boxes[pipeline.tokenizer.decode(row["region_text"][k])]
            kinds.add(KINDS[row["region_kind"][k]])
            if KINDS[row["region_kind"][k]] == "point":
                offsets.append((row["region_point"][k] - box[:2]) / (box[2:] - box[:2]))
    assert kinds == {"box", "point"}
    assert np.min(offsets) >= 0.25 - 1e-5 and np.max(offsets) <= 0.75 + 1e-5
    assert np.min(offsets) < 0.3 and np.max(offsets) > 0.7


def test_length_control_of_region_texts(folder):
    pipeline = make(
        source(folder),
        regions=Regions(text={"texts": 1.0, "name": 1.0}),
        controls=Controls(lengths=6, dropout=0.3),
    )
    tokenizer, with_length, valid = pipeline.tokenizer, 0, 0
    for row in rows_of(batches(pipeline, 0, 3)):
        for k in np.flatnonzero(row["region_valid"]):
            words = len(tokenizer.decode(row["region_text"][k]).split())
            prompt = row["region_prompt"][k][row["region_prompt_mask"][k]].tolist()
            assert prompt in (
                [tokenizer.start_id],
                [tokenizer.start_id, tokenizer.token_id(f"[LENGTH_{words}]")],
            )
            with_length, valid = with_length + len(prompt) - 1, valid + 1
    assert with_length / valid == pytest.approx(0.7, abs=0.12)


# --- Objects and phrases ----------------------------------------------------------------------------------


def test_objects_and_phrases_fit_the_image(spots, stream):
    present = absent = shared = 0
    for row in rows_of(stream):
        record = spots.sets[0].describe(int(row["record"]))
        names = {}  # the place among the objects -> entry
        for j in np.flatnonzero(row["object_valid"]):
            box = row["object_box"][j]
            level = level_at(row["image"], *((box[:2] + box[2:]) / 2))
            if level is not None:
                names[j] = record["boxes"][level - 1]
                assert row["object_mask_valid"][j]
                assert_fills(row["object_mask"][j], box)
        assert row["object_known"]
        texts = [spots.tokenizer.decode(t) for t in row["phrase"]]
        assert row["phrase_valid"].any()
        np.testing.assert_array_equal(row["phrase_known"], row["phrase_valid"])
        here = {entry["name"] for entry in record["boxes"]}
        for p in np.flatnonzero(row["phrase_valid"]):
            assert row["phrase_id"][p] == text_id(texts[p])
            if row["phrase_present"][p]:
                for j, entry in names.items():
                    assert row["phrase_object"][p, j] == (texts[p] == entry["name"])
                union = row["object_mask"][row["phrase_object"][p]].any(0)
                # Cells that two objects share count for their union alone, and slivers have no object.
                assert row["phrase_pixels_valid"][p] and not (union & ~row["phrase_pixels"][p]).any()
                assert row["phrase_object"][p].any()
                present += 1
                shared += row["phrase_object"][p].sum() > 1
            else:
                assert texts[p] in set(NAMES) - here
                assert not row["phrase_object"][p].any() and not row["phrase_pixels"][p].any()
                absent += 1
        assert row["phrase_present"].any() or not row["object_valid"].any()
    assert min(present, absent, shared) > 10


def test_pixels_of_a_phrase_count_objects_beyond_the_room(folder):
    pipeline = make(
        source(folder),
        regions=Regions(max_objects=1, phrases="texts", absent=0.0),
        augment=Augment(),
        preprocess=Preprocess(image_size=(48, 40), resize="squash"),
    )
    for row in rows_of(batches(pipeline, 0, 2)):
        record = pipeline.sets[0].load(int(row["record"]), mask=True)
        assert row["object_valid"].sum() == 1 and row["phrase_present"].sum() >= 1
        for p in np.flatnonzero(row["phrase_valid"]):
            phrase = pipeline.tokenizer.decode(row["phrase"][p])
            ids = [k for k, entry in enumerate(record["boxes"], 1) if phrase in entry["texts"]]
            assert phrase != "spot" or len(ids) == 4
            expected = mask_cells(np.isin(record["mask"], ids), (12, 10))
            np.testing.assert_array_equal(row["phrase_pixels"][p], expected)


def test_objects_without_room_are_not_taken_for_background(folder):
    """Of the images with as many objects as there is room for nothing changes."""
    options = {"keys": PHRASE_KEYS, "augment": Augment()}
    room = make(source(folder), regions=Regions(max_objects=4, max_phrases=4, phrases="texts"), **options)
    crowded = make(source(folder), regions=Regions(max_objects=3, max_phrases=4, phrases="texts"), **options)
    assert all(row["object_known"] for row in rows_of(batches(room, 0, 3)))
    boxed = {True: 0, False: 0}
    for row in rows_of(batches(crowded, 0, 3)):
        assert not row["object_known"] and row["object_valid"].all()
        entries = crowded.sets[0].describe(int(row["record"]))["boxes"]
        true = np.array([entry["box"] for entry in entries])
        kept = {int(np.abs(true - box).sum(1).argmin()) for box in row["object_box"]}
        assert row["phrase_present"].any()
        for p in np.flatnonzero(row["phrase_present"]):
            phrase = crowded.tokenizer.decode(row["phrase"][p])
            members = {i for i, entry in enumerate(entries) if phrase in entry["texts"]}
            count = len(members) if members <= kept else 0
            assert row["phrase_object"][p].sum() == count
            assert row["phrase_valid"][p] and row["phrase_pixels_valid"][p]
            boxed[count > 0] += 1
    assert min(boxed.values()) > 5, boxed


def test_phantoms_share_their_phrases():
    regions = Regions(text="texts", phrases="texts", absent=0.5, max_phrases=6)
    phantoms = Phantoms(num_patients=60, image_size=64)
    pipeline = make(Source(phantoms=phantoms, split=None), regions=regions, augment=Augment(), context=32)
    sides = 0
    for row in rows_of(batches(pipeline, 0, 5)):
        record = pipeline.sets[0].describe(int(row["record"]))
        for p in np.flatnonzero(row["phrase_valid"]):
            phrase = pipeline.tokenizer.decode(row["phrase"][p])
            truth = [phrase in entry["texts"] for entry in record["boxes"]]
            assert row["phrase_object"][p, : len(truth)].tolist() == truth
            assert row["phrase_present"][p] == any(truth) == row["phrase_pixels_valid"][p]
            sides += " left " in phrase + " "
    assert sides > 5


def test_records_without_boxes_teach_what_is_absent(tmp_path):
    record, image, mask = draw_record(0, np.random.default_rng(1))
    bare = {"id": "none", "image": "none.png", "boxes": [], "labels_known": ["round spot", "rare thing"]}
    unknown = {"id": "unknown", "image": "unknown.png"}
    labelled = {"id": "labelled", "image": "labelled.png", "labels": ["a"], "labels_known": ["a", "b"]}
    root = write(
        tmp_path / "set", [(record, image, mask), *((r, image, None) for r in (bare, unknown, labelled))]
    )
    pipeline = make(source(root), keys=PHRASE_KEYS)
    assert pipeline.left_out == ({"without boxes or known labels": 1},)
    rows = {int(row["record"]): row for row in rows_of(batches(pipeline, 0, 2))}
    texts = {
        i: {pipeline.tokenizer.decode(t) for t in row["phrase"][row["phrase_valid"]]}
        for i, row in rows.items()
    }
    assert texts[1] == {"round spot", "rare thing"} and texts[3] == {"b"}
    assert not rows[1]["phrase_present"].any() and rows[1]["phrase_known"].any()
    assert {i: bool(row["object_known"]) for i, row in rows.items()} == {0: True, 1: True, 3: False}
    prompts = make(source(root), keys=PROMPT_KEYS)
    assert prompts.left_out == ({"without boxes": 3},)
    both = make(source(root), tasks={"a": PROMPT_KEYS, "b": frozenset({"image"})})
    for row in rows_of(batches(both, 0, 1)):
        assert row["region_valid"].any() == (row["record"] == 0)


def test_what_is_known_to_be_absent():
    box = {"box": [0, 0, 1, 1]}
    record = {"boxes": [box | {"name": "Cell A"}], "labels": ["b"], "labels_known": ["cell a", "b", "c"]}
    assert known_absent(record) == ["c"]
    assert known_absent({"boxes": record["boxes"]}) == []
    assert known_absent({"boxes": record["boxes"]}, ("cell a", "cell d")) == ["cell d"]
    assert known_absent({"mask": "m.png", "mask_name": "lung"}, ("lung", "heart")) == ["heart"]
    bank = PhraseBank([{"boxes": [box | {"name": "c", "texts": ["see"]}, box | {"name": "c"}]}])
    assert bank.absent(record) == [[{"name": "c", "texts": ["see"]}, {"name": "c"}]]
    assert bank.absent({"labels_known": ["unseen"]}) == [[{"name": "unseen"}]]
    choice = TextChoice.of({"name": 1.0, "kind": 1.0})
    entry = {"name": "n", "texts": ["a *b* c"], "kind": "k"}
    assert entry_phrases(entry, choice) == ["n", "a b c", "k"]


def test_complete_boxes_make_other_names_absent(tmp_path):
    rng = np.random.default_rng(2)
    drawn = [draw_record(i, rng) for i in range(4)]
    for record, _, _ in drawn:
        del record["labels_known"], record["labels"]
    for entry in drawn[0][0]["boxes"]:
        entry["name"] = "other thing"
    root = write(tmp_path / "set", drawn)
    options = {"keys": PHRASE_KEYS, "augment": Augment()}
    silent = make(source(root), **options)
    assert all(
        not row["phrase_valid"][~row["phrase_present"]].any() for row in rows_of(batches(silent, 0, 2))
    )
    assert silent.summary()[1].startswith("no phrase is known to be absent anywhere")
    assert len(make(source(root), keys=PROMPT_KEYS).summary()) == 1
    complete = make(source(root, boxes_complete=True), **options)
    assert len(complete.summary()) == 1
    absent = {
        complete.tokenizer.decode(t)
        for row in rows_of(batches(complete, 0, 4))
        if row["record"] != 0
        for t in row["phrase"][row["phrase_valid"] & ~row["phrase_present"]]
    }
    assert "other thing" in absent and absent <= {"other thing", *NAMES}


@pytest.mark.parametrize("boxed", [False, True])
def test_a_named_mask_is_one_region(tmp_path, boxed):
    image = np.zeros((40, 40), np.uint8)
    mask = np.zeros((40, 40), np.uint8)
    mask[10:30, 5:25] = 1
    mask[10:20, 5:15] = 0
    record = {"id": "a", "image": "a.png", "mask": "m.png", "mask_name": "left lung"}
    if boxed:
        entry = {"box": [0.1, 0.2, 0.7, 0.8], "name": "left lung"}
        record["boxes"] = [{"box": [0, 0, 0.1, 0.1], "name": "marker"}, entry]
    assert len(region_entries(record)) == (2 if boxed else 1)
    root = write(tmp_path / "set", [(record, image, mask)])
    pipeline = make(
        source(root),
        regions=Regions(kinds={"mask": 1.0}),
        augment=Augment(),
        preprocess=Preprocess(image_size=40, resize="squash"),
        batch_size=1,
    )
    (row,) = rows_of(batches(pipeline, 0, 1))
    expected = mask_cells(mask > 0, (10, 10))
    texts = [pipeline.tokenizer.decode(t) for t in row["region_text"]]
    k = texts.index("left lung")
    assert row["region_kind"][k] == KINDS.index("mask")
    np.testing.assert_array_equal(row["region_mask"][k], expected)
    np.testing.assert_allclose(row["region_box"][k], [5 / 40, 10 / 40, 25 / 40, 30 / 40], atol=1e-6)
    j = int(boxed)
    np.testing.assert_allclose(
        row["object_box"][j], entry["box"] if boxed else [5 / 40, 10 / 40, 25 / 40, 30 / 40], atol=1e-6
    )
    assert row["object_mask_valid"].sum() == 1
    p = [pipeline.tokenizer.decode(t) for t in row["phrase"]].index("left lung")
    np.testing.assert_array_equal(row["phrase_pixels"][p], expected)
    if boxed:
        assert row["region_kind"][texts.index("marker")] == KINDS.index("box")
        assert not row["phrase_pixels_valid"][1 - p]


# --- Parts ------------------------------------------------------------------------------------------------


def test_cells():
    grid = (4, 4)
    assert box_cells(np.array([0.25, 0, 0.75, 0.5]), grid).nonzero()[1].tolist() == [1, 2, 1, 2]
    # Half a cell counts, less does not, and something is always left.
    assert box_cells(np.array([0, 0, 0.375, 0.25]), grid)[0].tolist() == [True, True, False, False]
    assert box_cells(np.array([0, 0, 0.37, 0.25]), grid)[0].tolist() == [True, False, False, False]
    assert box_cells(np.array([0.3, 0.3, 0.31, 0.31]), grid).sum() == 1
    mask = np.zeros((8, 8), bool)
    assert not mask_cells(mask, grid).any()
    mask[3, 5] = True
    assert np.argwhere(mask_cells(mask, grid)).tolist() == [[1, 2]]
    mask[4:, :4] = True
    assert np.argwhere(mask_cells(mask, grid)).tolist() == [[2, 0], [2, 1], [3, 0], [3, 1]]
    np.testing.assert_array_equal(tight_box(mask), [0, 3 / 8, 6 / 8, 1])


def test_marked_words():
    assert read_mark("a *nodule* here") == ("a nodule here", 8)
    assert read_mark("a *small nodule*, here") == ("a small nodule, here", 14)
    for plain in ("a nodule here", "2*3*4 mm", "two *a* and *b*", "a * b"):
        assert read_mark(plain) == (plain, len(plain))
    for kind in ("wordpiece", "bpe"):
        config = TokenizerConfig(vocab_size=300, context_length=8, kind=kind)
        tokenizer = Tokenizer.train(["a nodule here is round and small"], config)
        phrases = ["a *nodule* here", "a nodule here", "here is round and small here is a *nodule*", ""]
        ids, mask, mark = encode_phrases(tokenizer, phrases)
        np.testing.assert_array_equal(ids[0], ids[1])
        for row, word in ((0, "nodule"), (1, "here")):
            upto = tokenizer.decode(ids[row][1 : mark[row] + 1])
            assert upto.endswith(word) and len(tokenizer.decode(ids[row][1 : mark[row]])) < len(upto)
        # The marked word is cut off: what is left of the phrase ends before the end token.
        assert mark[2] == mask[2].sum() - 2 == 6 and mark[3] == 0


@pytest.mark.parametrize(
    "options, match",
    [
        ({"max_regions": 0}, "max_regions=0: must be at least 1"),
        ({"mask_stride": 0}, "mask_stride=0"),
        ({"kinds": {"circle": 1.0}}, "unknown 'circle'; there is box, point, mask"),
        ({"kinds": {"box": 0.0}}, "probabilities above 0"),
        ({"kinds": {}}, "probabilities above 0"),
        ({"box_jitter": 0.5}, "box_jitter=0.5"),
        ({"absent": 1.5}, "absent=1.5"),
        ({"text": {}}, "data.regions.text: .*field names"),
        ({"phrases": {"name": -1.0}}, "data.regions.phrases"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(ConfigError, match=match):
        Regions(**options)


def test_region_texts_may_have_a_shorter_context(folder):
    whole = make(source(folder), regions=Regions(max_phrases=2))
    short = make(source(folder), regions=Regions(max_phrases=2, context_length=5))
    (a,), (b,) = batches(whole, 0, 1), batches(short, 0, 1)
    for key in ("region_text", "region_text_mask", "phrase", "phrase_mask"):
        assert b[key].shape[-1] == 5 < a[key].shape[-1]
    fits = a["region_text_mask"].sum(-1) <= 5
    assert fits.any()
    np.testing.assert_array_equal(a["region_text"][fits][:, :5], b["region_text"][fits])
    with pytest.raises(ConfigError, match="longer than data.tokenizer.context_length"):
        make(source(folder), regions=Regions(context_length=CONTEXT + 1))


def test_what_a_pipeline_refuses(folder):
    with pytest.raises(ConfigError, match="mask_stride=5.*32x32"):
        make(source(folder), regions=Regions(mask_stride=5))
    with pytest.raises(DataError, match="data.regions.text='captoin'.*6 without boxes"):
        make(source(folder), regions=Regions(text="captoin"))
    config = DataConfig(train=(source(folder),), preprocess=Preprocess(image_size=SIZE))
    with pytest.raises(ConfigError, match="no tokenizer"):
        Pipeline(
            config,
            sets=[RecordSet(s) for s in config.train],
            keys_of_tasks={"t": PROMPT_KEYS},
            tokenizer=None,
            classes=(),
            batch_size=2,
            seed=0,
        )


def test_needs():
    assert needs_of(frozenset({"region_box"})) == {Need.IMAGE, Need.REGIONS}
    assert needs_of(frozenset({"phrase", "object_box"})) == {Need.IMAGE, Need.PHRASES}
    record = {"image": "a.png", "mask": "m.png", "mask_name": "lung"}
    needs, choice = frozenset({Need.REGIONS, Need.PHRASES}), TextChoice.of("caption")
    assert missing(record, needs, choice) == frozenset()
    assert missing({"image": "a.png", "mask": "m.png"}, needs, choice) == needs
    assert missing({"boxes": []}, needs, choice, complete=("cell",)) == {Need.REGIONS}


def test_texts_for_the_tokenizer(folder):
    sets = [RecordSet(source(folder))]
    assert list(training_texts(sets)) == []
    regions = Regions(text={"level": 1.0})
    assert {"level 1", "grey round spot", "spot", *NAMES} <= set(training_texts(sets, None, regions))


def test_cached_masks(folder):
    records = RecordSet(source(folder, cache=True))
    without, with_mask = records.load(0), records.load(0, mask=True)
    assert without["mask"] is None and with_mask["mask"].max() == 4
    assert records.load(0, mask=True) is with_mask and records.load(0)["mask"] is None
    assert records.load(0)["image"] is with_mask["image"]
    assert RecordSet(source(folder)).load(0, mask=True) is not with_mask
