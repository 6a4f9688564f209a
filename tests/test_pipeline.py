"""Batches: a function of (seed, step), whatever the hosts and workers; bad records; what each key holds."""

import copy
import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bvl.data.phantoms import FINDINGS, Phantoms
from bvl.data.pipeline import MAX_ATTEMPTS, DataConfig, Pipeline, encode_labels, label_names, training_texts
from bvl.data.sources import RecordSet, Source
from bvl.data.text import Tokenizer, TokenizerConfig
from bvl.data.text_choice import text_id
from bvl.data.transforms import Augment, Preprocess
from bvl.errors import ConfigError, DataError

SIZE, BATCH = 16, 8
KEYS = frozenset({"image", "image_valid", "image_box", "text", "text_mask", "text_valid", "text_id"})
ALL_KEYS = KEYS | {"labels", "label_valid"}
AUGMENT = Augment(crop_scale=(0.5, 1.0), brightness=0.2, contrast=0.2)


def write_folder(path: Path, records: list[dict]) -> str:
    """A records.jsonl folder; every image is a ramp from left to right whose level tells the record."""
    path.mkdir(parents=True, exist_ok=True)
    for i, record in enumerate(records):
        if record.get("image"):
            ramp = np.add.outer(np.zeros(20), np.linspace(0, 100, 24)) + i % 150
            Image.fromarray(ramp.astype(np.uint8)).save(path / record["image"])
    (path / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


def make(*sources, keys=KEYS, tasks=None, batch_size=BATCH, seed=0, classes=None, **options):
    options = {"augment": AUGMENT, "preprocess": Preprocess(image_size=SIZE)} | options
    config = DataConfig(train=sources, **options)
    sets = [RecordSet(source) for source in config.sources()]
    tokenizer = Tokenizer.train(training_texts(sets), TokenizerConfig(vocab_size=300, context_length=12))
    return Pipeline(
        config,
        sets=sets,
        keys_of_tasks=tasks or {"task": keys},
        tokenizer=tokenizer,
        classes=label_names(sets) if classes is None else classes,
        batch_size=batch_size,
        seed=seed,
    )


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def batches(pipeline, start, stop, **hosts):
    return [batch for batch, _ in pipeline.batches(start=start, stop=stop, **hosts)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    records = [
        {
            "id": f"r{i}",
            "image": f"{i}.png",
            "caption": f"caption number {i}",
            "alt_text": f"other {i}",
            "labels": ["even" if i % 2 == 0 else "odd"],
        }
        for i in range(11)
    ]
    return write_folder(tmp_path_factory.mktemp("data") / "ramps", records)


@pytest.fixture(scope="module")
def mixture(folder):
    """A folder and phantoms, augmented, two texts an image."""
    sources = (
        Source(root=folder, split=None, text={"caption": 0.5, "alt_text": 0.5}),
        Source(phantoms=Phantoms(num_patients=10, image_size=32), split=None, weight=2.0),
    )
    return make(*sources, keys=ALL_KEYS, texts_per_image=2)


@pytest.fixture(scope="module")
def reference(mixture):
    return batches(mixture, 0, 5)


def test_keys_shapes_and_types(reference, mixture):
    classes = len(mixture.classes)
    expected = {
        "row": (np.int32, ()),
        "record": (np.int32, ()),
        "source": (np.int32, ()),
        "valid": (np.bool_, ()),
        "image": (np.uint8, (SIZE, SIZE, 3)),
        "image_valid": (np.bool_, ()),
        "image_box": (np.float32, (4,)),
        "text": (np.int32, (2, 12)),
        "text_mask": (np.bool_, (2, 12)),
        "text_valid": (np.bool_, (2,)),
        "text_id": (np.uint32, (2,)),
        "labels": (np.float32, (classes,)),
        "label_valid": (np.bool_, (classes,)),
    }
    for batch in reference:
        assert {k: (v.dtype.type, v.shape) for k, v in batch.items()} == {
            k: (dtype, (BATCH, *shape)) for k, (dtype, shape) in expected.items()
        }
        np.testing.assert_array_equal(batch["row"], np.arange(BATCH))
        assert set(batch["source"]) <= {0, 1} and batch["valid"].all()


def test_only_what_is_declared_is_built(folder):
    pipeline = make(Source(root=folder, split=None), keys=frozenset({"text", "labels"}))
    (batch,) = batches(pipeline, 0, 1)
    assert set(batch) == {"row", "record", "source", "valid", "text", "labels"}


def test_batches_differ_from_step_to_step_and_by_seed(reference, mixture, folder):
    for a, b in itertools.combinations(reference, 2):
        assert not np.array_equal(a["image"], b["image"])
    first = make(Source(root=folder, split=None), seed=0).example(0)
    other = make(Source(root=folder, split=None), seed=1).example(0)
    assert not np.array_equal(first["image"], other["image"])


@pytest.mark.parametrize("num_hosts", [2, 4])
def test_any_number_of_hosts_gives_the_same_rows_in_the_same_order(mixture, reference, num_hosts):
    parts = [batches(mixture, 0, 5, host=h, num_hosts=num_hosts) for h in range(num_hosts)]
    for step, batch in enumerate(reference):
        assert_equal({k: np.concatenate([part[step][k] for part in parts]) for k in batch}, batch)


def test_resume_from_any_step(mixture, reference):
    for start in (1, 4):
        for a, b in zip(batches(mixture, start, 5), reference[start:], strict=True):
            assert_equal(a, b)
    assert batches(mixture, 5, 5) == []
    host = batches(mixture, 3, 5, host=1, num_hosts=2)
    assert_equal(host[0], {k: v[BATCH // 2 :] for k, v in reference[3].items()})


def with_options(pipeline, **options):
    """The same pipeline with other workers, threads or prefetch."""
    other = copy.copy(pipeline)
    other.config = dataclasses.replace(pipeline.config, **options)
    return other


def test_threads_do_not_matter(mixture, reference):
    for a, b in zip(batches(with_options(mixture, threads=1, prefetch=1), 0, 5), reference, strict=True):
        assert_equal(a, b)


def test_worker_processes_do_not_matter(mixture, reference):
    other = with_options(mixture, workers=2, threads=5, prefetch=3)
    for a, b in zip(batches(other, 2, 5), reference[2:], strict=True):
        assert_equal(a, b)


def test_hosts_must_divide_the_batch(mixture):
    with pytest.raises(ConfigError, match="batch_size=8 cannot be split over 3 hosts"):
        next(mixture.batches(start=0, stop=1, num_hosts=3))


def test_mixture_shares(mixture):
    sources = np.array([mixture.sampler(p)[0] for p in range(3000)])
    assert sources.mean() == pytest.approx(2 / 3, abs=1e-3)
    lines = mixture.summary()
    assert len(lines) == 2 and "11 of 11 records" in lines[0] and "share 33.3%" in lines[0]


def test_balanced_and_scheduled_sources(folder):
    """Few phantoms at first, then few of the folder, whose labels come equally often: five odd ones, six even."""
    sources = (
        Source(root=folder, split=None, balance="labels", weight=((0, 1.0), (4, 0.0), (5, 0.0), (9, 1.0))),
        Source(phantoms=Phantoms(num_patients=10, image_size=32), split=None, weight=((0, 0.0), (4, 1.0))),
    )
    pipeline = make(*sources, keys=frozenset({"labels"}))
    stream = batches(pipeline, 0, 20)
    assert (stream[0]["source"] == 0).all() and (stream[4]["source"] == 1).all()
    assert sum((b["source"] == 0).sum() for b in stream[9:19]) == 40
    odd = pipeline.classes.index("odd")
    drawn = np.concatenate([b["labels"][b["source"] == 0, odd] for b in stream])
    assert abs(drawn.sum() - len(drawn) / 2) <= 1
    halves = [batches(pipeline, 7, 20, host=h, num_hosts=2) for h in (0, 1)]
    for whole, *parts in zip(stream[7:], *halves, strict=True):
        assert_equal({k: np.concatenate([part[k] for part in parts]) for k in whole}, whole)
    line = pipeline.summary()[0]
    assert "share 100.0% at step 0, 0.0% at step 4, " in line and line.endswith("balanced by labels")


# --- Records that lack something --------------------------------------------------------------------------


def test_records_left_out_are_counted(tmp_path):
    root = write_folder(
        tmp_path / "set",
        [
            {"id": "good", "image": "a.png", "caption": "a text"},
            {"id": "no text", "image": "b.png"},
            {"id": "blank", "image": "c.png", "caption": " "},
            {"id": "no image", "caption": "a text"},
        ],
    )
    pipeline = make(Source(root=root, split=None))
    assert pipeline.left_out == ({"without text": 2, "without image": 1},)
    assert pipeline.num_records == 1
    assert "1 of 4 records (2 without text, 1 without image)" in pipeline.summary()[0]
    (batch,) = batches(pipeline, 0, 1)
    assert (batch["record"] == 0).all()


def test_texts_that_no_record_has_are_named(tmp_path):
    root = write_folder(tmp_path / "set", [{"id": "a", "image": "a.png", "caption": "x", "labels": ["y"]}])
    text = {"caption": 1.0, "captoin": 1.0, "{view} of {labels}": 1.0}
    line = make(Source(root=root, split=None, text=text)).summary()[0]
    assert line.endswith("; none has the text 'captoin' or '{view} of {labels}'")
    line = make(Source(root=root, split=None, templates=("a {}",))).summary()[0]
    assert line.endswith("; templates are not read, since they are forms of the text 'labels'")


def test_nothing_to_train_on(tmp_path):
    root = write_folder(tmp_path / "set", [{"id": "a", "image": "a.png", "alt_text": "x"}])
    with pytest.raises(DataError, match="none of its 1 records has what the tasks"):
        config = DataConfig(train=(Source(root=root, split=None),), preprocess=Preprocess(image_size=SIZE))
        Pipeline(
            config,
            sets=[RecordSet(s) for s in config.sources()],
            keys_of_tasks={"contrastive": KEYS},
            tokenizer=Tokenizer.train(["x"], TokenizerConfig(vocab_size=50)),
            classes=(),
            batch_size=2,
            seed=0,
        )


def test_two_tasks_with_different_needs(tmp_path):
    root = write_folder(
        tmp_path / "set",
        [
            {"id": "pair", "image": "a.png", "caption": "a text"},
            {"id": "labelled", "image": "b.png", "labels": ["x"]},
            {"id": "text", "caption": "another text"},
        ],
    )
    tasks = {
        "contrastive": KEYS,
        "classify": frozenset({"image", "image_valid", "labels", "label_valid"}),
        "text": frozenset({"text", "text_valid"}),
    }
    pipeline = make(Source(root=root, split=None), tasks=tasks, batch_size=6)
    (batch,) = batches(pipeline, 0, 1)
    expected = {  # record: image_valid, text_valid, label_valid, image_box
        0: (True, True, False, [0, 0, 1, 1]),
        1: (True, False, True, [0, 0, 1, 1]),
        2: (False, True, False, [0, 0, 0, 0]),
    }
    assert set(batch["record"]) == set(expected)
    for i, record in enumerate(batch["record"]):
        found = batch["image_valid"][i], batch["text_valid"][i, 0], batch["label_valid"][i, 0]
        assert (*map(bool, found), batch["image_box"][i].tolist()) == expected[int(record)]
        assert batch["image"][i].any() == expected[int(record)][0]


def test_an_unreadable_image_is_replaced_and_reported(tmp_path):
    records = [{"id": f"r{i}", "image": f"{i}.png", "caption": f"text {i}"} for i in range(6)]
    root = write_folder(tmp_path / "set", records)
    (tmp_path / "set" / "3.png").write_bytes(b"not an image")
    pipeline = make(Source(root=root, split=None), batch_size=6)
    stream = list(pipeline.batches(start=0, stop=3))
    for batch, bad in stream:
        assert 3 not in batch["record"]
        # One in six positions falls on it; a replacement may fall on it again.
        assert bad and {b["id"] for b in bad} == {"r3"}
        assert all(b["source"] == "set" and "3.png" in b["error"] for b in bad)
    for (batch, bad), (again, bad_again) in zip(stream, pipeline.batches(start=0, stop=3), strict=True):
        assert_equal(batch, again)
        assert bad == bad_again
    halves = [list(pipeline.batches(start=0, stop=3, host=h, num_hosts=2)) for h in (0, 1)]
    for step, (batch, bad) in enumerate(stream):
        np.testing.assert_array_equal(
            np.concatenate([half[step][0]["record"] for half in halves]), batch["record"]
        )
        assert halves[0][step][1] + halves[1][step][1] == bad


@pytest.mark.parametrize("workers", [0, 1], ids=["threads", "processes"])
def test_too_many_unreadable_images(tmp_path, workers):
    records = [{"id": f"r{i}", "image": f"{i}.png", "caption": f"text {i}"} for i in range(4)]
    root = write_folder(tmp_path / "set", records)
    for i in range(4):
        (tmp_path / "set" / f"{i}.png").write_bytes(b"not an image")
    pipeline = make(Source(root=root, split=None), batch_size=2, workers=workers)
    with pytest.raises(DataError, match=f"'set': {MAX_ATTEMPTS} records in a row"):
        list(pipeline.batches(start=0, stop=1))


# --- Texts, flips, labels ---------------------------------------------------------------------------------


def test_texts_follow_their_probabilities(folder):
    source = Source(root=folder, split=None, text={"caption": 0.8, "alt_text": 0.2})
    pipeline = make(source, keys=frozenset({"text", "text_id"}), batch_size=100)
    share, rows = 0, 0
    for batch in batches(pipeline, 0, 6):
        for record, tokens, ids in zip(batch["record"], batch["text"], batch["text_id"], strict=True):
            text = pipeline.tokenizer.decode(tokens[0])
            assert text in (f"caption number {record}", f"other {record}")
            assert ids[0] == text_id(text)
            share += text.startswith("caption")
            rows += 1
    assert share / rows == pytest.approx(0.8, abs=0.06)


def test_several_texts_an_image(reference, mixture):
    rows = [(b, i) for b in reference for i in range(BATCH) if b["source"][i] == 0]
    assert rows
    for batch, i in rows:
        texts = {mixture.tokenizer.decode(t) for t in batch["text"][i]}
        record = batch["record"][i]
        assert texts == {f"caption number {record}", f"other {record}"}
        assert len(set(batch["text_id"][i].tolist())) == 2 and batch["text_valid"][i].all()


def test_a_missing_text_is_invalid_and_not_repeated(tmp_path):
    records = [
        {"id": "two", "image": "a.png", "caption": "one text", "alt_text": "another text"},
        {"id": "one", "image": "b.png", "caption": "one text"},
        {"id": "same", "image": "c.png", "caption": "one text", "alt_text": "One  text"},
        {"id": "none", "image": "d.png"},
    ]
    root = write_folder(tmp_path / "set", records)
    source = Source(root=root, split=None, text={"caption": 0.5, "alt_text": 0.5})
    tasks = {"a": KEYS, "b": frozenset({"image"})}
    pipeline = make(source, tasks=tasks, texts_per_image=3, batch_size=4)
    (batch,) = batches(pipeline, 0, 1)
    found = dict(zip(batch["record"].tolist(), batch["text_valid"].tolist(), strict=True))
    assert found == {
        0: [True, True, False],
        1: [True, False, False],
        2: [True, False, False],
        3: [False, False, False],
    }
    # An encoder sees at least the start and the end of what is not there.
    assert batch["text_mask"].any(-1).all()


def test_words_are_dropped_and_the_text_keeps_its_id(folder):
    source = Source(root=folder, split=None)
    keys = frozenset({"text", "text_id"})
    pipeline = make(source, keys=keys, word_dropout=0.5, batch_size=11)
    plain = make(source, keys=keys, batch_size=11)
    seen = set()
    for dropped, whole in zip(batches(pipeline, 0, 4), batches(plain, 0, 4), strict=True):
        np.testing.assert_array_equal(dropped["text_id"], whole["text_id"])
        for a, b in zip(dropped["text"], whole["text"], strict=True):
            words, every = (pipeline.tokenizer.decode(t[0]).split() for t in (a, b))
            assert words and set(words) <= set(every)
            seen.add(len(words))
    assert seen == {1, 2, 3}
    for a, b in zip(batches(pipeline, 2, 4), batches(pipeline, 0, 4)[2:], strict=True):
        assert_equal(a, b)
    with pytest.raises(ConfigError, match="word_dropout"):
        DataConfig(word_dropout=1.0)


def test_laterality_forbids_horizontal_flips(folder):
    pipeline = make(
        Source(name="sided", root=folder, split=None),
        Source(name="free", root=folder, split=None, laterality=False),
        augment=Augment(flip_horizontal=True),
        batch_size=60,
    )
    (batch,) = batches(pipeline, 0, 1)
    images = batch["image"].astype(int)
    for source, flipped in ((0, {False}), (1, {True, False})):
        of_source = images[batch["source"] == source]
        assert {bool(x[:, 0].sum() > x[:, -1].sum()) for x in of_source} == flipped


def test_a_source_may_have_its_own_random_changes(folder):
    options = {"root": folder, "split": None, "laterality": False}
    own = Augment(flip_horizontal=True)
    pipeline = make(
        Source(name="plain", **options),
        Source(name="own", augment=own, **options),
        augment=Augment(),
        batch_size=60,
    )
    (batch,) = batches(pipeline, 0, 1)
    images = batch["image"].astype(int)
    for source, flipped in ((0, {False}), (1, {True, False})):
        of_source = images[batch["source"] == source]
        assert {bool(x[:, 0].sum() > x[:, -1].sum()) for x in of_source} == flipped
    with pytest.raises(ConfigError, match="laterality=true"):
        Source(root=folder, augment=own)


def test_a_flip_that_no_source_permits_is_refused(folder):
    source = Source(root=folder, split=None)
    with pytest.raises(ConfigError, match="data.train.0.laterality=false"):
        make(source, augment=Augment(flip_horizontal=True))
    make(source, augment=Augment(flip_vertical=True))


def test_encoded_labels():
    index = {"a": 0, "b": 1, "c": 2}

    def encoded(**record):
        labels, valid = encode_labels(record, index)
        return labels.tolist(), valid.tolist()

    assert encoded() == ([0, 0, 0], [False] * 3)
    assert encoded(labels=[]) == ([0, 0, 0], [True] * 3)
    assert encoded(labels=["b", "unknown"]) == ([0, 1, 0], [True] * 3)
    assert encoded(labels=["b"], labels_known=["a"]) == ([0, 1, 0], [True, True, False])
    assert encoded(labels=[], labels_known=[]) == ([0, 0, 0], [False] * 3)


def test_labels_of_phantoms_are_judged_within_their_modality(mixture, reference):
    checked = 0
    for batch in reference:
        for i in np.flatnonzero(batch["source"] == 1):
            record = mixture.sets[1].describe(int(batch["record"][i]))
            names = np.array(mixture.classes)
            assert set(names[batch["labels"][i] > 0]) == set(record["labels"])
            known = set(FINDINGS[record["modality"]]) & set(names)
            assert set(names[batch["label_valid"][i]]) == known | set(record["labels"])
            checked += 1
    assert checked > 10


def test_named_classes_order_the_columns(folder):
    pipeline = make(
        Source(root=folder, split=None), keys=frozenset({"labels"}), classes=("odd", "absent", "even")
    )
    (batch,) = batches(pipeline, 0, 1)
    for record, labels in zip(batch["record"], batch["labels"], strict=True):
        assert labels.tolist() == ([0, 0, 1] if record % 2 == 0 else [1, 0, 0])


def test_text_needs_a_tokenizer(folder):
    config = DataConfig(train=(Source(root=folder, split=None),))
    sets = [RecordSet(s) for s in config.train]
    with pytest.raises(ConfigError, match="no tokenizer"):
        Pipeline(
            config,
            sets=sets,
            keys_of_tasks={"t": KEYS},
            tokenizer=None,
            classes=(),
            batch_size=2,
            seed=0,
        )


def test_a_two_column_csv(tmp_path):
    write_folder(tmp_path, [{"id": str(i), "image": f"{i}.png"} for i in range(30)])
    (tmp_path / "records.jsonl").unlink()
    rows = "".join(f'{i}.png,"note {i}, with a comma"\n' for i in range(30))
    (tmp_path / "pairs.csv").write_text("image,text\n" + rows)
    for root in (tmp_path / "pairs.csv", tmp_path):
        config = DataConfig(root=str(root), preprocess=Preprocess(image_size=SIZE))
        (source,) = config.sources()
        train = make(source)
        (batch,) = batches(train, 0, 1)
        for record, tokens in zip(batch["record"], batch["text"], strict=True):
            name = train.sets[0].describe(int(record))["image"].removesuffix(".png")
            assert train.tokenizer.decode(tokens[0]) == f"note {name}, with a comma"
        assert batch["image_valid"].all() and batch["text_valid"].all()
        held = RecordSet(Source(root=str(root), split="val"))
        names = [{s.describe(i)["image"] for i in range(len(s))} for s in (train.sets[0], held)]
        assert not names[0] & names[1] and len(names[0] | names[1]) == 30
