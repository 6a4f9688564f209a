"""What the towers return. `need` names the fields wanted; what is not asked for stays None and costs nothing."""

from __future__ import annotations

import flax.struct
from jaxtyping import Array, Bool, Float


@flax.struct.dataclass
class ImageFeatures:
    """`embed`: in the shared space, unit norm. `pooled`: before the projection. `tokens`: one per patch.

    `levels`: feature maps of the tower from fine to coarse (of a ViT: from early to late), rows and columns first.
    """

    embed: Float[Array, "b e"] | None = None
    pooled: Float[Array, "b d"] | None = None
    tokens: Float[Array, "b l d"] | None = None
    levels: tuple[Float[Array, "b h w c"], ...] | None = None
    # Rows and columns of the patch grid that `tokens` lists row by row; None where patches were dropped.
    grid: tuple[int, int] | None = flax.struct.field(pytree_node=False, default=None)


@flax.struct.dataclass
class TextFeatures:
    """As ImageFeatures; `mask` says which tokens are text."""

    embed: Float[Array, "b e"] | None = None
    pooled: Float[Array, "b d"] | None = None
    tokens: Float[Array, "b l d"] | None = None
    mask: Bool[Array, "b l"] | None = None
