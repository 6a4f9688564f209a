"""m.caption: what reaches the decoder, bad input, and the same text wherever an image stands."""

import dataclasses
import logging
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tiny_model import PHANTOMS, tiny_components
from tiny_run import fast_compilation  # noqa: F401

from bvl.api import Model
from bvl.data.phantoms import PhantomSource
from bvl.errors import ConfigError, UserError
from bvl.tasks import captioning, writing_rows

pytestmark = pytest.mark.usefixtures("fast_compilation")


@pytest.fixture(scope="module")
def model():
    return Model(tiny_components(captions=True))


@pytest.fixture(scope="module")
def images():
    source = PhantomSource(PHANTOMS)
    return [source[i]["image"] for i in range(5)]


def test_one_text_an_image_of_any_kind(model, images, tmp_path):
    Image.fromarray(images[1]).save(tmp_path / "1.png")
    texts = model.caption([images[0], tmp_path / "1.png", Image.fromarray(images[2])], batch_size=4)
    assert all(isinstance(text, str) and text for text in texts) and len(texts) == 3
    # Neither the batch nor the neighbours matter.
    assert model.caption(np.stack(images), batch_size=4)[:3] == texts
    assert model.caption([images[2]], batch_size=4) == texts[2:]


def test_guidance_one_an_image(model, images):
    each = model.caption(images, guidance=[1, 0, 1, 4, 1], batch_size=8)
    plain, much = model.caption(images, batch_size=8), model.caption(images, guidance=4.0, batch_size=8)
    assert [each[i] for i in (0, 2, 4)] == [plain[i] for i in (0, 2, 4)]
    assert each[3] == much[3]
    # The scale is data: other scales compile nothing.
    before = writing_rows.generate._cache_size()
    model.caption(images, guidance=2.5, batch_size=8)
    assert writing_rows.generate._cache_size() == before


def test_arguments_reach_the_decoder(model, images, monkeypatch):
    calls = []

    def write(components, images, *, options, **how):
        calls.append((options, how))
        return [[captioning.Candidate("x", 0.0, 0.0, ())] for _ in images]

    monkeypatch.setattr("bvl.evals.writing.write_captions", write)
    search = {
        "beams": 4,
        "groups": 2,
        "diversity": 0.3,
        "length_penalty": 0.7,
        "no_repeat_ngram": 3,
        "repetition_penalty": 1.2,
        "min_length": 2,
        "max_length": 9,
    }
    controls = {"section": "impression", "length": 5, "quality": 2, "prompt": "frontal"}
    how = {"guidance": 2.0, "guidance_null": "both", "begin": "a", "seed": 3, "first_row": 5, "batch_size": 4}
    assert model.caption(images, **search, **controls, **how) == ["x"] * 5
    options, given = calls[-1]
    assert {name: getattr(options, name) for name in search} == search and options.num_return == 1
    assert given == {**how, "controls": controls, "language_model": None}
    model.caption(images, temperature=0.5, top_k=3, top_p=0.9)
    options, given = calls[-1]
    assert (options.temperature, options.top_k, options.top_p) == (0.5, 3, 0.9)
    assert options.max_length == 15  # the context without the start token
    assert given["guidance"] == 1.0 and set(given["controls"].values()) == {None}
    model.caption(images, language_model=model)
    assert calls[-1][1]["language_model"] is model.components


def test_the_best_of_several_is_what_the_scorer_likes(model, images, monkeypatch):
    def write(components, images, *, options, **how):
        texts = ["a nodule", "two cysts", "a sickle cell"][: options.num_return]
        return [[captioning.Candidate(text, 0.0, 0.0, ()) for text in texts] for _ in images]

    monkeypatch.setattr("bvl.evals.writing.write_captions", write)
    assert model.caption(images) == ["a nodule"] * 5
    similarity = model.embed_images(images) @ model.embed_texts(["a nodule", "two cysts", "a sickle cell"]).T
    expected = [["a nodule", "two cysts", "a sickle cell"][i] for i in similarity.argmax(1)]
    assert model.caption(images, best_of=3, beams=3) == expected
    assert model.caption(images, best_of=3, temperature=1.0, scorer=model) == expected


@pytest.mark.parametrize(
    "options, part",
    [
        ({"guidance": -1.0}, "guidance=-1.0: must be a finite number"),
        ({"guidance": float("nan")}, "guidance=nan"),
        ({"guidance": [1.0, 2.0]}, r"guidance of shape \(2,\) for 5 images"),
        ({"guidance": "much"}, "guidance='much'"),
        ({"guidance_null": "text"}, "guidance_null='text': choose image, controls or both"),
        ({"beams": 0}, "beams=0"),
        ({"beams": 4, "groups": 3}, "groups=3 does not divide beams=4"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"top_k": 5}, "set temperature"),
        ({"best_of": 0}, "best_of=0"),
        ({"best_of": 4, "beams": 2}, "best_of=4 with beams=2: set beams as high"),
        ({"max_length": 99}, "max_length=99: this run was trained on texts of up to 15 tokens"),
        ({"prompt": "frontal " * 20}, "the prompt 'frontal .* has room for 6"),
        ({"section": "history"}, "section='history' is unknown"),
        ({"length": 13}, "length=13: give a number of words from 1 to 12"),
        ({"length": [4, 5]}, "length: 2 values for 5 images"),
        ({"quality": 3}, "quality=3: give a bin from 0"),
        ({"begin": "a " * 20}, "begin: .* leave nothing to write"),
        ({"scorer": "no_such_run", "best_of": 2, "beams": 2}, "no_such_run is no run folder"),
        ({"scorer": "no_such_run"}, "best_of=1 writes only one: set best_of"),
        ({"language_model": "no_such_run"}, "no_such_run is no run folder"),
    ],
)
def test_bad_input(model, images, options, part):
    with pytest.raises(UserError, match=part):
        model.caption(images, **options)


def test_no_images_and_a_single_one(model, images):
    with pytest.raises(UserError, match="no images to caption"):
        model.caption([])
    with pytest.raises(UserError, match=r"write \[image\]"):
        model.caption(images[0])


def test_a_contrastive_run_names_the_missing_task(images):
    with pytest.raises(ConfigError, match="no task of type Caption, only contrastive"):
        Model(tiny_components()).caption(images)


def test_guidance_without_image_dropout_warns_and_runs(images, caplog):
    model = Model(tiny_components(captions=True, image_dropout=0.0))
    with caplog.at_level(logging.WARNING):
        assert len(model.caption(images, guidance=2.0, batch_size=8)) == 5
    assert "tasks.caption.image_dropout=0.2" in caplog.text
    caplog.clear()
    model.caption(images, batch_size=8)
    assert "image_dropout" not in caplog.text


def test_a_scorer_must_be_contrastive(model, images):
    nothing = SimpleNamespace(config=SimpleNamespace(embeds_text=False))
    other = Model(dataclasses.replace(model.components, model=nothing))
    with pytest.raises(UserError, match="this run has no text tower: name one as scorer"):
        model.caption(images, best_of=2, beams=2, scorer=other)
    # It has a text tower, which nothing has trained.
    alone = Model(tiny_components(captions=True, contrastive=False))
    with pytest.raises(ConfigError, match="best_of=2 needs a contrastive model"):
        alone.caption(images, best_of=2, beams=2)
    with pytest.raises(UserError, match="tasks of this run are caption: name one"):
        model.caption(images, best_of=2, beams=2, scorer=alone)
