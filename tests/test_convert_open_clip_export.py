"""Our dual encoders become folders of open_clip that it loads strictly, with equal outputs, also after a move."""

import dataclasses
import json
import math
import re
import subprocess

import numpy as np
import pytest
from convert_peers import open_clip_folder, word_tokenizer
from PIL import Image
from test_convert_open_clip import BERT, CASES, HF_TEXT, VISION, check, model
from tiny_run import fast_compilation  # noqa: F401

from bvl.config import Config
from bvl.convert.exporting import choose_family, export_model
from bvl.convert.importing import import_model
from bvl.convert.open_clip_writing import RELOCATE
from bvl.convert.parity import prove
from bvl.convert.peers import import_peer
from bvl.convert.table import flat_params
from bvl.data.pipeline import DataConfig
from bvl.data.text import Tokenizer, TokenizerConfig
from bvl.data.transforms import Preprocess
from bvl.errors import ConversionError
from bvl.models.bert import BertConfig
from bvl.models.decoder import DecoderConfig
from bvl.models.resnet import ResNetConfig
from bvl.models.text import TextConfig
from bvl.models.vit import ViTConfig
from bvl.models.vlm import DualEncoderConfig
from bvl.tasks.contrastive import Contrastive
from bvl.train.optim import OptimConfig

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")
pytestmark = pytest.mark.usefixtures("fast_compilation")


def export(imported, out, **options):
    out.mkdir()
    return export_model(
        out,
        "open_clip",
        config=imported.config,
        params=imported.params,
        tokenizer=imported.tokenizer,
        **options,
    )


def load(folder):
    """As a colleague does."""
    open_clip = import_peer("open_clip", what="a test")
    loaded = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    return loaded[0].eval(), loaded[2], open_clip.get_tokenizer(f"local-dir:{folder}")


@pytest.mark.parametrize("case", CASES)
def test_back_and_forth(tmp_path, case):
    """The tensors come back bit for bit, and open_clip loads them strictly."""
    source = open_clip_folder(tmp_path / "source", CASES[case])
    imported = import_model(f"open_clip:{source}")
    exported = export(imported, tmp_path / "out")
    first = safetensors_torch.load_file(source / "open_clip_model.safetensors")
    second = safetensors_torch.load_file(tmp_path / "out" / "open_clip_model.safetensors")
    first = {name.removeprefix("text."): x for name, x in first.items()}
    second = {name.removeprefix("text."): x for name, x in second.items()}
    assert first.keys() == second.keys()
    for name, x in first.items():
        counts = name.endswith("num_batches_tracked")
        assert counts or torch.equal(x.reshape(second[name].shape), second[name]), name
    again = import_model(f"open_clip:{tmp_path / 'out'}")
    assert again.config.model == imported.config.model
    assert again.config.data.preprocess == imported.config.data.preprocess
    params = flat_params(again.params)
    assert all(np.array_equal(x, params[name]) for name, x in flat_params(imported.params).items())
    loaded, transform, tokenize = load(tmp_path / "out")
    assert type(loaded).__name__ == exported.family.name
    tokens, _ = imported.tokenizer.encode_texts(["w3 w4", "w5 nothing"])
    assert np.array_equal(tokenize(["w3 w4", "w5 nothing"]).numpy(), tokens)
    height, width = imported.config.data.preprocess.height_width
    assert transform(Image.new("RGB", (50, 40))).shape == (3, height, width)


def test_bert_after_a_move(tmp_path, monkeypatch):
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text(json.dumps(BERT))
    text = HF_TEXT | {"hf_model_name": str(tmp_path / "bert"), "hf_pooler_type": "cls_pooler"}
    source = open_clip_folder(tmp_path / "source", model(VISION, text))
    imported = import_model(f"open_clip:{source}")
    out = tmp_path / "out"
    exported = export(imported, out)
    differences = prove(
        imported.config, imported.params, imported.tokenizer, exported.family, exported.foreign, out
    )
    assert all(d.within for d in differences)
    note = " ".join(exported.family.notes(exported.foreign, out))
    assert RELOCATE in note
    tokens = torch.from_numpy(imported.tokenizer.encode_texts(["w3 w4 w5"])[0]).long()
    before = load(out)[0].encode_text(tokens)

    moved = tmp_path / "elsewhere" / "moved"
    moved.parent.mkdir()
    out.rename(moved)
    (tmp_path / "bert" / "config.json").unlink()
    with pytest.raises(Exception, match=re.escape(str(out))):
        load(moved)
    command = re.search(r"```sh\n(.*)\n```", note)[1]
    subprocess.run(command, shell=True, check=True, cwd=moved)
    assert torch.equal(load(moved)[0].encode_text(tokens), before)
    check(import_model(f"open_clip:{moved}"))

    # A public name instead: nothing to relocate, and the proof still finds the config.
    public = export(imported, tmp_path / "public", hub_id="someone/bert")
    assert public.foreign["model_cfg"]["text_cfg"]["hf_model_name"] == "someone/bert"
    assert public.family.notes(public.foreign, tmp_path / "public") == ()
    assert public.family.load_peer(tmp_path / "public", public.foreign).text.config.hidden_size == 64


