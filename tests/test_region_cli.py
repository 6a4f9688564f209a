"""bvl describe, ground, segment, detect: lines of JSON, overlays, and what is refused before a model is loaded."""

import inspect
import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from bvl import cli
from bvl.api import Model, Search
from bvl.errors import ConfigError
from bvl.tasks.grounding import Grounding
from bvl.tasks.locating import Detections, Grounded

GROUNDED = Grounded(
    np.array([[0.1, 0.2, 0.30004, 0.6], [0, 0, 1, 1]], np.float32),
    np.array([0.9, 0.123456], np.float32),
    np.array([0.05, np.nan], np.float32),
    np.array([True, False]),
)
PROBABILITIES = np.zeros((2, 20, 30), np.float32)
PROBABILITIES[0, 5:15, 3:9] = 0.7
HEAT = np.linspace(0, 1, 1200, dtype=np.float32).reshape(2, 20, 30)
HEAT[0, :5] = np.nan


@pytest.fixture
def image(tmp_path):
    Image.new("L", (30, 20), 100).save(tmp_path / "scan.png")
    return str(tmp_path / "scan.png")


@pytest.fixture
def model(monkeypatch):
    """A model that answers without looking; `calls` are those of its methods, `loaded` the runs."""
    found = Detections(
        np.array([[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]], np.float32), ["cell", "cell"], np.array([0.8, 0.4])
    )
    answers = {
        "describe": lambda regions: [f"text {i}" for i in range(len(regions[0]))],
        "ground": GROUNDED,
        "heat_maps": HEAT,
        "detect": found,
    }
    calls, loaded = [], []

    def method(name):
        def call(images, *args, **options):
            assert [image.size for image in images] == [(30, 20)]
            # What the verb asks for is what a model takes.
            bound = inspect.signature(getattr(Model, name)).bind(None, images, *args, **options)
            assert bound.arguments.get("search", {}).keys() <= Search.__annotations__.keys()
            calls.append((name, args, options))
            answer = answers[name]
            return [answer(options["regions"]) if callable(answer) else answer]

        return call

    stub = SimpleNamespace(
        **{name: method(name) for name in answers}, calls=calls, loaded=loaded, answers=answers
    )
    stub.config = SimpleNamespace(tasks={"grounding": Grounding()})
    stub.components = SimpleNamespace(calibration=None)

    def locate(components, images, phrases, *, batch_size):
        assert components is stub.components and [image.size for image in images] == [(30, 20)]
        calls.append(("locate", (phrases,), {"batch_size": batch_size}))
        yield SimpleNamespace(presence=np.array([2.0, -2.0]), masks=lambda: PROBABILITIES)

    monkeypatch.setattr("bvl.tasks.locating.locate", locate)
    monkeypatch.setattr("bvl.train.environment.enable_compilation_cache", lambda: None)
    monkeypatch.setattr("bvl.api.load", lambda run, **options: loaded.append((run, options)) or stub)
    return stub


@pytest.fixture
def drawn(monkeypatch):
    """The options of every drawing."""
    from bvl.data import drawing

    out, draw = [], drawing.draw_regions
    monkeypatch.setattr(drawing, "draw_regions", lambda image, **o: out.append(o) or draw(image, **o))
    return out


def run(*words):
    try:
        return cli.main(words)
    except SystemExit as stop:
        return stop.code


