"""Every tower, decoder layout and projection in the PyTorch file gives what it gives in bvl."""

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from tiny_model import tiny_components
from tiny_run import fast_compilation  # noqa: F401

from bvl.assembly import build_model, parameter_shapes
from bvl.convert.table import nested_params
from bvl.convert.torch_format import export_torch
from bvl.convert.torch_format.bundle import bundled
from bvl.convert.torch_format.compare import load_torch_file
from bvl.convert.torch_format.known import KNOWN, check_known
from bvl.data.controls import Controls
from bvl.data.text import Tokenizer, TokenizerConfig
from bvl.data.transforms import Preprocess
from bvl.errors import ConversionError
from bvl.models.attentional_pool import AttentionalPool
from bvl.models.bert import BertConfig
from bvl.models.decoder import DecoderConfig
from bvl.models.features import RegionPrompts
from bvl.models.hybrid import HybridConfig
from bvl.models.region_decoder import RegionDecoderConfig
from bvl.models.region_encoder import RegionEncoderConfig
from bvl.models.resnet import ResNetConfig
from bvl.models.rotary import RopeScaling
from bvl.models.text import TextConfig
from bvl.models.vit import ViTConfig
from bvl.models.vlm import DualEncoderConfig

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("fast_compilation")
TOLERANCE = dict(rtol=1e-4, atol=2e-5)


@pytest.fixture(scope="module")
def tiny():
    return tiny_components()


@pytest.fixture(scope="module")
def both(tiny, tmp_path_factory):
    """Makes (function that applies bvl's model, the same model loaded from the exported folder) of a model config."""
    torch.set_num_threads(1)

    def make(model, preprocess=None, **changes):
        data = dataclasses.replace(tiny.config.data, preprocess=preprocess or Preprocess(image_size=32))
        config = dataclasses.replace(tiny.config, model=model, data=dataclasses.replace(data, **changes))
        ours = build_model(config, tiny.tokenizer)
        rng = np.random.default_rng(0)
        params = nested_params(
            {name: random_parameter(rng, name, shape) for name, shape in parameter_shapes(ours).items()}
        )
        folder = tmp_path_factory.mktemp("exported")
        export_torch(folder, config=config, params=params, tokenizer=tiny.tokenizer)

        def apply(*args, method):
            static = {i for i, x in enumerate(args) if not hasattr(x, "shape")}
            run = jax.jit(
                lambda params, *arrays: ours.apply(
                    {"params": params}, *merged(args, arrays, static), method=method
                )
            )
            return run(params["model"], *(x for i, x in enumerate(args) if i not in static))

        return apply, load_torch_file(folder).load(folder)

    return make


def merged(args, arrays, static):
    arrays = iter(arrays)
    return [x if i in static else next(arrays) for i, x in enumerate(args)]


def random_parameter(rng, name, shape):
    if name.endswith("running_var"):
        return rng.uniform(0.5, 2.0, shape).astype(np.float32)
    return rng.normal(name.endswith("scale"), 0.2, shape).astype(np.float32)


def towers(image=None, text=None, **changes):
    image = image or ViTConfig("XXS/16", pool="mean", width=16, depth=1, num_heads=2)
    return DualEncoderConfig(
        image=image, text=text or TextConfig(width=16, depth=1, num_heads=2), embed_dim=8, **changes
    )


def vit(**changes):
    return ViTConfig(**{"variant": "XXS/16", "width": 16, "depth": 2, "num_heads": 2, **changes})


IMAGE_TOWERS = {
    "clip": vit(
        pool="cls", pre_norm=True, patch_bias=False, registers=2, qk_norm=True, activation="quick_gelu",
        layer_scale=0.1, scan=True,
    ),
    "siglip": vit(pool="map", norm_epsilon=1e-6, activation="gelu_tanh", mlp_hidden=40, qkv_bias=False),
    "conv stem": vit(pool="mean", stem="conv", norm_after_pool=True, variant="XXS/8"),
    "registers with positions": vit(pool="pooler", registers=2, prefix_positions="all", activation="swiglu"),
    "class token in the mean": vit(
        pool="mean", class_token=True, prefix_positions="none", position_size=(48, 48), pool_prefix=True
    ),
    "coca": vit(pool="cls", attentional_pool=AttentionalPool(width=12, queries=3, num_heads=2)),
    "clip resnet": ResNetConfig("RN50", width=8, stages=(1, 2, 1, 1), pool_heads=2),
    "resnet": ResNetConfig("ResNet18", width=8, stages=(1, 1, 1, 1), norm="frozen"),
    "hybrid": HybridConfig("ViTamin-Ti", widths=(8, 12, 16), depths=(1, 2, 1), num_heads=2),
}  # fmt: skip


