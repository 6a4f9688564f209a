"""The public face: `bvl.load` and Model."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image
from tiny_model import PHANTOMS, tiny_components

import bvl
from bvl import config as config_lib
from bvl.checkpoint import Checkpoints
from bvl.data.phantoms import MODALITY_PROMPTS, PhantomSource, write_phantoms
from bvl.errors import ImageError, RunFolderError, UserError
from bvl.runs import RunFolder
from bvl.tasks import contrastive

IMAGES = [PhantomSource(PHANTOMS)[i]["image"] for i in range(5)]
PROMPTS = [p[0] for p in MODALITY_PROMPTS.values()]


@pytest.fixture(scope="module")
def model():
    return bvl.Model(tiny_components())


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, model):
    """A run folder as training leaves it, with two checkpoints that differ."""
    run, components = RunFolder(tmp_path_factory.mktemp("runs") / "tiny"), model.components
    run.path.mkdir()
    run.config.write_text(config_lib.dump(components.config))
    components.tokenizer.save(run.tokenizer)
    run.preprocess.write_text(json.dumps(components.preprocess.to_dict()))
    checkpoints = Checkpoints(run.checkpoints)
    checkpoints.save(1, {"params": jax.tree.map(lambda x: 2 * x, components.params)})
    checkpoints.save(2, {"params": components.params})
    checkpoints.wait()
    checkpoints.close()
    return run.path


def test_import_is_light():
    code = "import sys, bvl; bvl.__version__; assert 'jax' not in sys.modules; dir(bvl); bvl.load; assert 'jax' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert set(bvl.__all__) == {"Model", "__version__", "load"}
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        bvl.lod  # noqa: B018


def test_load_gives_the_model_that_was_saved(run_folder, model):
    loaded = bvl.load(run_folder)
    np.testing.assert_array_equal(loaded.embed_images(IMAGES), model.embed_images(IMAGES))
    np.testing.assert_array_equal(loaded.embed_texts(PROMPTS), model.embed_texts(PROMPTS))
    assert loaded.config == model.config
    assert jax.tree.structure(loaded.params) == jax.tree.structure(model.params)
    assert repr(loaded).startswith("Model(step=2, weights=")
    scale = model.params["model"]["log_scale"]
    assert bvl.load(str(run_folder), checkpoint=1).params["model"]["log_scale"] == 2 * scale


def test_what_cannot_be_loaded_is_said(tmp_path):
    for spec in ("open_clip:somewhere", "hf:somewhere"):
        with pytest.raises(UserError, match="no folder somewhere; give open_clip:DIR or hf:DIR"):
            bvl.load(spec)
    with pytest.raises(RunFolderError, match="config.json is missing"):
        bvl.load(tmp_path)


def test_images_of_every_kind_give_the_same_embedding(tmp_path, model):
    path = tmp_path / "a.png"
    Image.fromarray(IMAGES[0]).save(path)
    kinds = [path, str(path), Image.fromarray(IMAGES[0]), IMAGES[0], IMAGES[0] / np.float32(255)]
    embed = model.embed_images(kinds, batch_size=4)
    assert embed.shape == (5, 8) and embed.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(embed, axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(embed, np.repeat(embed[:1], 5, 0))
    stacked = model.embed_images(np.stack(IMAGES), batch_size=2)
    np.testing.assert_allclose(stacked, model.embed_images(iter(IMAGES)), atol=1e-6)
    assert model.embed_images([]).shape == (0, 8)


def test_one_image_or_text_instead_of_several_is_refused(tmp_path, model):
    for one in (
        "a.png",
        tmp_path / "a.png",
        b"bytes",
        IMAGES[0],
        IMAGES[0][..., 0],
        Image.fromarray(IMAGES[0]),
    ):
        with pytest.raises(UserError, match=r"write \[image\]"):
            model.embed_images(one)
    with pytest.raises(UserError, match=r"for one write \['a nodule'\]"):
        model.embed_texts("a nodule")
    with pytest.raises(UserError, match="strings, not int"):
        model.embed_texts([1])
    with pytest.raises(ImageError, match="no such image"):
        model.embed_images([tmp_path / "a.png"])


def test_classify_single_label(model):
    scale, _ = model.components.scale_and_bias()
    logits = scale * model.embed_images(IMAGES) @ model.embed_texts(PROMPTS).T
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    probabilities = model.classify(IMAGES, PROMPTS)
    assert probabilities.shape == (5, 4) and probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities, expected, rtol=1e-3)
    ensembles = [list(p) for p in MODALITY_PROMPTS.values()]
    text = contrastive.embed_prompts(model.components, ensembles)
    logits = scale * model.embed_images(IMAGES) @ text.T
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    for prompts in (ensembles, MODALITY_PROMPTS):
        np.testing.assert_allclose(model.classify(IMAGES, prompts), expected, rtol=1e-3)


def test_classify_multi_label(model):
    scale, bias = model.components.scale_and_bias()
    image = model.embed_images(IMAGES)

    def sigmoid(z):
        return 1 / (1 + np.exp(-z))

    # Two prompts in a tuple are an ensemble, not a positive and a negative.
    text = contrastive.embed_prompts(model.components, [["a", "b"], ["no a", "no b"]])
    found = model.classify(IMAGES, [("a", "b")], multi_label=True)
    np.testing.assert_allclose(found, sigmoid(scale * image @ text[:1].T + bias), rtol=1e-3)
    pair = {"positive": ("a", "b"), "negative": ["no a", "no b"]}
    found = model.classify(IMAGES, {"a": pair}, multi_label=True)
    np.testing.assert_allclose(found, sigmoid(scale * image @ (text[:1] - text[1:]).T), rtol=1e-3)


@pytest.mark.parametrize(
    ("prompts", "multi_label", "message"),
    [
        ("a nodule", False, "list of prompts"),
        (["a nodule"], False, "1 classes given"),
        ([], True, "0 classes given"),
        (["a", []], False, r"not \[\]"),
        (["a", 3], False, "not 3"),
        ([{"positive": "a", "negative": "b"}, "c"], True, "every class must have both"),
        ([{"positive": "a", "negative": "b"}] * 2, False, "need multi_label=True"),
        ([{"positive": "a"}], True, "'positive' and 'negative' prompts, not positive"),
    ],
)
def test_prompts_that_cannot_be_used_are_refused(model, prompts, multi_label, message):
    with pytest.raises(UserError, match=message):
        model.classify(IMAGES, prompts, multi_label)


def test_evaluate_a_folder(tmp_path, model):
    write_phantoms(tmp_path / "scans", PHANTOMS, 24)
    result = model.evaluate(tmp_path / "scans", split="train", batch_size=16)
    assert result["retrieval_scans/num_images"] > 10
    assert 0 <= result["retrieval_scans/t2i_r1"] <= 1
    assert result["zeroshot_scans/provenance"]["prompts"]
    assert list(tmp_path.iterdir()) == [tmp_path / "scans"]
