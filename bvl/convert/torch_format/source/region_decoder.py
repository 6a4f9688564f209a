"""Regions out: a light two-way transformer between phrases and patches gives boxes, masks, embeddings and presence."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bvl.convert.torch_format.source.features import ImageFeatures
from bvl.convert.torch_format.source.layers import Attention, Mlp, l2_normalize, resize

MAX_SCALE = 100.0


@dataclasses.dataclass
class Located:
    """For each phrase p candidates q, or for each image candidates q without a phrase.

    boxes [b, (p,) q, 4] in fractions of the model's image. scores [b, p, q]: logits of which candidate is the phrase's.
    mask_logits [b, p or q, h, w]. presence [b, p or q]: logits of whether there is anything. embed [b, p or q, e]: in
    the space shared with texts, unit norm.
    """

    boxes: Tensor
    presence: Tensor
    embed: Tensor
    scores: Tensor | None
    mask_logits: Tensor | None


class TwoWayBlock(nn.Module):
    """Queries among themselves, queries to patches, an MLP, patches to queries (Kirillov et al. 2023, arXiv:2304.02643)."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        for name in ("self", "patches", "query", "mlp", "answer", "patch_mlp"):
            self.add_module(f"{name}_norm", nn.LayerNorm(width))
        for name in ("self", "to_patches", "to_queries"):
            self.add_module(name, Attention(width, num_heads))
        self.mlp, self.patch_mlp = Mlp(width, 2 * width), Mlp(width, 2 * width)

    def forward(self, q: Tensor, q_mask: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.self_norm(q)
        q = q + self.self(y, y, key_mask=q_mask)
        keys = self.patches_norm(x)
        q = q + self.to_patches(self.query_norm(q), keys)
        q = q + self.mlp(self.mlp_norm(q))
        x = x + self.to_queries(keys, self.answer_norm(q), key_mask=q_mask)
        return q, x + self.patch_mlp(self.patch_mlp_norm(x))


class PixelEmbedding(nn.Module):
    """Patch tokens to one vector for each pixel of the masks: up-sampled by 2 at a time, finer maps added."""

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.config, self.size = config, tuple(config["mask_size"])
        width = config["pixel_width"]
        self.add_module("in", nn.Linear(config["width"], width))
        for step, channels in enumerate(config["fine_widths"]):
            if channels:
                self.add_module(f"fine_norm_{step}", nn.LayerNorm(channels))
                self.add_module(f"fine_{step}", nn.Linear(channels, width))
            self.add_module(f"norm_{step}", nn.LayerNorm(width))
            self.add_module(f"conv_{step}", nn.Conv2d(width, width, 3, padding=1))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, levels: tuple[Tensor, ...]) -> Tensor:
        """Patches [b, h, w, d] and finer maps -> [b, H, W, c]."""
        by_size = {tuple(level.shape[1:3]): level for level in levels}
        x = getattr(self, "in")(x)
        step = 0
        while tuple(x.shape[1:3]) != self.size:
            grown = tuple(min(2 * a, b) for a, b in zip(x.shape[1:3], self.size, strict=True))
            if grown == (2 * x.shape[1], 2 * x.shape[2]):
                x = x.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
            else:
                x = resize(x.permute(0, 3, 1, 2), grown, "bilinear").permute(0, 2, 3, 1)
            if grown in by_size:
                fine = getattr(self, f"fine_norm_{step}")(by_size[grown])
                x = x + getattr(self, f"fine_{step}")(fine)
            y = F.gelu(getattr(self, f"norm_{step}")(x)).permute(0, 3, 1, 2)
            x = x + getattr(self, f"conv_{step}")(y).permute(0, 2, 3, 1)
            step += 1
        return self.norm(x)