@pytest.mark.parametrize("name", IMAGE_TOWERS)
def test_image_towers(both, name):
    apply, peer = both(towers(IMAGE_TOWERS[name], image_projection="linear_bias"))
    image = np.random.default_rng(1).normal(size=(2, 32, 64, 3)).astype(np.float32)
    need = frozenset({"embed", "pooled", "tokens", "levels", "patch_embed"})
    ours = apply(image, need, method="encode_image")
    with torch.no_grad():
        theirs = peer.encode_image(torch.from_numpy(image).permute(0, 3, 1, 2), levels=True, patch_embed=True)
    assert theirs.grid == ours.grid
    for field in ("embed", "pooled", "tokens", "patch_embed"):
        close(getattr(theirs, field), getattr(ours, field))
    for a, b in zip(theirs.levels, ours.levels, strict=True):
        close(a, b)


def close(theirs, ours):
    np.testing.assert_allclose(theirs.numpy(), ours, rtol=1e-4, atol=2e-5 * max(1.0, np.abs(ours).max()))


def test_masks_and_images_that_are_not_whole_patches(both):
    image = vit(pool="map", mask_channel=True, whole_patches=False, position_resize="plain")
    apply, peer = both(towers(image), Preprocess(image_size=(40, 33)))
    pixels = np.random.default_rng(1).normal(size=(1, 70, 40, 4)).astype(np.float32)
    with torch.no_grad():
        theirs = peer.encode_image(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    close(theirs.embed, apply(pixels, frozenset({"embed"}), method="encode_image").embed)
    close(
        peer.encode_image(torch.from_numpy(pixels[..., :3]).permute(0, 3, 1, 2)).tokens.detach(),
        apply(pixels[..., :3], frozenset({"tokens"}), method="encode_image").tokens,
    )


TEXT_TOWERS = {
    "clip": (TextConfig(width=16, depth=2, num_heads=2, activation="quick_gelu", scan=True), "linear"),
    "siglip": (
        TextConfig(width=8, depth=1, num_heads=2, causal=False, pool="last", attend_padding=True),
        "none",
    ),
    "highest id": (
        TextConfig(width=16, depth=1, num_heads=2, pool="highest", layer_scale=0.1, qk_norm=True),
        "linear_bias",
    ),
    "mean": (TextConfig(width=16, depth=1, num_heads=2, causal=False, pool="mean"), "linear"),
    "bert": (
        BertConfig(hidden_size=16, depth=2, num_heads=2, mlp_hidden=24, pool="pooler", pool_layers=(1, -1)),
        "mlp",
    ),
    "bert max": (BertConfig(hidden_size=16, depth=1, num_heads=2, pool="max", activation="relu"), "mlp"),
}


@pytest.mark.parametrize("name", TEXT_TOWERS)
def test_text_towers(both, tiny, name):
    text, projection = TEXT_TOWERS[name]
    apply, peer = both(towers(text=text, text_projection=projection, init_bias=-3.0))
    tokens, mask = tiny.tokenizer.encode_texts(
        ["a nodule", "", "one two three four five six seven eight nine"]
    )
    ours = apply(tokens, mask, frozenset({"embed", "pooled", "tokens"}), method="encode_text")
    with torch.no_grad():
        theirs = peer.encode_text(torch.from_numpy(tokens).long(), torch.from_numpy(mask))
    for field in ("embed", "pooled"):
        close(getattr(theirs, field), getattr(ours, field))
    np.testing.assert_allclose(theirs.tokens[mask], np.asarray(ours.tokens)[mask], **TOLERANCE)


DECODERS = {
    "gpt2": DecoderConfig(width=12, depth=2, num_heads=2, activation="relu", tied_head=False),
    "coca": DecoderConfig("coca", width=16, depth=2, num_heads=2, unimodal_heads=4, visual_queries=3),
    "open_clip coca": DecoderConfig(
        "coca", width=16, depth=3, num_heads=2, unimodal_depth=1, text_class=True, cross_mlp=True, null=False
    ),
    "prefix": DecoderConfig(
        "prefix", width=16, depth=2, num_heads=4, num_kv_heads=2, head_dim=6, tied_head=False, qkv_bias=True,
        rope_scaling=RopeScaling(kind="llama3", factor=4.0, original_context=8),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DECODERS)
def test_decoders(both, tiny, name):
    """Whole sequences, and the same ones token by token; one row without an image, the prefix padded on the left."""
    apply, peer = both(towers(decoder=DECODERS[name]))
    rng = np.random.default_rng(2)
    tokens = rng.integers(5, 200, (2, 7))
    mask = np.arange(7) >= np.array([[2], [0]])
    image, dropped = rng.normal(size=(2, 4, 16)).astype(np.float32), np.array([False, True])
    visual = apply(image, dropped, method="visual_tokens")
    ours = apply(*visual, tokens, mask, method="decode_train")
    with torch.no_grad():
        theirs = peer.decoder.visual_tokens(torch.from_numpy(image), torch.from_numpy(dropped))
        close(theirs[0], visual[0])
        hidden = peer.decoder(*theirs, torch.from_numpy(tokens), torch.from_numpy(mask))
        np.testing.assert_allclose(hidden[mask], np.asarray(ours)[mask], **TOLERANCE)
        head = np.asarray(apply(method="vocabulary"))
        logits, state = peer.decoder.prefill(
            *theirs, torch.from_numpy(tokens[:, :4]), torch.from_numpy(mask[:, :4]), 8
        )
        for t in range(4, 7):
            np.testing.assert_allclose(logits, np.asarray(ours)[:, t - 1] @ head.T, **TOLERANCE)
            logits, state = peer.decoder.step(state, torch.from_numpy(tokens[:, t]))


@pytest.mark.parametrize("visual", ["all", "unnormed"])
def test_what_the_decoder_reads(both, visual):
    decoder = dataclasses.replace(DECODERS["prefix"], visual=visual)
    apply, peer = both(towers(vit(pool="cls", registers=1), decoder=decoder))
    image = np.random.default_rng(1).normal(size=(1, 32, 32, 3)).astype(np.float32)
    with torch.no_grad():
        theirs = peer.encode_image(torch.from_numpy(image).permute(0, 3, 1, 2)).for_decoder
    close(theirs, apply(image, frozenset({"visual"}), method="encode_image").for_decoder)


@pytest.mark.parametrize("name", ["coca", "open_clip coca"])
def test_texts_embedded_by_the_decoder(both, tiny, name):
    model = dataclasses.replace(towers(decoder=DECODERS[name]), text=None)
    apply, peer = both(model)
    tokens, mask = tiny.tokenizer.encode_texts(["a nodule", "one two three four five six seven eight nine"])
    with torch.no_grad():
        theirs = peer.encode_text(torch.from_numpy(tokens).long(), torch.from_numpy(mask))
    close(theirs.embed, apply(tokens, mask, frozenset({"embed"}), method="encode_text").embed)


REGION_MODULES = {
    "roi_align": (
        RegionEncoderConfig("roi_align", width=8, levels=(0, -1), output_size=2),
        RegionDecoderConfig(width=8, depth=1, num_heads=2, pixel_width=6, instance_masks=True),
    ),
    "box_token": (
        RegionEncoderConfig("box_token", width=8),
        RegionDecoderConfig(
            width=8, depth=1, num_heads=2, pixel_width=6, queries="learned", reads_levels=False
        ),
    ),
    "mask_embedding": (
        RegionEncoderConfig("mask_embedding", width=8, num_heads=3),
        RegionDecoderConfig(width=8, depth=1, num_heads=2, pixel_width=6, mask_stride=3),
    ),
}


@pytest.mark.parametrize("name", REGION_MODULES)
def test_region_modules(both, name):
    """Box, point and mask of two images in; phrases and objects out. One with masks that patches do not divide."""
    encoder, decoder = REGION_MODULES[name]
    tower = vit(variant="XXS/8", stem="conv", pool="mean")
    model = towers(tower, decoder=DECODERS["gpt2"], region_encoder=encoder, region_decoder=decoder)
    size = (24, 48)
    apply, peer = both(model, Preprocess(image_size=size))
    module = sys.modules[type(peer).__module__]
    rng = np.random.default_rng(4)
    image = rng.normal(size=(2, *size, 3)).astype(np.float32)
    corners = np.sort(rng.random((2, 3, 2, 2)), axis=2).reshape(2, 3, 4).astype(np.float32)
    prompts = dict(
        box=corners,
        point=rng.random((2, 3, 2)).astype(np.float32),
        mask=rng.random((2, 3, 6, 12)) < 0.4,
        kind=np.array([[0, 1, 2], [2, 1, 0]], np.int8),
    )
    dropped = np.arange(6) == 4
    phrase, words = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 2, 16), (2, 2, 5, 16)))
    words_mask = np.arange(5) < np.array([[[3], [5]], [[2], [4]]])
    names = rng.normal(size=(2, 8)).astype(np.float32)

    ours = apply(image, frozenset({"regions"}), method="encode_image")
    maps = (ours.tokens, ours.levels, ours.grid)
    regions = apply(*maps, RegionPrompts(**prompts), dropped, method="region_tokens")
    grounded = apply(*maps, phrase, words, words_mask, method="ground")
    detected = apply(*maps, method="detect")
    logits = apply(detected.embed, np.stack([names] * 2), method="detection_logits")
    with torch.no_grad():
        features = peer.encode_image(torch.from_numpy(image).permute(0, 3, 1, 2), levels=True)
        prompts = module.RegionPrompts(**{key: torch.from_numpy(x) for key, x in prompts.items()})
        tokens, mask = peer.encode_regions(features, prompts, torch.from_numpy(dropped))
        close(tokens, regions[0])
        np.testing.assert_array_equal(mask, regions[1])
        tensors = (torch.from_numpy(x) for x in (phrase, words, words_mask))
        found = peer.ground_phrases(features, *tensors)
        objects = peer.region_decoder.detect(features)
        close(peer.region_decoder.detection_logits(objects.embed, torch.from_numpy(names)), logits)
    for theirs, expected in ((found, grounded), (objects, detected)):
        for field in ("boxes", "presence", "embed", "scores", "mask_logits"):
            value = getattr(expected, field)
            assert (getattr(theirs, field) is None) == (value is None)
            if value is not None:
                close(getattr(theirs, field), value)


