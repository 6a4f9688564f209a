"""Language models of transformers: GPT2LMHeadModel, LlamaForCausalLM, Qwen2ForCausalLM, to be a captioner's decoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from bvl.convert.families import Described, Family, Layer, Source, TextFacts, Tower, expect
from bvl.convert.hf_common import activation_of, is_class, load_peer
from bvl.convert.table import Alias, Row, Table, Unread, linear, norm, packed, table
from bvl.convert.tensors import Tensors
from bvl.errors import ConversionError
from bvl.models.decoder import DecoderConfig
from bvl.models.rotary import RopeScaling
from bvl.models.vlm import DualEncoderConfig

# Of MLPs with a gate: our name of its activation -> that of the MLP.
GATED_NAMES = {"silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu_tanh", "relu": "reglu"}
# Rotary positions have no table, so that a text's length is a matter of memory alone; data.tokenizer.context_length may
# be set higher, up to the model's max_position_embeddings.
ROTARY_CONTEXT = 1024
# What trains a language model without images.
TEXT_ALONE = {"caption": {"type": "bvl.tasks.caption.Caption", "image_dropout": 1.0}}


def conv1d(ours: str, theirs: str) -> tuple[Row, ...]:
    """Rows of an affine map that GPT-2 keeps as [in, out], as ours is."""
    return Row(f"{ours}/kernel", f"{theirs}.weight"), Row(f"{ours}/bias", f"{theirs}.bias")


GPT2_BLOCK = table(
    norm("attention_norm", "ln_1"),
    packed("attention", ("query", "key", "value"), "attn.c_attn.weight", "attn.c_attn.bias", how="same", axis=1),
    conv1d("attention/out", "attn.c_proj"),
    norm("mlp_norm", "ln_2"),
    conv1d("mlp/up", "mlp.c_fc"),
    conv1d("mlp/down", "mlp.c_proj"),
)  # fmt: skip
GPT2_CROSS = table(
    norm("cross_norm", "ln_cross_attn"),
    conv1d("cross/query", "crossattention.q_attn"),
    packed("cross", ("key", "value"), "crossattention.c_attn.weight", "crossattention.c_attn.bias", how="same", axis=1),
    conv1d("cross/out", "crossattention.c_proj"),
)  # fmt: skip
GPT2_ENDS = table(
    Row("token_embed", "transformer.wte.weight"),
    Row("positions", "transformer.wpe.weight"),
    norm("norm", "transformer.ln_f"),
    Unread(r"transformer\.h\.\d+\.(cross)?(attn|attention)\.(bias|masked_bias)", "a mask that is always the same"),
)  # fmt: skip


def gpt2_table(decoder: DecoderConfig, *, cross: bool = False) -> Table:
    """Of GPT2LMHeadModel, with cross-attention where it sees images; our names without "decoder/"."""
    block = GPT2_BLOCK + GPT2_CROSS if cross else GPT2_BLOCK
    blocks = block.under("block_{i}/", "transformer.h.{i}.").repeat(decoder.depth)
    return GPT2_ENDS + blocks + _head(decoder, "transformer.wte.weight")


def llama_table(decoder: DecoderConfig) -> Table:
    """Of LlamaForCausalLM and Qwen2ForCausalLM; our names without "decoder/"."""
    qkv, out, mlp = decoder.qkv_bias, decoder.out_bias, decoder.mlp_bias
    block = table(
        norm("attention_norm", "input_layernorm", bias=False),
        linear("attention/query", "self_attn.q_proj", bias=qkv),
        linear("attention/key", "self_attn.k_proj", bias=qkv),
        linear("attention/value", "self_attn.v_proj", bias=qkv),
        linear("attention/out", "self_attn.o_proj", bias=out),
        norm("mlp_norm", "post_attention_layernorm", bias=False),
        linear("mlp/gate", "mlp.gate_proj", bias=mlp),
        linear("mlp/up", "mlp.up_proj", bias=mlp),
        linear("mlp/down", "mlp.down_proj", bias=mlp),
    )
    ends = table(
        Row("token_embed", "model.embed_tokens.weight"),
        norm("norm", "model.norm", bias=False),
        Unread(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq", "computed from the config"),
    )
    blocks = block.under("block_{i}/", "model.layers.{i}.").repeat(decoder.depth)
    return ends + blocks + _head(decoder, "model.embed_tokens.weight")


def _head(decoder: DecoderConfig, embedding: str) -> Table:
    return table(Alias("lm_head.weight", embedding) if decoder.tied_head else Row("head", "lm_head.weight"))


def gpt2_decoder(foreign: Mapping[str, Any], *, where: str) -> DecoderConfig:
    """Our config of a GPT2Config; raises ConversionError for options that bvl does not reproduce."""
    expect(
        foreign,
        {
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            # The order of factors alone.
            "reorder_and_upcast_attn": (False, True),
        },
        where=where,
    )
    return DecoderConfig(
        layout="gpt2",
        width=option(foreign, ("n_embd", "hidden_size"), 768),
        depth=option(foreign, ("n_layer", "num_hidden_layers"), 12),
        num_heads=option(foreign, ("n_head", "num_attention_heads"), 12),
        mlp_hidden=foreign.get("n_inner"),
        activation=activation_of(
            foreign.get("activation_function", "gelu_new"), where=where, option="activation_function"
        ),
        norm_epsilon=foreign.get("layer_norm_epsilon", 1e-5),
        tied_head=foreign.get("tie_word_embeddings", True),
    )


def gpt2_positions(foreign: Mapping[str, Any]) -> int:
    """Rows of a GPT-2's table of positions."""
    return option(foreign, ("n_positions", "max_position_embeddings"), 1024)


