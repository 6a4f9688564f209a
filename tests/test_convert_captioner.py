"""VisionEncoderDecoderModel in and out: layers and logits, and the same captions token for token, controls included."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convert_hf_peers import DINO, VISION, edit_config, proven, write
from tiny_run import fast_compilation  # noqa: F401

from bvl.assembly import build_model, parameter_shapes
from bvl.config import Config
from bvl.convert.exporting import choose_family, export_model
from bvl.convert.importing import import_model
from bvl.convert.parity import prove
from bvl.convert.registry import family_of, open_source
from bvl.convert.table import flat_params, nested_params
from bvl.data.controls import Controls
from bvl.data.pipeline import DataConfig
from bvl.data.text import Tokenizer, TokenizerConfig
from bvl.data.transforms import Preprocess
from bvl.decode.options import DecodeOptions
from bvl.errors import ConversionError
from bvl.mesh import MeshConfig, make_mesh
from bvl.models.decoder import DecoderConfig
from bvl.models.vit import ViTConfig
from bvl.models.vlm import DualEncoderConfig
from bvl.runs import Components, Encoder
from bvl.tasks.caption import Caption
from bvl.tasks.captioning import write_captions

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("fast_compilation")

SPECIAL = ("[PAD]", "[UNK]", "[START]", "[END]")
GPT2 = dict(vocab_size=48, n_positions=10, n_embd=16, n_layer=2, n_head=2, bos_token_id=2, eos_token_id=3)


@pytest.fixture(scope="module")
def T():
    from bvl.convert.peers import import_peer

    return import_peer("transformers", what="the test")


def peer_folder(T, folder, encoder, **decoder):
    config = T.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        encoder, T.GPT2Config(**GPT2 | decoder)
    )
    config.decoder_start_token_id, config.pad_token_id = 2, 0
    return write(T.VisionEncoderDecoderModel(config=config), folder, special=SPECIAL)


@pytest.mark.parametrize("kind", ["vit", "dinov2", "clip", "siglip"])
def test_every_layer_and_the_logits_are_equal(T, tmp_path, kind):
    encoder = {
        "vit": lambda: T.ViTConfig(**VISION | dict(image_size=[24, 16])),
        # Equal widths: nothing stands between the towers.
        "dinov2": lambda: T.Dinov2Config(**DINO | dict(hidden_size=16, num_attention_heads=2)),
        "clip": lambda: T.CLIPVisionConfig(**VISION),
        "siglip": lambda: T.SiglipVisionConfig(**VISION),
    }[kind]()
    untied = dict(tie_word_embeddings=False, activation_function="relu", n_inner=20) if kind == "clip" else {}
    folder = peer_folder(T, tmp_path, encoder, **untied)
    imported, found = proven(folder)
    names = {(d.tower, d.ours) for d in found}
    assert names >= {("image", "tokens"), ("decoder", "logits"), ("decoder", "decoder/block_1")}
    params = imported.params["model"]
    assert ("project" in params["decoder"].get("visual_tokens", {})) is (kind != "dinov2")
    assert "log_scale" not in params and ("head" in params["decoder"]) is (kind == "clip")


ENCODERS = {
    "vit": (dict(pool="mean", class_token=True, position_resize="plain"), "all"),
    "clip": (dict(pool="cls", pre_norm=True, patch_bias=False, position_resize="plain"), "unnormed"),
    "siglip": (dict(pool="map", position_resize="plain"), "patches"),
}
CONTROLS = Controls(sections=("caption",), lengths=4)


def captioner(kind="vit", *, controls=CONTROLS, text=False, decoder=(), image=(), **data):
    """A captioner of ours with random weights."""
    tower, visual = ENCODERS[kind]
    tokenizer = Tokenizer.train(["a b c d e f g h i j"], TokenizerConfig(vocab_size=60, context_length=9))
    tokenizer = tokenizer.with_tokens(controls.tokens())
    given = DecoderConfig(width=16, depth=2, num_heads=2, visual=visual)
    config = Config(
        model=DualEncoderConfig(
            image=ViTConfig("XXS/8", width=24, depth=1, num_heads=2, **tower | dict(image)),
            text=DualEncoderConfig().text if text else None,
            decoder=dataclasses.replace(given, **dict(decoder)),
            embed_dim=8,
        ),
        data=DataConfig(
            preprocess=data.pop("preprocess", Preprocess(image_size=16, resize="squash")),
            tokenizer=TokenizerConfig(context_length=9),
            controls=controls,
        ),
        tasks={"caption": Caption()},
        optim=None,
        steps=1,
        batch_size=1,
    )
    model = build_model(config, tokenizer)
    rng = np.random.default_rng(3)
    flat = {}
    for name, shape in parameter_shapes(model).items():
        # Small biases, and strong where the image and the positions come in, so that captions differ.
        spread = 0.05 if "bias" in name else 1.5 if "cross" in name or "decoder/positions" in name else 0.3
        flat[name] = (rng.normal(0, spread, shape) + ("scale" in name)).astype(np.float32)
    params = jax.tree.map(jnp.asarray, nested_params(flat))
    mesh = make_mesh(MeshConfig(), devices=jax.local_devices()[:1])
    preprocess = config.data.preprocess
    return Components(model, params, tokenizer, preprocess, config, (), Encoder(model, preprocess, mesh))


def exported(components, folder):
    options = dict(config=components.config, params=components.params, tokenizer=components.tokenizer)
    return export_model(folder, "hf", **options)


@pytest.mark.parametrize("kind", ENCODERS)
def test_captions_are_equal_token_for_token(T, tmp_path, kind):
    """With controls in front, greedily, by the settings that the folder brings along."""
    components = captioner(kind, decoder=dict(tied_head=kind == "vit"))
    out = exported(components, tmp_path)
    assert set(out.unwritten) >= {"decoder/visual_tokens/null", "log_scale", "image_projection/kernel"}
    differences = prove(
        components.config, components.params, components.tokenizer, out.family, out.foreign, tmp_path
    )
    assert all(d.within for d in differences)
    model = T.VisionEncoderDecoderModel.from_pretrained(tmp_path).eval()
    processor, tokenizer = (cls.from_pretrained(tmp_path) for cls in (T.AutoImageProcessor, T.AutoTokenizer))
    images = np.random.default_rng(0).integers(0, 255, (4, 16, 16, 3)).astype(np.uint8)
    images[:2, :8] = images[1:3, :, :8] = 0
    pixels = processor(images=list(images), return_tensors="pt")
    written = set()
    for controls in ({}, {"section": "caption", "length": 3}):
        ours = write_captions(
            components, images, options=DecodeOptions(max_length=8), controls=controls, batch_size=4
        )
        names = [tokenizer.bos_token, *(["[SECTION_CAPTION]", "[LENGTH_3]"] if controls else [])]
        prefix = torch.tensor([tokenizer.convert_tokens_to_ids(names)] * 4)
        ids = model.generate(**pixels, decoder_input_ids=prefix)[:, prefix.shape[1] :]
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        for (candidate,), row, text in zip(ours, ids.tolist(), texts, strict=True):
            assert list(candidate.tokens) == row[: len(candidate.tokens)]
            assert set(row[len(candidate.tokens) :]) <= {components.tokenizer.pad_id}
            written.add(candidate.tokens)
            assert candidate.text == text.strip()
    assert len(written) > 3, "the images and the controls make a difference"


def test_what_was_written_is_read_back_bit_for_bit(tmp_path):
    """But for what the class has no tensor for; the text tower is named among it."""
    components = captioner("clip", text=True)
    out = exported(components, tmp_path)
    assert out.unwritten["text/norm/scale"] == "the class embeds neither images nor texts"
    again = import_model(f"hf:{tmp_path}")
    before, after = flat_params(components.params), flat_params(again.params)
    assert set(before) - set(after) == set(out.unwritten) and set(after) < set(before)
    for name, x in after.items():
        np.testing.assert_array_equal(x, before[name])
    assert again.config.model.decoder.null is False and again.config.model.decoder.visual == "unnormed"
    assert again.tokenizer.start_id == components.tokenizer.start_id


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(decoder={"layout": "prefix"}), "model.decoder.layout='prefix'"),
        (dict(decoder={"visual_queries": 3}), "model.decoder.visual_queries=3"),
        (dict(decoder={"visual": "patches"}), "model.decoder.visual='patches'.*'all'"),
        (dict(image={"stem": "conv"}), "model.image.stem='conv'"),
        (dict(preprocess=Preprocess(image_size=16, resize="pad")), "resize='pad'"),
    ],
)
def test_what_the_class_has_not_is_named(options, words):
    components = captioner(**options)
    with pytest.raises(ConversionError, match=words) as raised:
        choose_family("hf", components.config, components.tokenizer)
    assert "--to torch" in str(raised.value)


def test_other_decoders_and_options_are_refused(T, tmp_path):
    folder = peer_folder(T, tmp_path, T.ViTConfig(**VISION))
    config = json.loads((folder / "config.json").read_text())
    for part, changes, words in (
        ("decoder", {"model_type": "bert"}, "decoder: model_type='bert'"),
        ("encoder", {"model_type": "swin"}, "encoder: model_type='swin'"),
        ("decoder", {"add_cross_attention": False}, "add_cross_attention=False"),
        ("decoder", {"scale_attn_weights": False}, "scale_attn_weights=False"),
        ("decoder", {"cross_attention_hidden_size": 24}, "cross_attention_hidden_size=24"),
    ):
        edit_config(folder, **{part: config[part] | changes})
        source = open_source(f"hf:{folder}")
        with pytest.raises(ConversionError, match=words):
            family_of(source).describe(source)
        edit_config(folder, **{part: config[part]})