def lines(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_regions_are_described_in_their_order(image, model, drawn, tmp_path, capsys):
    ids = np.zeros((20, 30), np.uint8)
    ids[:5, :5], ids[10:, 10:] = 2, 7
    Image.fromarray(ids).save(tmp_path / "ids.png")
    out, mask = str(tmp_path / "overlay.png"), str(tmp_path / "ids.png")
    words = ("--point", "0.5,0.25", "--mask", mask, "--box", "0,0.2,0.5,0.66666", "--length", "6")
    assert (
        run("describe", "run", image, *words, "--guidance-null", "region", "--beams", "2", "--out", out) == 0
    )
    assert lines(capsys) == [
        {"point": [0.5, 0.25], "text": "text 0"},
        {"mask": mask, "id": 2, "text": "text 1"},
        {"mask": mask, "id": 7, "text": "text 2"},
        {"box": [0, 0.2, 0.5, 0.6667], "text": "text 3"},
    ]
    ((_, _, options),) = model.calls
    (regions,) = options.pop("regions")
    np.testing.assert_equal(regions[:3], [{"point": [0.5, 0.25]}, {"mask": ids == 2}, {"mask": ids == 7}])
    chosen = {"length": 6, "guidance_null": "region", "beams": 2}
    assert options == {**chosen, "batch_size": 4, "image_batch_size": 1}
    assert Image.open(out).size == (540, 360)
    assert drawn[0]["texts"] == [f"text {i}" for i in range(4)]
    assert [box is not None for box in drawn[0]["boxes"]] == [False, False, False, True]


def test_a_mask_of_one_region_and_another_model(image, model, tmp_path, capsys):
    Image.fromarray(np.eye(30, dtype=bool)[:20]).save(tmp_path / "mask.png")
    words = ("--mask", str(tmp_path / "mask.png"), "--language-model", "other", "--checkpoint", "7")
    assert run("describe", "run", image, *words) == 0
    assert len(lines(capsys)) == 1
    assert model.calls[0][2]["language_model"] is model
    assert model.loaded == [("run", {"checkpoint": 7}), ("other", {})]


def test_phrases_are_grounded_or_not_found(image, model, drawn, tmp_path, capsys):
    out = str(tmp_path / "overlay.png")
    assert run("ground", "run", image, "left lung", "nodule", "--alpha", "0.2", "--out", out) == 0
    assert lines(capsys) == [
        {"phrase": "left lung", "found": True, "score": 0.9, "p_value": 0.05, "box": [0.1, 0.2, 0.3, 0.6]},
        {"phrase": "nodule", "found": False, "score": 0.1235, "p_value": None, "box": [0, 0, 1, 1]},
    ]
    assert model.calls == [("ground", (["left lung", "nodule"],), {"alpha": 0.2, "batch_size": 1})]
    assert drawn[0]["texts"] == ["left lung"] and drawn[0]["notes"] == ["not found: nodule"]
    assert Image.open(out).size[1] > 360


def test_heat_maps_with_and_without_boxes(image, model, drawn, tmp_path, capsys):
    words = ("ground", "run", image, "left lung", "nodule", "--heat-map")
    assert run(*words) == 1
    assert "say with --out" in capsys.readouterr().err and not model.loaded
    words = (*words, "--out", str(tmp_path / "overlay.png"))
    assert run(*words) == 0
    first, second = lines(capsys)
    assert first["box"] == [0.1, 0.2, 0.3, 0.6] and first["similarity"] == round(599 / 1199, 4)
    assert second["peak"] == [round(29.5 / 30, 4), round(19.5 / 20, 4)] and second["similarity"] == 1
    assert [len(options["boxes"]) for options in drawn] == [1, 0]
    assert Image.open(tmp_path / "overlay.png").size[0] > 1080
    model.config.tasks = {"contrastive": None}
    assert run(*words) == 0
    assert all(row.keys() == {"phrase", "peak", "similarity"} for row in lines(capsys))
    assert drawn[-1]["notes"] == ["nodule"]
    with pytest.raises(ConfigError):
        cli._parse(words[:-3]).run(cli._parse(words[:-3]))


def test_masks_of_phrases_are_written(image, model, drawn, tmp_path, capsys):
    words = ("Left/right lung", "left right LUNG", "--masks", str(tmp_path / "masks"))
    assert run("segment", "run", image, *words, "--out", str(tmp_path / "overlay.png")) == 0
    first, second = lines(capsys)
    files = [str(tmp_path / "masks" / name) for name in ("left_right_lung.png", "left_right_lung_2.png")]
    assert [first["mask"], second["mask"]] == files
    assert first["box"] == [0.1, 0.25, 0.3, 0.75] and first["area"] == 0.1 and first["found"]
    assert second["box"] is None and second["area"] == 0
    assert (first["score"], second["found"], second["p_value"]) == (0.8808, False, None)
    assert [name for name, *_ in model.calls] == ["locate"], "one pass"
    np.testing.assert_array_equal(np.asarray(Image.open(files[0])), (PROBABILITIES[0] > 0) * np.uint8(255))
    assert not np.asarray(Image.open(files[1])).any()
    assert len(drawn[0]["masks"]) == 1 and drawn[0]["notes"] == ["not found: left right LUNG"]
    model.config.tasks = {"grounding": Grounding(l1=0, giou=0, score=0)}
    assert run("segment", "run", image, *words) == 0, "boxes are not needed"
    model.config.tasks = {"grounding": Grounding(bce=0, dice=0)}
    assert run("segment", "run", image, *words) == 1
    assert "without masks" in capsys.readouterr().err


def test_objects_are_detected(image, model, drawn, tmp_path, capsys):
    words = (
        "detect",
        "run",
        image,
        "cell",
        "platelet",
        "--threshold",
        "0.2",
        "--iou-threshold",
        "0.6",
        "--max-detections",
        "7",
        "--out",
        str(tmp_path / "o.png"),
    )
    assert run(*words) == 0
    assert lines(capsys) == [
        {"name": "cell", "box": [0, 0, 0.5, 0.5], "score": 0.8},
        {"name": "cell", "box": [0.5, 0.5, 1, 1], "score": 0.4},
    ]
    options = {"threshold": 0.2, "iou_threshold": 0.6, "max_detections": 7, "batch_size": 1}
    assert model.calls == [("detect", (["cell", "platelet"],), options)]
    assert drawn[0]["notes"] == ["not found: platelet"] and drawn[0]["groups"] == ["cell", "cell"]
    model.answers["detect"] = Detections(np.zeros((0, 4), np.float32), [], np.zeros(0, np.float32))
    assert run(*words) == 0
    printed = capsys.readouterr()
    assert printed.out == "" and "nothing found with a score of 0.2 or more" in printed.err


BOX = ("--box", "0,0,1,1")


@pytest.mark.parametrize(
    "words, part",
    [
        (("describe", "run", "IMAGE"), "zero regions: give at least one --box"),
        (("describe", "run", "IMAGE", *BOX, "--box", "2,3,20,15"), "Are these pixels"),
        (("describe", "run", "IMAGE", "--box", "0.5,0,0.2,1"), "--box"),
        (("describe", "run", "IMAGE", "--point", "12,8"), "Are these pixels"),
        (("describe", "run", "IMAGE", "--mask", "FOLDER/empty.png"), "the mask is empty"),
        (("describe", "run", "IMAGE", "--mask", "FOLDER/small.png"), "the mask is 3x3 pixels"),
        (("describe", "run", "IMAGE", "--mask", "FOLDER/none.png"), "no such"),
        (("describe", "run", "FOLDER/none.png", *BOX), "no such image"),
        (("describe", "run", "IMAGE", *BOX, "--out", "overlay.txt"), "end it with .png"),
        (("ground", "run", "IMAGE", "a", "--out", "no_such_folder/overlay.png"), "there is no folder"),
        (("segment", "run", "IMAGE", "a", "--out", "overlay"), "end it with .png"),
        (("segment", "run", "IMAGE", "a", "--masks", "IMAGE"), "none can be made there"),
        (("detect", "run", "IMAGE", "a", "--out", "overlay.psd"), "end it with .png"),
    ],
)
def test_refused_before_the_model_is_loaded(words, part, image, model, tmp_path, capsys):
    Image.new("L", (30, 20)).save(tmp_path / "empty.png")
    Image.new("L", (3, 3), 255).save(tmp_path / "small.png")
    words = [word.replace("IMAGE", image).replace("FOLDER", str(tmp_path)) for word in words]
    assert run(*words) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"bvl {words[0]}: ") and part in error
    assert not model.loaded


@pytest.mark.parametrize(
    "words, part",
    [
        (("describe", "run", "x.png", "--box", "0.1,0.2,0.3"), "not 4 numbers with commas"),
        (("describe", "run", "x.png", "--box", "a,b,c,d"), "not 4 numbers with commas"),
        (("describe", "run", "x.png", "--point", "1"), "not 2 numbers with commas"),
        (("describe", "run", "x.png", "--scorer", "run"), "unrecognized"),
        (("ground", "run", "x.png"), "PHRASE"),
        (("ground", "run", "x.png", "a", "--alpha", "1.5"), "between 0 and 1"),
        (("detect", "run", "x.png"), "NAME"),
        (("detect", "run", "x.png", "a", "--threshold", "high"), "between 0 and 1"),
    ],
)
def test_wrong_usage(words, part, capsys):
    assert run(*words) == 2
    assert part in capsys.readouterr().err
