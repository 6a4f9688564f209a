"""Vision transformer (Dosovitskiy et al. 2021, arXiv:2010.11929): patches -> blocks -> pooled vector and tokens."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from bvl.errors import ConfigError
from bvl.models.attentional_pool import AttentionalPool, AttentionalPooler
from bvl.models.conv_stem import ConvStem
from bvl.models.dropout import RowKeys, check_rates, dropout, fold, random_subset
from bvl.models.features import ImageFeatures
from bvl.models.grid import PositionResize, grid_of, resize_positions
from bvl.models.layers import (
    Activation,
    AttentionPool,
    Dense,
    LayerNorm,
    RematPolicy,
    Stack,
    normal_init,
    zeros_init,
)
from bvl.models.variants import check_sizes, nearest_variant, override_sizes

# All tokens, those in front of the patches too, after the last norm or before it.
Visual = Literal["all", "unnormed"]

# name: (width, depth, num_heads, mlp_hidden). Ti to g: Zhai et al. 2022 (arXiv:2106.04560), table 2;
# So400m: Alabdulmohsin et al. 2023 (arXiv:2305.13035). XXS and XS are ours, for laptops.
VARIANTS: dict[str, tuple[int, int, int, int]] = {
    "XXS": (96, 4, 3, 384),
    "XS": (128, 6, 4, 512),
    "Ti": (192, 12, 3, 768),
    "S": (384, 12, 6, 1536),
    "M": (512, 12, 8, 2048),
    "B": (768, 12, 12, 3072),
    "L": (1024, 24, 16, 4096),
    "So400m": (1152, 27, 16, 4304),
    "H": (1280, 32, 16, 5120),
    "g": (1408, 40, 16, 6144),
}


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """`variant` is NAME/PATCH, for example "B/16"; width, depth and heads override the table.

    stem: "patch" embeds each patch by one linear map; "conv" by small strided convolutions, which learn from far
      fewer images (the patch size must then be a power of two). patch_bias: of that linear map.
    pool: "cls" reads a class token, "pooler" sends it through a dense layer and tanh (the ViT of transformers), "mean"
      averages the patches, "map" attends to them with a learned query. Patch
      embeddings for heat maps mean most with "mean"; with "cls" only `Mosaic` trains them.
    pre_norm: one layer norm between embedding and blocks. qk_norm: layer norm of queries and keys. qkv_bias: of the
      maps to queries, keys and values.
    position_size: image size (height, width) that the position embeddings are for, None = data.preprocess.image_size.
    position_resize: how position embeddings are resampled for images of another size (`bvl.models.grid`).
    whole_patches: an image must be whole patches; where it need not, what is left over at the right and the bottom
      is not read (SigLIP's So400m/14 at 384 pixels).
    layer_scale: initial factor of the residual branches. registers: learned tokens beside the patches that no
      output reads (Darcet et al. 2024, arXiv:2309.16588).
    pool_prefix: pool="mean" and "map" read the tokens in front of the patches too.
    norm_after_pool: `pooled` is the norm of the mean, not the mean of the normed (timm's fc_norm); for pool="mean".
    class_token: a token in front of the patches; None = only where pool="cls" reads it.
    prefix_positions: which tokens in front of the patches have position embeddings: the class token, none, or the
      registers too.
    attentional_pool: several queries attend to all tokens, and the decoder reads what they give; pool="cls" then takes
      the first one's, and pool="mean" the mean of the others' (open_clip's CoCa).
    patch_dropout: share of the patches left out of each training image (Li et al. 2023, arXiv:2212.00794);
      dropout: of the embedding and the residual branches; drop_path: stochastic depth, the rate of the last block.
    mask_channel: a fourth channel of the image, a mask of the region that is meant, is embedded beside the pixels by a
      map that is zero at first (Hua et al. 2024, arXiv:2411.15411); without it the image is read as ever.
    levels: blocks whose outputs are in `ImageFeatures.levels`, None = four evenly spaced ones.

    OpenAI's CLIP: pool="cls", pre_norm=True, patch_bias=False, activation="quick_gelu".
    SigLIP: pool="map", norm_epsilon=1e-6 (So400m also activation="gelu_tanh").
    """

    variant: str = "S/16"
    stem: Literal["patch", "conv"] = "patch"
    pool: Literal["cls", "pooler", "mean", "map"] = "map"
    width: int | None = None
    depth: int | None = None
    num_heads: int | None = None
    mlp_hidden: int | None = None
    patch_bias: bool = True
    pre_norm: bool = False
    qk_norm: bool = False
    qkv_bias: bool = True
    position_size: tuple[int, int] | None = None
    position_resize: PositionResize = "antialias"
    whole_patches: bool = True
    activation: Activation = "gelu"
    norm_epsilon: float = 1e-5
    layer_scale: float | None = None
    registers: int = 0
    pool_prefix: bool = False
    norm_after_pool: bool = False
    class_token: bool | None = None
    prefix_positions: Literal["class", "none", "all"] = "class"
    attentional_pool: AttentionalPool | None = None
    mask_channel: bool = False
    patch_dropout: float = 0.0
    dropout: float = 0.0
    drop_path: float = 0.0
    levels: tuple[int, ...] | None = None
    scan: bool = False
    remat: RematPolicy = "none"

    def __post_init__(self):
        name, _, patch = self.variant.partition("/")
        if name not in VARIANTS or not patch.isdigit() or int(patch) < 1:
            near = nearest_variant(name, VARIANTS)
            raise ConfigError(
                f"image variant {self.variant!r}: write NAME/PATCH with a name of {', '.join(VARIANTS)}; "
                f"nearest is '{near}/{patch if patch.isdigit() else 16}'"
            )
        check_sizes("image", self.sizes)
        if self.stem == "conv" and int(patch) & (int(patch) - 1):
            raise ConfigError(
                f"image variant {self.variant!r}: stem='conv' halves the size step by step, so the patch size must be a power of two"
            )
        if self.registers < 0:
            raise ConfigError(f"image registers={self.registers}: must be 0 or more")
        if self.pool in ("cls", "pooler") and self.class_token is False:
            raise ConfigError(
                f"image pool={self.pool!r} reads the class token: class_token=False leaves none"
            )
        if self.norm_after_pool and self.pool != "mean":
            raise ConfigError(f"image norm_after_pool=True belongs to pool='mean'; it is {self.pool!r}")
        if self.attentional_pool is not None and (
            self.pool not in ("cls", "mean") or self.norm_after_pool or self.registers
        ):
            raise ConfigError(
                f"image attentional_pool goes with pool='cls' or 'mean', without norm_after_pool and registers; it is "
                f"pool={self.pool!r}"
            )
        check_rates("image", patch_dropout=self.patch_dropout, dropout=self.dropout, drop_path=self.drop_path)
        depth = self.sizes[1]
        if any(not 0 <= block < depth for block in self.levels or ()):
            raise ConfigError(f"image levels={self.levels}: blocks are numbered 0 to {depth - 1}")

    @property
    def patch_size(self) -> int:
        return int(self.variant.partition("/")[2])

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """(width, depth, num_heads, mlp_hidden) with the overrides applied."""
        table = VARIANTS[self.variant.partition("/")[0]]
        return override_sizes(table, (self.width, self.depth, self.num_heads, self.mlp_hidden))

    @property
    def output_width(self) -> int:
        """Width of `pooled`, and of what a text decoder reads."""
        return self.sizes[0] if self.attentional_pool is None else self.attentional_pool.width

    @property
    def has_class_token(self) -> bool:
        return self.pool in ("cls", "pooler") if self.class_token is None else self.class_token

    @property
    def num_prefix_positions(self) -> int:
        """Rows of the position embeddings in front of those of the patches."""
        counts = {"class": self.has_class_token, "none": 0, "all": self.has_class_token + self.registers}
        return int(counts[self.prefix_positions])

    @property
    def level_blocks(self) -> tuple[int, ...]:
        """Numbers of the blocks whose outputs are the levels."""
        depth = self.sizes[1]
        if self.levels is not None:
            return self.levels
        return tuple(sorted({max(depth * i // 4, 1) - 1 for i in (1, 2, 3, 4)}))

    def grid(self, image_size: tuple[int, int], what: str = "image") -> tuple[int, int]:
        """Rows and columns of patches of an image (height, width); raises ConfigError if they do not fit."""
        if not self.whole_patches:
            image_size = tuple(side - side % self.patch_size or side for side in image_size)
        divisor = f"patch size {self.patch_size} of {self.variant}"
        return grid_of(image_size, self.patch_size, what=what, divisor=divisor)

    def position_grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the position embeddings, where images are preprocessed to `image_size`."""
        if self.position_size is not None:
            return self.grid(self.position_size, "model.image.position_size")
        return self.grid(image_size, "data.preprocess.image_size")

    def make(self, *, image_size: tuple[int, int], dtype: Any) -> ViT:
        """The tower, with position embeddings for images of `image_size` (height, width)."""
        return ViT(self, image_size, dtype=dtype)


class ViT(nn.Module):
    """Images whose size differs from `image_size`, that of the positions, are read with resampled positions."""

    config: ViTConfig
    image_size: tuple[int, int]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        image: Float[Array, "b h w c"],
        *,
        keys: RowKeys | None = None,
        levels: bool = False,
        patches: bool = False,
        visual: Visual | None = None,
    ) -> ImageFeatures:
        config, p = self.config, self.config.patch_size
        width, depth, num_heads, mlp_hidden = config.sizes
        trained = config.position_grid(self.image_size)
        grid = config.grid(image.shape[1:3])
        image = image[:, : grid[0] * p, : grid[1] * p]
        norm = dict(epsilon=config.norm_epsilon, dtype=self.dtype)
        if image.shape[-1] != 3 and not (config.mask_channel and image.shape[-1] == 4):
            raise ConfigError(
                f"images with {image.shape[-1]} channels: the tower reads 3, and with model.image.mask_channel=true also "
                "a mask"
            )
        image, mask = image[..., :3], image[..., 3:]

        if config.stem == "conv":
            x, fine = ConvStem(width, p, dtype=self.dtype, name="stem")(image)
        else:
            # A strided convolution written as one matrix product, which is faster on CPU and equal elsewhere.
            pixels, fine = rearrange(image, "b (h p) (w q) c -> b (h w) (p q c)", p=p, q=p), ()
            x = Dense(
                width,
                names=("patch", "embed"),
                use_bias=config.patch_bias,
                dtype=self.dtype,
                name="patch_embed",
            )(pixels)
        if mask.shape[-1]:
            masked = rearrange(mask, "b (h p) (w q) 1 -> b (h w) (p q)", p=p, q=p)
            kernel = self.param("mask_embed", zeros_init("patch", "embed"), (p * p, width))
            x = x + masked.astype(self.dtype) @ kernel.astype(self.dtype)
        prefix = config.num_prefix_positions
        positions = self.param(
            "positions", normal_init(0.02, "position", "embed"), (prefix + trained[0] * trained[1], width)
        )
        positions = resize_positions(positions, trained, grid, how=config.position_resize).astype(self.dtype)
        x = x + positions[prefix:]
        dropped = keys is not None and config.patch_dropout > 0
        if dropped:
            if levels:
                raise ConfigError("image patch_dropout leaves holes in the feature maps that a task reads")
            count = max(round(x.shape[1] * (1.0 - config.patch_dropout)), 1)
            kept = random_subset(fold(keys, 0), x.shape[1], count)
            x = jnp.take_along_axis(x, kept[..., None], axis=1)

        def beside(x: jax.Array, tokens: jax.Array) -> jax.Array:
            rows = jnp.broadcast_to(tokens.astype(self.dtype), (x.shape[0], *tokens.shape))
            return jnp.concatenate([rows, x], axis=1)

        front = []
        if config.registers:
            front = [self.param("registers", normal_init(0.02, None, "embed"), (config.registers, width))]
        if config.has_class_token:
            front = [self.param("cls", zeros_init("embed"), (width,))[None], *front]
        num_prefix = sum(map(len, front))
        if front:
            x = beside(x, jnp.concatenate(front).at[:prefix].add(positions[:prefix]))
        x = dropout(x, config.dropout, fold(keys, 1))
        if config.pre_norm:
            x = LayerNorm(**norm, name="pre_norm")(x)
        stack = Stack(
            depth=depth,
            num_heads=num_heads,
            mlp_hidden=mlp_hidden,
            norm_epsilon=config.norm_epsilon,
            activation=config.activation,
            qk_norm=config.qk_norm,
            qkv_bias=config.qkv_bias,
            layer_scale=config.layer_scale,
            dropout=config.dropout,
            drop_path=config.drop_path,
            scan=config.scan,
            remat=config.remat,
            dtype=self.dtype,
            name="stack",
        )
        x, maps = stack.run(x, keys=fold(keys, 2), levels=config.level_blocks if levels else ())
        maps = tuple(rearrange(m[:, num_prefix:], "b (h w) d -> b h w d", h=grid[0]) for m in maps)
        final_norm, unnormed = LayerNorm(**norm, name="norm"), x[:, num_prefix:]
        if config.attentional_pool is not None:
            pool = AttentionalPooler(config.attentional_pool, dtype=self.dtype, name="attentional_pool")
            x, tokens = pool(x)
            x = final_norm(x)
            pooled = x[:, 0] if config.pool == "cls" else x[:, 1:].astype(jnp.float32).mean(1).astype(x.dtype)
            return ImageFeatures(
                pooled=pooled,
                tokens=tokens[:, num_prefix:],
                levels=(*fine, *maps) if levels else None,
                patches=final_norm(pool.alone(unnormed)) if patches else None,
                visual=x[:, 1:],
                grid=None if dropped else grid,
            )
        whole = x
        x = final_norm(x)
        tokens = x[:, num_prefix:]
        first = 0 if config.pool_prefix else num_prefix
        if config.pool == "cls":
            pooled = x[:, 0]
        elif config.pool == "pooler":
            pooled = jnp.tanh(Dense(width, names=("embed", None), dtype=self.dtype, name="pooler")(x[:, 0]))
        elif config.pool == "mean":
            pooled = (whole if config.norm_after_pool else x)[:, first:]
            pooled = pooled.astype(jnp.float32).mean(axis=1).astype(self.dtype)
            pooled = final_norm(pooled) if config.norm_after_pool else pooled
        else:
            pool = AttentionPool(
                num_heads,
                mlp_hidden,
                config.activation,
                config.norm_epsilon,
                dtype=self.dtype,
                name="pool",
            )
            pooled = pool(x[:, first:])
        alone = tokens
        if patches and config.pool == "map":
            # Attention to one token gives its value alone (Zhou et al. 2022, arXiv:2112.01071, section 3.3).
            alone = pool(rearrange(tokens, "b l d -> (b l) 1 d")).reshape(tokens.shape)
        return ImageFeatures(
            pooled=pooled,
            tokens=tokens,
            levels=(*fine, *maps) if levels else None,
            patches=alone if patches else None,
            visual={"all": x, "unnormed": whole}.get(visual),
            grid=None if dropped else grid,
        )
