"""Captioners of transformers: VisionEncoderDecoderModel of an image tower and a GPT-2 with cross-attention."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bvl.assembly import embedding_rows
from bvl.config import Config
from bvl.convert.families import Described, Family, Layer, Source, TextFacts, Tower, expect
from bvl.convert.hf_clip_towers import VISION
from bvl.convert.hf_common import (
    FOREIGN_ACTIVATIONS,
    below,
    is_class,
    load_peer,
    processor_class,
    reasons,
    refuse,
    renamed,
    unlike,
    write_processor,
)
from bvl.convert.hf_decoders import gpt2_decoder, gpt2_positions, gpt2_table, one_id, option
from bvl.convert.hf_vision_towers import VisionTower, read_tower
from bvl.convert.preprocess import to_hf
from bvl.convert.table import Table, Unwritten, linear, table
from bvl.convert.tensors import Tensors
from bvl.convert.tokenizers import write_hf_tokenizer
from bvl.data.text import Tokenizer
from bvl.errors import ConversionError
from bvl.models.vit import ViTConfig
from bvl.models.vlm import DualEncoderConfig

# What the class gives its decoder of each tower -> DecoderConfig.visual; of the others "all".
VISUAL = {"clip_vision_model": "unnormed", "siglip_vision_model": "patches"}
_FREE = "width depth num_heads mlp_hidden activation norm_epsilon tied_head dropout remat null visual"
_NO_EMBEDDING = "the class embeds neither images nor texts"
LEFT_OUT = table(
    Unwritten(
        r"decoder/visual_tokens/null",
        "the class has no null image, which guidance needs: read back, the model has none (model.decoder.null=False)",
    ),
    Unwritten(r"(text|text_projection|image_projection)/.*|log_scale|logit_bias", _NO_EMBEDDING),
    Unwritten(r"image/pooler/.*", _NO_EMBEDDING),
)


class Captioner(Family):
    """Layout gpt2 that sees all tokens of ViTModel, Dinov2Model, CLIPVisionModel or SiglipVisionModel."""

    name = "VisionEncoderDecoderModel"
    library = "hf"

    def accepts(self, source: Source) -> bool:
        return is_class(source, "vision-encoder-decoder", self.name)

    def describe(self, source: Source) -> Described:
        foreign, where = source.config, str(source.folder)
        tower = _tower(foreign, where=where)
        image, preprocess = read_tower(tower, source, foreign["encoder"], where=f"{where}: encoder")
        given, generation = foreign["decoder"], source.json("generation_config.json")
        if given.get("model_type") != "gpt2":
            raise ConversionError(
                f"{where}: decoder: model_type={given.get('model_type')!r} is not reproduced by bvl; known: 'gpt2'"
            )
        expect(given, {"add_cross_attention": (True,)}, where=f"{where}: decoder")
        decoder = dataclasses.replace(
            gpt2_decoder(given, where=f"{where}: decoder"), visual=_visual(tower), null=False
        )
        expect(given, {"cross_attention_hidden_size": (None,)}, where=f"{where}: decoder")
        start = option(generation, ("decoder_start_token_id",), foreign.get("decoder_start_token_id"))
        ids = {
            name: option(generation, (name,), option(foreign, (name,), given.get(name)))
            for name in ("bos_token_id", "eos_token_id", "pad_token_id")
        }
        return Described(
            model=DualEncoderConfig(
                image=image,
                text=None,
                decoder=decoder,
                embed_dim=image.output_width,
                image_projection="none",
                init_temperature=None,
            ),
            preprocess=preprocess,
            text=TextFacts(
                "any",
                # The start token stands before the text in the same table of positions.
                gpt2_positions(given) - 1,
                given.get("vocab_size", 50257),
                ids["bos_token_id"] if start is None else start,
                one_id(ids["eos_token_id"]),
                ids["pad_token_id"],
            ),
            tasks={"caption": {"type": "bvl.tasks.caption.Caption", "image_dropout": 0.0}},
        )

    def tensors(self, source: Source) -> Tensors:
        tower = _tower(source.config, where=str(source.folder))
        return renamed(source.tensors(), below("encoder.", tower.renames))

    def table(self, model: DualEncoderConfig, foreign: Mapping[str, Any]) -> Table:
        tower, image = _tower(foreign, where=self.name), model.image
        widths = image.output_width, model.decoder.width
        return table(
            tower.table(_as_encoder(image, tower)).under("image/", "encoder."),
            gpt2_table(model.decoder, cross=True).under("decoder/", "decoder."),
            linear("decoder/visual_tokens/project", "enc_to_dec_proj") if widths[0] != widths[1] else (),
            LEFT_OUT,
        )

    def load_peer(self, folder: Path, foreign: Mapping[str, Any]) -> Any:
        return load_peer(self.name, folder)

    def towers(self, model: DualEncoderConfig, foreign: Mapping[str, Any]) -> tuple[Tower, ...]:
        tower = _tower(foreign, where=self.name)
        image = _as_encoder(model.image, tower)

        def encode(peer: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
            return {"tokens": tower.run(peer.encoder, inputs["pixels"], image)["tokens"]}

        def decode(peer: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
            out = peer(
                pixel_values=inputs["pixels"],
                decoder_input_ids=inputs["tokens"],
                decoder_attention_mask=inputs["mask"],
                use_cache=False,
            )
            return {"logits": out.logits}

        decoder = [
            Layer(f"decoder/block_{i}", f"decoder.transformer.h.{i}") for i in range(model.decoder.depth)
        ]
        if model.image.output_width != model.decoder.width:
            decoder.insert(0, Layer("decoder/visual_tokens/project", "enc_to_dec_proj"))
        layers = (Layer(f"image/{x.ours}", f"encoder.{x.theirs}", x.how) for x in tower.layers(image))
        return (
            Tower("image", tuple(x for x in layers if x.ours != "image/pool"), encode),
            Tower("decoder", (*decoder, Layer("decoder/norm", "decoder.transformer.ln_f")), decode),
        )

    def foreign(self, config: Config, tokenizer: Tokenizer) -> dict[str, Any]:
        model, preprocess = config.model, config.data.preprocess
        if model.decoder is None or not isinstance(model.image, ViTConfig):
            refuse(self.name, ["model without model.decoder, or without a ViTConfig as model.image"])
        decoder, tower = model.decoder, VISION[_kind(model.image)]
        image = _as_encoder(model.image, tower)
        names = ("region_encoder", "region_decoder")
        wrong = [f"model.{name}" for name in names if getattr(model, name) is not None]
        wrong += unlike("model.decoder", decoder, free=_FREE, fixed={})
        wrong += tower.wrong(image, preprocess.height_width)
        wrong += reasons(lambda: to_hf(preprocess, processor_class(preprocess, tower.processor)))
        # Of a tower without a class token "all" are its patches.
        if decoder.visual != _visual(tower) and not (_visual(tower) == "patches" and decoder.visual == "all"):
            wrong.append(
                f"model.decoder.visual={decoder.visual!r} (there, of a {tower.class_name}, {_visual(tower)!r})"
            )
        if decoder.activation is not None and decoder.activation not in FOREIGN_ACTIVATIONS:
            wrong.append(f"model.decoder.activation={decoder.activation!r}")
        if tokenizer.start_id is None:
            wrong.append("data.tokenizer.start='' (there a start token)")
        refuse(self.name, wrong)
        start, end, pad = tokenizer.start_id, tokenizer.end_id, tokenizer.pad_id
        ids = {"bos_token_id": start, "eos_token_id": end, "pad_token_id": pad}
        return {
            "architectures": [self.name],
            "model_type": "vision-encoder-decoder",
            "is_encoder_decoder": True,
            "tie_word_embeddings": False,
            "encoder": {"architectures": [tower.class_name]} | tower.foreign(image, preprocess.height_width),
            "decoder": {
                **{"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", **ids},
                "is_decoder": True,
                "add_cross_attention": True,
                "n_embd": decoder.width,
                "n_layer": decoder.depth,
                "n_head": decoder.num_heads,
                "n_inner": decoder.sizes[3],
                "n_positions": config.data.controls.num_slots + tokenizer.context_length,
                "vocab_size": embedding_rows(config, tokenizer),
                "activation_function": FOREIGN_ACTIVATIONS[decoder.activation or "gelu_tanh"],
                "layer_norm_epsilon": decoder.norm_epsilon,
                "tie_word_embeddings": decoder.tied_head,
                **{"embd_pdrop": decoder.dropout, "resid_pdrop": decoder.dropout, "attn_pdrop": 0.0},
            },
            "decoder_start_token_id": start,
            **ids,
        }

    def write_files(
        self, folder: Path, foreign: Mapping[str, Any], config: Config, tokenizer: Tokenizer
    ) -> None:
        write_hf_tokenizer(folder, tokenizer)
        tower = _tower(foreign, where=self.name)
        write_processor(folder, config.data.preprocess, tower.processor)
        written = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
        rows = foreign["decoder"]["vocab_size"]
        generation = {
            **{name: foreign[name] for name in written},
            # The longest text that the training shows, END included.
            "max_new_tokens": tokenizer.context_length - 1,
            "suppress_tokens": [int(i) for i in tokenizer.no_words(rows).nonzero()[0]],
            "do_sample": False,
            "num_beams": 1,
        }
        path = folder / "generation_config.json"
        path.write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
        controls = {"start": tokenizer.token(tokenizer.start_id), "controls": config.data.controls.tokens()}
        (folder / "controls.json").write_text(json.dumps(controls, indent=2) + "\n", encoding="utf-8")

    def how_to_load(self, folder_name: str) -> str:
        return "\n".join(
            (
                "import torch",
                "from transformers import AutoImageProcessor, AutoTokenizer, VisionEncoderDecoderModel",
                "",
                f'model = VisionEncoderDecoderModel.from_pretrained("{folder_name}").eval()',
                f'processor = AutoImageProcessor.from_pretrained("{folder_name}")',
                f'tokenizer = AutoTokenizer.from_pretrained("{folder_name}")',
                'images = processor(images=[image], return_tensors="pt")',
                "start = [tokenizer.bos_token]  # controls, if any, stand behind it",
                "prefix = torch.tensor([tokenizer.convert_tokens_to_ids(start)] * len(images.pixel_values))",
                "ids = model.generate(**images, decoder_input_ids=prefix)",
                "texts = tokenizer.batch_decode(ids[:, prefix.shape[1]:], skip_special_tokens=True)",
            )
        )

    def notes(self, foreign: Mapping[str, Any], folder: Path) -> tuple[str, ...]:
        known = json.loads((folder / "controls.json").read_text(encoding="utf-8"))["controls"]
        alike = (
            "The rows of one call of `generate` need prefixes of one length: transformers counts positions from the "
            "first place, padding included, so that a shorter prefix with padding in front would be read otherwise."
        )
        lost = (
            "Classifier-free guidance needs the null image, which this class has no parameter for; the PyTorch export "
            "(--to torch) keeps it."
        )
        if not known:
            return (lost,)
        shown = ", ".join(f"`{name}`" for name in known[:12]) + (", ..." if len(known) > 12 else "")
        return (
            f"Controls are vocabulary entries behind the start token, in the order section, length, quality: for "
            f"example `start = [tokenizer.bos_token, {known[0]!r}]`. There are {shown} (controls.json).",
            alike,
            lost,
        )


def _tower(foreign: Mapping[str, Any], *, where: str) -> VisionTower:
    """The encoder's kind."""
    if not isinstance(foreign.get("encoder"), Mapping) or not isinstance(foreign.get("decoder"), Mapping):
        raise ConversionError(f"{where}: config.json has no encoder or no decoder")
    kind = foreign["encoder"].get("model_type")
    if kind not in VISION:
        raise ConversionError(
            f"{where}: encoder: model_type={kind!r} is not known; bvl reads {', '.join(VISION)}"
        )
    return VISION[kind]


def _visual(tower: VisionTower) -> str:
    return VISUAL.get(tower.model_type, "all")


def _kind(image: ViTConfig) -> str:
    """The model_type that a tower of ours is to be."""
    if not image.has_class_token:
        return "siglip_vision_model"
    if image.pre_norm:
        return "clip_vision_model"
    if image.registers:
        return "dinov2_with_registers"
    return "vit" if image.layer_scale is None else "dinov2"


def _as_encoder(image: ViTConfig, tower: VisionTower) -> ViTConfig:
    """The tower pooled as the class does: a captioner does not read what is pooled."""
    if not image.has_class_token or (image.pool == "pooler" and tower.model_type == "vit"):
        return image
    return dataclasses.replace(image, pool="cls", class_token=None, norm_after_pool=False)


FAMILIES = (Captioner(),)
