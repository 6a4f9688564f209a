"""The contact sheet: pictures, boxes and masks where they belong, texts as the model reads them."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image, ImageDraw

from bvl.data import paint, show
from bvl.data.controls import Controls
from bvl.data.phantoms import Phantoms
from bvl.data.pipeline import DataConfig, Pipeline, training_texts
from bvl.data.show import COLOURS, MARGIN, TILE, contact_sheet
from bvl.data.sources import RecordSet, Source
from bvl.data.text import Tokenizer, TokenizerConfig
from bvl.data.transforms import Augment, Preprocess
from bvl.errors import ConfigError

GREY = 100
KEYS = frozenset({"image", "text"})


def folder(path, records, mask=None):
    for record in records:
        Image.new("L", (64, 32), GREY).save(path / record["image"])
    if mask is not None:
        Image.fromarray(mask).save(path / "mask.png")
    (path / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return DataConfig(
        train=(Source(name="set", root=str(path), split=None),),
        preprocess=Preprocess(image_size=64, resize="pad"),
        tokenizer=TokenizerConfig(vocab_size=60, context_length=6),
    )


def picture(sheet, number=0):
    """The picture of a tile in the first row."""
    left = MARGIN + number * (TILE + MARGIN)
    return np.asarray(sheet)[MARGIN : MARGIN + TILE, left : left + TILE]


@pytest.fixture
def written(monkeypatch):
    """Every text that is drawn."""
    texts = []
    draw = ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        ImageDraw.ImageDraw,
        "text",
        lambda self, xy, text, *a, **k: texts.append(text) or draw(self, xy, text, *a, **k),
    )
    return texts


def test_boxes_are_drawn_where_they_are(tmp_path, written):
    boxes = [
        {"box": [0.25, 0.5, 0.5, 1.0], "name": "cell"},
        {"box": [0.75, 0.0, 1.0, 0.5], "name": "nucleus"},
    ]
    sheet = contact_sheet(folder(tmp_path, [{"id": "a", "image": "a.png", "boxes": boxes}]), count=1)
    shown = picture(sheet)
    # 64 x 32 padded to 64 x 64: y of the image runs from a quarter to three quarters of the tile.
    for (x0, y0, x1, y1), colour in zip(((64, 128, 128, 192), (192, 64, 256, 128)), COLOURS, strict=False):
        # Names are drawn above a box or inside it, so its lower half is free of them.
        for y, x in (
            (y1 - 1, x0),
            (y1 - 1, (x0 + x1) // 2),
            (y1 - 1, x1 - 1),
            ((y0 + y1) // 2 + 8, x0),
            ((y0 + y1) // 2 + 8, x1 - 1),
        ):
            assert tuple(shown[y, x]) == colour
        assert tuple(shown[y1 - 10, (x0 + x1) // 2]) == (GREY,) * 3
        if y1 < 192:
            assert tuple(shown[y1, (x0 + x1) // 2]) == (GREY,) * 3
    assert tuple(shown[30, 30]) == (0, 0, 0)
    assert "cell" in written and "cell x 1" in written and "nucleus x 1" in written


def test_many_boxes_are_named_in_the_legend_only(tmp_path, written):
    boxes = [{"box": [i / 10, 0.1, i / 10 + 0.05, 0.3], "name": "cell"} for i in range(8)]
    contact_sheet(folder(tmp_path, [{"id": "a", "image": "a.png", "boxes": boxes}]), count=1)
    assert "cell" not in written and "cell x 8" in written


def test_masks_are_tinted_with_an_outline(tmp_path):
    mask = np.zeros((32, 64), np.uint8)
    mask[8:24, 16:32], mask[8:24, 32:48] = 1, 2
    boxes = [
        {"box": [0.2, 0.1, 0.55, 0.9], "name": "cell"},
        {"box": [0.45, 0.1, 0.8, 0.9], "name": "cell"},
    ]
    record = {"id": "a", "image": "a.png", "boxes": boxes, "mask": "mask.png"}
    shown = picture(contact_sheet(folder(tmp_path, [record], mask), count=1))
    colour = np.array(COLOURS[0])
    tint = np.rint(GREY * (1 - paint.MASK_OPACITY) + colour * paint.MASK_OPACITY)
    np.testing.assert_array_equal(shown[128, 96], tint)
    np.testing.assert_array_equal(shown[128, 160], tint)
    # Neighbours of the same name are kept apart by their outlines.
    np.testing.assert_array_equal(shown[128, 127], colour)
    np.testing.assert_array_equal(shown[128, 128], colour)
    assert tuple(shown[128, 200]) == (GREY,) * 3


def test_a_named_mask_needs_no_boxes(tmp_path, written):
    mask = np.zeros((32, 64), np.uint8)
    mask[8:24, 16:32] = 255
    record = {"id": "a", "image": "a.png", "mask": "mask.png", "mask_name": "lung"}
    shown = picture(contact_sheet(folder(tmp_path, [record], mask), count=1))
    assert tuple(shown[128, 64]) == COLOURS[0]
    assert "lung x 1" in written


def test_texts_are_what_the_ids_say(tmp_path, written):
    records = [{"id": "a", "image": "a.png", "caption": "One TWO xyz three four five", "labels": ["cat"]}]
    tokenizer = Tokenizer.train(["one two three four five"], TokenizerConfig(vocab_size=60, context_length=6))
    contact_sheet(folder(tmp_path, records), tokenizer=tokenizer, count=1)
    text = " ".join(written)
    assert "one two [UNK] three [cut at 6 tokens]" in text
    assert "four" not in text
    assert "labels: cat" in text


def test_records_without_boxes_or_text(tmp_path, written):
    records = [{"id": "a", "image": "a.png"}, {"id": "b", "image": "b.png", "caption": "cells"}]
    sheet = contact_sheet(folder(tmp_path, records), count=2)
    for number in range(2):
        assert tuple(picture(sheet, number)[128, 128]) == (GREY,) * 3
    assert sorted(written) == ["(no text)", "cells", "set: a", "set: b"]


def test_an_image_that_cannot_be_read_says_so(tmp_path, written):
    config = folder(tmp_path, [{"id": "a", "image": "a.png", "caption": "x"}])
    (tmp_path / "a.png").write_bytes(b"")
    contact_sheet(config, count=1)
    assert "the file is empty" in " ".join(written)


def test_augmented_pictures_and_texts_are_those_of_the_training():
    config = DataConfig(
        train=(
            Source(name="a", phantoms=Phantoms(num_patients=10, image_size=64), text="captions"),
            Source(name="b", phantoms=Phantoms(num_patients=10, image_size=64, seed=1), text="impression"),
        ),
        preprocess=Preprocess(image_size=64),
        augment=Augment(crop_scale=(0.3, 0.9), brightness=0.4, contrast=0.4),
        tokenizer=TokenizerConfig(vocab_size=400, context_length=32),
        texts_per_image=2,
    )
    sets = [RecordSet(source) for source in config.sources()]
    tokenizer = Tokenizer.train(["a text"], config.tokenizer)
    keys = frozenset({"image", "text", "text_valid"})
    pipeline = Pipeline(
        config, sets=sets, keys_of_tasks={"t": keys}, tokenizer=tokenizer, classes=(), batch_size=3, seed=5
    )
    options = dict(sets=sets, tokenizer=tokenizer, keys_of_tasks={"t": keys}, seed=5)
    for position in range(4):
        example = pipeline.example(position)
        tile = show._tile(pipeline, position, augmented=True, colours={})
        shown = np.asarray(tile.picture)[2::4, 2::4]
        # Boxes, masks and names cover a part; the rest is the training image itself.
        assert (shown == example["image"]).all(-1).mean() > 0.4
        texts = [tokenizer.decode(ids) for ids in example["text"][example["text_valid"]]]
        assert [line.text.split("  [cut")[0] for line in tile.lines[-len(texts) :]] == texts
        plain = show._tile(pipeline, position, augmented=False, colours={})
        assert (np.asarray(plain.picture)[2::4, 2::4] == example["image"]).all(-1).mean() < 0.4
    first, second = (contact_sheet(config, count=5, augmented=True, **options) for _ in range(2))
    assert first.tobytes() == second.tobytes()
    assert first.tobytes() != contact_sheet(config, count=5, **options).tobytes()


def test_scheduled_sources_come_as_in_training(written):
    """Of steps of two examples, the first step is the first source's, the later ones the other's."""
    weights = (((0, 1.0), (1, 0.0)), ((0, 0.0), (1, 1.0)))
    phantoms = Phantoms(num_patients=5, image_size=32)
    train = tuple(
        Source(name=f"set {i}", phantoms=phantoms, split=None, weight=w) for i, w in enumerate(weights)
    )
    config = DataConfig(train=train, preprocess=Preprocess(image_size=32))
    contact_sheet(config, batch_size=2, count=6, tokenizer=Tokenizer.train(["a"], config.tokenizer))
    assert [text[:5] for text in written if text.startswith("set")] == ["set 0"] * 2 + ["set 1"] * 4


def test_texts_are_drawn_as_by_tasks_that_read_no_image(written):
    phantoms = Source(phantoms=Phantoms(num_patients=5, image_size=32), split=None, text="captions")
    config = DataConfig(
        train=(phantoms,), preprocess=Preprocess(image_size=32), augment=Augment(brightness=0.5)
    )
    sets = [RecordSet(phantoms)]
    tokenizer = Tokenizer.train(training_texts(sets), config.tokenizer)
    keys = {"mlm": frozenset({"text", "text_valid"})}
    pipeline = Pipeline(
        config, sets=sets, keys_of_tasks=keys, tokenizer=tokenizer, classes=(), batch_size=1, seed=0
    )
    for position in range(8):
        tile = show._tile(pipeline, position, augmented=True, colours={})
        text = tokenizer.decode(pipeline.example(position)["text"][0])
        assert tile.lines[-1].text.split("  [cut")[0] == text


def test_count_must_be_positive(tmp_path):
    with pytest.raises(ConfigError, match="at least 1"):
        contact_sheet(folder(tmp_path, [{"id": "a", "image": "a.png"}]), count=0)


def test_controls_stand_in_front_of_their_text(tmp_path, written):
    records = [{"id": "a", "image": "a.png", "caption": "one two three", "question": "what is there to see"}]
    controls = Controls(lengths=5, prompt="question", prompt_tokens=3, dropout=0.0)
    config = dataclasses.replace(folder(tmp_path, records), controls=controls)
    for augmented in (False, True):
        contact_sheet(config, count=1, augmented=augmented, keys_of_tasks={"a": KEYS | {"prompt"}})
        text = " ".join(written)
        assert text.index("[LENGTH_3] what is there [PROMPT_END]") < text.index("one two three")
        written.clear()
    contact_sheet(config, count=1, augmented=True, keys_of_tasks={"a": KEYS})
    assert "LENGTH" not in " ".join(written)