def test_towers_alone(both, tiny):
    """An image tower, a text tower and a language model without the rest."""
    language_model = DualEncoderConfig(image=None, text=None, decoder=DECODERS["prefix"], embed_dim=8)
    apply, peer = both(language_model)
    tokens, mask = np.arange(12).reshape(2, 6), np.ones((2, 6), bool)
    with torch.no_grad():
        hidden = peer.decoder(None, None, torch.from_numpy(tokens), torch.from_numpy(mask))
    close(hidden, apply(None, None, tokens, mask, method="decode_train"))
    for model in (dataclasses.replace(towers(), text=None), dataclasses.replace(towers(), image=None)):
        assert not any(name.startswith("log_scale") for name in both(model)[1].state_dict())


def test_logits_and_gradients(both, tiny):
    """The class is an nn.Module: all pairs' logits, with gradients for every parameter."""
    _, peer = both(towers(vit(pool="map"), init_bias=-2.0))
    tokens, mask = map(torch.from_numpy, tiny.tokenizer.encode_texts(["a", "b", "c"]))
    logits = peer(torch.randn(2, 3, 32, 32), tokens.long(), mask)
    assert logits.shape == (2, 3)
    logits.square().sum().backward()
    assert all(p.grad is not None for p in peer.parameters())
    scale, bias = peer.logit_scale_and_bias()
    assert scale <= 100 and bias == peer.logit_bias


