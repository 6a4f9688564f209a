"""Dual encoders of transformers: CLIPModel, SiglipModel, VisionTextDualEncoderModel."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from bvl.assembly import embedding_rows
from bvl.config import Config
from bvl.convert.families import Described, Family, Layer, Source, Tower
from bvl.convert.hf_bert import RENAMES as BERT_RENAMES
from bvl.convert.hf_bert import (
    bert_config,
    bert_facts,
    bert_table,
    bert_tower,
    bert_wrong,
    foreign_bert,
)
from bvl.convert.hf_clip_towers import (
    VISION,
    clip_text,
    clip_text_wrong,
    foreign_text,
    siglip_text,
    siglip_text_wrong,
    text_layers,
    text_table,
)
from bvl.convert.hf_common import (
    CLIP_MAX_SCALE,
    NO_MAX_SCALE,
    below,
    how_to_load,
    integer,
    is_class,
    load_peer,
    max_scale,
    modules_wrong,
    processor_class,
    reasons,
    refuse,
    renamed,
    unit,
    unlike,
    write_processor,
)
from bvl.convert.hf_vision import image_tower
from bvl.convert.hf_vision_towers import VisionTower, read_tower
from bvl.convert.preprocess import to_hf
from bvl.convert.table import Row, Table, linear, table
from bvl.convert.tensors import Tensors
from bvl.convert.tokenizers import write_hf_tokenizer
from bvl.data.text import Tokenizer
from bvl.errors import ConversionError
from bvl.models.bert import BertConfig
from bvl.models.text import TextConfig
from bvl.models.vit import ViTConfig
from bvl.models.vlm import DualEncoderConfig


def part(foreign: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The config of a tower, "text" or "vision"; `text_config_dict`, which older files have, wins over `text_config`."""
    older = foreign.get(f"{name}_config_dict")
    return dict(older if older is not None else foreign.get(f"{name}_config") or {})


class Dual(Family):
    """What the three have in common: towers under "vision_model." and "text_model."."""

    library = "hf"
    model_type: str

    def accepts(self, source: Source) -> bool:
        return is_class(source, self.model_type, self.name)

    def vision(self, foreign: Mapping[str, Any]) -> VisionTower:
        """The image tower's kind."""
        raise NotImplementedError

    def load_peer(self, folder: Path, foreign: Mapping[str, Any]) -> Any:
        return load_peer(self.name, folder)

    def image_tower(self, model: DualEncoderConfig, foreign: Mapping[str, Any], project: Any) -> Tower:
        """How the proof runs the image tower."""
        vision = self.vision(foreign)
        size = vision.image_size(part(foreign, "vision"), where=self.name)
        return image_tower(
            vision, model.image, size, "vision_model.", lambda peer: peer.vision_model, project
        )

    def scale_and_bias(self, peer: Any) -> tuple[float, float] | None:
        return peer.logit_scale.exp().item(), 0.0

    # What the class has of DualEncoderConfig, and by which classes it reads images and texts.
    fixed: ClassVar[Mapping[str, tuple[Any, ...]]]
    text_class: ClassVar[type]

    def vision_for(self, image: ViTConfig) -> VisionTower:
        """The kind of image tower that an image tower of ours is to be."""
        return self.vision({})

    def text_wrong(self, text: Any, tokenizer: Tokenizer) -> list[str]:
        """Which options of a text tower of ours the class has not."""
        raise NotImplementedError

    def foreign_configs(self, config: Config, tokenizer: Tokenizer, vision: VisionTower) -> dict[str, Any]:
        """The foreign config of a model of ours without wrong options."""
        raise NotImplementedError

    def foreign(self, config: Config, tokenizer: Tokenizer) -> dict[str, Any]:
        model, preprocess = config.model, config.data.preprocess
        wrong = modules_wrong(model) + unlike("model", model, free=_FREE, fixed=self.fixed)
        vision = None
        if isinstance(model.image, ViTConfig):
            vision = self.vision_for(model.image)
            wrong += vision.wrong(model.image, preprocess.height_width)
            processor = processor_class(preprocess, vision.processor)
            wrong += reasons(lambda: to_hf(preprocess, processor))
        else:
            wrong.append(f"model.image of type {type(model.image).__name__}")
        if isinstance(model.text, self.text_class):
            wrong += self.text_wrong(model.text, tokenizer)
        else:
            wrong.append(f"model.text of type {type(model.text).__name__}")
        refuse(self.name, wrong)
        configs = self.foreign_configs(config, tokenizer, vision)
        return {"architectures": [self.name], "model_type": self.model_type, **configs}

    def write_files(
        self, folder: Path, foreign: Mapping[str, Any], config: Config, tokenizer: Tokenizer
    ) -> None:
        write_hf_tokenizer(folder, tokenizer)
        write_processor(folder, config.data.preprocess, self.vision_for(config.model.image).processor)

    def how_to_load(self, folder_name: str) -> str:
        then = "logits = model(**images, **texts).logits_per_image"
        return how_to_load(
            folder_name, self.name, tokenizer="AutoTokenizer", processor="AutoImageProcessor", then=then
        )


