"""Dual encoders of transformers become ours: every layer and output equal, and what is not reproduced is named."""

import json

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from convert_hf_peers import (  # noqa: E402
    TEXT,
    VISION,
    clip,
    edit_config,
    edit_weights,
    proven,
    siglip,
    vision_text,
)

from bvl.assembly import build_model  # noqa: E402
from bvl.convert.importing import import_model  # noqa: E402
from bvl.convert.peers import import_peer  # noqa: E402
from bvl.errors import ConversionError  # noqa: E402

torch.set_num_threads(1)
transformers = import_peer("transformers", what="the test")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def edited(folder, part, **changes):
    """Change keys of a tower's config, "text_config" or "vision_config"."""
    edit_config(folder, **{part: config_of(folder)[part] | changes})
    return folder


def refused(folder, *words):
    with pytest.raises(ConversionError) as error:
        import_model(f"hf:{folder}")
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return clip(transformers, tmp_path_factory.mktemp("clip"))


@pytest.fixture
def broken(clip_folder, tmp_path):
    """A copy of the CLIP folder, to be damaged."""
    for file in clip_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_clip(clip_folder):
    imported, found = proven(clip_folder)
    assert {d.tower for d in found} == {"image", "text", "both"}
    # Two sizes of images, and the logits with the scale.
    assert len({d.probe for d in found if d.tower == "image"}) == 2
    model = imported.config.model
    assert (model.image.activation, model.text.activation, model.max_scale) == ("quick_gelu",) * 2 + (100.0,)
    assert imported.config.data.preprocess.height_width == (24, 24)


def test_clip_of_older_files(broken):
    """`text_config_dict` wins, the end token of id 2 means the highest id, and buffers lie among the weights."""
    config = config_of(broken)
    text = config["text_config"] | {"eos_token_id": 2, "layer_norm_eps": 1e-3, "hidden_act": "gelu"}
    edit_config(broken, text_config_dict=text, text_config=text | {"layer_norm_eps": 1e-5})

    def older(tensors):
        tensors["text_model.embeddings.position_ids"] = np.arange(10)[None]
        tensors["vision_model.embeddings.position_ids"] = np.arange(10)[None]
        tensors["logit_scale"] = np.array(5.0, np.float32)  # above what CLIP's training allows

    edit_weights(broken, older)
    imported, _ = proven(broken)
    text = imported.config.model.text
    assert (text.pool, text.norm_epsilon, text.activation) == ("highest", 1e-3, "gelu")
    assert set(imported.unread) == {
        "text_model.embeddings.position_ids",
        "vision_model.embeddings.position_ids",
    }


def test_siglip(tmp_path):
    """Images that are not whole patches, and a scale beyond CLIP's."""
    folder = siglip(transformers, tmp_path, vision={"image_size": 27})
    edit_weights(folder, lambda tensors: tensors.update(logit_scale=np.float32([4.8])))
    imported, found = proven(folder)
    assert any(d.ours == "image/pool" for d in found)
    assert imported.config.tasks["contrastive"].loss_type == "sigmoid"


def test_vision_text(tmp_path):
    """A ViT and a BERT, both through their poolers; names of the weights as older versions wrote them."""
    folder = vision_text(transformers, tmp_path, text={"layer_norm_eps": 1e-5})

    def older(tensors):
        for name in [n for n in tensors if "LayerNorm" in n]:
            tensors[name.replace(".weight", ".gamma").replace(".bias", ".beta")] = tensors.pop(name)

    edit_weights(folder, older)
    imported, _ = proven(folder)
    assert (imported.config.model.image.pool, imported.config.model.text.pool) == ("pooler", "pooler")


