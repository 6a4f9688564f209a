"""Models of ours as folders of transformers: the class that fits loads them, and gives what ours gives."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from convert_hf_peers import (  # noqa: E402
    BERT_SPECIAL,
    bert,
    clip,
    clip_vision,
    dinov2,
    dinov2_registers,
    edit_config,
    masked_lm,
    siglip,
    siglip_vision,
    vision_text,
    vit,
)
from random_peers import worst, write_tokenizer  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402

from bvl.assembly import build_model, parameter_shapes  # noqa: E402
from bvl.convert.exporting import choose_family, export_model  # noqa: E402
from bvl.convert.families import Described  # noqa: E402
from bvl.convert.importing import config_of, import_model  # noqa: E402
from bvl.convert.inputs_parity import compare_inputs  # noqa: E402
from bvl.convert.parity import prove  # noqa: E402
from bvl.convert.peers import import_peer  # noqa: E402
from bvl.convert.table import flat_params, nested_params, split_layers  # noqa: E402
from bvl.data.text import Tokenizer, TokenizerConfig  # noqa: E402
from bvl.data.transforms import Preprocess  # noqa: E402
from bvl.errors import ConversionError  # noqa: E402
from bvl.models.bert import BertConfig  # noqa: E402
from bvl.models.decoder import DecoderConfig  # noqa: E402
from bvl.models.resnet import ResNetConfig  # noqa: E402
from bvl.models.text import TextConfig  # noqa: E402
from bvl.models.vit import ViTConfig  # noqa: E402
from bvl.models.vlm import DualEncoderConfig  # noqa: E402

torch.set_num_threads(1)
transformers = import_peer("transformers", what="the test")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

IMAGE = ViTConfig(variant="B/8", width=24, depth=2, num_heads=3, mlp_hidden=40)
TEXT = TextConfig(width=20, depth=2, num_heads=2, mlp_hidden=28)
BERT = BertConfig(hidden_size=20, depth=2, num_heads=2, mlp_hidden=28, max_positions=12, pool="pooler")
LIKE_SIGLIP = DualEncoderConfig(
    image=dataclasses.replace(IMAGE, norm_epsilon=1e-6, scan=True),
    text=dataclasses.replace(TEXT, causal=False, pool="last", attend_padding=True, activation="gelu_tanh", scan=True),
    embed_dim=24,
    image_projection="none",
    text_projection="linear_bias",
    init_temperature=0.1,
    init_bias=-10.0,
)  # fmt: skip
LIKE_CLIP = DualEncoderConfig(
    image=dataclasses.replace(IMAGE, pool="cls", pre_norm=True, patch_bias=False, drop_path=0.1),
    text=TEXT,
    embed_dim=12,
)
WITH_BERT = DualEncoderConfig(image=dataclasses.replace(IMAGE, pool="pooler"), text=BERT, embed_dim=12)
PREPROCESS = Preprocess(image_size=24, crop_offset="down", resampler="torchvision")


def own(tmp_path, model, preprocess=PREPROCESS):
    """(config, random parameters, tokenizer) of a model that was not imported."""
    tmp_path.mkdir(exist_ok=True)
    write_tokenizer(tmp_path, 40, BERT_SPECIAL)
    options = TokenizerConfig(context_length=10)
    tokenizer = Tokenizer.of(tmp_path / "tokenizer.json", options)
    config = config_of(Described(model, preprocess, None), options)
    rng = np.random.default_rng(0)
    shapes = parameter_shapes(build_model(config, tokenizer))
    flat = {name: rng.normal(size=shape).astype(np.float32) * 0.3 for name, shape in shapes.items()}
    return config, nested_params(flat), tokenizer


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (LIKE_SIGLIP, "SiglipModel"),
        (LIKE_CLIP, "CLIPModel"),
        (WITH_BERT, "VisionTextDualEncoderModel"),
    ],
)
def test_dual_encoders(tmp_path, model, name):
    config, params, tokenizer = own(tmp_path / "own", model)
    out = tmp_path / "out"
    out.mkdir()
    exported = export_model(out, "hf", config=config, params=params, tokenizer=tokenizer)
    assert exported.family.name == name
    found = prove(config, params, tokenizer, exported.family, exported.foreign, out)
    assert not worst(found), worst(found)
    assert type(transformers.AutoModel.from_pretrained(out)).__name__ == name
    transformers.AutoProcessor.from_pretrained(out)
    inputs = compare_inputs("hf", out, exported.foreign, preprocess=PREPROCESS, tokenizer=tokenizer)
    assert inputs.within and not inputs.why
    # And back, without a bit of difference.
    again = import_model(f"hf:{out}")
    there, here = flat_params(again.params), split_layers(flat_params(params))
    assert there.keys() == here.keys()
    assert all(np.array_equal(there[key], here[key]) for key in here)
    assert name in exported.family.how_to_load("out")


@pytest.mark.parametrize(
    "write", [clip, siglip, vision_text, vit, dinov2, dinov2_registers, bert, masked_lm], ids=lambda f: f.__name__
)  # fmt: skip
def test_what_came_from_transformers_goes_back(tmp_path, write):
    """The same class, config and tensors; but no pooler and no mask token that ours never read."""
    folder, out = write(transformers, tmp_path / "in"), tmp_path / "out"
    out.mkdir()
    imported = import_model(f"hf:{folder}")
    exported = export_model(
        out, "hf", config=imported.config, params=imported.params, tokenizer=imported.tokenizer
    )
    before, after = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() - after.keys() == set(imported.unread) and after.keys() <= before.keys()
    assert all(np.array_equal(before[name], after[name]) for name in after)
    assert [exported.family.name] == json.loads((folder / "config.json").read_text())["architectures"]
    assert import_model(f"hf:{out}").config.model == imported.config.model
    if not imported.unread:
        getattr(transformers, exported.family.name).from_pretrained(out)


def test_a_bert_that_is_not_averaged_says_so_to_sentence_transformers(tmp_path):
    model = DualEncoderConfig(
        image=None, text=dataclasses.replace(BERT, pool="max"), embed_dim=20, text_projection="none"
    )
    config, params, tokenizer = own(tmp_path / "own", model)
    out = tmp_path / "out"
    out.mkdir()
    export_model(out, "hf", config=config, params=params, tokenizer=tokenizer)
    again = import_model(f"hf:{out}")
    assert again.config.model == model
    assert again.tokenizer.context_length == 10


def replaced(model, part, **changes):
    return dataclasses.replace(model, **{part: dataclasses.replace(getattr(model, part), **changes)})


@pytest.mark.parametrize(
    ("model", "name", "words"),
    [
        (replaced(LIKE_CLIP, "image", pool="mean"), "CLIPModel", ["model.image.pool='mean'", "'cls'"]),
        (replaced(LIKE_CLIP, "image", qk_norm=True), "CLIPModel", ["model.image.qk_norm=True"]),
        (replaced(LIKE_CLIP, "image", stem="conv"), "CLIPModel", ["model.image.stem='conv'"]),
        (replaced(LIKE_CLIP, "text", pool="mean"), "CLIPModel", ["model.text.pool='mean'"]),
        (replaced(LIKE_CLIP, "text", causal=False), "CLIPModel", ["model.text.causal=False"]),
        (dataclasses.replace(LIKE_CLIP, init_bias=-10.0), "CLIPModel", ["model.init_bias=-10.0"]),
        (dataclasses.replace(LIKE_CLIP, text_projection="mlp"), "CLIPModel", ["text_projection='mlp'"]),
        (dataclasses.replace(LIKE_CLIP, image=ResNetConfig()), "CLIPModel", ["ResNetConfig"]),
        (
            dataclasses.replace(LIKE_CLIP, decoder=DecoderConfig(width=24, depth=1, num_heads=2)),
            "CLIPModel",
            ["model.decoder"],
        ),
        (dataclasses.replace(LIKE_SIGLIP, init_bias=None), "SiglipModel", ["model.init_bias=None"]),
        (replaced(LIKE_SIGLIP, "image", activation="swiglu"), "SiglipModel", ["activation='swiglu'"]),
        (replaced(LIKE_SIGLIP, "image", registers=2), "SiglipModel", ["model.image.registers=2"]),
        (replaced(WITH_BERT, "text", pool="mean"), "VisionTextDualEncoderModel", ["text.pool='mean'"]),
        (
            replaced(WITH_BERT, "text", pool_layers=(1, 2)),
            "VisionTextDualEncoderModel",
            ["model.text.pool_layers=(1, 2)"],
        ),
        (
            replaced(WITH_BERT, "image", pool="cls"),
            "VisionTextDualEncoderModel",
            ["model.image.layer_scale=None"],
        ),
    ],
)
def test_what_no_class_holds_is_named(tmp_path, model, name, words):
    options = TokenizerConfig(context_length=10)
    write_tokenizer(tmp_path, 40, BERT_SPECIAL)
    tokenizer = Tokenizer.of(tmp_path / "tokenizer.json", options)
    with pytest.raises(ConversionError) as error:
        choose_family("hf", config_of(Described(model, PREPROCESS, None), options), tokenizer)
    line = next(x for x in str(error.value).splitlines() if x.strip().startswith(f"{name}:"))
    assert all(word in line for word in words), line
    assert "--to torch" in str(error.value)


def test_preprocessing_that_no_image_processor_does_is_named(tmp_path):
    padded = Preprocess(image_size=24, resize="pad")
    config, _, tokenizer = own(tmp_path, LIKE_CLIP, padded)
    with pytest.raises(ConversionError, match="resize='pad'.*torch"):
        choose_family("hf", config, tokenizer)
    oblong = Preprocess(image_size=(24, 16), resize="squash")
    config, _, tokenizer = own(tmp_path, LIKE_SIGLIP, oblong)
    with pytest.raises(ConversionError, match="SiglipModel has no .*not square"):
        choose_family("hf", config, tokenizer)


def test_an_end_token_of_id_two_is_refused(tmp_path):
    write_tokenizer(tmp_path, 40, ("[PAD]", "[UNK]", "[SEP]", "[CLS]", "[MASK]"))
    options = TokenizerConfig(context_length=10)
    tokenizer = Tokenizer.of(tmp_path / "tokenizer.json", options)
    with pytest.raises(ConversionError, match="end token of id 2"):
        choose_family("hf", config_of(Described(LIKE_CLIP, PREPROCESS, None), options), tokenizer)


def test_a_config_edited_after_the_export_is_caught(tmp_path):
    """A wrong epsilon is a small difference, and the first layer that departs is named."""
    config, params, tokenizer = own(tmp_path / "own", LIKE_CLIP)
    out = tmp_path / "out"
    out.mkdir()
    exported = export_model(out, "hf", config=config, params=params, tokenizer=tokenizer)
    vision = exported.foreign["vision_config"] | {"layer_norm_eps": 1e-2}
    edit_config(out, vision_config=vision)
    found = prove(config, params, tokenizer, exported.family, exported.foreign, out)
    first = next(d for d in found if not d.within)
    assert (first.tower, first.ours) == ("image", "image/pre_norm")


def test_a_scale_beyond_its_limit_is_written_as_it_is_read(tmp_path):
    config, params, tokenizer = own(tmp_path / "own", LIKE_CLIP)
    params["model"]["log_scale"] = np.float32(4.7)
    out = tmp_path / "out"
    out.mkdir()
    export_model(out, "hf", config=config, params=params, tokenizer=tokenizer)
    scale = np.exp(load_file(out / "model.safetensors")["logit_scale"])
    np.testing.assert_allclose(scale, config.model.max_scale, rtol=1e-6)


def test_the_lines_of_the_model_card_load_the_folder(tmp_path):
    folder, out = bert(transformers, tmp_path / "in"), tmp_path / "out"
    out.mkdir()
    imported = import_model(f"hf:{folder}")
    exported = export_model(
        out, "hf", config=imported.config, params=imported.params, tokenizer=imported.tokenizer
    )
    names = {"text": "w9 w10", "image": Image.new("RGB", (30, 30))}
    exec(exported.family.how_to_load(str(out)), names)  # noqa: S102
    assert names["hidden"].shape == (1, 10, 20)
    (note,) = exported.family.notes(exported.foreign, out)
    assert "add_pooling_layer=False" in note


@pytest.mark.parametrize("make", [vit, dinov2, clip_vision, siglip_vision])
def test_the_lines_of_an_image_towers_card_give_its_embedding(tmp_path, make):
    """The proof's own reading of the class is the standard."""
    folder, out = make(transformers, tmp_path / "in"), tmp_path / "out"
    out.mkdir()
    imported = import_model(f"hf:{folder}")
    exported = export_model(
        out, "hf", config=imported.config, params=imported.params, tokenizer=imported.tokenizer
    )
    names = {"image": Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 30, 3), np.uint8))}
    exec(exported.family.how_to_load(str(out)), names)  # noqa: S102
    (tower,) = exported.family.towers(imported.config.model, exported.foreign)
    expected = tower.run(names["model"], {"pixels": names["images"]["pixel_values"]})["pooled"]
    np.testing.assert_allclose(names["embeddings"].detach(), expected.detach(), atol=1e-6)
