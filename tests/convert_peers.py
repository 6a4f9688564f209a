"""Small foreign models with random weights, and folders of them, for the tests of conversion."""

import json
from pathlib import Path

import tokenizers
from random_peers import randomise


def randomised(model, seed: int = 0):
    """As `randomise`, and also the statistics of batch norms; the scale of logits is one that training gives."""
    import torch

    generator = torch.Generator().manual_seed(seed + 1)
    randomise(model, seed)
    with torch.no_grad():
        for name, x in model.named_buffers():
            noise = torch.randn(x.shape, generator=generator)
            if name.endswith("running_var"):
                x.copy_(0.5 + noise.abs())
            elif name.endswith("running_mean"):
                x.copy_(0.2 * noise)
        model.logit_scale.fill_(2.5)
    return model


def word_tokenizer(path: Path, *, size: int = 40, start="[CLS]", end="[SEP]", pad="[PAD]") -> Path:
    """A folder with a tokenizer of `size` words; the padding is 0, start and end have the highest ids."""
    special = (pad, "[UNK]", start, end)
    words = [f"w{i}" for i in range(size - len(special))]
    vocabulary = {word: i for i, word in enumerate((pad, "[UNK]", *words, start, end))}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    model.add_special_tokens(list(special))
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(t, vocabulary[t]) for t in (start, end)]
    )
    path.mkdir(parents=True, exist_ok=True)
    model.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": pad, "unk_token": "[UNK]"})
    )
    return path


def open_clip_folder(path: Path, model_cfg: dict, *, preprocess: dict | None = None, seed: int = 0) -> Path:
    """A folder of open_clip with a model of random weights as open_clip itself makes it from `model_cfg`."""
    import safetensors.torch

    from bvl.convert.peers import import_peer

    import_peer("timm", what="a test")
    open_clip = import_peer("open_clip", what="a test")
    word_tokenizer(path, size=model_cfg["text_cfg"].get("vocab_size", 40))
    config = {"model_cfg": model_cfg, "preprocess_cfg": preprocess or {}}
    (path / "open_clip_config.json").write_text(json.dumps(config))
    made = dict(json.loads(json.dumps(model_cfg)))
    custom = made.pop("custom_text", False) or "hf_model_name" in made["text_cfg"]
    if "multimodal_cfg" in made:
        kind = open_clip.CoCa
    else:
        kind = open_clip.CustomTextCLIP if custom else open_clip.CLIP
    if "hf_model_name" in made["text_cfg"]:
        made["text_cfg"]["hf_model_pretrained"] = False
    model = randomised(kind(**made), seed)
    tensors = {name: x.contiguous() for name, x in model.state_dict().items()}
    safetensors.torch.save_file(tensors, path / "open_clip_model.safetensors")
    return path