@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2", "dinov2_with_registers"])
def test_other_image_towers_beside_a_bert(tmp_path, kind):
    """Embeddings equal those of the model itself; CLIP's tower under the doubled prefix of older versions."""
    dino = {key: value for key, value in VISION.items() if key != "intermediate_size"}
    vision = {
        "clip": lambda T: T.CLIPVisionConfig(**VISION),
        "siglip": lambda T: T.SiglipVisionConfig(**VISION),
        "dinov2": lambda T: T.Dinov2Config(**dino, mlp_ratio=2),
        "dinov2_with_registers": lambda T: T.Dinov2WithRegistersConfig(**dino, num_register_tokens=2),
    }[kind](transformers)
    folder = vision_text(transformers, tmp_path, vision)
    peer = transformers.VisionTextDualEncoderModel.from_pretrained(folder).eval()
    if kind == "clip":
        prefix = "vision_model."

        def older(tensors):
            for name in [n for n in tensors if n.startswith(prefix)]:
                tensors[prefix + name] = tensors.pop(name)

        edit_weights(folder, older)
    imported = import_model(f"hf:{folder}")
    pixels = np.random.default_rng(0).normal(size=(2, 24, 24, 3)).astype(np.float32)
    model = build_model(imported.config, imported.tokenizer)
    ours = jax.jit(lambda params: model.apply({"params": params}, pixels, method="encode_image"))(
        imported.params["model"]
    )
    with torch.no_grad():
        theirs = peer.get_image_features(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())).pooler_output
    theirs = (theirs / theirs.norm(dim=-1, keepdim=True)).numpy()
    np.testing.assert_allclose(ours.embed, theirs, atol=2e-6)


def test_missing_left_over_and_misshapen_tensors_are_named(broken):
    def change(tensors):
        del tensors["text_model.final_layer_norm.bias"]
        tensors["text_model.encoder.layers.7.layer_norm1.bias"] = np.zeros(20, np.float32)
        tensors["visual_projection.weight"] = np.zeros((12, 23), np.float32)

    edit_weights(broken, change)
    refused(
        broken,
        "text_model.final_layer_norm.bias (20,) is missing",
        "text_model.encoder.layers.7.layer_norm1.bias (20,) has no place",
        "visual_projection.weight is (12, 23), the config asks for (12, 24)",
    )


@pytest.mark.parametrize(
    ("part", "changes", "words"),
    [
        ("vision_config", {"hidden_act": "mish"}, ["vision_config: hidden_act='mish'"]),
        ("vision_config", {"num_channels": 1}, ["num_channels=1"]),
        ("vision_config", {"image_size": [24, 16]}, ["image_size=[24, 16]", "square"]),
        ("vision_config", {"patch_size": [8, 4]}, ["patch_size=[8, 4]"]),
        ("vision_config", {"hidden_size": "wide"}, ["hidden_size='wide'"]),
        ("text_config", {"eos_token_id": 49407}, ["eos_token_id=49407", "48"]),
        ("text_config", {"eos_token_id": [3]}, ["eos_token_id=[3]"]),
        ("text_config", {"layer_norm_eps": "small"}, ["layer_norm_eps='small'"]),
    ],
)
def test_options_that_are_not_reproduced_are_named(broken, part, changes, words):
    refused(edited(broken, part, **changes), *words)


def test_an_image_processor_for_other_images_is_refused(broken):
    size = {"height": 32, "width": 32}
    content = {"image_processor_type": "SiglipImageProcessor", "size": size}
    (broken / "preprocessor_config.json").write_text(json.dumps(content))
    refused(broken, "(32, 32)", "(24, 24)")


def test_what_siglip_and_dual_encoders_cannot_be(tmp_path):
    folder = siglip(transformers, tmp_path / "a", text={"projection_size": 10})
    refused(folder, "projection_size=10", "24")
    folder = siglip(transformers, tmp_path / "b", vision={"vision_use_head": False})
    refused(folder, "vision_use_head=False")
    folder = vision_text(transformers, tmp_path / "c")
    text = config_of(folder)["text_config"]
    for changes, word in (
        ({"model_type": "roberta"}, "model_type='roberta'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
        ({"is_decoder": True}, "is_decoder=True"),
    ):
        refused(edited(folder, "text_config", **changes), "text_config", word)
        edit_config(folder, text_config=text)
    refused(edited(folder, "vision_config", pooler_act="gelu"), "pooler_act='gelu'")
    refused(edited(folder, "vision_config", model_type="swin"), "model_type='swin'", "vit", "dinov2")


def test_weights_in_bfloat16(broken):
    """Read as the float32 values that they are."""
    from safetensors.torch import load_file, save_file

    path = broken / "model.safetensors"
    tensors = {name: x.bfloat16() for name, x in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    params = import_model(f"hf:{broken}").params["model"]
    kernel = np.asarray(params["image_projection"]["kernel"])
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel, tensors["visual_projection.weight"].float().numpy().T)


def test_sizes_of_the_towers_are_those_of_the_config(clip_folder):
    model = import_model(f"hf:{clip_folder}").config.model
    assert model.image.sizes == (VISION["hidden_size"], 2, 3, VISION["intermediate_size"])
    assert model.text.sizes == (TEXT["hidden_size"], 2, 2, TEXT["intermediate_size"])
