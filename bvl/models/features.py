"""What goes into and comes out of the model's parts. `need` names the fields wanted; the others stay None, at no cost."""

from __future__ import annotations

import flax.struct
from jaxtyping import Array, Bool, Float, Int8


@flax.struct.dataclass
class ImageFeatures:
    """`embed`: in the shared space, unit norm. `pooled`: before the projection. `tokens`: one per patch.

    `levels`: feature maps of the tower from fine to coarse (of a ViT: those of its convolutional stem, then blocks
    from early to late), rows and columns first.
    `patches`: each patch pooled alone, as if the image were nothing else; `patch_embed`: these in the shared space, of
    unit norm, so that they can be compared with texts.
    `visual`: what a text decoder reads, where that is not `tokens`; see `for_decoder`.
    """

    embed: Float[Array, "b e"] | None = None
    pooled: Float[Array, "b d"] | None = None
    tokens: Float[Array, "b l d"] | None = None
    levels: tuple[Float[Array, "b h w c"], ...] | None = None
    patches: Float[Array, "b l d"] | None = None
    patch_embed: Float[Array, "b l e"] | None = None
    visual: Float[Array, "b s v"] | None = None
    # Rows and columns of the patch grid that `tokens` lists row by row; None where patches were dropped.
    grid: tuple[int, int] | None = flax.struct.field(pytree_node=False, default=None)

    @property
    def for_decoder(self) -> Float[Array, "b s v"] | None:
        """What a text decoder reads, of an encoding that "visual" was needed of."""
        return self.tokens if self.visual is None else self.visual


@flax.struct.dataclass
class TextFeatures:
    """As ImageFeatures; `mask` says which tokens are text."""

    embed: Float[Array, "b e"] | None = None
    pooled: Float[Array, "b d"] | None = None
    tokens: Float[Array, "b l d"] | None = None
    mask: Bool[Array, "b l"] | None = None


@flax.struct.dataclass
class RegionPrompts:
    """Regions that are asked about, r an image, in fractions of the model's image (bvl/data/regions.py).

    `kind`: 0 box, 1 point, 2 mask. All fields are filled for every kind: `box` is the tight one of a mask and [x, y, x, y]
    for a point, `point` the centre of a box, `mask` the filled box, or the cell that holds the point.
    """

    box: Float[Array, "b r 4"]
    point: Float[Array, "b r 2"]
    mask: Bool[Array, "b r h w"]
    kind: Int8[Array, "b r"]


@flax.struct.dataclass
class Located:
    """What the region decoder finds: for each phrase p candidates q, or for each image candidates q without a phrase.

    `boxes` in fractions of the model's image. `scores`: logits of which candidate is the phrase's. `mask_logits`: on the
    decoder's pixel grid. `presence`: logits of whether there is anything. `embed`: in the shared space, unit norm.
    """

    boxes: Float[Array, "b *p q 4"]
    presence: Float[Array, "b pq"]
    embed: Float[Array, "b pq e"]
    scores: Float[Array, "b p q"] | None = None
    mask_logits: Float[Array, "b pq h w"] | None = None
