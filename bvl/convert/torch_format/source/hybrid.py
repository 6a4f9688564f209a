"""ViTamin: two convolutional stages, then transformer blocks with gated MLPs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bvl.convert.torch_format.source.features import ImageFeatures, channels_last, grid_of
from bvl.convert.torch_format.source.layers import Attention, ChannelNorm, resize_positions


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
