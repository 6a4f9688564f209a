"""Image towers of transformers: each one's config in our terms and back, its table, and how the proof runs it.

Other families take them from `hf_clip_towers.VISION` by the `model_type` of a vision config; names of ours stand below the image tower
("patch_embed/kernel"), theirs below the vision model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from bvl.convert.families import Layer, Source, expect
from bvl.convert.hf_common import (
    FOREIGN_ACTIVATIONS,
    Config,
    HeightWidth,
    activation,
    block,
    height_width,
    integer,
    number,
    read_preprocess,
    refuse,
    side,
    unlike,
)
from bvl.convert.table import Row, Table, Unread, linear, norm, packed, table
from bvl.data.transforms import Preprocess
from bvl.errors import ConversionError
from bvl.models.grid import PositionResize
from bvl.models.vit import VARIANTS, ViTConfig

_NO_POOLER = (
    "the class token behind the final norm is the embedding; the pooler is read where a dual encoder uses it"
)
_HEAD = "the head of another task"
# Options of ours that any class can have, that it is asked for in its own words, or that matter in training alone.
_FREE = (
    "variant width depth num_heads mlp_hidden activation norm_epsilon position_size position_resize whole_patches "
    "dropout drop_path patch_dropout levels scan remat"
)
_FIXED: dict[str, tuple[Any, ...]] = {"class_token": (None, True)}


class VisionTower:
    """One `model_type`. processor: the class of image processor where a folder names none.

    any_size: whether the class resamples its positions without being asked. oblong: whether it takes images that are
      not square in its own size.
    """

    model_type: ClassVar[str]
    class_name: ClassVar[str]
    processor: ClassVar[str]
    # Names of newer versions, or with what other classes put in front -> the names that files have.
    renames: ClassVar[tuple[tuple[str, str], ...]] = ()
    # Ours below a block -> theirs below the layer.
    block_names: ClassVar[Mapping[str, str]]
    layer: ClassVar[str]  # of a block in files
    live_layer: ClassVar[str]  # of a block as a module
    live_patches: ClassVar[str]  # the map of patches as a module
    any_size: ClassVar[bool] = False
    oblong: ClassVar[bool] = False
    # What of ours the class has, where that is not one of ours' defaults; activations with a gate.
    fixed: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    gated: ClassVar[tuple[str, ...]] = ()
    # How the class resamples positions.
    position_resize: ClassVar[PositionResize] = "plain"

    def image_size(self, foreign: Config, *, where: str) -> HeightWidth:
        """(height, width) that the position embeddings are for."""
        return height_width(foreign, "image_size", 224, where=where)

    def config(self, foreign: Config, *, where: str, pooler: bool = False) -> ViTConfig:
        """The tower in our terms; raises ConversionError naming an option that bvl does not reproduce.

        pooler: whether the pooled vector is read through the pooler, where the class has one.
        """
        raise NotImplementedError

    def table(self, config: ViTConfig) -> Table:
        """Which parameter is which tensor of a file."""
        raise NotImplementedError

    def layers(self, config: ViTConfig) -> tuple[Layer, ...]:
        """What the proof compares, beside the outputs."""
        blocks = range(config.sizes[1])
        return (
            Layer("patch_embed", self.live_patches, "nchw"),
            *(Layer(f"stack/block_{i}", f"{self.live_layer}.{i}") for i in blocks),
        )

    def run(self, vision: Any, pixels: Any, config: ViTConfig) -> dict[str, Any]:
        """ "pooled" and "tokens" of the vision model, as ours gives them."""
        raise NotImplementedError

    def sizes(self, config: ViTConfig, image_size: HeightWidth) -> tuple[HeightWidth, ...]:
        """Further image sizes that the vision model reads: it resamples positions of square images alone."""
        p, (height, width) = config.patch_size, image_size
        reads = height == width and config.position_resize == self.position_resize
        return ((height + p, max(width - p, p)),) if reads else ()

    def _config(
        self,
        foreign: Config,
        *,
        where: str,
        heads: int = 12,
        patch: int = 16,
        hidden: int | None = None,
        **options: Any,
    ) -> ViTConfig:
        expect(foreign, {"num_channels": (3,)}, where=where)
        width = integer(foreign, "hidden_size", 768, where=where)
        sizes = (
            width,
            integer(foreign, "num_hidden_layers", 12, where=where),
            integer(foreign, "num_attention_heads", heads, where=where),
            integer(foreign, "intermediate_size", 3072, where=where) if hidden is None else hidden,
        )
        if sizes[2] and foreign.get("head_dim", width // sizes[2]) != width // sizes[2]:
            raise ConversionError(
                f"{where}: head_dim={foreign['head_dim']} is not hidden_size / num_attention_heads"
            )
        patch = side(foreign, "patch_size", patch, where=where)
        image = self.image_size(foreign, where=where)
        named = next((name for name, known in VARIANTS.items() if known == sizes), None)
        given = {} if named else dict(zip(("width", "depth", "num_heads", "mlp_hidden"), sizes, strict=True))
        return ViTConfig(
            variant=f"{named or 'B'}/{patch}",
            whole_patches=not any(s % patch for s in image),
            position_resize=self.position_resize,
            **given,
            **options,
        )

    def wrong(self, config: ViTConfig, image_size: HeightWidth) -> list[str]:
        """Which options of a tower of ours, for images of this size, the class has not."""
        found = unlike("model.image", config, free=_FREE, fixed=_FIXED | dict(self.fixed))
        if config.activation not in FOREIGN_ACTIVATIONS and config.activation not in self.gated:
            found.append(f"model.image.activation={config.activation!r}")
        if config.position_size not in (None, image_size) and not self.any_size:
            found.append(f"model.image.position_size={config.position_size} beside images of {image_size}")
        height, width = config.position_size or image_size
        if height != width and not self.oblong:
            found.append(f"positions for images of {(height, width)}, which are not square")
        return found

    def foreign(self, config: ViTConfig, image_size: HeightWidth) -> dict[str, Any]:
        """The vision config of a tower of ours for images of this size; ConversionError says which options prevent it."""
        refuse(self.class_name, self.wrong(config, image_size))
        width, depth, num_heads, hidden = config.sizes
        height_width = config.position_size or image_size
        return {
            "model_type": self.model_type,
            "hidden_size": width,
            "num_hidden_layers": depth,
            "num_attention_heads": num_heads,
            "intermediate_size": hidden,
            "image_size": height_width[0] if len(set(height_width)) == 1 else list(height_width),
            "patch_size": config.patch_size,
            "num_channels": 3,
            "hidden_act": FOREIGN_ACTIVATIONS.get(config.activation, "gelu"),
            "layer_norm_eps": config.norm_epsilon,
        }


class ViTTower(VisionTower):
    """ViTModel: a class token, biases everywhere, a pooler where the class has been given one."""

    model_type, class_name, processor = "vit", "ViTModel", "ViTImageProcessor"
    oblong, fixed = True, {"pool": ("pooler", "cls"), "qkv_bias": (True, False)}
    layer, live_layer, live_patches = "encoder.layer", "layers", "embeddings.patch_embeddings.projection"
    renames = (
        (r"^vit\.", ""),
        (r"^layers\.(\d+)\.", r"encoder.layer.\1."),
        (r"\.attention\.q_proj\.", ".attention.attention.query."),
        (r"\.attention\.k_proj\.", ".attention.attention.key."),
        (r"\.attention\.v_proj\.", ".attention.attention.value."),
        (r"\.attention\.o_proj\.", ".attention.output.dense."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
    )
    block_names = {
        "attention_norm": "layernorm_before",
        "attention/query": "attention.attention.query",
        "attention/key": "attention.attention.key",
        "attention/value": "attention.attention.value",
        "attention/out": "attention.output.dense",
        "mlp_norm": "layernorm_after",
        "mlp/up": "intermediate.dense",
        "mlp/down": "output.dense",
    }

    def config(self, foreign: Config, *, where: str, pooler: bool = False) -> ViTConfig:
        if pooler:
            expect(foreign, {"pooler_act": ("tanh",)}, where=where)
            width = foreign.get("hidden_size", 768)
            expect(foreign, {"pooler_output_size": (width, None)}, where=where)
        return self._config(
            foreign,
            where=where,
            pool="pooler" if pooler else "cls",
            activation=activation(foreign, "gelu", where=where),
            norm_epsilon=number(foreign, "layer_norm_eps", 1e-12, where=where),
            qkv_bias=bool(foreign.get("qkv_bias", True)),
            dropout=number(foreign, "hidden_dropout_prob", 0.0, where=where),
        )

    def table(self, config: ViTConfig) -> Table:
        return table(
            Row("cls", "embeddings.cls_token", leading=2),
            Row("positions", "embeddings.position_embeddings", leading=1),
            Row("patch_embed/kernel", "embeddings.patch_embeddings.projection.weight", "patches"),
            Row("patch_embed/bias", "embeddings.patch_embeddings.projection.bias"),
            block(self.block_names, qkv_bias=config.qkv_bias)
            .under(theirs=f"{self.layer}.{{i}}.")
            .repeat(config.sizes[1]),
            norm("norm", "layernorm"),
            linear("pooler", "pooler.dense")
            if config.pool == "pooler"
            else (Unread(r"pooler\..*", _NO_POOLER),),
            Unread(r"embeddings\.mask_token", "read in masked pretraining alone"),
            Unread(r"classifier\..*", _HEAD),
        )

    def foreign(self, config: ViTConfig, image_size: HeightWidth) -> dict[str, Any]:
        return super().foreign(config, image_size) | {
            "qkv_bias": config.qkv_bias,
            "hidden_dropout_prob": config.dropout,
            "attention_probs_dropout_prob": 0.0,
            "pooler_output_size": config.sizes[0],
            "pooler_act": "tanh",
        }

    def layers(self, config: ViTConfig) -> tuple[Layer, ...]:
        return (*super().layers(config), Layer("norm", "layernorm"))

    def run(self, vision: Any, pixels: Any, config: ViTConfig) -> dict[str, Any]:
        own = tuple(vision.embeddings.image_size)
        out = vision(pixel_values=pixels, interpolate_pos_encoding=tuple(pixels.shape[2:]) != own)
        x = out.last_hidden_state
        pooled = out.pooler_output if config.pool == "pooler" else x[:, 0]
        return {"pooled": pooled, "tokens": x[:, 1:]}


class Dinov2Tower(VisionTower):
    """Dinov2Model (RAD-DINO's too): layer scale, in the giant a gated MLP; reads images of any size."""

    model_type, class_name, processor = "dinov2", "Dinov2Model", "BitImageProcessor"
    layer, live_layer, live_patches = (
        "encoder.layer",
        "encoder.layer",
        "embeddings.patch_embeddings.projection",
    )
    patch: ClassVar[int] = 14
    any_size, gated = True, ("swiglu",)
    fixed = {"pool": ("cls",), "qkv_bias": (True, False)}
    renames = (
        (r"^dinov2(_with_registers)?\.", ""),
        (r"\.attention\.q_proj\.", ".attention.attention.query."),
        (r"\.attention\.k_proj\.", ".attention.attention.key."),
        (r"\.attention\.v_proj\.", ".attention.attention.value."),
        (r"\.attention\.o_proj\.", ".attention.output.dense."),
    )
    block_names = {
        "attention_norm": "norm1",
        "attention/query": "attention.attention.query",
        "attention/key": "attention.attention.key",
        "attention/value": "attention.attention.value",
        "attention/out": "attention.output.dense",
        "mlp_norm": "norm2",
    }

    def registers(self, foreign: Config, *, where: str) -> int:
        return 0

    def config(self, foreign: Config, *, where: str, pooler: bool = False) -> ViTConfig:
        del pooler  # The class token is what this class calls so.
        width = integer(foreign, "hidden_size", 768, where=where)
        swiglu = bool(foreign.get("use_swiglu_ffn", False))
        return self._config(
            foreign,
            where=where,
            patch=self.patch,
            hidden=_mlp_hidden(width, number(foreign, "mlp_ratio", 4, where=where), swiglu),
            pool="cls",
            activation="swiglu" if swiglu else activation(foreign, "gelu", where=where),
            norm_epsilon=number(foreign, "layer_norm_eps", 1e-6, where=where),
            qkv_bias=bool(foreign.get("qkv_bias", True)),
            layer_scale=float(number(foreign, "layerscale_value", 1.0, where=where)),
            registers=self.registers(foreign, where=where),
            dropout=number(foreign, "hidden_dropout_prob", 0.0, where=where),
        )

    def table(self, config: ViTConfig) -> Table:
        mlp = (
            table(
                packed("mlp", ("gate", "up"), "mlp.weights_in.weight", "mlp.weights_in.bias"),
                linear("mlp/down", "mlp.weights_out"),
            )
            if config.activation == "swiglu"
            else table(linear("mlp/up", "mlp.fc1"), linear("mlp/down", "mlp.fc2"))
        )
        layer = table(
            block(self.block_names, qkv_bias=config.qkv_bias),
            Row("stack/block_{i}/attention_scale/scale", "layer_scale1.lambda1"),
            Row("stack/block_{i}/mlp_scale/scale", "layer_scale2.lambda1"),
            mlp.under("stack/block_{i}/"),
        )
        return table(
            Row("cls", "embeddings.cls_token", leading=2),
            Row("positions", "embeddings.position_embeddings", leading=1),
            (Row("registers", "embeddings.register_tokens", leading=1),) if config.registers else (),
            Row("patch_embed/kernel", "embeddings.patch_embeddings.projection.weight", "patches"),
            Row("patch_embed/bias", "embeddings.patch_embeddings.projection.bias"),
            layer.under(theirs=f"{self.layer}.{{i}}.").repeat(config.sizes[1]),
            norm("norm", "layernorm"),
            Unread(r"embeddings\.mask_token", "read in masked pretraining alone"),
            Unread(r"classifier\..*", _HEAD),
        )

    def wrong(self, config: ViTConfig, image_size: HeightWidth) -> list[str]:
        found = super().wrong(dataclasses.replace(config, layer_scale=None), image_size)
        if config.layer_scale is None:
            found.append("model.image.layer_scale=None (there a number)")
        if _mlp_ratio(config) is None:
            width, hidden = config.sizes[0], config.sizes[3]
            found.append(f"model.image.mlp_hidden={hidden}, no whole multiple of the width {width}")
        return found

    def foreign(self, config: ViTConfig, image_size: HeightWidth) -> dict[str, Any]:
        common = super().foreign(config, image_size)
        del common["intermediate_size"]
        return common | {
            "mlp_ratio": _mlp_ratio(config),
            "use_swiglu_ffn": config.activation == "swiglu",
            "qkv_bias": config.qkv_bias,
            "layerscale_value": config.layer_scale,
            "hidden_dropout_prob": config.dropout,
            "attention_probs_dropout_prob": 0.0,
            **({"num_register_tokens": config.registers} if config.registers else {"use_mask_token": False}),
        }

    def layers(self, config: ViTConfig) -> tuple[Layer, ...]:
        return (*super().layers(config), Layer("norm", "layernorm"))

    def run(self, vision: Any, pixels: Any, config: ViTConfig) -> dict[str, Any]:
        x = vision(pixel_values=pixels).last_hidden_state
        return {"pooled": x[:, 0], "tokens": x[:, 1 + config.registers :]}


class Dinov2RegistersTower(Dinov2Tower):
    """Dinov2WithRegistersModel: register tokens behind the class token, positions resampled with antialiasing."""

    model_type, class_name = "dinov2_with_registers", "Dinov2WithRegistersModel"
    patch, position_resize = 16, "antialias"

    def registers(self, foreign: Config, *, where: str) -> int:
        return integer(foreign, "num_register_tokens", 4, where=where)

    def wrong(self, config: ViTConfig, image_size: HeightWidth) -> list[str]:
        found = super().wrong(dataclasses.replace(config, registers=0), image_size)
        return found if config.registers else [*found, "model.image.registers=0 (there at least 1)"]


def _mlp_ratio(config: ViTConfig) -> int | None:
    """The ratio, a whole number, of which the class makes this width of the MLP."""
    width, hidden, gated = config.sizes[0], config.sizes[3], config.activation == "swiglu"
    return next((r for r in range(1, 65) if _mlp_hidden(width, r, gated) == hidden), None)


def _mlp_hidden(width: int, ratio: float, swiglu: bool) -> int:
    hidden = int(width * ratio)
    return (int(hidden * 2 / 3) + 7) // 8 * 8 if swiglu else hidden


def read_tower(
    tower: VisionTower, source: Source, foreign: Config, *, where: str, pooler: bool = False
) -> tuple[ViTConfig, Preprocess]:
    """A folder's image tower and preprocessing; raises ConversionError naming what bvl does not reproduce.

    foreign: the vision config. Where the tower reads images of any size, that of the image processor counts, and the
    positions are resampled to it.
    """
    config, size = tower.config(foreign, where=where, pooler=pooler), tower.image_size(foreign, where=where)
    preprocess = read_preprocess(source, size, tower.processor)
    if preprocess.height_width == size:
        return config, preprocess
    if not tower.any_size:
        raise ConversionError(
            f"{source.folder}: the image processor gives images of {preprocess.height_width} pixels, and "
            f"{where} reads {size}"
        )
    rest = any(s % config.patch_size for s in (*size, *preprocess.height_width))
    return dataclasses.replace(config, position_size=size, whole_patches=not rest), preprocess