def option(foreign: Mapping[str, Any], names: tuple[str, ...], default: Any) -> Any:
    """The value of an option that goes by several names; `default` where it is absent or null."""
    return next((foreign[name] for name in names if foreign.get(name) is not None), default)


def one_id(value: int | list[int] | None) -> int | None:
    """A special token of a config that may name several: bvl ends a text at the first."""
    return value[0] if isinstance(value, list) else value


class LanguageModel(Family):
    """A decoder alone. base: what stands before the names of all tensors but the head's."""

    library = "hf"
    base: ClassVar[str] = "model."
    # Also the kind of its tokenizer.
    model_type: ClassVar[str]
    blocks: ClassVar[str] = "model.layers"
    last_norm: ClassVar[str] = "model.norm"

    def accepts(self, source: Source) -> bool:
        return is_class(source, self.model_type, self.name)

    def tensors(self, source: Source) -> Tensors:
        found = source.tensors()
        if any(name.startswith(self.base) for name in found.shapes):
            return found
        # Written by the class without a head, as those of the first GPT-2 are.
        return found.renamed(lambda name: name if name.startswith("lm_head.") else self.base + name)

    def load_peer(self, folder: Path, foreign: Mapping[str, Any]) -> Any:
        return load_peer(self.name, folder)

    def towers(self, model: DualEncoderConfig, foreign: Mapping[str, Any]) -> tuple[Tower, ...]:
        layers = [Layer(f"decoder/block_{i}", f"{self.blocks}.{i}") for i in range(model.decoder.depth)]
        layers.append(Layer("decoder/norm", self.last_norm))

        def run(peer: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
            out = peer(input_ids=inputs["tokens"], attention_mask=inputs["mask"], use_cache=False)
            return {"logits": out.logits}

        return (Tower("decoder", tuple(layers), run),)


class Gpt2(LanguageModel):
    """GPT-2: learned positions, layer norms, an MLP without a gate, the head tied to the embedding."""

    name = "GPT2LMHeadModel"
    model_type = "gpt2"
    base = "transformer."
    blocks = "transformer.h"
    last_norm = "transformer.ln_f"

    def describe(self, source: Source) -> Described:
        foreign, where = source.config, str(source.folder)
        expect(foreign, {"add_cross_attention": (False,)}, where=where)
        # A prefix of at least the start token stands before the text in the same table of positions.
        return Described(
            model=DualEncoderConfig(image=None, text=None, decoder=gpt2_decoder(foreign, where=where)),
            preprocess=None,
            text=TextFacts(
                self.model_type,
                gpt2_positions(foreign) - 1,
                foreign.get("vocab_size", 50257),
                foreign.get("bos_token_id", 50256),
                one_id(foreign.get("eos_token_id", 50256)),
                foreign.get("pad_token_id"),
            ),
            tasks=TEXT_ALONE,
        )

    def table(self, model: DualEncoderConfig, foreign: Mapping[str, Any]) -> Table:
        return gpt2_table(model.decoder).under("decoder/")


class Llama(LanguageModel):
    """Llama 1 to 3: rotary positions, RMS norms, grouped heads, a gated MLP."""

    name = "LlamaForCausalLM"
    model_type = "llama"
    # Of the foreign config where it says nothing: vocabulary, width, MLP, contexts, start and end token.
    defaults: ClassVar[Mapping[str, Any]] = {
        **{"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32},
        **{"num_attention_heads": 32, "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    }

    def describe(self, source: Source) -> Described:
        foreign, where = source.config, str(source.folder)
        given = self.defaults | foreign
        longest = given["max_position_embeddings"]
        return Described(
            model=DualEncoderConfig(image=None, text=None, decoder=self.decoder(given, where=where)),
            preprocess=None,
            text=TextFacts(
                self.model_type,
                min(longest - 1, ROTARY_CONTEXT),
                given["vocab_size"],
                given["bos_token_id"],
                one_id(given["eos_token_id"]),
                given.get("pad_token_id"),
            ),
            tasks=TEXT_ALONE,
        )

    def decoder(self, given: Mapping[str, Any], *, where: str) -> DecoderConfig:
        """Our config; raises ConversionError for options that bvl does not reproduce."""
        activation = activation_of(given.get("hidden_act", "silu"), where=where, option="hidden_act")
        if activation not in GATED_NAMES:
            raise ConversionError(f"{where}: hidden_act={given['hidden_act']!r} has no gated MLP in bvl")
        theta, scaling = rope(given, where=where)
        heads = given["num_attention_heads"]
        attention_bias = given.get("attention_bias", False)
        return DecoderConfig(
            layout="prefix",
            width=given["hidden_size"],
            depth=given["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=option(given, ("num_key_value_heads",), heads),
            head_dim=given.get("head_dim"),
            mlp_hidden=given["intermediate_size"],
            activation=GATED_NAMES[activation],
            qkv_bias=attention_bias,
            out_bias=attention_bias,
            mlp_bias=given.get("mlp_bias", False),
            rope_theta=theta,
            rope_scaling=scaling,
            norm_epsilon=given.get("rms_norm_eps", 1e-6),
            tied_head=given.get("tie_word_embeddings", False),
        )

    def table(self, model: DualEncoderConfig, foreign: Mapping[str, Any]) -> Table:
        return llama_table(model.decoder).under("decoder/")


class Qwen2(Llama):
    """Qwen2 and Qwen2.5: as Llama, with biases of queries, keys and values."""

    name = "Qwen2ForCausalLM"
    model_type = "qwen2"
    defaults = {
        **{"vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32},
        **{"num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 32768},
        **{"bos_token_id": None, "eos_token_id": None},
    }

    def decoder(self, given: Mapping[str, Any], *, where: str) -> DecoderConfig:
        expect(given, {"use_sliding_window": (False,)}, where=where)
        kinds = set(given.get("layer_types") or ())
        if not kinds <= {"full_attention"}:
            raise ConversionError(f"{where}: layer_types={sorted(kinds)}: bvl knows full_attention alone")
        # Its class has these biases whatever the config says.
        plain = super().decoder({**given, "attention_bias": False, "mlp_bias": False}, where=where)
        return dataclasses.replace(plain, qkv_bias=True)


def rope(given: Mapping[str, Any], *, where: str) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) of a config that has them as `rope_parameters`, or as `rope_theta` and `rope_scaling`."""
    found = given.get("rope_scaling") or given.get("rope_parameters") or {}
    if any(isinstance(value, Mapping) for value in found.values()):
        raise ConversionError(
            f"{where}: rope_parameters of several kinds of layers are not reproduced by bvl"
        )
    theta = option(found, ("rope_theta",), option(given, ("rope_theta",), 10000.0))
    share = option(found, ("partial_rotary_factor",), option(given, ("partial_rotary_factor",), 1.0))
    if share != 1:
        raise ConversionError(f"{where}: partial_rotary_factor={share} is not reproduced by bvl")
    kind = option(found, ("rope_type", "type"), "default")

    def given_number(name: str) -> float:
        if found.get(name) is None:
            raise ConversionError(f"{where}: rope_type={kind!r} needs {name}")
        return float(found[name])

    if kind == "default":
        return float(theta), None
    if kind == "linear":
        return float(theta), RopeScaling(kind="linear", factor=given_number("factor"))
    if kind == "llama3":
        return float(theta), RopeScaling(
            kind="llama3",
            factor=given_number("factor"),
            low_freq_factor=given_number("low_freq_factor"),
            high_freq_factor=given_number("high_freq_factor"),
            original_context=option(
                found, ("original_max_position_embeddings",), given["max_position_embeddings"]
            ),
        )
    raise ConversionError(
        f"{where}: rope_type={kind!r} is not reproduced by bvl; known: default, linear, llama3"
    )


FAMILIES = (Gpt2(), Llama(), Qwen2())
