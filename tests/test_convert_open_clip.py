"""CLIP and CustomTextCLIP of open_clip become ours: layers, embeddings and logits equal; what we lack is named."""

import json
import math

import numpy as np
import pytest
from convert_peers import open_clip_folder
from random_peers import worst
from tiny_run import fast_compilation  # noqa: F401

from bvl.convert import open_clip_timm
from bvl.convert.importing import import_model
from bvl.convert.inputs_parity import compare_inputs
from bvl.convert.open_clip_towers import mlp_ratio
from bvl.convert.parity import prove
from bvl.convert.peers import import_peer
from bvl.convert.registry import family_of, open_source
from bvl.convert.table import flat_params
from bvl.data.text import Tokenizer
from bvl.errors import ConversionError

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")
pytestmark = pytest.mark.usefixtures("fast_compilation")

VISION = {
    **{"layers": 2, "width": 32, "head_width": 8, "patch_size": 8, "image_size": [16, 24]},
    "mlp_ratio": 3.3,
}
TEXT = {"context_length": 9, "vocab_size": 40, "width": 24, "heads": 3, "layers": 1}
RESNET = {"layers": [1, 2, 1, 1], "width": 8, "head_width": 32, "image_size": 64}
MAP_HEAD = {"timm_model_name": "test_vit3", "timm_pool": "map", "timm_proj": "none", "image_size": 160}
BERT = {
    **{"model_type": "bert", "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1},
    **{"intermediate_size": 72, "vocab_size": 40, "max_position_embeddings": 20, "hidden_act": "gelu"},
}
HF_TEXT = {
    **{"hf_tokenizer_name": "someone/bert", "context_length": 9, "vocab_size": 40},
    **{"hf_proj_type": "mlp", "hf_pooler_type": "cls_last_hidden_state_pooler"},
}


def model(vision, text, embed_dim=16, **options):
    return {"embed_dim": embed_dim, "vision_cfg": vision, "text_cfg": text, **options}


CASES = {
    "quick gelu, not square": model(VISION, TEXT, quick_gelu=True),
    "every option": model(
        VISION
        | {"pool_type": "avg", "final_ln_after_pool": True, "no_ln_pre": True, "ls_init_value": 0.1}
        | {"norm_kwargs": {"eps": 1e-3}, "act_kwargs": {"approximate": "tanh"}, "qk_norm": True},
        TEXT
        | {"no_causal_mask": True, "pool_type": "last", "proj_bias": True, "norm_kwargs": {"eps": 1e-6}}
        | {"ls_init_value": 0.1, "qk_norm": True, "act_kwargs": {"approximate": "tanh"}},
        **{"custom_text": True, "init_logit_bias": -10.0, "nonscalar_logit_scale": True},
    ),
    "ResNet": model(RESNET, TEXT | {"pool_type": "eos", "eos_id": 39, "proj_type": "none"}, embed_dim=24),
    "attentional pooler": model(
        VISION
        | {"attentional_pool": True, "attn_pooler_queries": 5, "attn_pooler_heads": 4, "pool_type": "avg"}
        | {"final_ln_after_pool": True},
        TEXT,
    ),
    # As SigLIP, with what only timm's own test model adds.
    # Positions are for another size than the images, and the proof reads a third.
    "several sizes": model(
        {"timm_model_name": "test_vit", "timm_pool": "", "image_size": 48}, TEXT, custom_text=True
    ),
    "map head": model(
        MAP_HEAD, TEXT | {"no_causal_mask": True, "pool_type": "last", "proj_bias": True}, embed_dim=96,
        custom_text=True, init_logit_bias=-10.0,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(case):
        if case not in made:
            made[case] = open_clip_folder(tmp_path_factory.mktemp("open_clip"), CASES[case])
        return made[case]

    return folder


@pytest.fixture
def copy(folders, tmp_path):
    """A copy of a folder whose config and tensors a test may change."""

    def make(case, *, tensors=None, **changes):
        source = folders(case)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / name).write_bytes((source / name).read_bytes())
        config = json.loads((source / "open_clip_config.json").read_text())
        for part, values in changes.items():
            if isinstance(values, dict):
                config["model_cfg"].setdefault(part, {})
                config["model_cfg"][part] |= values
            else:
                config["model_cfg"][part] = values
        (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
        loaded = safetensors_torch.load_file(source / "open_clip_model.safetensors")
        safetensors_torch.save_file((tensors or dict)(loaded), tmp_path / "open_clip_model.safetensors")
        return f"open_clip:{tmp_path}"

    return make


def check(imported):
    differences = prove(
        imported.config,
        imported.params,
        imported.tokenizer,
        imported.family,
        imported.source.config,
        imported.source.folder,
    )
    assert all(d.within for d in differences), worst(differences)
    assert {d.ours for d in differences} >= {"embed", "logits"}
    return differences


@pytest.mark.parametrize("case", CASES)
def test_equal(folders, case):
    imported = import_model(f"open_clip:{folders(case)}")
    differences = check(imported)
    blocks = {d.ours for d in differences if "block" in d.ours}
    assert len([name for name in blocks if name.startswith("text/")]) == 1
    assert len([name for name in blocks if name.startswith("image/")]) >= 2
    assert imported.family.name == ("CustomTextCLIP" if "custom_text" in CASES[case] else "CLIP")
    loss = imported.config.tasks["contrastive"].loss_type
    assert loss == ("sigmoid" if "init_logit_bias" in CASES[case] else "softmax")


def test_bert_by_a_public_name(tmp_path):
    """The layout of BiomedCLIP: a hub's name, which nobody looks up, and no config of the BERT beside the weights."""
    (tmp_path / "made_with").mkdir()
    (tmp_path / "made_with" / "config.json").write_text(json.dumps(BERT))
    text = HF_TEXT | {"hf_model_name": str(tmp_path / "made_with")}
    folder = open_clip_folder(tmp_path / "model", model(VISION, text))
    path = folder / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"]["text_cfg"]["hf_model_name"] = "someone/bert"
    path.write_text(json.dumps(config))
    imported = import_model(f"open_clip:{folder}")
    check(imported)
    tower = imported.config.model.text
    assert tower.sizes == (64, 1, 1, 72) and tower.max_positions == 20 and tower.norm_epsilon == 1e-12
    assert imported.tokenizer.context_length == 9 and tower.pool == "cls"
    # What stands in a config beside the weights counts more than what tensors can tell.
    (folder / "config.json").write_text(json.dumps(BERT | {"num_attention_heads": 4, "layer_norm_eps": 1e-5}))
    described = family_of(open_source(folder)).describe(open_source(folder))
    assert described.model.text.num_heads == 4 and described.model.text.norm_epsilon == 1e-5
    for change, named in (
        ({"hf_pooler_type": "max_pooler"}, "hf_pooler_type='max_pooler'"),
        ({"hf_proj_type": "none"}, "hf_proj_type='none'"),
    ):
        path.write_text(json.dumps({"model_cfg": model(VISION, HF_TEXT | {"hf_model_name": "a/b"} | change)}))
        with pytest.raises(ConversionError, match=named):
            family_of(open_source(folder)).describe(open_source(folder))
    (folder / "config.json").write_text(json.dumps(BERT | {"model_type": "roberta"}))
    path.write_text(json.dumps(config))
    with pytest.raises(ConversionError, match="model_type='roberta'"):
        import_model(f"open_clip:{folder}")


@pytest.mark.parametrize("name, pool", [("test_vit", "avg"), ("test_vit2", "avg"), ("vit_small_patch16_224", ""),
    ("vit_base_patch32_siglip_256", "map"), ("vit_xsmall_patch16_clip_224", ""), ("vit_small_patch14_reg4_dinov2", "avg"),
    ("vit_so400m_patch14_siglip_384", "map")])  # fmt: skip
def test_listed_trunks_are_those_of_timm(name, pool):
    import_peer("timm", what="a test")
    for proj in ("linear", "none"):
        listed = open_clip_timm._listed(name, pool, headed=proj == "linear")
        if listed is not None:
            assert listed == open_clip_timm._built(name, {"timm_pool": pool, "timm_proj": proj}, where="here")
    assert open_clip_timm._listed(name, pool, headed=True) is not None


def test_listed_trunks_need_no_timm(monkeypatch):
    def absent(name, *, what):
        raise ConversionError(f"{what} needs {name}")

    monkeypatch.setattr(open_clip_timm, "import_peer", absent)
    vision = {"timm_model_name": "vit_base_patch16_224.augreg", "timm_pool": "", "timm_proj": "linear"}
    image, projection, size = open_clip_timm.read_vision(vision, where="here")
    assert (image.sizes, image.pool, projection, size) == ((768, 12, 12, 3072), "cls", "linear", (224, 224))
    with pytest.raises(ConversionError, match="vit_giant_patch16_gap_224.*needs timm"):
        open_clip_timm.read_vision({"timm_model_name": "vit_giant_patch16_gap_224"}, where="here")


@pytest.mark.parametrize(
    "name, named",
    [("vit_giant_patch14_dinov2", "GluMlp"), ("resnet18", "class is ResNet"), ("no_such_vit", "no_such_vit")],
)
def test_trunks_that_are_no_vision_transformer_of_ours(name, named):
    import_peer("timm", what="a test")
    vision = {"timm_model_name": name, "timm_pool": "", "timm_proj": "linear"}
    with pytest.raises(ConversionError, match=named):
        open_clip_timm.read_vision(vision, where="here")


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"vision_cfg": {"attentional_pool": "cascade"}}, "attentional_pool='cascade'"),
        ({"vision_cfg": {"pos_embed_type": "sin_cos_2d"}}, "pos_embed_type='sin_cos_2d'"),
        ({"vision_cfg": {"scale_heads": True}}, "scale_heads=True"),
        ({"vision_cfg": {"patch_size": [8, 4]}}, r"patch_size=\[8, 4\]"),
        ({"vision_cfg": {"act_kwargs": {"approximate": "tanh"}}}, "act_kwargs=.* of quick_gelu"),
        ({"vision_cfg": {"norm_kwargs": {"elementwise_affine": False}}}, "norm_kwargs"),
        ({"vision_cfg": {"window": 3}}, "window=3"),
        ({"vision_cfg": {"timm_model_name": "vit_tiny_patch16_224"}}, r"image_size=\[16, 24\]"),
        ({"text_cfg": {"embed_cls": True}}, "embed_cls=True"),
        ({"text_cfg": {"pool_type": "none"}}, "pool_type='none'"),
        ({"text_cfg": {"pool_type": "first"}}, "first token"),
        ({"text_cfg": {"tokenizer_mode": "clips"}}, "tokenizer_mode='clips'"),
        ({"cross_attention": True}, "cross_attention=True"),
    ],
)
def test_options_that_we_lack_are_named(copy, changes, named):
    with pytest.raises(ConversionError, match=named):
        import_model(copy("quick gelu, not square", **changes))


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda t: {k: v for k, v in t.items() if k != "visual.ln_post.bias"}, r"visual.ln_post.bias \(32,\) is missing"),
        (lambda t: t | {"visual.extra": torch.zeros(3)}, r"visual.extra \(3,\) has no place"),
        (lambda t: t | {"text_projection": torch.zeros(24, 17)}, r"text_projection is \(24, 17\).*\(24, 16\)"),
        (lambda t: t | {"logit_scale": torch.tensor(float("nan"))}, "logit_scale"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_named(copy, change, named):
    with pytest.raises(ConversionError, match=named):
        import_model(copy("quick gelu, not square", tensors=change))


def test_configs_that_are_not_complete(folders, tmp_path):
    for content, named in (
        ({}, "no model_cfg"),
        ({"model_cfg": {"embed_dim": 3, "text_cfg": {}}}, "no vision_cfg"),
    ):
        (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
        with pytest.raises(ConversionError, match=named):
            import_model(f"open_clip:{tmp_path}")


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"vision_cfg": {"width": "x"}}, "vision_cfg: width='x' is no whole number"),
        ({"vision_cfg": {"head_width": 0}}, "head_width=0 is no whole number of at least 1"),
        ({"vision_cfg": {"image_size": [16]}}, r"image_size=\[16\] is no number of pixels"),
        ({"vision_cfg": {"layers": None}}, "layers=None is no whole number"),
        ({"vision_cfg": {"norm_kwargs": {"eps": "x"}}}, "norm_kwargs: eps='x' is no number"),
        ({"vision_cfg": None}, "vision_cfg=None is no JSON object"),
        ({"text_cfg": {"context_length": 9.5}}, "context_length=9.5 is no whole number"),
        ({"text_cfg": {"pool_type": 3}}, "pool_type=3 is no name"),
        ({"quick_gelu": "yes"}, "quick_gelu='yes' is no true or false"),
        ({"text_cfg": {"eos_id": "x"}}, "eos_id='x' is no id of a token"),
        ({"text_cfg": {"pad_id": []}}, r"pad_id=\[\] is no id of a token"),
    ],
)
def test_values_of_another_kind_are_named(copy, changes, named):
    with pytest.raises(ConversionError, match=named):
        import_model(copy("quick gelu, not square", **changes))


