"""What an image tower makes of images."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from bvl.convert.torch_format.source.errors import UserError


@dataclasses.dataclass
class ImageFeatures:
    """pooled [b, d]; tokens [b, l, d], one a patch of the `grid` (rows, columns), row by row.

    levels: maps [b, h, w, c] from fine to coarse. patches [b, l, d]: each patch pooled alone, as if the image were
    nothing else. embed [b, e], patch_embed [b, l, e]: `pooled` and `patches` in the space shared with texts, unit norm.
    visual [b, s, v]: what the text decoder reads, where that is not `tokens`. What was not asked for is None.
    """

    pooled: Tensor
    tokens: Tensor
    grid: tuple[int, int]
    levels: tuple[Tensor, ...] | None = None
    patches: Tensor | None = None
    embed: Tensor | None = None
    patch_embed: Tensor | None = None
    visual: Tensor | None = None

    @property
    def for_decoder(self) -> Tensor:
        """What the text decoder reads."""
        return self.tokens if self.visual is None else self.visual


def grid_of(image: Tensor, stride: int) -> tuple[int, int]:
    """Rows and columns of the patches of images [b, c, H, W]; UserError where they do not fit."""
    height, width = image.shape[-2:]
    if height % stride or width % stride:
        raise UserError(f"an image of {height} x {width} pixels is not divisible by {stride}")
    return height // stride, width // stride


def channels_last(x: Tensor) -> Tensor:
    """[b, c, h, w] -> [b, h, w, c]."""
    return x.permute(0, 2, 3, 1)
