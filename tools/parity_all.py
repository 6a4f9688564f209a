"""Convert models of full size, with random weights, in and out again, and print the largest differences.

    python tools/parity_all.py                 # all, about 15 minutes on 2 cores
    python tools/parity_all.py ViT-B-32 bert   # those whose name contains one of the words
    python tools/parity_all.py --out parity.md

Each model is built by its own library from its config, gets random numbers in every tensor, and is saved. Then
`in` is the import with its proof; `out` the export of the imported model with its proof, and a check that importing
the export gives the same parameters bit for bit. "embeddings" are absolute differences (unit norm), "layers" relative.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tokenizers

import bvl
from bvl.conversion import import_run
from bvl.convert.peers import import_peer
from bvl.convert.report import Report
from bvl.convert.table import flat_params
from bvl.errors import UserError


def write_tokenizer(folder: Path, vocab_size: int, start: str | None, end: str, pad: str) -> None:
    """A tokenizer of made-up words. The end has the highest id, at which CLIP pools; padding that is not the end has
    id 0, which BERT hides."""
    first = [pad] if pad != end else []
    last = ["[UNK]", *([start] if start and start != end else []), end]
    words = [f"w{i}" for i in range(vocab_size - len(first) - len(last))]
    vocab = {word: i for i, word in enumerate([*first, *words, *last])}
    special = [*first, *last]
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.add_special_tokens(special)
    front = f"{start} " if start else ""
    ids = [(token, vocab[token]) for token in special]
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{front}$A {end}", special_tokens=ids
    )
    model.save(str(folder / "tokenizer.json"))
    options = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": pad, "eos_token": end, "unk_token": "[UNK]"}  # fmt: skip
    if start:
        options |= {"bos_token": start, "cls_token": start, "sep_token": end}
    (folder / "tokenizer_config.json").write_text(json.dumps(options))


def write_qwen_tokenizer(folder: Path) -> None:
    """Qwen2's own tokenizer with every byte as a token and no merges; transformers takes no other class for it."""
    transformers = import_peer("transformers", what="this tool")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, "<|endoftext|>"])}
    transformers.Qwen2Tokenizer(vocab=vocab, merges=[]).save_pretrained(folder)


def randomise(model) -> None:
    """Random numbers in every parameter and statistic, so that no tensor is like another or at its start."""
    torch = import_peer("torch", what="this tool")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, x in model.state_dict().items():
            if not x.is_floating_point():
                continue
            noise = torch.randn(x.shape, generator=generator)
            if x.ndim >= 2:
                x.copy_(noise * (x.shape[-1] if x.ndim == 2 else x[0].numel()) ** -0.5)
            elif name.endswith("running_var"):
                x.copy_(1.0 + 0.1 * noise.abs())
            elif name.endswith(("logit_scale", "logit_bias")):
                x.copy_(2.0 + 0.1 * noise)
            elif name.endswith("weight"):
                x.copy_(1.0 + 0.1 * noise)
            else:
                x.copy_(0.1 * noise)


def open_clip_model(name: str) -> Callable[[Path], str]:
    """A model of open_clip's own list, with its preprocessing."""

    def make(folder: Path) -> str:
        open_clip = import_peer("open_clip", what="this tool")
        from safetensors.torch import save_file

        model = open_clip.create_model(name, pretrained=None)
        randomise(model)
        config = {
            "model_cfg": open_clip.get_model_config(name),
            "preprocess_cfg": open_clip.get_model_preprocess_cfg(model),
        }
        save_file(
            {k: v.contiguous() for k, v in model.state_dict().items()},
            folder / "open_clip_model.safetensors",
        )
        (folder / "open_clip_config.json").write_text(json.dumps(config))
        text = config["model_cfg"]["text_cfg"]
        if "siglip" in name.lower():
            write_tokenizer(folder, text["vocab_size"], None, "</s>", "</s>")
        return f"open_clip:{folder}"

    return make


