"""open_clip's CLIP and CustomTextCLIP: open_clip_config.json in bvl's terms and back, tables, peers."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from bvl.config import Config
from bvl.convert import open_clip_hf as hf
from bvl.convert import open_clip_timm as timm
from bvl.convert import open_clip_towers as native
from bvl.convert import open_clip_writing as writing
from bvl.convert.families import Described, Family, Source, TextFacts, Tower
from bvl.convert.hf_common import CLIP_MAX_SCALE, max_scale
from bvl.convert.open_clip_towers import checked, known_options
from bvl.convert.peers import import_peer
from bvl.convert.preprocess import from_open_clip
from bvl.convert.table import Row, Table, Unread, linear, table
from bvl.convert.tensors import Tensors, weights_file
from bvl.data.text import Tokenizer
from bvl.errors import ConversionError
from bvl.models.bert import BertConfig
from bvl.models.resnet import ResNetConfig
from bvl.models.vlm import DualEncoderConfig

_MODEL_OPTIONS = {
    "embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "init_logit_scale", "init_logit_bias",
    "nonscalar_logit_scale", "custom_text", "cast_dtype", "output_dict",
}  # fmt: skip
# The first parts of the names of a text tower, which CustomTextCLIP has below "text." and older files have not.
_TEXT_NAMES = ("text_projection", "positional_embedding", "token_embedding", "transformer", "ln_final")


def model_cfg(foreign: Mapping[str, Any], *, where: str) -> Mapping[str, Any]:
    """The architecture in open_clip_config.json; raises ConversionError where it is not complete."""
    cfg = foreign.get("model_cfg")
    if not isinstance(cfg, Mapping):
        raise ConversionError(f"{where}: open_clip_config.json has no model_cfg")
    missing = [name for name in ("embed_dim", "vision_cfg", "text_cfg") if name not in cfg]
    if missing:
        raise ConversionError(f"{where}: model_cfg has no {', '.join(missing)}")
    return cfg


def is_custom(cfg: Mapping[str, Any]) -> bool:
    """Whether open_clip makes a CustomTextCLIP of a model_cfg: its text tower's names begin with "text."."""
    return bool(cfg.get("custom_text")) or "hf_model_name" in cfg["text_cfg"]


def scale_rows(cfg: Mapping[str, Any]) -> Table:
    """Temperature and bias of the logits."""
    leading = int(bool(cfg.get("nonscalar_logit_scale")))
    return table(
        Row("log_scale", "logit_scale", leading=leading),
        (Row("logit_bias", "logit_bias", leading=leading),) if cfg.get("init_logit_bias") is not None else (),
    )


def scale_options(cfg: Mapping[str, Any], source: Source, tensors: Tensors) -> dict[str, Any]:
    """The options of DualEncoderConfig for the logits."""
    limit = max_scale(source, tensors, known=CLIP_MAX_SCALE)
    temperature = math.exp(-cfg.get("init_logit_scale", math.log(1 / 0.07)))
    return {
        "init_temperature": max(temperature, 1 / limit),
        "max_scale": limit,
        "init_bias": cfg.get("init_logit_bias"),
    }