def test_a_tokenizer_without_a_start_token(tiny, tmp_path):
    """As SigLIP's; and with more rows of the embedding than it has tokens."""
    tokenizer = Tokenizer(tiny.tokenizer._model, 8, start="")
    options = dataclasses.replace(tiny.config.data.tokenizer, embedding_rows=400, context_length=8)
    data = dataclasses.replace(tiny.config.data, tokenizer=options)
    config = dataclasses.replace(tiny.config, data=data, model=towers(decoder=DECODERS["gpt2"]))
    shapes = parameter_shapes(build_model(config, tokenizer))
    params = nested_params({name: np.zeros(shape, np.float32) for name, shape in shapes.items()})
    export_torch(tmp_path, config=config, params=params, tokenizer=tokenizer)
    peer = load_torch_file(tmp_path).load(tmp_path)
    for text in ("a nodule", "one two three four five six seven eight nine ten", ""):
        ids, mask, _ = tokenizer.encode(text)
        found = peer.tokenizer.encode(text)
        np.testing.assert_array_equal(found[0], ids)
        np.testing.assert_array_equal(found[1], mask)
    assert len(peer.decoder.token_embed) == 400
    assert {tokenizer.vocab_size, 399, tokenizer.pad_id} <= set(peer.tokenizer.excluded_ids)
    assert tokenizer.end_id not in peer.tokenizer.excluded_ids


