"""GPT-2, Llama and Qwen2 as decoders: every layer and the logits equal those of transformers."""

import json

import numpy as np
import pytest
from random_peers import randomise, worst, write_tokenizer
from tiny_run import fast_compilation  # noqa: F401

from bvl.convert.importing import import_model
from bvl.convert.parity import prove
from bvl.convert.registry import family_of, open_source
from bvl.errors import ConversionError

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("fast_compilation")

VOCAB, ROWS = 29, 31
IDS = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
GPT2 = {"vocab_size": ROWS, "n_positions": 13, "n_embd": 24, "n_layer": 2, "n_head": 3, **IDS}
LLAMA = {
    **{"vocab_size": ROWS, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 13, **IDS},
}
LLAMA3 = {
    **{
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    "original_max_position_embeddings": 16,
}


@pytest.fixture(scope="module")
def write(tmp_path_factory):
    from bvl.convert.peers import import_peer

    transformers = import_peer("transformers", what="the test")

    def write(name, options, dtype=None):
        folder = tmp_path_factory.mktemp("peer")
        config = getattr(transformers, name.replace("LMHeadModel", "Config").replace("ForCausalLM", "Config"))
        model = randomise(getattr(transformers, name)(config(**options)))
        if dtype is not None:
            model = model.to(dtype)
        model.save_pretrained(folder)
        write_tokenizer(folder, VOCAB)
        return folder

    return write


CASES = {
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "gpt2, other options": (
        "GPT2LMHeadModel",
        GPT2 | {"n_inner": 40, "activation_function": "relu", "layer_norm_epsilon": 1e-2}
        | {"tie_word_embeddings": False, "reorder_and_upcast_attn": True},
    ),
    "llama": ("LlamaForCausalLM", LLAMA | {"rms_norm_eps": 1e-3}),
    "llama, other options": (
        "LlamaForCausalLM",
        LLAMA | {"attention_bias": True, "mlp_bias": True, "head_dim": 10, "rope_parameters": LLAMA3}
        | {"tie_word_embeddings": True, "hidden_act": "gelu", "eos_token_id": [3, 4]},
    ),
    "qwen2": (
        "Qwen2ForCausalLM",
        LLAMA | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_layer_and_the_logits_are_equal(write, case):
    folder = write(*CASES[case])
    imported = import_model(f"hf:{folder}")
    assert imported.params["model"]["decoder"]["token_embed"].shape[0] == ROWS
    assert imported.config.model.image is None and "log_scale" not in imported.params["model"]
    differences = prove(
        imported.config, imported.params, imported.tokenizer, imported.family, imported.source.config, folder
    )
    assert all(d.within for d in differences), worst(differences)
    assert {d.ours for d in differences} >= {"decoder/block_0", "decoder/block_1", "decoder/norm", "logits"}


def test_the_tokenizer_is_read_by_the_rules_of_the_family(write):
    for name, options, kind in (("Qwen2ForCausalLM", LLAMA, "qwen2"), ("LlamaForCausalLM", LLAMA, "llama")):
        source = open_source(f"hf:{write(name, options)}")
        assert family_of(source).describe(source).text.kind == kind


def test_bfloat16_and_the_names_of_the_first_checkpoints(write):
    """A folder of the class without a head, with the buffers that old versions wrote."""
    folder = write("GPT2LMHeadModel", GPT2, dtype=torch.bfloat16)
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    assert {x.dtype for x in tensors.values()} == {torch.bfloat16}
    expected = tensors["transformer.h.1.attn.c_attn.weight"].float().numpy()
    old = {
        name.removeprefix("transformer."): x.clone()
        for name, x in tensors.items()
        if name != "lm_head.weight"
    }
    old["h.0.attn.bias"] = torch.ones(1, 1, 13, 13)
    save_file(old, folder / "model.safetensors", metadata={"format": "pt"})
    imported = import_model(f"hf:{folder}")
    assert imported.unread == {"transformer.h.0.attn.bias": "a mask that is always the same"}
    key = np.asarray(imported.params["model"]["decoder"]["block_1"]["attention"]["key"]["kernel"])
    np.testing.assert_array_equal(key, expected[:, 24:48])


def test_a_config_of_the_older_kind_is_read_as_the_newer(write):
    folder = write("LlamaForCausalLM", LLAMA | {"rope_parameters": LLAMA3})
    new = import_model(f"hf:{folder}").config.model
    config = json.loads((folder / "config.json").read_text())
    scaling = config.pop("rope_parameters")
    config |= {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling}
    (folder / "config.json").write_text(json.dumps(config))
    assert import_model(f"hf:{folder}").config.model == new


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights=False"),
        ("gpt2", {"activation_function": "mish"}, "activation_function='mish'"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention=True"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type='yarn'"),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, "rope_type='linear' needs factor"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("llama", {"hidden_act": "tanh"}, "hidden_act='tanh'"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window=True"),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
    ],
)
def test_options_that_are_not_reproduced_are_named(tmp_path, name, options, words):
    classes = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
    base = GPT2 if name == "gpt2" else LLAMA
    config = {"model_type": name, "architectures": [classes[name]], **base, **options}
    (tmp_path / "config.json").write_text(json.dumps(config))
    source = open_source(f"hf:{tmp_path}")
    with pytest.raises(ConversionError, match=words):
        family_of(source).describe(source)
