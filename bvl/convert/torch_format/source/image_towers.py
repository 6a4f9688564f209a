"""Image towers: ViT, ResNet (CLIP's and torchvision's) and ViTamin. All read normalised pixels [b, 3, H, W]."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bvl.convert.torch_format.source.errors import UserError
from bvl.convert.torch_format.source.layers import (
    Attention,
    AttentionPool,
    ChannelNorm,
    Stack,
    attend,
    join_heads,
    resize_positions,
    split_heads,
)


@dataclasses.dataclass
class ImageFeatures:
    """pooled [b, d]; tokens [b, l, d], one a patch of the `grid` (rows, columns), row by row.

    levels: maps [b, h, w, c] from fine to coarse. patches [b, l, d]: each patch pooled alone, as if the image were
    nothing else. embed [b, e], patch_embed [b, l, e]: `pooled` and `patches` in the space shared with texts, unit norm.
    What was not asked for is None.
    """

    pooled: Tensor
    tokens: Tensor
    grid: tuple[int, int]
    levels: tuple[Tensor, ...] | None = None
    patches: Tensor | None = None
    embed: Tensor | None = None
    patch_embed: Tensor | None = None


def grid_of(image: Tensor, stride: int) -> tuple[int, int]:
    """Rows and columns of the patches of images [b, c, H, W]; UserError where they do not fit."""
    height, width = image.shape[-2:]
    if height % stride or width % stride:
        raise UserError(f"an image of {height} x {width} pixels is not divisible by {stride}")
    return height // stride, width // stride


def channels_last(x: Tensor) -> Tensor:
    """[b, c, h, w] -> [b, h, w, c]."""
    return x.permute(0, 2, 3, 1)


class ConvStem(nn.Module):
    """3x3 convolutions of stride 2 down to the patch grid, then a linear map (Xiao et al. 2021, arXiv:2106.14881)."""

    def __init__(self, width: int, patch_size: int):
        super().__init__()
        self.depth, channels = patch_size.bit_length() - 1, 3
        for i in range(self.depth):
            features = max(width >> (self.depth - 1 - i), 32)
            self.add_module(f"conv_{i}", nn.Conv2d(channels, features, 3, stride=2, padding=1))
            self.add_module(f"norm_{i}", ChannelNorm(features))
            channels = features
        self.out = nn.Linear(channels, width)

    def forward(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(tokens [b, l, d], the maps that are finer than the grid)."""
        x, maps = image, []
        for i in range(self.depth):
            x = F.gelu(getattr(self, f"norm_{i}")(getattr(self, f"conv_{i}")(x)))
            maps.append(channels_last(x))
        return self.out(x.flatten(2).transpose(1, 2)), maps[:-1]


