"""Small models of transformers with random weights, written to folders by their own library."""

import json

import numpy as np
from random_peers import randomise, worst, write_tokenizer

from bvl.convert.importing import import_model
from bvl.convert.parity import prove

BERT_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CLIP_SPECIAL = ("<|pad|>", "[UNK]", "<|startoftext|>", "<|endoftext|>")
SIGLIP_SPECIAL = ("<pad>", "</s>", "[UNK]")

VISION = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40, image_size=24, patch_size=8)  # fmt: skip
DINO = dict(
    hidden_size=24, num_hidden_layers=2, num_attention_heads=3, mlp_ratio=2, image_size=28, patch_size=7
)
TEXT = dict(vocab_size=48, hidden_size=20, num_hidden_layers=2, num_attention_heads=2, intermediate_size=28, max_position_embeddings=10)  # fmt: skip


def write(model, folder, *, special=None, words=46, seed=0, spread=0.3):
    """Save a model of transformers with random weights, and a tokenizer with these special tokens."""
    randomise(model, seed, spread).save_pretrained(folder)
    if special is not None:
        write_tokenizer(folder, words, special)
    return folder


def edit_config(folder, **changes):
    """Set keys of config.json, or with None remove them."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def edit_weights(folder, change):
    """Rewrite model.safetensors after `change` of the dict of its arrays."""
    from safetensors.numpy import load_file, save_file

    path = folder / "model.safetensors"
    tensors = {name: np.array(x) for name, x in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def proven(folder):
    """(what the folder became, the differences) after the proof, which must hold."""
    imported = import_model(f"hf:{folder}")
    found = prove(
        imported.config,
        imported.params,
        imported.tokenizer,
        imported.family,
        imported.source.config,
        folder,
    )
    assert found and not worst(found), worst(found)
    return imported, found


def clip(T, folder, *, vision=(), text=(), **options):
    text = TEXT | dict(bos_token_id=2, eos_token_id=3, pad_token_id=0) | dict(text)
    config = T.CLIPConfig(
        text_config=text, vision_config=VISION | dict(vision), **dict(projection_dim=12) | options
    )
    return write(T.CLIPModel(config), folder, special=CLIP_SPECIAL)


def siglip(T, folder, *, vision=(), text=()):
    vision = VISION | dict(vision)
    config = T.SiglipConfig(
        text_config=TEXT | dict(projection_size=vision["hidden_size"]) | dict(text), vision_config=vision
    )
    return write(T.SiglipModel(config), folder, special=SIGLIP_SPECIAL)


def vision_text(T, folder, vision=None, *, text=()):
    """vision: the config of the image tower, by default that of a ViT."""
    vision = vision or T.ViTConfig(**VISION)
    config = T.VisionTextDualEncoderConfig.from_vision_text_configs(
        vision, T.BertConfig(**TEXT | dict(text)), projection_dim=12
    )
    return write(T.VisionTextDualEncoderModel(config), folder, special=BERT_SPECIAL)


def vit(T, folder, *, pooler=True, **options):
    return write(T.ViTModel(T.ViTConfig(**VISION | options), add_pooling_layer=pooler), folder)


def dinov2(T, folder, **options):
    return write(T.Dinov2Model(T.Dinov2Config(**DINO | options)), folder)


def dinov2_registers(T, folder, **options):
    return write(
        T.Dinov2WithRegistersModel(
            T.Dinov2WithRegistersConfig(**DINO | dict(num_register_tokens=3) | options)
        ),
        folder,
    )


def bert(T, folder, *, pooler=True, **options):
    return write(
        T.BertModel(T.BertConfig(**TEXT | options), add_pooling_layer=pooler), folder, special=BERT_SPECIAL
    )


def masked_lm(T, folder, **options):
    return write(T.BertForMaskedLM(T.BertConfig(**TEXT | options)), folder, special=BERT_SPECIAL)


def clip_vision(T, folder, **options):
    return write(T.CLIPVisionModel(T.CLIPVisionConfig(**VISION | options)), folder)


def siglip_vision(T, folder, **options):
    return write(T.SiglipVisionModel(T.SiglipVisionConfig(**VISION | options)), folder)
