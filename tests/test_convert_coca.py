"""CoCa of open_clip: embeddings, logits and every layer equal open_clip's; captions are those of recomputation."""

import dataclasses
import json

import numpy as np
import pytest
from convert_peers import open_clip_folder
from random_peers import worst
from tiny_run import fast_compilation  # noqa: F401

from bvl.convert.exporting import choose_family, export_model
from bvl.convert.importing import import_model
from bvl.convert.parity import prove
from bvl.convert.registry import family_of, open_source
from bvl.errors import ConversionError, UserError

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("fast_compilation")

VISION = {
    **{"image_size": 16, "layers": 2, "width": 24, "head_width": 8, "patch_size": 8, "output_tokens": True},
    **{"attentional_pool": True, "attn_pooler_queries": 5, "attn_pooler_heads": 4},
}
TEXT = {
    **{"context_length": 9, "vocab_size": 40, "width": 16, "heads": 2, "layers": 2},
    **{"embed_cls": True, "output_tokens": True},
}
MULTIMODAL = {"context_length": 9, "vocab_size": 40, "width": 16, "heads": 4, "layers": 1}


def coca(vision=None, text=None, multimodal=None, **model):
    return {
        **{"embed_dim": 16, "custom_text": True},
        "vision_cfg": VISION | (vision or {}),
        "text_cfg": TEXT | (text or {}),
        "multimodal_cfg": MULTIMODAL | (multimodal or {}),
        **model,
    }