def biomedclip(folder: Path) -> str:
    """The layout of BiomedCLIP: a timm ViT-B/16 and a BERT-base with an MLP projection, context 256."""
    open_clip = import_peer("open_clip", what="this tool")
    transformers = import_peer("transformers", what="this tool")
    from safetensors.torch import save_file

    transformers.BertConfig().save_pretrained(folder)
    write_tokenizer(folder, 30522, "[CLS]", "[SEP]", "[PAD]")
    config = {
        "embed_dim": 512,
        "vision_cfg": {
            "timm_model_name": "vit_base_patch16_224",
            "timm_model_pretrained": False,
            "timm_pool": "",
            "timm_proj": "linear",
            "image_size": 224,
        },
        "text_cfg": {
            "hf_model_name": str(folder),
            "hf_tokenizer_name": str(folder),
            "hf_model_pretrained": False,
            "hf_proj_type": "mlp",
            "hf_pooler_type": "cls_last_hidden_state_pooler",
            "context_length": 256,
        },
    }
    model = open_clip.CustomTextCLIP(**config)
    randomise(model)
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    preprocess = {
        "mean": [0.48145466, 0.4578275, 0.40821073],
        "std": [0.26862954, 0.26130258, 0.27577711],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": preprocess})
    )
    return f"open_clip:{folder}"


def hf_model(
    class_name: str,
    config: Callable,
    tokenizer: tuple | Callable[[Path], None] | None,
    processor: str | None,
) -> Callable:
    """A transformers class with a config of full size; tokenizer: (vocabulary, start, end, pad), or what writes it."""

    def make(folder: Path) -> str:
        transformers = import_peer("transformers", what="this tool")
        model = getattr(transformers, class_name)(config(transformers))
        randomise(model)
        model.save_pretrained(folder)
        if callable(tokenizer):
            tokenizer(folder)
        elif tokenizer is not None:
            write_tokenizer(folder, *tokenizer)
        if processor is not None:
            getattr(transformers, processor)().save_pretrained(folder)
        return f"hf:{folder}"

    return make


def vit_gpt2(transformers):
    """The config of a captioner: a ViT whose tokens a GPT-2 reads."""
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.ViTConfig(), transformers.GPT2Config()
    )
    config.decoder_start_token_id = config.eos_token_id = config.pad_token_id = GPT2[0] - 1
    return config


BERT = (30522, "[CLS]", "[SEP]", "[PAD]")
GPT2 = (50257, "<|endoftext|>", "<|endoftext|>", "<|endoftext|>")
MODELS: dict[str, tuple[Callable[[Path], str], str | None]] = {
    # name: (how to make it, the format it goes out to)
    "open_clip ViT-B-32": (open_clip_model("ViT-B-32"), "open_clip"),
    "open_clip ViT-B-32-quickgelu": (open_clip_model("ViT-B-32-quickgelu"), "open_clip"),
    "open_clip RN50": (open_clip_model("RN50"), "open_clip"),
    "open_clip ViT-B-16-SigLIP": (open_clip_model("ViT-B-16-SigLIP"), "open_clip"),
    "open_clip coca_ViT-B-32": (open_clip_model("coca_ViT-B-32"), "open_clip"),
    "open_clip BiomedCLIP layout": (biomedclip, "open_clip"),
    "hf CLIPModel": (
        hf_model(
            "CLIPModel",
            lambda t: t.CLIPConfig(),
            (49408, "<|startoftext|>", "<|endoftext|>", "<|endoftext|>"),
            "CLIPImageProcessor",
        ),
        "hf",
    ),
    "hf SiglipModel": (
        hf_model(
            "SiglipModel", lambda t: t.SiglipConfig(), (32000, None, "</s>", "</s>"), "SiglipImageProcessor"
        ),
        "hf",
    ),
    "hf VisionTextDualEncoderModel": (
        hf_model(
            "VisionTextDualEncoderModel",
            lambda t: t.VisionTextDualEncoderConfig.from_vision_text_configs(t.ViTConfig(), t.BertConfig()),
            BERT,
            "ViTImageProcessor",
        ),
        "hf",
    ),
    "hf VisionEncoderDecoderModel (ViT, GPT-2)": (
        hf_model("VisionEncoderDecoderModel", vit_gpt2, GPT2, "ViTImageProcessor"),
        "hf",
    ),
    "hf ViTModel": (hf_model("ViTModel", lambda t: t.ViTConfig(), None, "ViTImageProcessor"), "hf"),
    "hf Dinov2Model (RAD-DINO layout)": (
        hf_model("Dinov2Model", lambda t: t.Dinov2Config(image_size=518), None, "BitImageProcessor"),
        "hf",
    ),
    "hf BertModel": (hf_model("BertModel", lambda t: t.BertConfig(), BERT, None), "hf"),
    "hf BertForMaskedLM": (hf_model("BertForMaskedLM", lambda t: t.BertConfig(), BERT, None), "hf"),
    "hf GPT2LMHeadModel": (
        hf_model(
            "GPT2LMHeadModel",
            lambda t: t.GPT2Config(),
            GPT2,
            None,
        ),
        None,
    ),
    "hf LlamaForCausalLM (360M)": (
        hf_model(
            "LlamaForCausalLM",
            lambda t: t.LlamaConfig(
                hidden_size=960,
                num_hidden_layers=32,
                num_attention_heads=15,
                num_key_value_heads=5,
                intermediate_size=2560,
                vocab_size=49152,
                tie_word_embeddings=True,
            ),
            (49152, "<s>", "</s>", "</s>"),
            None,
        ),
        None,
    ),
    "hf Qwen2ForCausalLM (0.5B)": (
        hf_model(
            "Qwen2ForCausalLM",
            lambda t: t.Qwen2Config(
                hidden_size=896,
                num_hidden_layers=24,
                num_attention_heads=14,
                num_key_value_heads=2,
                intermediate_size=4864,
                vocab_size=151936,
                tie_word_embeddings=True,
            ),
            write_qwen_tokenizer,
            None,
        ),
        None,
    ),
}