class _DualEncoder(Family):
    """What both classes share; `custom`: whether the text tower is a module of its own."""

    library = "open_clip"
    weights_file = "open_clip_model.safetensors"
    config_file = "open_clip_config.json"
    custom: ClassVar[bool]

    def accepts(self, source: Source) -> bool:
        cfg = source.config.get("model_cfg")
        if not isinstance(cfg, Mapping) or not isinstance(cfg.get("text_cfg"), Mapping):
            return not self.custom  # which then says what is missing
        return is_custom(cfg) == self.custom and "multimodal_cfg" not in cfg

    def describe(self, source: Source) -> Described:
        where = str(source.folder)
        cfg = model_cfg(source.config, where=where)
        known_options(cfg, _MODEL_OPTIONS, where=where)
        vision, text = cfg["vision_cfg"], cfg["text_cfg"]
        quick = bool(cfg.get("quick_gelu", False))
        tensors = self.tensors(source)
        if vision.get("timm_model_name"):
            image, projection, size = timm.read_vision(vision, where=f"{where}: vision_cfg")
        else:
            image = native.read_vision(
                vision, embed_dim=cfg["embed_dim"], quick_gelu=quick, where=f"{where}: vision_cfg"
            )
            projection = "linear_bias" if isinstance(image, ResNetConfig) else "linear"
            size = native.image_size(vision)
        if text.get("hf_model_name"):
            tower, facts, text_projection = hf.read_text(text, source, tensors, where=f"{where}: text_cfg")
        else:
            tower = native.read_text(text, quick_gelu=quick, where=f"{where}: text_cfg")
            facts, text_projection = text_facts(text), text_projection_of(text)
        bias = cfg.get("init_logit_bias")
        return Described(
            model=checked(
                DualEncoderConfig,
                where=where,
                image=image,
                text=tower,
                embed_dim=cfg["embed_dim"],
                image_projection=projection,
                text_projection=text_projection,
                **scale_options(cfg, source, tensors),
            ),
            preprocess=from_open_clip(source.config.get("preprocess_cfg"), size),
            text=facts,
            tasks={
                "contrastive": {
                    "type": "bvl.tasks.contrastive.Contrastive",
                    "loss_type": "softmax" if bias is None else "sigmoid",
                }
            },
        )

    def tensors(self, source: Source) -> Tensors:
        cfg = model_cfg(source.config, where=str(source.folder))
        return as_loaded(source.tensors(), cfg, custom=self.custom)

    def table(self, model: DualEncoderConfig, foreign: Mapping[str, Any]) -> Table:
        cfg = foreign["model_cfg"]
        prefix = "text." if self.custom else ""
        return table(
            _vision_table(model, cfg["vision_cfg"]),
            _text_table(model, cfg["text_cfg"], prefix),
            scale_rows(cfg),
            Unread(r"(text\.)?attn_mask", "the causal mask"),
        )

    def load_peer(self, folder: Path, foreign: Mapping[str, Any]) -> Any:
        if foreign["model_cfg"]["vision_cfg"].get("timm_model_name"):
            import_peer("timm", what="the proof")
        if not foreign["model_cfg"]["text_cfg"].get("hf_model_name"):
            return load_folder(folder)
        tensors = self.tensors(Source("open_clip", folder, foreign))
        return hf.load_peer(folder, foreign, tensors, load_folder)

    def towers(self, model: DualEncoderConfig, foreign: Mapping[str, Any]) -> tuple[Tower, ...]:
        vision = foreign["model_cfg"]["vision_cfg"]
        if vision.get("timm_model_name"):
            layers, sizes = timm.layers(model.image), timm.further_sizes(model.image, vision)
        else:
            layers, sizes = native.vision_layers(model.image, vision), ()
        if isinstance(model.text, BertConfig):
            text_layers = hf.layers(model.text)
        else:
            text_layers = native.text_layers(model.text, "text." if self.custom else "")
        return (Tower("image", layers, encode_image, sizes), Tower("text", text_layers, encode_text))

    def scale_and_bias(self, peer: Any) -> tuple[float, float]:
        bias = 0.0 if peer.logit_bias is None else float(peer.logit_bias.detach())
        return float(peer.logit_scale.detach().exp()), bias

    def foreign(self, config: Config, tokenizer: Tokenizer) -> dict[str, Any]:
        return writing.foreign(config, tokenizer, custom=self.custom)

    def placed(self, foreign: Mapping[str, Any], folder: Path, *, hub_id: str | None) -> dict[str, Any]:
        return writing.placed(foreign, folder, hub_id=hub_id)

    def write_files(
        self, folder: Path, foreign: Mapping[str, Any], config: Config, tokenizer: Tokenizer
    ) -> None:
        writing.write_files(folder, foreign, config, tokenizer)

    def how_to_load(self, folder_name: str) -> str:
        return writing.how_to_load(folder_name)

    def notes(self, foreign: Mapping[str, Any], folder: Path) -> tuple[str, ...]:
        return writing.notes(foreign, folder)


class Clip(_DualEncoder):
    """Both towers open_clip's own, or timm's image tower; the text tower's parts lie in the model itself."""

    name = "CLIP"
    custom = False


class CustomTextClip(_DualEncoder):
    """The text tower is a module of its own: open_clip's (SigLIP), or a BERT of transformers (BiomedCLIP)."""

    name = "CustomTextCLIP"
    custom = True


