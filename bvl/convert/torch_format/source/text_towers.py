"""Text towers: transformers of the CLIP and SigLIP type, and BERT. They read token ids [b, t] and their mask [b, t]."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bvl.convert.torch_format.source.errors import UserError
from bvl.convert.torch_format.source.layers import Stack


@dataclasses.dataclass
class TextFeatures:
    """pooled [b, d]; tokens [b, t, d]; embed [b, e]: `pooled` in the space shared with images, unit norm."""

    pooled: Tensor
    tokens: Tensor
    embed: Tensor | None = None


def pool_tokens(x: Tensor, tokens: Tensor, mask: Tensor, pool: str, end_id: int) -> Tensor:
    """One vector a text: of the first ("cls"), the last ("last"), the end token ("end"), that of the
    highest id ("highest"), or over the text tokens."""
    if pool == "cls":
        return x[:, 0]
    if pool == "last":
        return x[:, -1]
    if pool == "mean":
        weights = mask[..., None].to(x.dtype)
        return (x * weights).sum(1) / weights.sum(1).clamp(min=1.0)
    if pool == "max":
        highest = x.masked_fill(~mask[..., None], torch.finfo(x.dtype).min).amax(1)
        return torch.where(mask.any(1, keepdim=True), highest, torch.zeros_like(highest))
    if pool in ("end", "highest"):
        place = (tokens if pool == "highest" else (tokens == end_id).int()).argmax(1)
        return x[torch.arange(len(x), device=x.device), place]
    raise UserError(f"text pool {pool!r} is unknown to this file")


class TextTransformer(nn.Module):
    """CLIP's (causal, pooled at the end token) and SigLIP's (bidirectional, pooled at the last position)."""

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.config = config
        width, epsilon = config["width"], config["norm_epsilon"]
        self.token_embed = nn.Parameter(torch.zeros(config["vocab_size"], width))
        self.positions = nn.Parameter(torch.zeros(config["context_length"], width))
        self.stack = Stack(
            config["depth"],
            width,
            config["num_heads"],
            config["mlp_hidden"],
            causal=config["causal"],
            epsilon=epsilon,
            activation=config["activation"],
            qk_norm=config["qk_norm"],
            layer_scale=config["layer_scale"],
        )
        self.norm = nn.LayerNorm(width, epsilon)

    def forward(self, tokens: Tensor, mask: Tensor) -> TextFeatures:
        config = self.config
        x = F.embedding(tokens, self.token_embed) + self.positions[: tokens.shape[1]]
        # Under a causal mask no text token sees the padding behind it.
        key_mask = None if config["causal"] or config["attend_padding"] else mask
        x = self.norm(self.stack(x, key_mask)[0])
        return TextFeatures(pool_tokens(x, tokens, mask, config["pool"], config["end_id"]), x)


class Bert(nn.Module):
    """BERT (Devlin et al. 2019, arXiv:1810.04805); token types are 0. pool "pooler": first token, dense, tanh."""

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.config = config
        width, epsilon = config["width"], config["norm_epsilon"]
        self.token_embed = nn.Parameter(torch.zeros(config["vocab_size"], width))
        self.positions = nn.Parameter(torch.zeros(config["max_positions"], width))
        self.token_types = nn.Parameter(torch.zeros(config["type_vocab_size"], width))
        self.embed_norm = nn.LayerNorm(width, epsilon)
        self.stack = Stack(
            config["depth"],
            width,
            config["num_heads"],
            config["mlp_hidden"],
            post_norm=True,
            epsilon=epsilon,
            activation=config["activation"],
        )
        if config["pool"] == "pooler":
            self.pooler = nn.Linear(width, width)

    def forward(self, tokens: Tensor, mask: Tensor) -> TextFeatures:
        x = F.embedding(tokens, self.token_embed) + self.positions[: tokens.shape[1]] + self.token_types[0]
        x, levels = self.stack(self.embed_norm(x), mask, levels=tuple(self.config["pool_blocks"]))
        states = sum(levels) / len(levels) if levels else x
        if self.config["pool"] == "pooler":
            pooled = torch.tanh(self.pooler(states[:, 0]))
        else:
            pooled = pool_tokens(states, tokens, mask, self.config["pool"], end_id=-1)
        return TextFeatures(pooled, x)


def make_text_tower(config: dict[str, Any]) -> nn.Module:
    """The text tower of a config, by its "type"."""
    return {"transformer": TextTransformer, "bert": Bert}[config["type"]](config)