def line(name: str, direction: str, report: Report, seconds: float) -> str:
    """One row of the table."""
    largest = report.largest()
    embeds = [v for k, v in largest.items() if k.endswith("/embed")]
    others = [v for k, v in largest.items() if not k.endswith("/embed")]
    shown = f"{max(embeds):.1e}" if embeds else "-"
    result = "passed" if report.passed else f"FAILED: {report.lines()[-1]}"
    return f"| {name} | {direction} | {shown} | {max(others):.1e} | {result} | {seconds:.0f} |"


def convert(name: str) -> list[str]:
    """The rows of one model."""
    make, target = MODELS[name]
    scratch = Path(tempfile.mkdtemp())
    rows = []
    try:
        folder = scratch / "source"
        folder.mkdir()
        spec = make(folder)
        gc.collect()
        start = time.monotonic()
        report = import_run(spec, scratch / "run")
        rows.append(line(name, "in", report, time.monotonic() - start))
        if target is not None:
            start = time.monotonic()
            model = bvl.load(scratch / "run")
            report = model.export(scratch / "out", format=target, raises=False)
            rows.append(line(name, "out", report, time.monotonic() - start))
            before = flat_params(model.params)
            after = flat_params(bvl.load(f"{target}:{scratch / 'out'}").params)
            equal = before.keys() == after.keys() and all(np.array_equal(before[k], after[k]) for k in before)
            rows[-1] += " bit-equal |" if equal else " NOT EQUAL |"
        else:
            rows[-1] += " |"
    except UserError as error:
        rows.append(f"| {name} | | | | FAILED: {str(error).splitlines()[0]} | |")
    finally:
        shutil.rmtree(scratch)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="words; a model is taken whose name contains one of them")
    parser.add_argument("--out", help="a file to write the table to as well")
    args = parser.parse_args()
    chosen = [n for n in MODELS if not args.names or any(w.lower() in n.lower() for w in args.names)]
    rows = ["| model | | embeddings | layers | | s | round trip |", "|---|---|---|---|---|---|---|"]
    print("\n".join(rows), flush=True)
    for name in chosen:
        for row in convert(name):
            rows.append(row)
            print(row, flush=True)
    if args.out:
        Path(args.out).write_text("\n".join(rows) + "\n", encoding="utf-8")
    return int(any("FAILED" in row or "NOT EQUAL" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