def as_loaded(tensors: Tensors, cfg: Mapping[str, Any], *, custom: bool) -> Tensors:
    """The tensors as open_clip's own loader changes them before it compares names and shapes."""
    if custom and not any(name.startswith("text.") for name in tensors.shapes):
        tensors = tensors.renamed(lambda name: f"text.{name}" if name.startswith(_TEXT_NAMES) else name)
    scalars = {"logit_scale", "logit_bias"} & tensors.shapes.keys()
    shape = (1,) if cfg.get("nonscalar_logit_scale") else ()
    shapes = {**tensors.shapes, **{name: shape for name in scalars if tensors.shapes[name] in ((), (1,))}}
    if cfg.get("init_logit_bias") is not None and "logit_scale" in scalars:
        shapes.setdefault("logit_bias", shape)

    def load(name: str) -> np.ndarray:
        if name not in tensors.shapes:
            return np.zeros(shapes[name], np.float32)
        return tensors.load(name).reshape(shapes[name])

    return dataclasses.replace(tensors, shapes=shapes, load=load)


def text_facts(text: Mapping[str, Any]) -> TextFacts:
    """What the tokenizer of a text_cfg must be; its cleaning of texts is read with the tokenizer's own files."""
    # Texts are cleaned so for the SentencePiece vocabularies of SigLIP alone.
    kind = "siglip" if (text.get("tokenizer_kwargs") or {}).get("clean") == "canonicalize" else "any"
    return TextFacts(
        kind if text.get("hf_tokenizer_name") else "clip",
        text.get("context_length", 77),
        text.get("vocab_size", 49408),
        end_id=text.get("eos_id", 2) if text.get("pool_type") == "eos" else None,
    )


def text_projection_of(text: Mapping[str, Any]) -> str:
    """Our projection of a text_cfg without a model of transformers."""
    if text.get("proj_type", "linear") == "none":
        return "none"
    return "linear_bias" if text.get("proj_bias") else "linear"


def _vision_table(model: DualEncoderConfig, vision: Mapping[str, Any]) -> Table:
    if vision.get("timm_model_name"):
        return timm.vision_table(model, vision)
    if isinstance(model.image, ResNetConfig):
        return native.modified_resnet(model.image).under(theirs="visual.")
    return table(
        native.vision_transformer(model.image).under("image/", "visual."),
        Row("image_projection/kernel", "visual.proj"),
    )


def _text_table(model: DualEncoderConfig, text: Mapping[str, Any], prefix: str) -> Table:
    if isinstance(model.text, BertConfig):
        return hf.text_table(model)
    projection: tuple[Row, ...] = ()
    if model.text_projection == "linear":
        projection = (Row("text_projection/kernel", f"{prefix}text_projection"),)
    elif model.text_projection == "linear_bias":
        projection = linear("text_projection", f"{prefix}text_projection")
    return table(native.text_transformer(model.text).under("text/", prefix), projection)


def load_folder(folder: Path) -> Any:
    """The model of a folder as open_clip makes it; raises ConversionError with what open_clip says."""
    open_clip = import_peer("open_clip", what="the proof")
    with _readable(folder) as readable:
        try:
            return open_clip.create_model(f"local-dir:{readable}", precision="fp32").eval()
        except (
            Exception
        ) as error:  # whatever a class there may raise for a config or weights that do not fit it
            lines = [line for line in str(error).strip().splitlines() if line.strip()]
            raise ConversionError(
                f"open_clip cannot load {folder}: {' '.join(lines[:3]) or type(error).__name__}"
            ) from error


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[Path]:
    """The folder, or one with its weights under a name that open_clip looks for, where it would make random ones."""
    path = weights_file(folder, "open_clip")
    if path.suffix != ".pt":
        yield folder
        return
    with tempfile.TemporaryDirectory() as temporary:
        here = Path(temporary)
        for file in folder.iterdir():
            if file.is_file():
                name = "open_clip_pytorch_model.bin" if file == path else file.name
                (here / name).symlink_to(file.absolute())
        yield here


def encode_image(peer: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Embeddings of images, of unit norm."""
    return {"embed": peer.encode_image(inputs["pixels"], normalize=True)}


def encode_text(peer: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Embeddings of texts, of unit norm."""
    return {"embed": peer.encode_text(inputs["tokens"], normalize=True)}


FAMILIES = (Clip(), CustomTextClip())