class RegionDecoder(nn.Module):
    """Finds what phrases name (ground), and the objects of an image (detect)."""

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.config = config
        width = config["width"]
        self.image_in, self.image_norm = nn.Linear(config["image_width"], width), nn.LayerNorm(width)
        self.pixels = PixelEmbedding(config)
        if config["reads_own_pixels"]:
            self.fine_in = nn.Linear(config["pixel_width"], width)
        self.phrase_in, self.words_in = (nn.Linear(config["phrase_width"], width) for _ in range(2))
        self.queries = nn.Parameter(torch.zeros(config["num_queries"], width))
        for i in range(config["depth"]):
            self.add_module(f"block_{i}", TwoWayBlock(width, config["num_heads"]))
        self.query_norm, self.candidate_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.box_hidden, self.box_out = nn.Linear(width, width), nn.Linear(width, 4)
        self.score_candidate, self.score_query = nn.Linear(width, width), nn.Linear(width, width)
        self.mask_query, self.mask_patch = (
            nn.Linear(width, config["pixel_width"] + 1),
            nn.Linear(width, width),
        )
        self.presence_hidden, self.presence_out = nn.Linear(2 * width, width), nn.Linear(width, 1)
        self.object_out = nn.Linear(width, 1)
        self.embed_hidden, self.embed_out = nn.Linear(width, width), nn.Linear(width, config["embed_dim"])
        self.log_scale = nn.Parameter(torch.full((1,), math.log(10.0)))
        self.bias = nn.Parameter(torch.full((1,), -2.0))

    def ground(self, image: ImageFeatures, phrase: Tensor, words: Tensor, words_mask: Tensor) -> Located:
        """Boxes, mask and presence of phrases, given by a vector [b, p, e] and tokens [b, p, t, d] each."""
        rows, count = phrase.shape[:2]
        x, pixels = self._image(image)
        learned = self.queries.expand(rows * count, -1, -1)
        q = torch.cat(
            [self.phrase_in(phrase).flatten(0, 1)[:, None], learned, self.words_in(words).flatten(0, 1)],
            dim=1,
        )
        first_word = 1 + self.config["num_queries"]
        mask = F.pad(words_mask.flatten(0, 1), (first_word, 0), value=True)
        q, x = self._exchange(q, mask, x.repeat_interleave(count, dim=0))
        state, candidates = q[:, 0], self._candidates(q[:, 1:first_word], x)
        query = self.score_query(state)
        scores = scaled_product(self.score_candidate(candidates), query)
        # What the likeliest candidates are, and how well they fit, decides about presence.
        seen = torch.einsum("nq,nqd->nd", scores.softmax(-1).to(candidates.dtype), candidates)
        hidden = F.gelu(self.presence_hidden(torch.cat([state, seen], dim=-1)))
        best = scores.logsumexp(-1) - math.log(scores.shape[-1])
        presence = self.presence_out(hidden)[..., 0].float() + best
        coarse = scaled_product(self.mask_patch(x), query).unflatten(-1, image.grid)

        def split(y: Tensor) -> Tensor:
            return y.unflatten(0, (rows, count))

        masks = self._masks(pixels, split(self.mask_query(state)))
        masks = masks + resize(split(coarse), masks.shape[-2:], "bilinear")
        return Located(
            boxes=split(self._boxes(candidates, image.grid)),
            presence=split(presence),
            embed=split(self._embed(state)),
            scores=split(scores),
            mask_logits=masks,
        )

    def detect(self, image: ImageFeatures) -> Located:
        """The image's candidates, whatever they are: boxes, embeddings to compare with names, presence."""
        x, pixels = self._image(image)
        q, x = self._exchange(self.queries.expand(len(x), -1, -1), None, x)
        candidates = self._candidates(q, x)
        masks = None
        if self.config["instance_masks"]:
            masks = self._masks(pixels, self.mask_query(candidates))
        presence = self.object_out(candidates)[..., 0].float()
        boxes, embed = self._boxes(candidates, image.grid), self._embed(candidates)
        return Located(boxes=boxes, presence=presence, embed=embed, scores=None, mask_logits=masks)

    def detection_logits(self, embed: Tensor, names: Tensor) -> Tensor:
        """How well each candidate [b, q, e] fits each name [n, e], both of unit norm: scale * cosine + bias."""
        return self.log_scale.clamp(max=math.log(MAX_SCALE)).exp() * (embed @ names.T) + self.bias

    def _image(self, image: ImageFeatures) -> tuple[Tensor, Tensor]:
        """(patches [b, l, d], pixel embeddings [b, h, w, c])."""
        x = self.image_norm(self.image_in(image.tokens))
        fine = image.levels if self.config["reads_levels"] and image.levels is not None else ()
        pixels = self.pixels(x.unflatten(1, image.grid), fine)
        if self.config["reads_own_pixels"]:
            # Each patch also gets the mean of its own pixels, which have seen the finer maps.
            rows, columns = image.grid
            own = pixels.unflatten(2, (columns, -1)).unflatten(1, (rows, -1)).mean((2, 4))
            x = x + self.fine_in(own.flatten(1, 2))
        return x, pixels

    def _exchange(self, q: Tensor, mask: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:
        for i in range(self.config["depth"]):
            q, x = getattr(self, f"block_{i}")(q, mask, x)
        return self.query_norm(q), self.candidate_norm(x)

    def _candidates(self, learned: Tensor, patches: Tensor) -> Tensor:
        return patches if self.config["queries"] == "patches" else learned

    def _boxes(self, candidates: Tensor, grid: tuple[int, int]) -> Tensor:
        """[x0, y0, x1, y1] from centre and size, which for patches are predicted relative to the patch's."""
        raw = self.box_out(F.gelu(self.box_hidden(candidates))).float()
        if self.config["queries"] == "patches":
            rows, columns = grid
            y = (torch.arange(rows, dtype=torch.float64) + 0.5) / rows
            x = (torch.arange(columns, dtype=torch.float64) + 0.5) / columns
            y, x = torch.meshgrid(y, x, indexing="ij")
            size = torch.tensor([min(2 / columns, 0.5), min(2 / rows, 0.5)], dtype=torch.float64)
            prior = torch.cat([torch.stack([x, y], -1).flatten(0, 1), size.expand(rows * columns, 2)], dim=1)
            raw = raw + (prior / (1 - prior)).log().to(raw)
        centre, size = raw.sigmoid().chunk(2, dim=-1)
        return torch.cat([centre - size / 2, centre + size / 2], dim=-1)

    def _masks(self, pixels: Tensor, query: Tensor) -> Tensor:
        """Mask logits [b, n, h, w]: products of queries [b, n, c + 1] and pixels, and a bias of each query."""
        weights, bias = query[..., :-1], query[..., -1].float()
        logits = torch.einsum("bhwc,bnc->bnhw", pixels, weights).float()
        return logits / math.sqrt(weights.shape[-1]) + bias[..., None, None]

    def _embed(self, states: Tensor) -> Tensor:
        return l2_normalize(self.embed_out(F.gelu(self.embed_hidden(states))))


def scaled_product(x: Tensor, query: Tensor) -> Tensor:
    """[n, q, d] and [n, d] -> [n, q]."""
    return torch.einsum("nqd,nd->nq", x, query).float() / math.sqrt(x.shape[-1])
