"""The model card of an export."""

import dataclasses

import pytest
from tiny_run import tiny_config

from bvl.convert.card import model_card
from bvl.data.transforms import Preprocess
from bvl.models.decoder import DecoderConfig

ENV = [
    {"from_step": 0, "devices": ["cpu:cpu"], "licences": {"older": {"CC0": 1}}},
    {
        "from_step": 4,
        "devices": ["gpu:A"],
        "packages": {"bvl": "0.1.0", "jax": "0.10.2"},
        "licences": {"figures": {"CC BY 4.0": 940, "a | b": 2}, "scans": {"not stated": 7}},
    },
]
EVALUATION = {
    "retrieval_held/i2t_r1": 0.123456,
    "retrieval_held/i2t_r1/ci95": [0.1, 0.2],
    "retrieval_held/i2t_r1/chance": 0.005,
    "retrieval_held/num_images": 179,
    "retrieval_held/by": "patient",
}
PARITY = {
    "checked": True,
    "passed": True,
    "largest": {"image/embed": 1.25e-7, "text/layers": 3e-6},
    "inputs": {"grey_levels": 1.0, "texts": [], "why": {"tokens": "no file"}},
}


@pytest.fixture(scope="module")
def config():
    return tiny_config(init_from="runs/before")


def table_row(card, first):
    return next(line for line in card.splitlines() if line.startswith(f"| {first} |"))


def test_what_a_card_says(config):
    card = model_card(
        config,
        format="hf",
        env=ENV,
        evaluation=EVALUATION,
        parity=PARITY,
        how_to_load="from transformers import CLIPModel\nCLIPModel.from_pretrained('out')\n",
        extra=["After moving this folder run `relocate`."],
    )
    assert "```python\nfrom transformers import CLIPModel\nCLIPModel.from_pretrained('out')\n```" in card
    assert "not a medical device" in card and "run `relocate`" in card
    assert "image: ViT (variant XXS/16, width 32, depth 1" in card and "16 numbers of unit norm" in card
    assert "32x32 pixels" in card and "at most 16 tokens" in card
    assert table_row(card, "figures") == "| figures | CC BY 4.0 | 940 |"
    assert "| figures | a \\| b | 2 |" in card and "| older |" not in card
    assert "6 steps of 8 examples" in card and "contrastive (Contrastive)" in card
    assert "name adamw, lr 0.001" in card and "started from: runs/before" in card
    assert "What runs/before was trained on before is not in the table." in card
    assert "2 start(s), on gpu:A" in card and "jax 0.10.2" in card
    assert (
        table_row(card, "retrieval_held/i2t_r1") == "| retrieval_held/i2t_r1 | 0.1235 | 0.1 to 0.2 | 0.005 |"
    )
    assert table_row(card, "retrieval_held/num_images") == "| retrieval_held/num_images | 179 |  |  |"
    assert "inputs passed" in card and table_row(card, "image/embed") == "| image/embed | 1.2e-07 |"
    assert (
        "1 grey level(s)" in card and "same text: equal" in card and "tokens: not compared (no file)" in card
    )


def test_what_the_library_rounds_otherwise_is_said(config):
    said = "data.preprocess.crop_offset='nearest'"
    assert said in model_card(config, format="hf", how_to_load="load")
    assert said not in model_card(config, format="open_clip", how_to_load="load")
    assert said not in model_card(config, format="torch")


def test_another_checkpoint_is_not_praised_for_the_last(config):
    """Numbers of other parameters are left out, and the steps are those that were done."""
    evaluation = EVALUATION | {"retrieval_held/provenance": {"weights_hash": "of the last", "step": 6}}
    said = dict(format="torch", env=ENV, evaluation=evaluation)
    last = model_card(config, **said, step=6, weights_hash="of the last")
    assert "retrieval_held/i2t_r1" in last and "- 6 steps of 8" in last
    earlier = model_card(config, **said, step=2, weights_hash="of the second")
    assert "retrieval_held" not in earlier and "not evaluated; its run was, at step 6" in earlier
    assert "- 2 of 6 steps of 8" in earlier


def test_what_is_not_known_is_said(config):
    card = model_card(config, format="torch")
    assert "Nothing is recorded about the data" in card and "Nothing is recorded about its training" in card
    assert "was not evaluated" in card and "Nobody has compared" in card
    assert "bvl_model.load" in card
    assert "FAILED" in model_card(config, format="torch", parity=PARITY | {"passed": False})
    different = {"inputs": {"grey_levels": None, "texts": ["a chest"], "why": {}}}
    assert "DIFFERENT for 'a chest'" in model_card(config, format="torch", parity=PARITY | different)


def test_a_model_without_texts_or_with_a_decoder(config):
    preprocess = Preprocess(image_size=(32, 48), resize="squash", resize_to=60, mean=(0.25, 0.5, 0.125))
    data = dataclasses.replace(config.data, preprocess=preprocess)
    model = dataclasses.replace(config.model, decoder=DecoderConfig(width=32, depth=1, num_heads=2))
    card = model_card(dataclasses.replace(config, model=model, data=data), format="torch", env=ENV[0])
    assert (
        "48x32 pixels" in card and "resized to 60 whatever the aspect ratio, and the centre cut out" in card
    )
    assert "mean 0.25, 0.5, 0.125" in card and table_row(card, "older") == "| older | CC0 | 1 |"
    assert "decoder: Decoder (width 32, depth 1" in card and "fluent and wrong" in card
    image_only = dataclasses.replace(config.model, text=None, text_projection="none")
    card = model_card(dataclasses.replace(config, model=image_only), format="torch")
    assert "an image tower." in card and "## Texts" not in card and "text:" not in card
    language = dataclasses.replace(model, image=None, text=None)
    assert "unit norm" not in model_card(dataclasses.replace(config, model=language), format="torch")
