"""CoCa of open_clip: embeddings, logits and every layer equal open_clip's; captions are those of recomputation."""

import json

import numpy as np
import pytest
from convert_peers import open_clip_folder
from random_peers import worst
from tiny_run import fast_compilation  # noqa: F401

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
