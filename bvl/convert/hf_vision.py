"""Image towers of transformers alone: ViTModel, Dinov2Model (RAD-DINO's layout), Dinov2WithRegistersModel, CLIP's and SigLIP's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bvl.config import Config
from bvl.convert.families import Described, Family, Layer, Source, Tower
from bvl.convert.hf_clip_towers import VISION
from bvl.convert.hf_common import (
    alone_wrong,
    how_to_load,
    is_class,
    load_peer,
    processor_class,
    reasons,
    refuse,
    renamed,
    unit,
    write_processor,
)
from bvl.convert.hf_vision_towers import VisionTower, read_tower
from bvl.convert.preprocess import to_hf
from bvl.convert.table import Table
from bvl.convert.tensors import Tensors
from bvl.data.text import Tokenizer
from bvl.models.vit import ViTConfig
from bvl.models.vlm import DualEncoderConfig


class ImageTower(Family):
    """One class of image tower; its embedding is the class token behind the final norm, SigLIP's what its head pools."""

    library = "hf"

    def __init__(self, tower: VisionTower):
        self.tower, self.name = tower, tower.class_name

    def accepts(self, source: Source) -> bool:
        # A classifier's folder holds the tower as well.
        classifier = self.name.removesuffix("Model") + "ForImageClassification"
        return is_class(source, self.tower.model_type, self.name, classifier)

    def describe(self, source: Source) -> Described:
        image, preprocess = read_tower(self.tower, source, source.config, where=str(source.folder))
        model = DualEncoderConfig(
            image=image, text=None, embed_dim=image.output_width, image_projection="none"
        )
        return Described(model=model, preprocess=preprocess, text=None)

    def tensors(self, source: Source) -> Tensors:
        return renamed(source.tensors(), self.tower.renames)

    def table(self, model: DualEncoderConfig, foreign: Mapping[str, Any]) -> Table:
        return self.tower.table(model.image).under("image/")

    def load_peer(self, folder: Path, foreign: Mapping[str, Any]) -> Any:
        return load_peer(self.name, folder)

    def foreign(self, config: Config, tokenizer: Tokenizer) -> dict[str, Any]:
        model, size = config.model, config.data.preprocess.height_width
        if not isinstance(model.image, ViTConfig) or model.text is not None:
            refuse(self.name, ["room for anything but one ViTConfig as model.image"])
        wrong = self.tower.wrong(model.image, size) + alone_wrong(model, "image")
        if model.image.pool == "pooler":
            wrong.append("model.image.pool='pooler' as the embedding of a tower alone")
        check = reasons(lambda: to_hf(config.data.preprocess, self._processor(config)))
        refuse(self.name, wrong + check)
        return {"architectures": [self.name]} | self.tower.foreign(model.image, size)

    def _processor(self, config: Config) -> str:
        return processor_class(config.data.preprocess, self.tower.processor)

    def write_files(
        self, folder: Path, foreign: Mapping[str, Any], config: Config, tokenizer: Tokenizer
    ) -> None:
        write_processor(folder, config.data.preprocess, self.tower.processor)

    def how_to_load(self, folder_name: str) -> str:
        # A ViTModel of ours has no pooler; without the option the class would make a random one.
        vit = self.name == "ViTModel"
        options, pooled = (
            (", add_pooling_layer=False", "last_hidden_state[:, 0]") if vit else ("", "pooler_output")
        )
        then = f"embeddings = model(**images).{pooled}  # bvl gives them at unit length"
        return how_to_load(folder_name, self.name, options=options, processor="AutoImageProcessor", then=then)

    def towers(self, model: DualEncoderConfig, foreign: Mapping[str, Any]) -> tuple[Tower, ...]:
        size = self.tower.image_size(foreign, where=self.name)
        return (image_tower(self.tower, model.image, size, "", lambda peer: peer),)


def image_tower(
    tower: VisionTower,
    config: ViTConfig,
    image_size: tuple[int, int],
    prefix: str,
    of: Any,
    project: Any = None,
) -> Tower:
    """How the proof runs an image tower. of: the peer's vision model; prefix: its name there; project: the projection,
    if any."""

    def run(peer: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
        out = tower.run(of(peer), inputs["pixels"], config)
        return {**out, "embed": unit(project(peer, out["pooled"]) if project else out["pooled"])}

    layers = tuple(Layer(f"image/{x.ours}", prefix + x.theirs, x.how) for x in tower.layers(config))
    return Tower("image", layers, run, tower.sizes(config, image_size))


FAMILIES = tuple(map(ImageTower, VISION.values()))
