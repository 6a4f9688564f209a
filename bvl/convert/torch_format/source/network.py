"""The network put together: towers, projections to the shared space, decoder and region modules."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bvl.convert.torch_format.source.decoder import Decoder
from bvl.convert.torch_format.source.errors import UserError
from bvl.convert.torch_format.source.features import ImageFeatures
from bvl.convert.torch_format.source.hybrid import Hybrid
from bvl.convert.torch_format.source.layers import l2_normalize
from bvl.convert.torch_format.source.region_decoder import Located, RegionDecoder
from bvl.convert.torch_format.source.region_encoder import RegionEncoder, RegionPrompts
from bvl.convert.torch_format.source.resnet import ResNet
from bvl.convert.torch_format.source.text_towers import TextFeatures, make_text_tower, pool_tokens
from bvl.convert.torch_format.source.vit import ViT


def make_image_tower(config: dict[str, Any]) -> nn.Module:
    """The image tower of a config, by its "type"."""
    return {"vit": ViT, "resnet": ResNet, "hybrid": Hybrid}[config["type"]](config)


class ProjectionMlp(nn.Module):
    """Two affine maps without bias and a GELU between; hidden width: the mean of both ends."""

    def __init__(self, width: int, embed_dim: int):
        super().__init__()
        middle = (width + embed_dim) // 2
        self.hidden = nn.Linear(width, middle, bias=False)
        self.out = nn.Linear(middle, embed_dim, bias=False)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.out(F.gelu(self.hidden(pooled)))


def make_projection(kind: str, width: int, embed_dim: int) -> nn.Module:
    """From a tower's pooled vector to the shared space."""
    if kind == "none":
        return nn.Identity()
    if kind == "mlp":
        return ProjectionMlp(width, embed_dim)
    return nn.Linear(width, embed_dim, bias=kind == "linear_bias")


class Network(nn.Module):
    """An image tower and a text tower that meet in one space, a text decoder over image tokens, and region modules.

    For fine-tuning: `forward` gives the logits of all pairs of images and texts; `decode` with `decoder.logits` those of
    a text's next tokens. A part that this model does not have is None. Dropout and stochastic depth are not part of
    the file.
    """

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.config = config

        def make(name: str, kind: Any) -> nn.Module | None:
            return None if config[name] is None else kind(config[name])

        self.image, self.text = make("image", make_image_tower), make("text", make_text_tower)
        self.decoder = make("decoder", Decoder)
        self.region_encoder = make("region_encoder", RegionEncoder)
        self.region_decoder = make("region_decoder", RegionDecoder)
        embed_dim, widths = config["embed_dim"], config["pooled_widths"]
        self.image_projection, self.text_projection = (
            make_projection(config[f"{name}_projection"], widths[name], embed_dim) if widths[name] else None
            for name in ("image", "text")
        )
        if config["has_logits"]:
            self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))
            if config["has_bias"]:
                self.logit_bias = nn.Parameter(torch.tensor(0.0))

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def normalize(self, pixels: Tensor) -> Tensor:
        """uint8 pixels [b, H, W, 3 or 4] -> the input of `encode_image` [b, 3 or 4, H, W]; a fourth channel is a mask."""
        masks = pixels.shape[-1] - 3
        mean, std = (*self.config["mean"], *(0.0,) * masks), (*self.config["std"], *(1.0,) * masks)
        mean, std = (torch.tensor(x, dtype=torch.float32, device=self.device) for x in (mean, std))
        x = pixels.to(self.device).float() * (1.0 / (255.0 * std)) - mean / std
        return x.permute(0, 3, 1, 2).to(self.dtype)

    def encode_image(
        self, image: Tensor, *, levels: bool = False, patch_embed: bool = False
    ) -> ImageFeatures:
        """Features of normalised images [b, 3, H, W]; levels, patch_embed: give these too."""
        if self.image is None:
            raise UserError("this model has no image tower")
        out = self.image(image, levels=levels, patches=patch_embed)
        out.embed = l2_normalize(self.image_projection(out.pooled))
        if patch_embed:
            out.patch_embed = l2_normalize(self.image_projection(out.patches))
        return out

    def encode_text(self, tokens: Tensor, mask: Tensor) -> TextFeatures:
        """Features of token ids [b, t] and their mask."""
        if self.text is not None:
            out = self.text(tokens, mask)
        elif self.decoder is not None and self.config["decoder"]["layout"] == "coca":
            x, pooled = self.decoder.embed_text(tokens, mask)
            if pooled is None:
                pooled = pool_tokens(x, tokens, mask, "end", self.config["end_id"])
            out = TextFeatures(pooled, x)
        else:
            raise UserError("this model has no text tower, so it gives no text embeddings")
        out.embed = l2_normalize(self.text_projection(out.pooled))
        return out

    def logit_scale_and_bias(self) -> tuple[Tensor, Tensor]:
        """(scale, bias) of the logits scale * cosine + bias."""
        if not self.config["has_logits"]:
            return torch.ones((), device=self.device), torch.zeros((), device=self.device)
        scale = self.log_scale.clamp(max=math.log(self.config["max_scale"])).exp()
        return scale, self.logit_bias if self.config["has_bias"] else torch.zeros_like(scale)

    def forward(self, image: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Logits [images, texts] of which text belongs to which image."""
        scale, bias = self.logit_scale_and_bias()
        return scale * self.encode_image(image).embed @ self.encode_text(tokens, mask).embed.T + bias

    def decode(
        self, image: ImageFeatures, tokens: Tensor, mask: Tensor, dropped: Tensor | None = None
    ) -> Tensor:
        """The decoder's hidden states [b, l, d] of texts about images; the null stands for `dropped` images [b]."""
        if dropped is None:
            dropped = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        return self.decoder(*self.decoder.visual_tokens(image.for_decoder, dropped), tokens, mask)

    def encode_regions(
        self, image: ImageFeatures, prompts: RegionPrompts, dropped: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What the decoder sees of regions, behind the image's tokens; see RegionEncoder."""
        return self.region_encoder(image, prompts, dropped)

    def ground_phrases(
        self, image: ImageFeatures, phrase: Tensor, words: Tensor, words_mask: Tensor
    ) -> Located:
        """Boxes, mask and presence of phrases; see RegionDecoder."""
        return self.region_decoder.ground(image, phrase, words, words_mask)