class ViT(nn.Module):
    """Vision transformer (Dosovitskiy et al. 2021, arXiv:2010.11929).

    Images of another size than that of training are read with resampled positions. A fourth channel, of a tower with
    `mask_channel`, is a mask in 0..1 of the region that is meant.
    """

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.config = config
        width, patch = config["width"], config["patch_size"]
        epsilon, hidden = config["norm_epsilon"], config["mlp_hidden"]
        if config["stem"] == "conv":
            self.stem = ConvStem(width, patch)
        else:
            self.patch_embed = nn.Conv2d(3, width, patch, stride=patch, bias=config["patch_bias"])
        if config["mask_channel"]:
            self.mask_embed = nn.Parameter(torch.zeros(patch * patch, width))
        rows = config["prefix_positions"] + config["grid"][0] * config["grid"][1]
        self.positions = nn.Parameter(torch.zeros(rows, width))
        if config["registers"]:
            self.registers = nn.Parameter(torch.zeros(config["registers"], width))
        if config["class_token"]:
            self.cls = nn.Parameter(torch.zeros(width))
        self.pre_norm = nn.LayerNorm(width, epsilon) if config["pre_norm"] else nn.Identity()
        self.stack = Stack(
            config["depth"],
            width,
            config["num_heads"],
            hidden,
            epsilon=epsilon,
            activation=config["activation"],
            qk_norm=config["qk_norm"],
            qkv_bias=config["qkv_bias"],
            layer_scale=config["layer_scale"],
        )
        self.norm = nn.LayerNorm(width, epsilon)
        if config["pool"] == "map":
            self.pool = AttentionPool(width, config["num_heads"], hidden, config["activation"], epsilon)
        elif config["pool"] == "pooler":
            self.pooler = nn.Linear(width, width)

    def forward(self, image: Tensor, *, levels: bool = False, patches: bool = False) -> ImageFeatures:
        config, patch = self.config, self.config["patch_size"]
        if not config["whole_patches"]:
            # What is left over at the right and the bottom is not read.
            height, width = (side - side % patch or side for side in image.shape[-2:])
            image = image[..., :height, :width]
        grid = grid_of(image, patch)
        image, mask = image[:, :3], image[:, 3:]
        if config["stem"] == "conv":
            x, fine = self.stem(image)
        else:
            x, fine = self.patch_embed(image).flatten(2).transpose(1, 2), []
        if mask.shape[1]:
            if not config["mask_channel"]:
                raise UserError("this image tower reads 3 channels, not 4: it was made without mask_channel")
            kernel = self.mask_embed.T.unflatten(1, (1, patch, patch))
            x = x + F.conv2d(mask, kernel, stride=patch).flatten(2).transpose(1, 2)
        prefix = config["prefix_positions"]
        positions = resize_positions(self.positions, config["grid"], grid, config["antialias_positions"])
        x = x + positions[prefix:]
        front = [self.cls[None]] if config["class_token"] else []
        front += [self.registers] if config["registers"] else []
        num_prefix = sum(map(len, front))
        if front:
            tokens = torch.cat(front)
            tokens = tokens + F.pad(positions[:prefix], (0, 0, 0, num_prefix - prefix))
            x = torch.cat([tokens.expand(len(x), -1, -1), x], dim=1)
        x, maps = self.stack(self.pre_norm(x), levels=tuple(config["levels"]) if levels else ())
        unnormed, x = x[:, num_prefix:], self.norm(x)
        tokens = x[:, num_prefix:]
        alone = tokens
        if config["pool"] == "cls":
            pooled = x[:, 0]
        elif config["pool"] == "pooler":
            pooled = torch.tanh(self.pooler(x[:, 0]))
        elif config["pool"] == "mean":
            pooled = self.norm(unnormed.mean(1)) if config["norm_after_pool"] else tokens.mean(1)
        else:
            pooled = self.pool(tokens)
            # Attention to one token gives its value alone (Zhou et al. 2022, arXiv:2112.01071, section 3.3).
            alone = self.pool(tokens.flatten(0, 1)[:, None]).view_as(tokens) if patches else None
        maps = [m[:, num_prefix:].unflatten(1, grid) for m in maps]
        return ImageFeatures(
            pooled=pooled,
            tokens=tokens,
            grid=grid,
            levels=(*fine, *maps) if levels else None,
            patches=alone if patches else None,
        )


class BatchNorm(nn.BatchNorm2d):
    """Batch norm; a frozen one keeps to its running statistics in training too."""

    def __init__(self, features: int, frozen: bool):
        super().__init__(features)
        self.frozen = frozen

    def train(self, mode: bool = True) -> BatchNorm:
        return super().train(mode and not self.frozen)


