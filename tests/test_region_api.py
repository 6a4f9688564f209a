"""m.describe, m.ground, m.segment, m.detect, m.heat_maps: shapes, what reaches the functions below, bad input."""

import dataclasses

import numpy as np
import pytest
from PIL import Image
from tiny_model import PHANTOMS, tiny_components
from tiny_regions import region_model
from tiny_run import fast_compilation  # noqa: F401

from bvl.api import Model
from bvl.data.phantoms import PhantomSource
from bvl.decode.options import DecodeOptions
from bvl.errors import ConfigError, UserError
from bvl.tasks.captioning import Candidate

pytestmark = pytest.mark.usefixtures("fast_compilation")

BOX, OTHER = [0.0, 0.0, 0.5, 0.5], [0.25, 0.5, 1.0, 1.0]
SMALL = {"batch_size": 4, "image_batch_size": 2, "max_length": 4}


@pytest.fixture(scope="module")
def model():
    return region_model()


@pytest.fixture(scope="module")
def images():
    source = PhantomSource(PHANTOMS)
    return [source[i]["image"] for i in range(2)]


@pytest.fixture
def described(monkeypatch):
    """The calls of the function below, which writes x for every region."""
    calls = []

    def describe(components, images, regions, **how):
        calls.append((images, regions, how))
        return [[[Candidate("x", 0.0, 0.0, ())] for _ in some] for some in regions]

    monkeypatch.setattr("bvl.tasks.describing.describe", describe)
    return calls


def test_a_text_for_each_region_of_each_image(model, images, tmp_path):
    Image.fromarray(images[1]).save(tmp_path / "1.png")
    texts = model.describe([images[0], tmp_path / "1.png"], boxes=[[BOX, OTHER], [BOX]], **SMALL)
    assert [len(some) for some in texts] == [2, 1]
    assert all(isinstance(text, str) for some in texts for text in some)
    regions = [[{"box": BOX}, {"box": OTHER}], [{"box": BOX}]]
    assert model.describe(images, regions=regions, **SMALL) == texts
    assert model.describe(np.stack(images), boxes=np.array([[BOX], [BOX]]), **SMALL) == [
        texts[0][:1],
        texts[1],
    ]


def test_regions_of_each_kind_reach_the_function_below(model, images, described):
    mask = np.ones((32, 32), bool)
    for given, regions in (
        ({"boxes": [[BOX], []]}, [[{"box": BOX}], []]),
        ({"points": [[(0.5, 0.25)], []]}, [[{"point": (0.5, 0.25)}], []]),
        ({"masks": [[], [mask]]}, [[], [{"mask": mask}]]),
        ({"regions": [[{"box": BOX}, {"point": [0, 1]}], []]}, [[{"box": BOX}, {"point": [0, 1]}], []]),
    ):
        model.describe(images, **given)
        np.testing.assert_equal(described[-1][1], regions)


def test_options_reach_the_function_below(model, images, described):
    how = {
        "guidance": [[2.0], []],
        "guidance_null": "region",
        "begin": "a",
        "seed": 3,
        "first_row": 5,
        "batch_size": 4,
        "image_batch_size": 2,
    }
    search = {
        "beams": 4,
        "groups": 2,
        "diversity": 0.3,
        "length_penalty": 0.7,
        "min_length": 2,
        "max_length": 9,
    }
    search |= {"no_repeat_ngram": 3, "repetition_penalty": 1.2}
    assert model.describe(images, boxes=[[BOX], []], length=5, **how, **search) == [["x"], []]
    _, _, given = described[-1]
    assert given.pop("options") == DecodeOptions(**search)
    assert given == {**how, "controls": {"length": 5}, "language_model": None}
    model.describe(images, boxes=[[BOX], []], temperature=0.5, top_k=3, top_p=0.9)
    assert described[-1][2]["options"] == DecodeOptions(max_length=15, temperature=0.5, top_k=3, top_p=0.9)
    with pytest.raises(TypeError, match="beam"):
        model.describe(images, boxes=[[BOX], []], beam=4)


def test_phrases_are_found_in_each_image(model, images):
    phrases = ["a nodule", "a cyst", "a cell"]
    first, second = model.ground(images, phrases, batch_size=2)
    for found in (first, second):
        assert found.boxes.shape == (3, 4) and (found.boxes >= 0).all() and (found.boxes <= 1).all()
        assert found.scores.shape == (3,) and np.isnan(found.p_values).all()
        np.testing.assert_array_equal(found.found, found.scores >= 0.5)
    (alone,) = model.ground([images[1]], [["a cyst"]], batch_size=2)
    np.testing.assert_allclose(alone.scores, second.scores[1:2], rtol=1e-5)


def test_alpha_decides_by_the_calibration(model, images):
    scores = model.ground(images[:1], ["a nodule"], batch_size=2)[0].scores
    logit = np.log(scores[0] / (1 - scores[0]))
    negatives = [logit - 1] * 17 + [logit + 1] * 2
    calibration = {"negatives": sorted(negatives), "weights_hash": model.components.weights_hash()}
    calibrated = Model(dataclasses.replace(model.components, calibration=calibration))
    for alpha, there in ((0.1, False), (0.16, True)):
        (found,) = calibrated.ground(images[:1], ["a nodule"], alpha=alpha, batch_size=2)
        np.testing.assert_allclose(found.p_values, [3 / 20])
        assert found.found.tolist() == [there]


