"""Residual networks: those of CLIP and those of torchvision."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bvl.convert.torch_format.source.features import ImageFeatures, channels_last, grid_of
from bvl.convert.torch_format.source.layers import attend, join_heads, resize_positions, split_heads


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