class ConvNorm(nn.Module):
    """The parts of a residual network are pairs NAME_conv, NAME_norm; this reads such a pair."""

    def add_pair(self, name: str, channels: int, features: int, size: int, stride: int, frozen: bool) -> None:
        conv = nn.Conv2d(channels, features, size, stride, padding=(size - 1) // 2, bias=False)
        self.add_module(f"{name}_conv", conv)
        self.add_module(f"{name}_norm", BatchNorm(features, frozen))

    def pair(self, name: str, x: Tensor) -> Tensor:
        return getattr(self, f"{name}_norm")(getattr(self, f"{name}_conv")(x))


class ResidualBlock(ConvNorm):
    """Three convolutions (1x1, 3x3, 1x1), or two of 3x3, and a residual; average: CLIP's way to stride."""

    def __init__(
        self, channels: int, features: int, stride: int, bottleneck: bool, average: bool, frozen: bool
    ):
        super().__init__()
        width = features * (4 if bottleneck else 1)
        self.bottleneck, self.averaged = bottleneck, average and stride > 1
        self.has_shortcut = stride > 1 or channels != width
        stride = 1 if average else stride
        if self.has_shortcut:
            self.add_pair("shortcut", channels, width, 1, stride, frozen)
        if bottleneck:
            self.add_pair("reduce", channels, features, 1, 1, frozen)
            self.add_pair("middle", features, features, 3, stride, frozen)
            self.add_pair("expand", features, width, 1, 1, frozen)
        else:
            self.add_pair("first", channels, width, 3, stride, frozen)
            self.add_pair("second", width, width, 3, 1, frozen)

    def forward(self, x: Tensor) -> Tensor:
        def shrink(y: Tensor) -> Tensor:
            return F.avg_pool2d(y, 2) if self.averaged else y

        residual = self.pair("shortcut", shrink(x)) if self.has_shortcut else x
        if self.bottleneck:
            y = F.relu(self.pair("middle", F.relu(self.pair("reduce", x))))
            y = self.pair("expand", shrink(y))
        else:
            y = F.relu(self.pair("first", x))
            y = self.pair("second", y)
        return F.relu(residual + y)


class ResNetStem(nn.Module):
    """To a quarter of the image's size: three 3x3 convolutions and an average (CLIP), or one 7x7 and a maximum."""

    def __init__(self, width: int, clip: bool, frozen: bool):
        super().__init__()
        half = width // 2
        layers = [(3, half, 3, 2), (half, half, 3, 1), (half, width, 3, 1)] if clip else [(3, width, 7, 2)]
        self.clip, self.depth = clip, len(layers)
        for i, (channels, features, size, stride) in enumerate(layers):
            conv = nn.Conv2d(channels, features, size, stride, padding=(size - 1) // 2, bias=False)
            self.add_module(f"conv_{i}", conv)
            self.add_module(f"norm_{i}", BatchNorm(features, frozen))

    def forward(self, x: Tensor) -> Tensor:
        for i in range(self.depth):
            x = F.relu(getattr(self, f"norm_{i}")(getattr(self, f"conv_{i}")(x)))
        return F.avg_pool2d(x, 2) if self.clip else F.max_pool2d(x, 3, stride=2, padding=1)


class MeanAttentionPool(nn.Module):
    """The mean of a map asks all of it and itself by multi-head attention (Radford et al. 2021, section 2.4)."""

    def __init__(self, width: int, num_heads: int, grid: tuple[int, int]):
        super().__init__()
        self.num_heads, self.grid = num_heads, tuple(grid)
        self.positions = nn.Parameter(torch.zeros(1 + grid[0] * grid[1], width))
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """(pooled [b, d], what each cell of the map would give if it were attended to alone [b, l, d])."""
        x = torch.cat([x.mean(1, keepdim=True), x], dim=1) + resize_positions(self.positions, self.grid, grid)
        values = self.value(x)
        q, k, v = (split_heads(y, self.num_heads) for y in (self.query(x[:, :1]), self.key(x), values))
        return join_heads(attend(q, k, v))[:, 0], values[:, 1:]


class ResNet(nn.Module):
    """Residual network (He et al. 2016, arXiv:1512.03385); the levels are the maps after its four stages."""

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.config = config
        width, frozen = config["width"], config["norm"] == "frozen"
        self.stem = ResNetStem(width, config["clip"], frozen)
        channels = width
        for i, depth in enumerate(config["stages"]):
            for j in range(depth):
                features, stride = width * 2**i, 2 if i and not j else 1
                block = ResidualBlock(
                    channels, features, stride, config["bottleneck"], config["clip"], frozen
                )
                self.add_module(f"stage_{i}_block_{j}", block)
                channels = features * (4 if config["bottleneck"] else 1)
        if config["pool"] == "attention":
            self.pool = MeanAttentionPool(channels, config["num_heads"], config["grid"])

    def forward(self, image: Tensor, *, levels: bool = False, patches: bool = False) -> ImageFeatures:
        grid = grid_of(image, 32)
        x, maps = self.stem(image), []
        for i, depth in enumerate(self.config["stages"]):
            for j in range(depth):
                x = getattr(self, f"stage_{i}_block_{j}")(x)
            maps.append(channels_last(x))
        tokens = x.flatten(2).transpose(1, 2)
        pooled, alone = (
            self.pool(tokens, grid) if self.config["pool"] == "attention" else (tokens.mean(1), tokens)
        )
        return ImageFeatures(
            pooled=pooled,
            tokens=tokens,
            grid=grid,
            levels=tuple(maps) if levels else None,
            patches=alone if patches else None,
        )


class InvertedBottleneck(nn.Module):
    """Layer norm, then 1x1 to four times the width, depthwise 3x3 and 1x1, beside a residual (MBConv-LN)."""

    def __init__(self, channels: int, features: int, stride: int):
        super().__init__()
        hidden = 4 * features
        self.stride = stride
        self.shortcut = nn.Conv2d(channels, features, 1) if channels != features else nn.Identity()
        self.norm = ChannelNorm(channels, 1e-6)
        self.expand = nn.Conv2d(channels, hidden, 1)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, stride, padding=1, groups=hidden)
        self.reduce = nn.Conv2d(hidden, features, 1)

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        if self.stride > 1:
            residual = F.avg_pool2d(x, 3, self.stride, padding=1, count_include_pad=False)
        y = F.gelu(self.expand(self.norm(x)))
        return self.shortcut(residual) + self.reduce(F.gelu(self.depthwise(y)))


class GatedBlock(nn.Module):
    """Pre-norm transformer block; its MLP multiplies a GELU of one map with another (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.attention = Attention(width, num_heads)
        self.attention_norm, self.mlp_norm, self.gate_norm = (nn.LayerNorm(width, 1e-6) for _ in range(3))
        self.gate, self.up = nn.Linear(width, 2 * width), nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.attention_norm(x)
        x = x + self.attention(h, h)
        h = self.gate_norm(self.mlp_norm(x))
        return x + self.down(F.gelu(self.gate(h)) * self.up(h))


class Hybrid(nn.Module):
    """ViTamin (Chen et al. 2024, arXiv:2404.02132): two convolutional stages, then transformer blocks."""

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.config = config
        widths, depths = config["widths"], config["depths"]
        self.stem_0 = nn.Conv2d(3, widths[0], 3, stride=2, padding=1)
        self.stem_norm = ChannelNorm(widths[0], 1e-6)
        self.stem_1 = nn.Conv2d(widths[0], widths[0], 3, padding=1)
        channels = widths[0]
        for i in range(2):
            for j in range(depths[i]):
                block = InvertedBottleneck(channels, widths[i], 1 if j else 2)
                self.add_module(f"stage_{i}_block_{j}", block)
                channels = widths[i]
        self.patch_norm = ChannelNorm(channels, 1e-6)
        self.patch_embed = nn.Conv2d(channels, widths[2], 3, stride=2, padding=1)
        if config["positions"]:
            rows = config["grid"][0] * config["grid"][1]
            self.positions = nn.Parameter(torch.zeros(rows, widths[2]))
        for j in range(depths[2]):
            self.add_module(f"stage_2_block_{j}", GatedBlock(widths[2], config["num_heads"]))
        self.norm = nn.LayerNorm(widths[2], 1e-6)

    def forward(self, image: Tensor, *, levels: bool = False, patches: bool = False) -> ImageFeatures:
        depths, grid = self.config["depths"], grid_of(image, 16)
        x, maps = self.stem_1(F.gelu(self.stem_norm(self.stem_0(image)))), []
        for i in range(2):
            for j in range(depths[i]):
                x = getattr(self, f"stage_{i}_block_{j}")(x)
            maps.append(channels_last(x))
        x = self.patch_embed(self.patch_norm(x)).flatten(2).transpose(1, 2)
        if self.config["positions"]:
            x = x + resize_positions(self.positions, self.config["grid"], grid)
        for j in range(depths[2]):
            x = getattr(self, f"stage_2_block_{j}")(x)
        maps.append(x.unflatten(1, grid))
        return ImageFeatures(
            pooled=self.norm(x.mean(1)),
            tokens=x,
            grid=grid,
            levels=tuple(maps) if levels else None,
            patches=self.norm(x) if patches else None,
        )


def make_image_tower(config: dict[str, Any]) -> nn.Module:
    """The image tower of a config, by its "type"."""
    return {"vit": ViT, "resnet": ResNet, "hybrid": Hybrid}[config["type"]](config)