def test_masks_and_heat_maps_have_the_size_of_their_image(model, images):
    large = Image.fromarray(images[0]).resize((60, 40))
    for maps in (
        model.segment([large, images[1]], ["a nodule", "a cyst"], batch_size=2),
        model.heat_maps([large, images[1]], ["a nodule", "a cyst"], batch_size=2),
    ):
        assert [m.shape for m in maps] == [(2, 40, 60), (2, 32, 32)]
        assert all(m.dtype == np.float32 for m in maps)
    sharp, smooth = (model.heat_maps(images, ["a nodule"], sigma=s, batch_size=2)[0] for s in (0.0, 2.0))
    assert np.ptp(smooth) < np.ptp(sharp)


def test_objects_are_detected_by_name(model, images):
    some = model.detect(images, ["nodule", "cyst"], threshold=0.05, max_detections=5, batch_size=2)
    for found in some:
        assert len(found.names) == len(found.boxes) == len(found.scores) <= 5
        assert set(found.names) <= {"nodule", "cyst"}
        assert (np.diff(found.scores) <= 0).all() and (found.scores >= 0.05).all()
    assert sum(len(found.names) for found in some) > 0
    assert all(not found.names for found in model.detect(images, ["nodule"], threshold=1.0, batch_size=2))


@pytest.mark.parametrize(
    "given, part",
    [
        ({}, "give one of boxes, points, masks and regions, as a list for each image, not none"),
        ({"boxes": [[BOX], []], "points": [[[0, 0]], []]}, "not boxes and points"),
        ({"boxes": [BOX, BOX]}, r"images\[0\]: boxes is a single box; put it into a list"),
        ({"boxes": [[], [[20, 10, 30, 40]]]}, r"images\[1\], boxes\[0\]: .*fractions.*pixels"),
        ({"boxes": [[[0.5, 0, 0.2, 1]], []]}, r"images\[0\], boxes\[0\]"),
        ({"points": [[], [[0.1, 20]]]}, r"images\[1\], points\[0\]: .*pixels"),
        ({"masks": [[np.zeros((32, 32), bool)], []]}, "the mask is empty"),
        ({"masks": [[np.ones((8, 32), bool)], []]}, "the mask is 32x8 pixels .* its image 32x32"),
        ({"boxes": [[BOX]]}, "regions of 1 images for 2 images"),
        ({"boxes": [[], []]}, "no regions to describe"),
        ({"regions": [[{"circle": 3}], []]}, "is no region"),
        ({"boxes": [[BOX], []], "guidance_null": "controls"}, "choose image, region or both"),
        ({"boxes": [[BOX], []], "beams": 0}, "beams=0"),
        ({"boxes": [[BOX], []], "best_of": 4}, "best_of: texts of regions are not chosen"),
        ({"boxes": [[BOX], []], "max_length": 99}, "max_length=99"),
        ({"boxes": [[BOX], []], "length": 99}, "length=99"),
        ({"boxes": [[BOX], []], "language_model": "no_such_run"}, "no_such_run is no run folder"),
    ],
)
def test_bad_regions(model, images, given, part):
    with pytest.raises(UserError, match=part):
        model.describe(images, **given)


@pytest.mark.parametrize("method", ["ground", "segment", "detect", "heat_maps"])
@pytest.mark.parametrize(
    "phrases, part",
    [
        ("a nodule", "is one text; give a list"),
        ([], "give at least one"),
        (["a", " "], "not empty"),
        (["nodule " * 40], "this run reads up to 14"),
    ],
)
def test_bad_phrases(model, images, method, phrases, part):
    with pytest.raises(UserError, match=part):
        getattr(model, method)(images, phrases)


def test_a_single_image_and_none(model, images):
    for call in (
        lambda x: model.describe(x, boxes=[[BOX]]),
        lambda x: model.ground(x, ["a"]),
        lambda x: model.segment(x, ["a"]),
        lambda x: model.detect(x, ["a"]),
        lambda x: model.heat_maps(x, ["a"]),
    ):
        with pytest.raises(UserError, match=r"write \[image\]"):
            call(images[0])
        with pytest.raises(UserError, match="no images|regions of 1 images for 0"):
            call([])


def test_a_run_without_the_task_names_what_to_train(images):
    model = Model(tiny_components())
    for call, part in (
        (lambda: model.describe(images, boxes=[[BOX], [BOX]]), "RegionCaption"),
        (lambda: model.ground(images, ["a"]), "Grounding"),
        (lambda: model.segment(images, ["a"]), "Grounding"),
        (lambda: model.detect(images, ["a"]), "Detection"),
    ):
        with pytest.raises(ConfigError, match=rf"no task of type {part}, only contrastive .*{part}\(\)"):
            call()
    captioner = Model(tiny_components(captions=True, contrastive=False))
    with pytest.raises(ConfigError, match=r"Contrastive\(\)"):
        captioner.heat_maps(images, ["a"])
