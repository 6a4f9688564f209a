"""BertModel (also as a folder of sentence-transformers) and BertForMaskedLM of transformers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from bvl.assembly import embedding_rows
from bvl.config import Config
from bvl.convert.families import Described, Family, Layer, Source, TextFacts, Tower, expect
from bvl.convert.hf_common import (
    FOREIGN_ACTIVATIONS,
    activation,
    alone_wrong,
    block,
    how_to_load,
    integer,
    is_class,
    load_peer,
    number,
    refuse,
    renamed,
    unit,
    unlike,
)
from bvl.convert.table import Alias, Row, Table, Unread, linear, norm, table
from bvl.convert.tensors import Tensors
from bvl.convert.tokenizers import write_hf_tokenizer
from bvl.data.text import Tokenizer
from bvl.errors import ConversionError
from bvl.models.bert import VARIANTS, BertConfig
from bvl.models.vlm import DualEncoderConfig

Pool = Literal["cls", "mean", "max", "pooler"]

BLOCK = {
    "attention/query": "attention.self.query",
    "attention/key": "attention.self.key",
    "attention/value": "attention.self.value",
    "attention/out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "mlp/up": "intermediate.dense",
    "mlp/down": "output.dense",
    "mlp_norm": "output.LayerNorm",
}
# What other classes put in front, and names of the oldest files.
RENAMES = (
    (r"^bert\.", ""),
    (r"LayerNorm\.gamma$", "LayerNorm.weight"),
    (r"LayerNorm\.beta$", "LayerNorm.bias"),
)
# Options of ours that the class can have, or that matter in training alone.
_FREE = (
    "variant hidden_size depth num_heads mlp_hidden max_positions type_vocab_size activation norm_epsilon dropout "
    "drop_path scan remat"
)
_POOLER = "the embedding is pooled over the tokens; a dual encoder that reads the pooler takes it"


def bert_config(foreign: Mapping[str, Any], *, where: str, pool: Pool) -> BertConfig:
    """A foreign BertConfig in our terms; raises ConversionError naming an option that bvl does not reproduce."""
    known = {
        "position_embedding_type": ("absolute",),
        "is_decoder": (False,),
        "add_cross_attention": (False,),
    }
    expect(foreign, known, where=where)
    sizes = (
        integer(foreign, "hidden_size", 768, where=where),
        integer(foreign, "num_hidden_layers", 12, where=where),
        integer(foreign, "num_attention_heads", 12, where=where),
        integer(foreign, "intermediate_size", 3072, where=where),
    )
    named = next((name for name, row in VARIANTS.items() if row == sizes), None)
    given = (
        {} if named else dict(zip(("hidden_size", "depth", "num_heads", "mlp_hidden"), sizes, strict=True))
    )
    return BertConfig(
        variant=named or "base",
        **given,
        max_positions=integer(foreign, "max_position_embeddings", 512, where=where),
        type_vocab_size=integer(foreign, "type_vocab_size", 2, where=where),
        pool=pool,
        activation=activation(foreign, "gelu", where=where),
        norm_epsilon=number(foreign, "layer_norm_eps", 1e-12, where=where),
        dropout=number(foreign, "hidden_dropout_prob", 0.1, where=where),
    )


def bert_wrong(config: BertConfig, *pools: Pool) -> list[str]:
    """Which options of a text tower of ours, with one of these pools, BertModel has not."""
    wrong = unlike("model.text", config, free=_FREE, fixed={"pool": pools})
    if config.activation not in FOREIGN_ACTIVATIONS:
        wrong.append(f"model.text.activation={config.activation!r}")
    return wrong


def foreign_bert(config: BertConfig, *, rows: int, pad_id: int) -> dict[str, Any]:
    """The foreign BertConfig of a text tower of ours without wrong options."""
    width, depth, num_heads, hidden = config.sizes
    return {
        "model_type": "bert",
        "vocab_size": rows,
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": num_heads,
        "intermediate_size": hidden,
        "max_position_embeddings": config.max_positions,
        "type_vocab_size": config.type_vocab_size,
        "hidden_act": FOREIGN_ACTIVATIONS[config.activation],
        "layer_norm_eps": config.norm_epsilon,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": 0.0,
        "pad_token_id": pad_id,
    }


def bert_facts(foreign: Mapping[str, Any], *, where: str, longest: int | None = None) -> TextFacts:
    """What its tokenizer must be. longest: texts are cut there, below the table of positions."""
    positions = integer(foreign, "max_position_embeddings", 512, where=where)
    return TextFacts(
        kind="bert",
        context_length=min(positions, longest or positions),
        embedding_rows=integer(foreign, "vocab_size", 30522, where=where),
        pad_id=foreign.get("pad_token_id", 0),
    )


def bert_table(config: BertConfig) -> Table:
    """Names of ours below "text/", theirs those of BertModel without what stands in front of it."""
    pooler = (
        linear("pooler", "pooler.dense") if config.pool == "pooler" else (Unread(r"pooler\..*", _POOLER),)
    )
    return table(
        Row("token_embed", "embeddings.word_embeddings.weight"),
        Row("positions", "embeddings.position_embeddings.weight"),
        Row("token_types", "embeddings.token_type_embeddings.weight"),
        norm("embed_norm", "embeddings.LayerNorm"),
        block(BLOCK).under(theirs="encoder.layer.{i}.").repeat(config.sizes[1]),
        pooler,
        Unread(r"embeddings\.(position_ids|token_type_ids)", "no parameter"),
    )


def bert_layers(config: BertConfig) -> tuple[Layer, ...]:
    """What the proof compares: embeddings and blocks."""
    blocks = (Layer(f"stack/block_{i}", f"encoder.layer.{i}") for i in range(config.sizes[1]))
    return (Layer("embed_norm", "embeddings.LayerNorm"), *blocks)


def run_bert(bert: Any, inputs: Mapping[str, Any], pool: Pool) -> dict[str, Any]:
    """ "pooled" and "tokens" of a BertModel."""
    out = bert(input_ids=inputs["tokens"], attention_mask=inputs["mask"])
    x, mask = out.last_hidden_state, inputs["mask"][..., None]
    if pool == "pooler":
        pooled = out.pooler_output
    elif pool == "cls":
        pooled = x[:, 0]
    elif pool == "max":
        pooled = x.masked_fill(mask == 0, float("-inf")).amax(1)
    else:
        pooled = (x * mask).sum(1) / mask.sum(1).clamp_min(1)
    return {"pooled": pooled, "tokens": x}


def sentence_pool(source: Source) -> tuple[Pool, int | None]:
    """(pool, longest text) as the folder's sentence-transformers files say; "mean" where there are none.

    Raises ConversionError for modules and pooling modes that bvl does not reproduce.
    """
    path = source.folder / "modules.json"
    if not path.is_file():
        return "mean", None
    modules = _modules(path)
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
    if [kind for kind in kinds if kind != "Normalize"] != ["Transformer", "Pooling"]:
        raise ConversionError(
            f"{path}: modules {', '.join(kinds)} are not reproduced by bvl; known: Transformer, Pooling, Normalize"
        )
    pooling = source.json(f"{modules[kinds.index('Pooling')].get('path', '1_Pooling')}/config.json")
    modes = [name for name, value in pooling.items() if name.startswith("pooling_mode_") and value is True]
    modes = modes or [f"pooling_mode_{pooling.get('pooling_mode', 'mean')}_tokens"]
    known: dict[str, Pool] = {
        "pooling_mode_mean_tokens": "mean",
        "pooling_mode_cls_token": "cls",
        "pooling_mode_cls_tokens": "cls",
        "pooling_mode_max_tokens": "max",
    }
    if len(modes) != 1 or modes[0] not in known:
        raise ConversionError(
            f"{path.parent}: {' and '.join(modes)} is not reproduced by bvl; known: one of {', '.join(known)}"
        )
    longest = source.json("sentence_bert_config.json").get("max_seq_length")
    return known[modes[0]], longest


def _modules(path: Path) -> list[Mapping[str, Any]]:
    try:
        return list(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ConversionError(f"{path} is damaged, or no JSON: {error}") from error


class Bert(Family):
    """BertModel alone: a text tower whose embedding is pooled as the folder of sentence-transformers says, or averaged."""

    name = "BertModel"
    library = "hf"
    # A folder of ours has no pooler; without the option the class would make a random one.
    load_options: ClassVar[str] = ", add_pooling_layer=False"
    then: ClassVar[str] = "hidden = model(**texts).last_hidden_state"

    def accepts(self, source: Source) -> bool:
        return is_class(source, "bert", self.name)

    def describe(self, source: Source) -> Described:
        where = str(source.folder)
        pool, longest = sentence_pool(source)
        text = bert_config(source.config, where=where, pool=pool)
        return Described(
            model=_alone(text),
            preprocess=None,
            text=bert_facts(source.config, where=where, longest=longest),
        )

    def tensors(self, source: Source) -> Tensors:
        return renamed(source.tensors(), RENAMES)

    def table(self, model: DualEncoderConfig, foreign: Mapping[str, Any]) -> Table:
        return table(bert_table(model.text).under("text/"), Unread(r"cls\..*", "a head of pretraining"))

    def load_peer(self, folder: Path, foreign: Mapping[str, Any]) -> Any:
        return load_peer("BertModel", folder)

    def towers(self, model: DualEncoderConfig, foreign: Mapping[str, Any]) -> tuple[Tower, ...]:
        return (bert_tower(model.text, "", lambda peer: peer),)

    def foreign(self, config: Config, tokenizer: Tokenizer) -> dict[str, Any]:
        model = config.model
        if not isinstance(model.text, BertConfig) or model.image is not None:
            refuse(self.name, ["room for anything but one BertConfig as model.text"])
        wrong = bert_wrong(model.text, "mean", "cls", "max") + alone_wrong(model, "text")
        refuse(self.name, wrong + self.head_wrong(config))
        rows = embedding_rows(config, tokenizer)
        return {"architectures": [self.name]} | foreign_bert(model.text, rows=rows, pad_id=tokenizer.pad_id)

    def head_wrong(self, config: Config) -> list[str]:
        """What prevents the class because of the task's head; the more special class comes first."""
        return []

    def write_files(
        self, folder: Path, foreign: Mapping[str, Any], config: Config, tokenizer: Tokenizer
    ) -> None:
        write_hf_tokenizer(folder, tokenizer)
        modes = {
            "pooling_mode_cls_token": "cls",
            "pooling_mode_mean_tokens": "mean",
            "pooling_mode_max_tokens": "max",
        }
        (folder / "1_Pooling").mkdir(exist_ok=True)
        pool, kinds = config.model.text.pool, ("Transformer", "Pooling", "Normalize")
        paths = ("", "1_Pooling", "2_Normalize")
        files = {
            "1_Pooling/config.json": {
                "word_embedding_dimension": config.model.text.width,
                **{name: pool == mode for name, mode in modes.items()},
            },
            "sentence_bert_config.json": {"max_seq_length": tokenizer.context_length, "do_lower_case": False},
            "modules.json": [
                {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
                for i, (path, kind) in enumerate(zip(paths, kinds, strict=True))
            ],
        }
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def how_to_load(self, folder_name: str) -> str:
        return how_to_load(
            folder_name,
            self.name,
            options=self.load_options,
            tokenizer="AutoTokenizer",
            then=self.then,
        )

    def notes(self, foreign: Mapping[str, Any], folder: Path) -> tuple[str, ...]:
        if not self.load_options:
            return ()
        return (
            "The embedding of a text is `hidden`, pooled as `1_Pooling/config.json` says, at unit length; "
            "sentence-transformers reads this folder so. Without `add_pooling_layer=False` transformers warns of a "
            "missing pooler and makes one of random values: then do not read `pooler_output`.",
        )


def bert_tower(config: BertConfig, prefix: str, of: Any, project: Any = None) -> Tower:
    """How the proof runs a BERT. of: the peer's BertModel; prefix: its name there; project: the projection, if any."""

    def run(peer: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
        out = run_bert(of(peer), inputs, config.pool)
        return {**out, "embed": unit(project(peer, out["pooled"]) if project else out["pooled"])}

    layers = tuple(Layer(f"text/{x.ours}", prefix + x.theirs) for x in bert_layers(config))
    return Tower("text", layers, run)


def _alone(text: BertConfig) -> DualEncoderConfig:
    return DualEncoderConfig(image=None, text=text, embed_dim=text.width, text_projection="none")


class BertForMaskedLM(Bert):
    """BertForMaskedLM (and BertForPreTraining): the head goes to the task "mlm", its decoder is the token embedding."""

    name = "BertForMaskedLM"
    load_options, then = "", "logits = model(**texts).logits"

    def accepts(self, source: Source) -> bool:
        return bool({self.name, "BertForPreTraining"} & set(source.config.get("architectures") or ()))

    def describe(self, source: Source) -> Described:
        expect(source.config, {"tie_word_embeddings": (True,)}, where=str(source.folder))
        described = super().describe(source)
        text = described.model.text
        task = {
            "type": "bvl.tasks.mlm.MaskedLanguageModel",
            "norm_epsilon": text.norm_epsilon,
            "activation": text.activation,
        }
        width = text.width
        heads = {
            "heads/mlm/transform/dense/kernel": (width, width),
            "heads/mlm/transform/dense/bias": (width,),
            "heads/mlm/transform/norm/scale": (width,),
            "heads/mlm/transform/norm/bias": (width,),
            "heads/mlm/bias/bias": (described.text.embedding_rows,),
        }
        return Described(described.model, None, described.text, {"mlm": task}, heads)

    def tensors(self, source: Source) -> Tensors:
        return renamed(source.tensors(), ((r"^(?!bert\.|cls\.)", "bert."), *RENAMES[1:]))

    def table(self, model: DualEncoderConfig, foreign: Mapping[str, Any]) -> Table:
        head = "cls.predictions."
        return table(
            bert_table(model.text).under("text/", "bert."),
            linear("heads/mlm/transform/dense", f"{head}transform.dense"),
            norm("heads/mlm/transform/norm", f"{head}transform.LayerNorm"),
            Row("heads/mlm/bias/bias", f"{head}bias"),
            Alias(f"{head}decoder.weight", "bert.embeddings.word_embeddings.weight"),
            Alias(f"{head}decoder.bias", f"{head}bias"),
            Unread(r"cls\.seq_relationship\..*", "the head of next-sentence prediction"),
        )

    def head_wrong(self, config: Config) -> list[str]:
        text = config.model.text
        task = config.tasks.get("mlm")
        if task is None or not hasattr(task, "mask_fraction"):
            return ["room for a model without the task mlm"]
        return [
            f"tasks.mlm.{name}={getattr(task, name)!r} beside model.text.{name}={getattr(text, name)!r}"
            for name in ("norm_epsilon", "activation")
            if getattr(task, name) != getattr(text, name)
        ]

    def load_peer(self, folder: Path, foreign: Mapping[str, Any]) -> Any:
        return load_peer("BertForMaskedLM", folder)

    def towers(self, model: DualEncoderConfig, foreign: Mapping[str, Any]) -> tuple[Tower, ...]:
        tower = bert_tower(model.text, "bert.", lambda peer: peer.bert)

        def run(peer: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
            out = dict(tower.run(peer, inputs))
            return out | {"logits": peer.cls(out["tokens"])}

        return (dataclasses.replace(tower, run=run),)


FAMILIES = (BertForMaskedLM(), Bert())
