"""BERT of transformers as open_clip's text tower (HFTextEncoder): where its config is found, its table, its peer."""

from __future__ import annotations

import dataclasses
import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bvl.convert.families import Layer, Source, TextFacts, expect, read_json
from bvl.convert.hf_bert import bert_config, bert_facts, bert_layers, bert_table
from bvl.convert.open_clip_towers import HF_OPTIONS, TOKENIZER_OPTIONS, known_options
from bvl.convert.table import Table, linear, table
from bvl.convert.tensors import Tensors
from bvl.errors import ConversionError
from bvl.models.bert import BertConfig
from bvl.models.vlm import DualEncoderConfig

_BERT = "text.transformer."
# Their hf_pooler_type -> our pool. Without a type open_clip makes a BERT without its pooler and takes the first token.
# open_clip's own "max_pooler" fails on every text, so there is nothing that could be reproduced.
POOLS = {
    "cls_last_hidden_state_pooler": "cls",
    "cls_pooler": "pooler",
    "mean_pooler": "mean",
    None: "cls",
}
# Their hf_proj_type -> our projection.
PROJECTIONS = {"mlp": "mlp", "linear": "linear", None: "none"}


def read_text(
    text: Mapping[str, Any], source: Source, tensors: Tensors, *, where: str
) -> tuple[BertConfig, TextFacts, str]:
    """(our text tower, what its tokenizer must be, its projection) of a text_cfg that names a model of transformers.

    Raises ConversionError for a model that is no BERT, and for options that we lack.
    """
    # open_clip's defaults of its own text tower may stand there and mean nothing.
    known_options(
        text, {*HF_OPTIONS, *TOKENIZER_OPTIONS, "width", "heads", "layers", "output_tokens"}, where=where
    )
    expect(
        text,
        {
            "hf_pooler_type": ("mean_pooler", "cls_last_hidden_state_pooler", "cls_pooler", None),
            "hf_proj_type": ("mlp", "linear", None),
            "output_tokens": (False,),
        },
        where=where,
    )
    found = bert_json(text, source, tensors, where=where)
    where = f"{where}: {text['hf_model_name']}"
    expect(found, {"model_type": ("bert",)}, where=where)
    pool = POOLS[text.get("hf_pooler_type", "mean_pooler")]
    facts = bert_facts(found, where=where, longest=text.get("context_length", 77))
    return (
        bert_config(found, where=where, pool=pool),
        facts,
        PROJECTIONS[text.get("hf_proj_type", "mlp")],
    )


def bert_json(text: Mapping[str, Any], source: Source, tensors: Tensors, *, where: str) -> dict[str, Any]:
    """The BERT's config.json: given, in the folder that hf_model_name is, in the source folder, or read off the tensors.

    Raises ConversionError where none of them tells.
    """
    if text.get("hf_model_config"):
        return dict(text["hf_model_config"])
    name = text["hf_model_name"]
    for folder in (Path(name), source.folder / name, source.folder):
        if (folder / "config.json").is_file():
            found = read_json(folder / "config.json")
            if "hidden_size" in found:
                return found
    return _from_shapes(name, tensors.shapes, where=where)


def _from_shapes(name: str, shapes: Mapping[str, tuple[int, ...]], *, where: str) -> dict[str, Any]:
    """What the tensors say, and what is the same in every BERT: heads of 64 channels (MiniLM: 32), GELU, epsilon 1e-12."""
    numbers = [
        int(found[1])
        for key in shapes
        if (found := re.match(r"text\.transformer\.encoder\.layer\.(\d+)\.", key))
    ]
    needed = {
        "words": f"{_BERT}embeddings.word_embeddings.weight",
        "positions": f"{_BERT}embeddings.position_embeddings.weight",
        "types": f"{_BERT}embeddings.token_type_embeddings.weight",
        "up": f"{_BERT}encoder.layer.0.intermediate.dense.weight",
    }
    missing = [key for key in needed.values() if key not in shapes]
    if missing:
        raise ConversionError(
            f"{where}: hf_model_name={name!r} is no folder here, and the weights are not those of a BERT: tensor "
            f"{missing[0]} is missing; put the model's config.json beside them"
        )
    (vocabulary, width), positions = shapes[needed["words"]], shapes[needed["positions"]][0]
    types = shapes[needed["types"]][0]
    # RoBERTa has the same tensors, one type and two positions more, which it counts from 2 on.
    if "roberta" in name.lower() or types == 1:
        raise ConversionError(
            f"{where}: hf_model_name={name!r} is a RoBERTa, which bvl does not reproduce; it reads BERT"
        )
    head = 32 if "minilm" in name.lower() else 64
    if width % head:
        raise ConversionError(
            f"{where}: hf_model_name={name!r} is no folder here, and a width of {width} does not tell its heads; put "
            "the model's config.json beside the weights"
        )
    return {
        "model_type": "bert",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": max(numbers) + 1,
        "num_attention_heads": width // head,
        "intermediate_size": shapes[needed["up"]][0],
        "max_position_embeddings": positions,
        "type_vocab_size": types,
        "pad_token_id": 0,
    }


def text_table(model: DualEncoderConfig) -> Table:
    """The text tower and its projection; names of ours below the model."""
    return table(
        bert_table(model.text).under("text/", _BERT),
        linear("text_projection/hidden", "text.proj.0", bias=False) if model.text_projection == "mlp" else (),
        linear("text_projection/out", "text.proj.2", bias=False) if model.text_projection == "mlp" else (),
        linear("text_projection", "text.proj", bias=False) if model.text_projection == "linear" else (),
    )


def layers(config: BertConfig) -> tuple[Layer, ...]:
    """What the proof compares, from first to last."""
    return tuple(
        dataclasses.replace(layer, ours=f"text/{layer.ours}", theirs=_BERT + layer.theirs)
        for layer in bert_layers(config)
    )


def load_peer(folder: Path, foreign: Mapping[str, Any], tensors: Tensors, load: Any) -> Any:
    """The model by `load(folder)`, also where hf_model_name is a public name and there is no network.

    open_clip asks for the BERT's config by that name; it gets a folder beside the weights instead.
    """
    cfg = foreign["model_cfg"]
    name = Path(cfg["text_cfg"]["hf_model_name"])
    if name.is_absolute() and (name / "config.json").is_file() and "hf_model_config" not in cfg["text_cfg"]:
        return load(folder)
    text = dict(cfg["text_cfg"])
    found = bert_json(text, Source("open_clip", folder, foreign), tensors, where=str(folder))
    text.pop("hf_model_config", None)
    with tempfile.TemporaryDirectory() as temporary:
        here = Path(temporary)
        for path in folder.iterdir():
            if path.is_file() and path.suffix in (".safetensors", ".bin", ".pth", ".pt"):
                (here / path.name).symlink_to(path.absolute())
        (here / "config.json").write_text(json.dumps({"model_type": "bert", **found}), encoding="utf-8")
        config = {**foreign, "model_cfg": {**cfg, "text_cfg": {**text, "hf_model_name": str(here)}}}
        (here / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
        return load(here)
