"""Vision transformers. Image towers read normalised pixels [b, 3, H, W]."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bvl.convert.torch_format.source.errors import UserError
from bvl.convert.torch_format.source.features import ImageFeatures, channels_last, grid_of
from bvl.convert.torch_format.source.layers import (
    AttentionPool,
    ChannelNorm,
    Stack,
    resize_positions,
)


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


class AttentionalPooler(nn.Module):
    """Learned queries attend to all tokens, and the text decoder reads what they give (CoCa: Yu et al. 2022, arXiv:2205.01917)."""

    def __init__(self, token_width: int, config: dict[str, int]):
        super().__init__()
        width = config["width"]
        self.queries = nn.Parameter(torch.zeros(config["queries"], width))
        self.query_norm, self.token_norm = nn.LayerNorm(width), nn.LayerNorm(token_width)
        self.attention = Attention(width, config["num_heads"], key_width=token_width)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(a vector for each query [b, q, w], the tokens as they are attended to [b, l, d])."""
        normed = self.token_norm(tokens)
        queries = self.query_norm(self.queries).expand(len(tokens), -1, -1)
        return self.attention(queries, normed), normed

    def alone(self, tokens: Tensor) -> Tensor:
        """What each token alone would give any query [b, l, w]."""
        single = self.token_norm(tokens).flatten(0, 1)[:, None]
        query = single.new_zeros(len(single), 1, self.queries.shape[1])
        return self.attention(query, single).view(*tokens.shape[:2], -1)


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
        pooler = config["attentional_pool"]
        self.attentional_pool = None if pooler is None else AttentionalPooler(width, pooler)
        self.norm = nn.LayerNorm(width if pooler is None else pooler["width"], epsilon)
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
        maps = [*fine, *(m[:, num_prefix:].unflatten(1, grid) for m in maps)]
        shared = {"grid": grid, "levels": tuple(maps) if levels else None}
        if self.attentional_pool is not None:
            alone = self.norm(self.attentional_pool.alone(x[:, num_prefix:])) if patches else None
            pooled, tokens = self.attentional_pool(x)
            pooled = self.norm(pooled)
            return ImageFeatures(
                pooled=pooled[:, 0] if config["pool"] == "cls" else pooled[:, 1:].mean(1),
                tokens=tokens[:, num_prefix:],
                patches=alone,
                visual=pooled[:, 1:],
                **shared,
            )
        unnormed, x = x, self.norm(x)
        tokens = alone = x[:, num_prefix:]
        first = 0 if config["pool_prefix"] else num_prefix
        if config["pool"] == "cls":
            pooled = x[:, 0]
        elif config["pool"] == "pooler":
            pooled = torch.tanh(self.pooler(x[:, 0]))
        elif config["pool"] == "mean":
            after = config["norm_after_pool"]
            pooled = self.norm(unnormed[:, first:].mean(1)) if after else x[:, first:].mean(1)
        else:
            pooled = self.pool(x[:, first:])
            # Attention to one token gives its value alone (Zhou et al. 2022, arXiv:2112.01071, section 3.3).
            alone = self.pool(tokens.flatten(0, 1)[:, None]).view_as(tokens) if patches else None
        return ImageFeatures(
            pooled=pooled,
            tokens=tokens,
            patches=alone if patches else None,
            visual={"all": x, "unnormed": unnormed}.get(config["visual"]),
            **shared,
        )
