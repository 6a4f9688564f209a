"""Regions in: boxes, points and masks of an image as visual tokens of the text decoder."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bvl.convert.torch_format.source.decoder import replace_dropped
from bvl.convert.torch_format.source.features import ImageFeatures
from bvl.convert.torch_format.source.layers import Block

# Waves of 1, 2, 4, ... half periods over the image.
NUM_FREQUENCIES = 7
BOX, POINT, MASK = range(3)


@dataclasses.dataclass
class RegionPrompts:
    """Regions that are asked about, r an image, in fractions of the model's image.

    kind [b, r]: 0 box, 1 point, 2 mask. box [b, r, 4], point [b, r, 2] and mask [b, r, h, w] are filled for every kind.
    """

    box: Tensor
    point: Tensor
    mask: Tensor
    kind: Tensor


def sampling_weights(low: Tensor, high: Tensor, size: int, cells: int, ratio: int) -> Tensor:
    """Weights [b, r, cells, size] of a map's rows (or columns) in each cell of boxes from `low` to `high` [b, r]."""
    steps = (torch.arange(cells * ratio, device=low.device) + 0.5) / (cells * ratio)
    points = ((low[..., None] + (high - low)[..., None] * steps) * size - 0.5).clamp(0.0, size - 1.0)
    places = torch.arange(size, device=low.device)
    weights = (1.0 - (points[..., None] - places).abs()).clamp(min=0.0)
    return weights.unflatten(2, (cells, ratio)).mean(3)


def roi_align(features: Tensor, boxes: Tensor, output_size: int, sampling_ratio: int) -> Tensor:
    """Features [b, r, i, j, c] inside each box [b, r, 4] of maps [b, h, w, c] (He et al. 2017, arXiv:1703.06870)."""
    along_y = sampling_weights(boxes[..., 1], boxes[..., 3], features.shape[1], output_size, sampling_ratio)
    along_x = sampling_weights(boxes[..., 0], boxes[..., 2], features.shape[2], output_size, sampling_ratio)
    y = torch.einsum("brih,bhwc->briwc", along_y.to(features.dtype), features)
    return torch.einsum("brjw,briwc->brijc", along_x.to(features.dtype), y)


def box_coverage(boxes: Tensor, grid: tuple[int, int]) -> Tensor:
    """The share of each cell of a grid [..., h, w] that a box [..., 4] covers."""

    def overlap(low: Tensor, high: Tensor, size: int) -> Tensor:
        edges = torch.arange(size, device=low.device) / size
        inside = torch.minimum(high[..., None], edges + 1 / size) - torch.maximum(low[..., None], edges)
        return inside.clamp(min=0.0) * size

    along_y = overlap(boxes[..., 1], boxes[..., 3], grid[0])
    along_x = overlap(boxes[..., 0], boxes[..., 2], grid[1])
    return along_y[..., :, None] * along_x[..., None, :]


def mask_coverage(masks: Tensor, grid: tuple[int, int]) -> Tensor:
    """The share of each cell of a grid [..., i, j] that a mask [..., h, w] of any size covers."""

    def shares(size: int, cells: int) -> Tensor:
        low = torch.arange(cells, device=masks.device) / cells
        zeros, ones = torch.zeros_like(low), torch.ones_like(low)
        covered = box_coverage(torch.stack([low, zeros, low + 1 / cells, ones], dim=-1), (1, size))[:, 0]
        return covered / (size / cells)

    rows, columns = shares(masks.shape[-2], grid[0]), shares(masks.shape[-1], grid[1])
    return torch.einsum("ih,...hw,jw->...ij", rows, masks.float(), columns)


class CoordinateEmbedding(nn.Module):
    """Waves of each coordinate of a box, then two affine maps; a vector for each kind of region is added."""

    def __init__(self, width: int):
        super().__init__()
        self.kinds = nn.Parameter(torch.zeros(3, width))
        self.hidden, self.out = nn.Linear(8 * NUM_FREQUENCIES + 6, width), nn.Linear(width, width)

    def forward(self, box: Tensor, kind: Tensor) -> Tensor:
        """[b, r, 4] -> [b, r, d]."""
        angles = box[..., None] * (math.pi * 2.0 ** torch.arange(NUM_FREQUENCIES, device=box.device))
        waves = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(2)
        x = torch.cat([waves, box, box[..., 2:] - box[..., :2]], dim=-1).to(self.kinds.dtype)
        return self.out(F.gelu(self.hidden(x))) + self.kinds[kind.long()]


