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
    side,
)
from bvl.convert.table import Row, Table, Unread, linear, norm, packed, table
from bvl.data.transforms import Preprocess
from bvl.errors import ConversionError
from bvl.models.vit import VARIANTS, ViTConfig

_NO_POOLER = (
    "the class token behind the final norm is the embedding; the pooler is read where a dual encoder uses it"
)
_HEAD = "the head of another task"


class VisionTower:
    """One `model_type`. processor: the class of image processor where a folder names none.

    any_size: whether the class resamples its positions without being asked.
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
    any_size: ClassVar[bool] = False

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

    def foreign(self, config: ViTConfig, image_size: HeightWidth) -> dict[str, Any]:
        """The vision config of a tower of ours for images of this size; ConversionError says which options prevent it."""
        raise NotImplementedError

    def layers(self, config: ViTConfig) -> tuple[Layer, ...]:
        """What the proof compares, beside the outputs."""
        blocks = range(config.sizes[1])
        return (
            Layer("patch_embed", self.live_patches, "nchw"),
            *(Layer(f"stack/block_{i}", f"{self.live_layer}.{i}") for i in blocks),
        )

    live_patches: ClassVar[str]

    def run(self, vision: Any, pixels: Any, config: ViTConfig) -> dict[str, Any]:
        """ "pooled" and "tokens" of the vision model, as ours gives them."""
        raise NotImplementedError

    def sizes(self, config: ViTConfig, image_size: HeightWidth) -> tuple[HeightWidth, ...]:
        """Further image sizes that the vision model reads: it resamples positions of square images alone."""
        p, (height, width) = config.patch_size, image_size
        return ((height + p, max(width - p, p)),) if height == width else ()

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
            position_resize="plain",
            **given,
            **options,
        )

    def _foreign(
        self, config: ViTConfig, image_size: HeightWidth, fixed: Mapping[str, Any]
    ) -> dict[str, Any]:
        """What all vision configs have in common. fixed: option -> the value of ours that the class has."""
        always = {
            "stem": "patch",
            "qk_norm": False,
            "norm_after_pool": False,
            "mask_channel": False,
            "class_token": None,
            "prefix_positions": "class",
        }
        wrong = [
            f"model.image.{name}={getattr(config, name)!r} (there {value!r})"
            for name, value in {**always, **fixed}.items()
            if getattr(config, name) != value
        ]
        if wrong:
            raise ConversionError(f"{self.class_name} has no {', '.join(wrong)}")
        width, depth, num_heads, hidden = config.sizes
        return {
            "model_type": self.model_type,
            "hidden_size": width,
            "num_hidden_layers": depth,
            "num_attention_heads": num_heads,
            "intermediate_size": hidden,
            "image_size": image_size[0] if image_size[0] == image_size[1] else list(image_size),
            "patch_size": config.patch_size,
            "num_channels": 3,
            "hidden_act": FOREIGN_ACTIVATIONS.get(config.activation),
            "layer_norm_eps": config.norm_epsilon,
        }


class ViTTower(VisionTower):
    """ViTModel: a class token, biases everywhere, a pooler where the class has been given one."""

    model_type, class_name, processor = "vit", "ViTModel", "ViTImageProcessor"
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
        if config.activation == "swiglu":
            raise ConversionError("ViTModel has no model.image.activation='swiglu'")
        pool = "pooler" if config.pool == "pooler" else "cls"
        fixed = {"patch_bias": True, "pre_norm": False, "registers": 0, "layer_scale": None, "pool": pool}
        return {
            **self._foreign(config, image_size, fixed),
            "qkv_bias": config.qkv_bias,
            "hidden_dropout_prob": config.dropout,
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
    any_size = True
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
        return dataclasses.replace(
            self._config(
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
            ),
            position_resize=self.position_resize,
        )

    position_resize: ClassVar[Any] = "plain"

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

    def foreign(self, config: ViTConfig, image_size: HeightWidth) -> dict[str, Any]:
        if config.layer_scale is None:
            raise ConversionError(
                f"{self.class_name} has no model.image.layer_scale=None (there it has a layer scale)"
            )
        if image_size[0] != image_size[1]:
            raise ConversionError(
                f"{self.class_name} has no positions for data.preprocess.image_size={image_size}, which is not square"
            )
        width, hidden, swiglu = config.sizes[0], config.sizes[3], config.activation == "swiglu"
        ratio = next((r for r in range(1, 65) if _mlp_hidden(width, r, swiglu) == hidden), None)
        if ratio is None:
            raise ConversionError(
                f"{self.class_name} has no model.image.mlp_hidden={hidden} beside the width {width}: it takes whole multiples"
            )
        fixed = {
            "patch_bias": True,
            "pre_norm": False,
            "pool": "cls",
            "position_resize": self.position_resize,
            **self.fixed,
        }
        common = self._foreign(config, image_size, fixed)
        del common["intermediate_size"]
        return {
            **common,
            "hidden_act": common["hidden_act"] or "gelu",
            "mlp_ratio": ratio,
            "use_swiglu_ffn": swiglu,
            "qkv_bias": config.qkv_bias,
            "layerscale_value": config.layer_scale,
            "hidden_dropout_prob": config.dropout,
            **self.extra(config),
        }

    fixed: ClassVar[Mapping[str, Any]] = {"registers": 0}

    def extra(self, config: ViTConfig) -> dict[str, Any]:
        return {"use_mask_token": False}

    def layers(self, config: ViTConfig) -> tuple[Layer, ...]:
        return (*super().layers(config), Layer("norm", "layernorm"))

    def run(self, vision: Any, pixels: Any, config: ViTConfig) -> dict[str, Any]:
        x = vision(pixel_values=pixels).last_hidden_state
        return {"pooled": x[:, 0], "tokens": x[:, 1 + config.registers :]}


class Dinov2RegistersTower(Dinov2Tower):
    """Dinov2WithRegistersModel: register tokens behind the class token, positions resampled with antialiasing."""

    model_type, class_name = "dinov2_with_registers", "Dinov2WithRegistersModel"
    patch = 16
    position_resize = "antialias"
    fixed = {}

    def registers(self, foreign: Config, *, where: str) -> int:
        return integer(foreign, "num_register_tokens", 4, where=where)

    def extra(self, config: ViTConfig) -> dict[str, Any]:
        return {"num_register_tokens": config.registers}


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
