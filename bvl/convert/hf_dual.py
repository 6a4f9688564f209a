"""Dual encoders of transformers: CLIPModel, SiglipModel, VisionTextDualEncoderModel."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bvl.convert.families import Described, Family, Layer, Source, Tower
from bvl.convert.hf_bert import RENAMES as BERT_RENAMES
from bvl.convert.hf_bert import bert_config, bert_facts, bert_table, bert_tower
from bvl.convert.hf_clip_towers import VISION, clip_text, siglip_text, text_layers, text_table
from bvl.convert.hf_common import (
    CLIP_MAX_SCALE,
    NO_MAX_SCALE,
    below,
    integer,
    is_class,
    load_peer,
    max_scale,
    renamed,
    unit,
)
from bvl.convert.hf_vision import image_tower
from bvl.convert.hf_vision_towers import VisionTower, read_tower
from bvl.convert.table import Row, Table, linear, table
from bvl.convert.tensors import Tensors
from bvl.errors import ConversionError
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


class Clip(Dual):
    """CLIPModel."""

    name = "CLIPModel"
    model_type = "clip"

    def vision(self, foreign: Mapping[str, Any]) -> VisionTower:
        return VISION["clip_vision_model"]

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

    def vision(self, foreign: Mapping[str, Any]) -> VisionTower:
        return VISION["siglip_vision_model"]

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


CONTRASTIVE = {"contrastive": {"type": "bvl.tasks.contrastive.Contrastive"}}

FAMILIES = (Clip(), Siglip(), VisionText())