def config_of(image, text, size=16, preprocess=None, **options):
    return Config(
        model=DualEncoderConfig(image=image, text=text, **options),
        data=DataConfig(
            preprocess=Preprocess(image_size=size, **(preprocess or {})),
            tokenizer=TokenizerConfig(context_length=9),
        ),
        tasks={"contrastive": Contrastive()},
        optim=OptimConfig(),
        steps=1,
        batch_size=2,
    )


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.load(word_tokenizer(tmp_path_factory.mktemp("words")) / "tokenizer.json", 9)


VIT = ViTConfig(variant="XXS/8", depth=1, pool="cls", patch_bias=False)
OWN = TextConfig(width=24, depth=1, num_heads=3)
B16 = ViTConfig(variant="B/16", pool="map", norm_epsilon=1e-6)


@pytest.mark.parametrize(
    "image, text, size, options, found",
    [
        (VIT, OWN, 16, {}, ("CLIP", None, None)),
        (B16, OWN, 224, {}, ("CustomTextCLIP", "vit_base_patch16_siglip_224", "map")),
        (B16, OWN, 384, {"image_projection": "none", "embed_dim": 768}, ("CustomTextCLIP", "vit_base_patch16_siglip_384", "map")),
        (dataclasses.replace(B16, pool="cls"), BertConfig("tiny"), 224, {"text_projection": "mlp"}, ("CustomTextCLIP", "vit_base_patch16_224", "token")),
        (dataclasses.replace(B16, pool="mean"), OWN, 256, {"image_projection": "linear_bias"}, ("CustomTextCLIP", "vit_base_patch16_siglip_gap_256", "avg")),
        (dataclasses.replace(B16, pool="mean", class_token=True), OWN, 224, {}, ("CustomTextCLIP", "vit_base_patch16_224", "avg")),
        (ViTConfig("So400m/14", norm_epsilon=1e-6, whole_patches=False), OWN, 384, {}, ("CustomTextCLIP", "vit_so400m_patch14_siglip_384", "map")),
    ],
)  # fmt: skip
def test_the_class_that_fits(tokenizer, image, text, size, options, found):
    family, foreign = choose_family("open_clip", config_of(image, text, size, **options), tokenizer)
    vision = foreign["model_cfg"]["vision_cfg"]
    assert (family.name, vision.get("timm_model_name"), vision.get("timm_pool")) == found
    assert foreign["model_cfg"]["init_logit_scale"] == pytest.approx(math.log(1 / 0.07))


@pytest.mark.parametrize(
    "image, text, options, named",
    [
        (dataclasses.replace(VIT, stem="conv"), OWN, {}, "model.image.stem='conv'"),
        (dataclasses.replace(VIT, patch_bias=True), OWN, {}, "model.image.patch_bias=True"),
        (dataclasses.replace(VIT, pool="mean"), OWN, {}, "model.image.pool='mean' without class_token"),
        (dataclasses.replace(VIT, pool="map"), OWN, {}, "model.image.pool='map'.*vit_.*patch"),
        (dataclasses.replace(VIT, registers=2), OWN, {}, "model.image.registers=2"),
        (dataclasses.replace(VIT, mask_channel=True), OWN, {}, "model.image.mask_channel=True"),
        (VIT, OWN, {"image_projection": "mlp"}, "model.image_projection='mlp'"),
        (dataclasses.replace(B16, norm_epsilon=1e-5), OWN, {"size": 224}, "model.image.norm_epsilon is 1e-05 and not 1e-06"),
        (B16, OWN, {"size": 240}, r"image_size is \(240, 240\)"),
        (ResNetConfig("ResNet18"), OWN, {"size": 32}, "model.image.variant='ResNet18'"),
        (ResNetConfig("RN50", width=8), OWN, {"size": 32}, "model.image_projection='linear'"),
        (VIT, dataclasses.replace(OWN, pool="mean"), {}, "model.text.pool='mean'"),
        (VIT, dataclasses.replace(OWN, causal=False), {}, "model.text.attend_padding=False"),
        (VIT, dataclasses.replace(OWN, activation="quick_gelu"), {}, "activation='quick_gelu'.*both towers"),
        (VIT, OWN, {"text_projection": "mlp"}, "model.text_projection='mlp'"),
        (VIT, BertConfig("tiny", pool="max"), {}, "model.text.pool='max'"),
        (VIT, BertConfig("tiny", pool_layers=(1, 2)), {}, r"model.text.pool_layers=\(1, 2\)"),
        (VIT, BertConfig("tiny"), {"text_projection": "linear_bias"}, "model.text_projection='linear_bias'"),
        (VIT, OWN, {"decoder": DecoderConfig(width=24, depth=1, num_heads=3)}, "model.decoder"),
        (VIT, None, {"decoder": DecoderConfig(width=24, depth=1, num_heads=3)}, "model.text=None"),
        (VIT, OWN, {"preprocess": {"interpolation": "lanczos"}}, "interpolation='lanczos'"),
    ],
)  # fmt: skip
def test_what_prevents_an_export_is_named(tokenizer, image, text, options, named):
    with pytest.raises(ConversionError, match=f"(?s){named}.*--to torch"):
        choose_family("open_clip", config_of(image, text, **options), tokenizer)


def test_a_public_name_without_a_bert(tmp_path):
    imported = import_model(f"open_clip:{open_clip_folder(tmp_path / 'source', CASES['ResNet'])}")
    with pytest.raises(ConversionError, match="hub_id='someone/bert'"):
        export(imported, tmp_path / "out", hub_id="someone/bert")