class Clip(Dual):
    """CLIPModel."""

    name = "CLIPModel"
    model_type = "clip"

    fixed = {"image_projection": ("linear",), "text_projection": ("linear",)}
    text_class = TextConfig

    def vision(self, foreign: Mapping[str, Any]) -> VisionTower:
        return VISION["clip_vision_model"]

    def text_wrong(self, text: TextConfig, tokenizer: Tokenizer) -> list[str]:
        return clip_text_wrong(text, tokenizer)

    def foreign_configs(self, config: Config, tokenizer: Tokenizer, vision: VisionTower) -> dict[str, Any]:
        model, rows = config.model, embedding_rows(config, tokenizer)
        text = foreign_text(model.text, tokenizer, model_type="clip_text_model", rows=rows)
        image = vision.foreign(model.image, config.data.preprocess.height_width)
        width = {"projection_dim": model.embed_dim}
        return {"text_config": text | width, "vision_config": image | width, **width}

    def describe(self, source: Source) -> Described:
        foreign, where = source.config, str(source.folder)
        image, preprocess = read_tower(
            self.vision(foreign), source, part(foreign, "vision"), where=f"{where}: vision_config"
        )
        text, facts = clip_text(part(foreign, "text"), where=f"{where}: text_config")
        model = DualEncoderConfig(
            image=image,
            text=text,
            embed_dim=integer(foreign, "projection_dim", 512, where=where),
            max_scale=max_scale(source, self.tensors(source), known=CLIP_MAX_SCALE),
        )
        return Described(model, preprocess, facts, CONTRASTIVE)

    def table(self, model: DualEncoderConfig, foreign: Mapping[str, Any]) -> Table:
        return table(
            self.vision(foreign).table(model.image).under("image/", "vision_model."),
            text_table(model.text).under("text/", "text_model."),
            linear("image_projection", "visual_projection", bias=False),
            linear("text_projection", "text_projection", bias=False),
            Row("log_scale", "logit_scale"),
        )

    def towers(self, model: DualEncoderConfig, foreign: Mapping[str, Any]) -> tuple[Tower, ...]:
        def run(peer: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
            out = peer.text_model(input_ids=inputs["tokens"], attention_mask=inputs["mask"])
            embed = unit(peer.text_projection(out.pooler_output))
            return {"embed": embed, "pooled": out.pooler_output, "tokens": out.last_hidden_state}

        layers = tuple(Layer(f"text/{x.ours}", f"text_model.{x.theirs}") for x in text_layers(model.text))
        image = self.image_tower(model, foreign, lambda peer, x: peer.visual_projection(x))
        return image, Tower("text", layers, run)


class Siglip(Dual):
    """SiglipModel, of SigLIP 2 as well where its images have one size."""

    name = "SiglipModel"
    model_type = "siglip"

    fixed = {"image_projection": ("none",), "text_projection": ("linear_bias",)}
    text_class = TextConfig

    def vision(self, foreign: Mapping[str, Any]) -> VisionTower:
        return VISION["siglip_vision_model"]

    def text_wrong(self, text: TextConfig, tokenizer: Tokenizer) -> list[str]:
        return siglip_text_wrong(text)

    def foreign(self, config: Config, tokenizer: Tokenizer) -> dict[str, Any]:
        # Its bias of the logits is any number but none at all.
        none = ["model.init_bias=None (there a number)"] if config.model.init_bias is None else []
        plain = dataclasses.replace(config, model=dataclasses.replace(config.model, init_bias=None))
        try:
            found = super().foreign(plain, tokenizer)
        except ConversionError as error:
            raise ConversionError(", ".join([str(error), *none])) from error
        refuse(self.name, none)
        return found

    def foreign_configs(self, config: Config, tokenizer: Tokenizer, vision: VisionTower) -> dict[str, Any]:
        model, rows = config.model, embedding_rows(config, tokenizer)
        text = foreign_text(model.text, tokenizer, model_type="siglip_text_model", rows=rows)
        image = vision.foreign(model.image, config.data.preprocess.height_width)
        return {"text_config": text | {"projection_size": model.embed_dim}, "vision_config": image}

    def describe(self, source: Source) -> Described:
        foreign, where = source.config, str(source.folder)
        image, preprocess = read_tower(
            self.vision(foreign), source, part(foreign, "vision"), where=f"{where}: vision_config"
        )
        given = part(foreign, "text")
        text, facts = siglip_text(given, where=f"{where}: text_config")
        width = given.get("projection_size") or text.width
        if width != image.output_width:
            raise ConversionError(
                f"{where}: text_config: projection_size={width} is not the image tower's width {image.output_width}"
            )
        model = DualEncoderConfig(
            image=image,
            text=text,
            embed_dim=width,
            image_projection="none",
            text_projection="linear_bias",
            init_temperature=0.1,
            init_bias=-10.0,
            max_scale=NO_MAX_SCALE,
        )
        return Described(
            model, preprocess, facts, {"contrastive": CONTRASTIVE["contrastive"] | {"loss_type": "sigmoid"}}
        )

    def table(self, model: DualEncoderConfig, foreign: Mapping[str, Any]) -> Table:
        return table(
            self.vision(foreign).table(model.image).under("image/", "vision_model."),
            text_table(model.text).under("text/", "text_model."),
            linear("text_projection", "text_model.head"),
            Row("log_scale", "logit_scale", leading=1),
            Row("logit_bias", "logit_bias", leading=1),
        )

    def towers(self, model: DualEncoderConfig, foreign: Mapping[str, Any]) -> tuple[Tower, ...]:
        def run(peer: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
            # Without a mask, as it was trained: padding is read.
            out = peer.text_model(input_ids=inputs["tokens"])
            x = out.last_hidden_state
            return {"embed": unit(out.pooler_output), "pooled": x[:, -1], "tokens": x}

        layers = tuple(Layer(f"text/{x.ours}", f"text_model.{x.theirs}") for x in text_layers(model.text))
        return self.image_tower(model, foreign, None), Tower("text", layers, run)

    def scale_and_bias(self, peer: Any) -> tuple[float, float] | None:
        return peer.logit_scale.exp().item(), peer.logit_bias.item()


class VisionText(Dual):
    """VisionTextDualEncoderModel: any image tower that is known, and BERT with its pooler."""

    name = "VisionTextDualEncoderModel"
    model_type = "vision-text-dual-encoder"

    def vision(self, foreign: Mapping[str, Any]) -> VisionTower:
        kind = part(foreign, "vision").get("model_type", "vit")
        if kind not in VISION:
            raise ConversionError(
                f"vision_config: model_type={kind!r} is not known; bvl reads {', '.join(VISION)}"
            )
        return VISION[kind]

    fixed = {"image_projection": ("linear",), "text_projection": ("linear",)}
    text_class = BertConfig

    def vision_for(self, image: ViTConfig) -> VisionTower:
        if image.pool == "pooler":
            kind = "vit"
        elif image.pool == "map":
            kind = "siglip_vision_model"
        elif image.pre_norm:
            kind = "clip_vision_model"
        else:
            kind = "dinov2_with_registers" if image.registers else "dinov2"
        return VISION[kind]

    def text_wrong(self, text: BertConfig, tokenizer: Tokenizer) -> list[str]:
        return bert_wrong(text, "pooler")

    def foreign_configs(self, config: Config, tokenizer: Tokenizer, vision: VisionTower) -> dict[str, Any]:
        model, rows = config.model, embedding_rows(config, tokenizer)
        return {
            "text_config": foreign_bert(model.text, rows=rows, pad_id=tokenizer.pad_id),
            "vision_config": vision.foreign(model.image, config.data.preprocess.height_width),
            "projection_dim": model.embed_dim,
        }

    def describe(self, source: Source) -> Described:
        foreign, where = source.config, str(source.folder)
        given = part(foreign, "text")
        kind = given.get("model_type", "bert")
        if kind != "bert":
            raise ConversionError(f"{where}: text_config: model_type={kind!r} is not known; bvl reads bert")
        image, preprocess = read_tower(
            self.vision(foreign),
            source,
            part(foreign, "vision"),
            where=f"{where}: vision_config",
            pooler=True,
        )
        model = DualEncoderConfig(
            image=image,
            text=bert_config(given, where=f"{where}: text_config", pool="pooler"),
            embed_dim=integer(foreign, "projection_dim", 512, where=where),
            max_scale=max_scale(source, self.tensors(source), known=CLIP_MAX_SCALE),
        )
        return Described(model, preprocess, bert_facts(given, where=f"{where}: text_config"), CONTRASTIVE)

    def tensors(self, source: Source) -> Tensors:
        rules = below("vision_model.", self.vision(source.config).renames) + BERT_RENAMES[1:]
        return renamed(source.tensors(), rules)

    def table(self, model: DualEncoderConfig, foreign: Mapping[str, Any]) -> Table:
        return table(
            self.vision(foreign).table(model.image).under("image/", "vision_model."),
            bert_table(model.text).under("text/", "text_model."),
            linear("image_projection", "visual_projection", bias=False),
            linear("text_projection", "text_projection", bias=False),
            Row("log_scale", "logit_scale"),
        )

    def towers(self, model: DualEncoderConfig, foreign: Mapping[str, Any]) -> tuple[Tower, ...]:
        image = self.image_tower(model, foreign, lambda peer, x: peer.visual_projection(x))
        text = bert_tower(
            model.text, "text_model.", lambda peer: peer.text_model, lambda peer, x: peer.text_projection(x)
        )
        return image, text


# Options of ours that all classes can have, those that are looked at elsewhere, and those of training.
_FREE = "image text decoder region_encoder region_decoder embed_dim init_temperature max_scale"
CONTRASTIVE = {"contrastive": {"type": "bvl.tasks.contrastive.Contrastive"}}

FAMILIES = (Clip(), Siglip(), VisionText())
