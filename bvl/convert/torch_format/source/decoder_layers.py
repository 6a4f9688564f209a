"""Blocks of the text decoder: attention that can go on token by token, cross-attention, rotary positions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from bvl.convert.torch_format.source.layers import Mlp, attend, join_heads, split_heads

KeysValues = tuple[Tensor, Tensor]


class RmsNorm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon) * weight, in float32 (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, width: int, epsilon: float):
        super().__init__()
        self.weight, self.epsilon = nn.Parameter(torch.ones(width)), epsilon

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)
        return (wide * self.weight).to(x.dtype)


def rotary_frequencies(channels: int, theta: float, scaling: dict[str, Any] | None) -> Tensor:
    """Angle that each of half the channels of a head turns a token: theta^(-2i / channels).

    scaling, for longer texts than those of training: "linear" divides all by `factor`; "llama3" divides those of
    channels that turn seldom in `original_context` tokens, and goes over smoothly to those that turn often.
    """
    exponent = torch.arange(0, channels, 2, dtype=torch.float32) / channels
    frequency = 1.0 / torch.tensor(theta, dtype=torch.float32) ** exponent
    if scaling is None:
        return frequency
    slow = frequency / scaling["factor"]
    if scaling["kind"] == "linear":
        return slow
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_context"] * frequency.double() / (2 * math.pi)
    share = ((turns - low) / (high - low)).clamp(0.0, 1.0).float()
    return (1 - share) * slow + share * frequency


def rotate(x: Tensor, positions: Tensor, frequency: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021, arXiv:2104.09864) of heads [b, h, l, c] at positions [b, l].

    Channel i of the first half and channel i of the second are one pair, as in Llama and Qwen2.
    """
    half = x.shape[-1] // 2
    angle = positions[:, None, :, None].float() * frequency.to(x.device)
    cos, sin = angle.cos(), angle.sin()
    a, b = x[..., :half].float(), x[..., half:].float()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class SelfAttention(nn.Module):
    """Self-attention with grouped heads and, in layout "prefix", rotary positions."""

    def __init__(self, config: dict[str, Any], block: dict[str, int]):
        super().__init__()
        width, head, bias = config["width"], block["head_dim"], config["qkv_bias"]
        self.num_heads, self.num_kv_heads = block["num_heads"], block["num_kv_heads"]
        self.frequency = None
        if config["layout"] == "prefix":
            self.frequency = rotary_frequencies(head, config["rope_theta"], config["rope_scaling"])
        self.query = nn.Linear(width, self.num_heads * head, bias)
        self.key = nn.Linear(width, self.num_kv_heads * head, bias)
        self.value = nn.Linear(width, self.num_kv_heads * head, bias)
        self.out = nn.Linear(self.num_heads * head, width, config["out_bias"])

    def forward(
        self, x: Tensor, mask: Tensor, positions: Tensor, past: KeysValues | None
    ) -> tuple[Tensor, KeysValues]:
        """(output, keys and values, those of the `past` in front)."""
        q = split_heads(self.query(x), self.num_heads)
        k, v = (split_heads(y, self.num_kv_heads) for y in (self.key(x), self.value(x)))
        if self.frequency is not None:
            q, k = (rotate(y, positions, self.frequency) for y in (q, k))
        if past is not None:
            k, v = (torch.cat(pair, dim=2) for pair in zip(past, (k, v), strict=True))
        return self.out(join_heads(attend(q, k, v, mask))), (k, v)


class CrossAttention(nn.Module):
    """Attention of text over visual tokens, whose keys and values are computed once."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def keys_values(self, visual: Tensor) -> KeysValues:
        return split_heads(self.key(visual), self.num_heads), split_heads(self.value(visual), self.num_heads)

    def forward(self, x: Tensor, visual: KeysValues, visual_mask: Tensor) -> Tensor:
        q = split_heads(self.query(x), self.num_heads)
        return self.out(join_heads(attend(q, *visual, visual_mask[:, None, None])))


def make_norm(config: dict[str, Any]) -> nn.Module:
    """The norm of a decoder's layout."""
    kind = RmsNorm if config["layout"] == "prefix" else nn.LayerNorm
    return kind(config["width"], config["norm_epsilon"])


class DecoderBlock(nn.Module):
    """Self-attention, cross-attention over visual tokens where the block has it, then an MLP; each pre-normed.

    cross_mlp: the cross-attention stands behind the MLP, with a norm of the visual tokens and an MLP of its own.
    block: num_heads, num_kv_heads, head_dim, mlp_hidden, cross_attention of this block.
    """

    def __init__(self, config: dict[str, Any], block: dict[str, int]):
        super().__init__()
        width = config["width"]

        def make_mlp() -> Mlp:
            return Mlp(width, block["mlp_hidden"], config["activation"], config["mlp_bias"])

        self.attention, self.attention_norm = SelfAttention(config, block), make_norm(config)
        self.mlp, self.mlp_norm = make_mlp(), make_norm(config)
        self.has_cross, self.cross_mlp = block["cross_attention"], config["cross_mlp"]
        if self.has_cross:
            self.cross, self.cross_norm = CrossAttention(width, block["num_heads"]), make_norm(config)
            if self.cross_mlp:
                self.visual_norm, self.image_mlp_norm = make_norm(config), make_norm(config)
                self.image_mlp = make_mlp()

    def visual(self, visual: Tensor | None) -> KeysValues | None:
        """Keys and values of the visual tokens; None without cross-attention."""
        if not self.has_cross:
            return None
        return self.cross.keys_values(self.visual_norm(visual) if self.cross_mlp else visual)

    def forward(
        self,
        x: Tensor,
        mask: Tensor,
        positions: Tensor,
        visual: KeysValues | None,
        visual_mask: Tensor | None,
        past: KeysValues | None = None,
    ) -> tuple[Tensor, KeysValues]:
        """(output, keys and values of the self-attention)."""
        y, own = self.attention(self.attention_norm(x), mask, positions, past)
        x = x + y
        if self.cross_mlp and self.has_cross:
            x = x + self.mlp(self.mlp_norm(x))
            x = x + self.cross(self.cross_norm(x), visual, visual_mask)
            return x + self.image_mlp(self.image_mlp_norm(x)), own
        if self.has_cross:
            x = x + self.cross(self.cross_norm(x), visual, visual_mask)
        return x + self.mlp(self.mlp_norm(x)), own