class RegionEncoder(nn.Module):
    """Visual tokens of regions at the decoder's width; regions of one image share its features.

    kind: "box_token" (the coordinates), "roi_align" (features inside the box), "mask_embedding" (the image's tokens,
    once they know of the region), "mask_channel" (tokens of the image encoded anew with the mask as fourth channel).
    """

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.config = config
        width, tokens = config["width"], config["image_width"]
        if config["kind"] != "mask_channel":
            self.coordinates = CoordinateEmbedding(width)
        if config["kind"] == "roi_align":
            self.cells = nn.Parameter(torch.zeros(config["output_size"], config["output_size"], width))
            for i, channels in enumerate(config["level_widths"]):
                self.add_module(f"level_{i}_norm", nn.LayerNorm(channels))
                self.add_module(f"level_{i}", nn.Linear(channels, width))
            self.features = nn.Linear(width, width)
        elif config["kind"] == "mask_embedding":
            heads = config["num_heads"] if tokens % config["num_heads"] == 0 else 1
            self.mask = nn.Parameter(torch.zeros(tokens))
            self.block, self.pooled_norm = Block(tokens, heads, 2 * tokens), nn.LayerNorm(tokens)
            self.features = nn.Linear(tokens, width)
        elif config["kind"] == "mask_channel":
            self.features = nn.Linear(tokens, width)
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, config["decoder_width"])
        self.null = nn.Parameter(torch.zeros(config["decoder_width"]))

    def forward(self, image: ImageFeatures, prompts: RegionPrompts, dropped: Tensor) -> tuple[Tensor, Tensor]:
        """(visual tokens [b * r, s, d], which are there) of the regions, row by row; `dropped` [b * r] are the null.

        For kind "mask_channel" the image's tokens are those of the images with their masks, one row a region.
        """
        kind = self.config["kind"]
        if kind == "mask_channel":
            place = self.features(image.tokens)
        else:
            place = self.coordinates(prompts.box, prompts.kind)
            if kind == "roi_align":
                place = place + self._aligned(image, prompts)
            elif kind == "mask_embedding":
                place = place + self._masked(image, prompts)
            place = place.flatten(0, 1)[:, None]
        return replace_dropped(self.out(F.gelu(self.norm(place))), self.null, dropped)

    def _squares(self, prompts: RegionPrompts) -> Tensor:
        """The boxes of the regions, with a square around each point."""
        half = self.config["point_extent"] / 2
        square = torch.cat([prompts.point - half, prompts.point + half], dim=-1)
        return torch.where((prompts.kind == POINT)[..., None], square, prompts.box)

    def _aligned(self, image: ImageFeatures, prompts: RegionPrompts) -> Tensor:
        size, ratio = self.config["output_size"], self.config["sampling_ratio"]
        maps = [image.tokens.unflatten(1, image.grid)]
        maps += [image.levels[i] for i in self.config["levels"]]
        boxes = self._squares(prompts)
        # Boxes and points have all of their square; a mask has what it covers.
        masks = prompts.mask.flatten(0, 1)[..., None].float()
        own = roi_align(masks, boxes.flatten(0, 1)[:, None], size, ratio)[:, 0, ..., 0]
        own = own.unflatten(0, boxes.shape[:2])
        weights = torch.where((prompts.kind == MASK)[..., None, None], own, torch.ones_like(own))
        weights = weights / weights.sum((2, 3), keepdim=True).clamp(min=1e-6)
        total = self.cells
        for i, features in enumerate(maps):
            aligned = getattr(self, f"level_{i}_norm")(roi_align(features, boxes, size, ratio))
            total = total + getattr(self, f"level_{i}")(aligned)
        total = F.gelu(total)
        return self.features(torch.einsum("brij,brijd->brd", weights.to(total.dtype), total))

    def _masked(self, image: ImageFeatures, prompts: RegionPrompts) -> Tensor:
        squares = box_coverage(self._squares(prompts), image.grid)
        is_point = (prompts.kind == POINT)[..., None, None]
        covered = torch.where(is_point, squares, mask_coverage(prompts.mask, image.grid)).flatten(2)
        x = image.tokens[:, None] + covered[..., None].to(image.tokens.dtype) * self.mask
        x = self.block(x.flatten(0, 1)).unflatten(0, covered.shape[:2])
        shares = covered / covered.sum(-1, keepdim=True).clamp(min=1e-6)
        pooled = torch.einsum("brl,brld->brd", shares.to(x.dtype), x)
        return self.features(self.pooled_norm(pooled))