def test_heads_stay_with_the_weights(tiny, tmp_path):
    components = tiny_components(classes=("a", "b"))
    params = {**components.params, "heads": components.params["heads"]}
    export_torch(tmp_path, config=components.config, params=params, tokenizer=components.tokenizer)
    model = load_torch_file(tmp_path).load(tmp_path)
    weight = params["heads"]["classify"]["linear"]["kernel"]
    np.testing.assert_array_equal(model.heads["classify.linear.weight"], np.asarray(weight).T)
    model.save(tmp_path / "saved")
    again = load_torch_file(tmp_path / "saved").load(tmp_path / "saved")
    assert again.heads.keys() == model.heads.keys()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=0)


def test_an_unknown_option_is_refused(tiny):
    @dataclasses.dataclass(frozen=True)
    class TextConfig:  # as one to which a field was added
        width: int = 16
        sinks: int = 4

    config = dataclasses.replace(tiny.config, model=dataclasses.replace(tiny.config.model))
    object.__setattr__(config.model, "text", TextConfig())
    with pytest.raises(ConversionError, match="TextConfig: sinks=4"):
        check_known(config)


def test_every_known_option_exists():
    """A field that was renamed or taken away must not stay among the known ones."""
    configs = (
        *(DualEncoderConfig, ViTConfig, ResNetConfig, HybridConfig, TextConfig, BertConfig, DecoderConfig),
        *(
            RopeScaling,
            Preprocess,
            AttentionalPool,
            RegionEncoderConfig,
            RegionDecoderConfig,
            TokenizerConfig,
        ),
        Controls,
    )
    for config in configs:
        assert KNOWN[config.__name__] == {field.name for field in dataclasses.fields(config)}


def test_the_file_needs_neither_jax_nor_bvl(both, tmp_path):
    """Run from the folder alone, where importing jax, flax or bvl fails."""
    _, peer = both(towers())
    code = """
import importlib.abc, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("jax", "jaxlib", "flax", "bvl", "einops", "scipy"):
            raise ImportError(name + " is not to be imported")
sys.meta_path.insert(0, Block())
import numpy as np
from bvl_model import load
m = load(".")
print(m.embed_texts(["a"]).shape, m.embed_images([np.zeros((9, 9), np.uint8)]).shape)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=peer.folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == "(1, 8) (1, 8)"


def test_one_file_with_a_docstring_for_every_class(tmp_path):
    import ast

    tree = ast.parse(bundled())
    imported = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    packages = {"torch", "numpy", "PIL", "tokenizers", "safetensors"}
    assert imported - set(sys.stdlib_module_names) == packages
    defined = [n for n in tree.body if isinstance(n, ast.ClassDef | ast.FunctionDef)]
    assert len({n.name for n in defined}) == len(defined), "two parts of the file share a name"
    assert all(ast.get_docstring(n) for n in defined if isinstance(n, ast.ClassDef))


def test_the_folder(both):
    _, peer = both(towers())
    names = {path.name for path in peer.folder.iterdir()}
    assert {"bvl_model.py", "model.safetensors", "config.json", "tokenizer.json", "preprocess.json"} <= names
    assert "bvl." not in (peer.folder / "config.json").read_text()
    assert json.loads((peer.folder / "preprocess.json").read_text())["image_size"] == 32
    assert "text.stack.block_0.attention.query.weight" in peer.state_dict()