CASES = {
    "pooler": coca(),
    # Of coca_base: the decoder reads the patches.
    "no pooler": coca(
        {"attentional_pool": False, "width": 16, "image_size": [16, 24], "norm_kwargs": {"eps": 1e-3}},
        {"mlp_ratio": 2.0, "proj_bias": True},
        quick_gelu=True,
    ),
    # One packed tensor for the pooler's attention; the mean of its queries.
    "same width": coca({"width": 16, "pool_type": "avg", "no_ln_pre": True}, nonscalar_logit_scale=True),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(case):
        if case not in made:
            made[case] = open_clip_folder(tmp_path_factory.mktemp("coca"), CASES[case])
        return made[case]

    return folder


@pytest.mark.parametrize("case", CASES)
def test_embeddings_logits_and_layers_are_equal(folders, case):
    folder = folders(case)
    imported = import_model(f"open_clip:{folder}")
    differences = prove(
        imported.config, imported.params, imported.tokenizer, imported.family, imported.source.config, folder
    )
    assert all(d.within for d in differences), worst(differences)
    names = {(d.tower, d.ours) for d in differences}
    expected = {("image", "embed"), ("text", "embed"), ("decoder", "logits"), ("both", "logits")}
    assert names >= expected | {("decoder", "decoder/block_2"), ("text", "decoder/block_1")}
    assert (("image", "image/attentional_pool") in names) is (case != "no pooler")


@pytest.mark.parametrize("case", CASES)
def test_an_import_is_written_again_bit_for_bit(folders, tmp_path, case):
    """What open_clip loads from the new folder is what it loads from the old one."""
    imported = import_model(f"open_clip:{folders(case)}")
    written = export_model(
        tmp_path, "open_clip", config=imported.config, params=imported.params, tokenizer=imported.tokenizer
    )
    assert written.family.name == "CoCa" and not written.unwritten
    old, new = (
        imported.family.load_peer(folder, imported.source.config).state_dict()
        for folder in (folders(case), tmp_path)
    )
    assert old.keys() == new.keys()
    for name, x in old.items():
        assert torch.equal(x.reshape(new[name].shape), new[name]), name
    again = import_model(f"open_clip:{tmp_path}")
    assert again.config.model == imported.config.model


@pytest.mark.parametrize(
    "options, words",
    [
        ({"cross_mlp": False}, "model.decoder.cross_mlp=False"),
        ({"activation": None}, "model.decoder.activation=None"),
        ({"activation": "quick_gelu"}, "quick_gelu is one option for both"),
        ({"mlp_hidden": 40}, "mlp_hidden=40"),
        ({"visual_queries": 2}, "visual_queries=2"),
    ],
)
def test_what_open_clip_has_not_is_named(folders, options, words):
    imported = import_model(f"open_clip:{folders('pooler')}")
    model = imported.config.model
    model = dataclasses.replace(model, decoder=dataclasses.replace(model.decoder, **options))
    with pytest.raises(ConversionError, match=words):
        choose_family("open_clip", dataclasses.replace(imported.config, model=model), imported.tokenizer)


def test_a_learned_null_is_left_out_and_said_to_be(folders, tmp_path):
    imported = import_model(f"open_clip:{folders('pooler')}")
    model = imported.config.model
    model = dataclasses.replace(model, decoder=dataclasses.replace(model.decoder, null=True))
    params = {
        **imported.params,
        "model": {
            **imported.params["model"],
            "decoder": {**imported.params["model"]["decoder"], "visual_tokens": {"null": np.ones(16)}},
        },
    }
    config = dataclasses.replace(imported.config, model=model)
    written = export_model(tmp_path, "open_clip", config=config, params=params, tokenizer=imported.tokenizer)
    assert "no null image" in written.unwritten["decoder/visual_tokens/null"]


def test_captions_are_those_of_open_clip_and_guidance_is_refused(folders):
    """Greedy by open_clip's own forward pass, token for token; guidance 1 needs no null, which CoCa has not."""
    from bvl.decode.options import DecodeOptions
    from bvl.runs import components_of
    from bvl.tasks.captioning import write_captions

    folder = folders("pooler")
    imported = import_model(f"open_clip:{folder}")
    components, tokenizer = components_of(imported), imported.tokenizer
    images = np.random.default_rng(0).integers(0, 255, (2, 16, 16, 3)).astype(np.uint8)
    options = DecodeOptions(max_length=6)
    written = write_captions(components, images, options=options, batch_size=2)
    preprocess = components.preprocess
    pixels = (images / 255.0 - np.asarray(preprocess.mean)) / np.asarray(preprocess.std)
    peer = imported.family.load_peer(folder, imported.source.config)
    forbidden = [*({*tokenizer.special_ids, tokenizer.unknown_id} - {tokenizer.end_id})]
    with torch.inference_mode():
        _, visual = peer.visual(torch.from_numpy(pixels.transpose(0, 3, 1, 2)).float())
        tokens = torch.full((2, 1), tokenizer.start_id)
        for _ in range(6):
            logits = peer.text_decoder(visual, peer.text(tokens)[1])[:, -1]
            logits[:, forbidden] = -torch.inf
            tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], dim=1)
    for row, (candidate,) in enumerate(written):
        assert list(candidate.tokens) == tokens[row, 1 : 1 + len(candidate.tokens)].tolist()
        assert len(candidate.tokens) == 6 or candidate.tokens[-1] == tokenizer.end_id
    with pytest.raises(UserError, match="model.decoder.null=true"):
        write_captions(components, images, options=options, guidance=2.0)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(vision={"attentional_pool": "parallel"}), "attentional_pool='parallel'"),
        (dict(vision={"output_tokens": False}), "output_tokens=False"),
        (dict(vision={"layers": [1, 1, 1, 1]}), r"layers=\[1, 1, 1, 1\]: ResNets"),
        (dict(vision={"timm_model_name": "vit_tiny"}), "timm_model_name='vit_tiny'"),
        (dict(vision={"attentional_pool": False}), "width 16 cannot read image tokens of width 24"),
        (dict(text={"hf_model_name": "bert-base-uncased"}), "hf_model_name='bert-base-uncased'"),
        (dict(text={"embed_cls": False}), "embed_cls=False"),
        (dict(text={"ls_init_value": 0.1}), "ls_init_value=0.1"),
        (dict(text={"act_kwargs": {"approximate": "tanh"}}), "act_kwargs"),
        (dict(multimodal={"width": 24}), "multimodal_cfg.width=24 and text_cfg.width=16"),
        (dict(multimodal={"ls_init_value": 0.1}), "multimodal_cfg: ls_init_value=0.1"),
        (dict(multimodal={"context_length": 5}), "context_length=5 is shorter"),
        (dict(new_option=3), "new_option=3"),
    ],
)
def test_options_that_are_not_reproduced_are_named(tmp_path, options, words):
    config = {"model_cfg": coca(**options), "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    source = open_source(f"open_clip:{tmp_path}")
    with pytest.raises(ConversionError, match=words):
        family_of(source).describe(source)
