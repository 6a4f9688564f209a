"""Vision transformer (Dosovitskiy et al. 2021, arXiv:2010.11929): patches -> blocks -> pooled vector and tokens."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from bvl.errors import ConfigError
from bvl.models.layers import (
    AttentionPool,
    Dense,
    LayerNorm,
    RematPolicy,
    Stack,
    gelu,
    normal_init,
    zeros_init,
)

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
    fewer images (the patch size must then be a power of two).
    """

    variant: str = "S/16"
    stem: Literal["patch", "conv"] = "patch"
    pool: Literal["cls", "mean", "map"] = "map"
    width: int | None = None
    depth: int | None = None
    num_heads: int | None = None
    mlp_hidden: int | None = None
    # One layer norm between embedding and blocks, as in OpenAI's CLIP.
    pre_norm: bool = False
    scan: bool = False
    remat: RematPolicy = "none"

    def __post_init__(self):
        name, _, patch = self.variant.partition("/")
        if name not in VARIANTS or not patch.isdigit() or int(patch) < 1:
            near = {known.lower(): known for known in VARIANTS}
            near = near[difflib.get_close_matches(name.lower(), near, n=1, cutoff=0.0)[0]]
            raise ConfigError(
                f"image variant {self.variant!r}: write NAME/PATCH with a name of {', '.join(VARIANTS)}; "
                f"nearest is '{near}/{patch if patch.isdigit() else 16}'"
            )
        if min(self.sizes) < 1:
            raise ConfigError(f"image width, depth, num_heads, mlp_hidden {self.sizes}: must be at least 1")
        if self.stem == "conv" and int(patch) & (int(patch) - 1):
            raise ConfigError(
                f"image variant {self.variant!r}: stem='conv' halves the size step by step, so the patch size must be a power of two"
            )
        if self.sizes[0] % self.sizes[2]:
            raise ConfigError(f"image width {self.sizes[0]} is not divisible by num_heads {self.sizes[2]}")

    @property
    def patch_size(self) -> int:
        return int(self.variant.partition("/")[2])

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """(width, depth, num_heads, mlp_hidden) with the overrides applied."""
        table = VARIANTS[self.variant.partition("/")[0]]
        width = self.width or table[0]
        # An overridden width scales the MLP with it, unless that is given too.
        hidden = self.mlp_hidden or (table[3] if width == table[0] else 4 * width)
        return width, self.depth or table[1], self.num_heads or table[2], hidden


def resize_positions(
    positions: Float[Array, "l d"], old: tuple[int, int], new: tuple[int, int]
) -> Float[Array, "m d"]:
    """Resample a grid of position embeddings to another grid (bicubic, antialiased)."""
    if old == new:
        return positions
    grid = rearrange(positions, "(h w) d -> h w d", h=old[0])
    grid = jax.image.resize(grid, (*new, grid.shape[-1]), method="bicubic", antialias=True)
    return rearrange(grid, "h w d -> (h w) d")


class ConvStem(nn.Module):
    """3x3 convolutions of stride 2 down to the patch grid, then a linear map (Xiao et al. 2021, arXiv:2106.14881).

    Each is followed by a layer norm over channels, which unlike batch norm does not tie the rows of a batch.
    """

    width: int
    patch_size: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, image: Float[Array, "b h w 3"]) -> Float[Array, "b l d"]:
        num_layers = self.patch_size.bit_length() - 1
        x = image
        for i in range(num_layers):
            features = max(self.width >> (num_layers - 1 - i), 32)
            x = Dense(features, names=(None, "patch"), dtype=self.dtype, name=f"conv_{i}")(_patches_3x3(x))
            x = gelu(LayerNorm(dtype=self.dtype, name=f"norm_{i}")(x))
        x = rearrange(x, "b h w c -> b (h w) c")
        return Dense(self.width, names=("patch", "embed"), dtype=self.dtype, name="out")(x)


def _patches_3x3(x: Float[Array, "b h w c"]) -> Float[Array, "b h/2 w/2 9*c"]:
    """The 3x3 neighbourhoods at stride 2: a convolution becomes one matrix product, on CPU several times faster."""
    height, width = x.shape[1] // 2, x.shape[2] // 2
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    views = [x[:, i : i + 2 * height : 2, j : j + 2 * width : 2] for i in range(3) for j in range(3)]
    return jnp.concatenate(views, axis=-1)


class ViT(nn.Module):
    """Returns (pooled [b, d], tokens [b, l, d], grid). `image_size` is the size the positions are made for."""

    config: ViTConfig
    image_size: tuple[int, int]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, image: Float[Array, "b h w 3"]
    ) -> tuple[Float[Array, "b d"], Float[Array, "b l d"], tuple[int, int]]:
        config, p = self.config, self.config.patch_size
        width, depth, num_heads, mlp_hidden = config.sizes
        for size, what in ((self.image_size, "data.preprocess.image_size"), (image.shape[1:3], "image")):
            if size[0] % p or size[1] % p:
                raise ConfigError(
                    f"{what} {tuple(size)} is not divisible by the patch size {p} of {config.variant}"
                )
        trained = (self.image_size[0] // p, self.image_size[1] // p)
        grid = (image.shape[1] // p, image.shape[2] // p)

        if config.stem == "conv":
            x = ConvStem(width, p, dtype=self.dtype, name="stem")(image)
        else:
            # A strided convolution written as one matrix product, which is faster on CPU and equal elsewhere.
            patches = rearrange(image, "b (h p) (w q) c -> b (h w) (p q c)", p=p, q=p)
            x = Dense(width, names=("patch", "embed"), dtype=self.dtype, name="patch_embed")(patches)
        positions = self.param(
            "positions", normal_init(0.02, "position", "embed"), (trained[0] * trained[1], width)
        )
        x = x + resize_positions(positions, trained, grid).astype(self.dtype)
        if config.pool == "cls":
            cls = self.param("cls", zeros_init("embed"), (width,)).astype(self.dtype)
            x = jnp.concatenate([jnp.broadcast_to(cls, (x.shape[0], 1, width)), x], axis=1)
        if config.pre_norm:
            x = LayerNorm(dtype=self.dtype, name="pre_norm")(x)
        x = Stack(
            depth=depth,
            num_heads=num_heads,
            mlp_hidden=mlp_hidden,
            scan=config.scan,
            remat=config.remat,
            dtype=self.dtype,
            name="stack",
        )(x)
        x = LayerNorm(dtype=self.dtype, name="norm")(x)
        if config.pool == "cls":
            return x[:, 0], x[:, 1:], grid
        if config.pool == "mean":
            return x.astype(jnp.float32).mean(axis=1).astype(self.dtype), x, grid
        return AttentionPool(num_heads, mlp_hidden, dtype=self.dtype, name="pool")(x), x, grid