def test_a_training_checkpoint_of_any_name(folders, tmp_path):
    """open_clip itself does not look for .pt and would make random weights; the proof gives it the file by another name."""
    source = folders("quick gelu, not square")
    for name in ("tokenizer.json", "tokenizer_config.json", "open_clip_config.json"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    state = safetensors_torch.load_file(source / "open_clip_model.safetensors")
    state = {f"module.{name}": x for name, x in state.items()}
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "epoch_3.pt")
    check(import_model(f"open_clip:{tmp_path}"))


def test_a_tokenizer_that_open_clip_would_not_read_is_not_compared(folders):
    """Without a name in text_cfg open_clip takes its own vocabulary, which this model has no embeddings for."""
    imported = import_model(f"open_clip:{folders('quick gelu, not square')}")
    source = imported.source
    found = compare_inputs(
        "open_clip", source.folder, source.config, preprocess=None, tokenizer=imported.tokenizer
    )
    assert found.texts is None and "49408 tokens for 40 embeddings" in found.why["tokens"]


def test_padding_is_compared_where_it_is_read(copy):
    """SigLIP's towers see it: another token there is another embedding."""
    imported = import_model(copy("map head", text_cfg={"hf_tokenizer_name": "made/up"}))
    tokenizer = imported.tokenizer
    wrong = Tokenizer(tokenizer.model(), tokenizer.context_length, start="[CLS]", end="[SEP]", pad="[UNK]")

    def texts(tokenizer, **options):
        source = imported.source
        return compare_inputs(
            "open_clip", source.folder, source.config, preprocess=None, tokenizer=tokenizer, **options
        ).texts

    assert texts(tokenizer, padding=True) == () == texts(wrong)
    assert texts(wrong, padding=True)


def test_what_open_clips_loader_puts_right(copy, folders):
    """Text towers saved without "text.", scalars saved as arrays of one, a bias that is not there."""

    def older(tensors):
        tensors = {name.removeprefix("text."): x for name, x in tensors.items()}
        del tensors["logit_bias"]
        return tensors | {"logit_scale": tensors["logit_scale"].reshape(())}

    before = flat_params(import_model(f"open_clip:{folders('every option')}").params)
    after = flat_params(import_model(copy("every option", tensors=older)).params)
    assert after.pop("logit_bias") == 0 and before.pop("logit_bias") != 0
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_scales_above_the_limit_of_training(copy):
    imported = import_model(
        copy("quick gelu, not square", tensors=lambda t: t | {"logit_scale": torch.tensor(4.77)})
    )
    assert imported.config.model.max_scale > math.exp(4.77) > 100


def test_mlp_ratio_gives_back_every_width():
    for width in (24, 48, 96, 768, 1152, 1408):
        for hidden in range(width, 6 * width, 7):
            assert int(width * mlp_ratio(width, hidden)) == hidden
