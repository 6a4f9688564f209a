"""Transformer parts that all towers share. Heads are [b, h, l, c], feature maps [b, h, w, c] unless said otherwise."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    # The crude formula that OpenAI's CLIP was trained with.
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "silu": F.silu,
}
# Activations of an MLP with a gate -> that of the gate (Shazeer 2020, arXiv:2002.05202).
GATED = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu"}


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)) of an array."""
    return torch.from_numpy(np.ascontiguousarray(x)).sigmoid().numpy()


def l2_normalize(x: Tensor) -> Tensor:
    """Unit norm along the last axis, in float32."""
    x = x.float()
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True).clamp(min=1e-12))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(c)) v; `mask` is True where a key may be seen and broadcasts to [b, h, queries, keys].

    Where there are fewer heads of keys than of queries, neighbouring heads share theirs.
    """
    if k.shape[1] != q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    if mask is not None:
        # Not -inf: a query that sees nothing (padding in front) must give numbers, though nobody reads them.
        bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device)
        mask = bias.masked_fill(~mask, torch.finfo(q.dtype).min)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """[b, l, h * c] -> [b, h, l, c]."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """[b, h, l, c] -> [b, l, h * c]."""
    return x.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Multi-head attention of queries [b, q, d] over keys [b, k, e].

    qk_norm: layer norm of every head's queries and keys. key_width: e, None = d.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        qk_norm: bool = False,
        qkv_bias: bool = True,
        epsilon: float = 1e-5,
        key_width: int | None = None,
    ):
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(width, width, qkv_bias)
        self.key, self.value = (nn.Linear(key_width or width, width, qkv_bias) for _ in range(2))
        self.out = nn.Linear(width, width)
        head = width // num_heads
        self.query_norm = nn.LayerNorm(head, epsilon) if qk_norm else nn.Identity()
        self.key_norm = nn.LayerNorm(head, epsilon) if qk_norm else nn.Identity()

    def forward(
        self, queries: Tensor, keys: Tensor, *, key_mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """key_mask [b, k]: which keys may be seen."""
        q = self.query_norm(split_heads(self.query(queries), self.num_heads))
        k = self.key_norm(split_heads(self.key(keys), self.num_heads))
        v = split_heads(self.value(keys), self.num_heads)
        mask = None if key_mask is None else key_mask[:, None, None]
        if causal and mask is not None:
            length = queries.shape[1]
            mask = mask & torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
            causal = False
        return self.out(join_heads(attend(q, k, v, mask, causal=causal)))


class Mlp(nn.Module):
    """Two affine maps with an activation between; those of GATED have a third, as "swiglu": down(silu(gate(x)) * up(x))."""

    def __init__(self, width: int, hidden: int, activation: str = "gelu", bias: bool = True):
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden, bias), nn.Linear(hidden, width, bias)
        self.gate = nn.Linear(width, hidden, bias) if activation in GATED else None
        self.activation = ACTIVATIONS[GATED.get(activation, activation)]

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(self.activation(self.up(x)))
        return self.down(self.activation(self.gate(x)) * self.up(x))


class LayerScale(nn.Module):
    """A learned factor for every channel of a residual branch (Touvron et al. 2021, arXiv:2103.17239)."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Block(nn.Module):
    """Transformer block; post_norm normalises the sum after a branch (BERT) instead of what enters it."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_hidden: int,
        *,
        causal: bool = False,
        post_norm: bool = False,
        epsilon: float = 1e-5,
        activation: str = "gelu",
        qk_norm: bool = False,
        qkv_bias: bool = True,
        layer_scale: bool = False,
    ):
        super().__init__()
        self.causal, self.post_norm = causal, post_norm
        self.attention = Attention(width, num_heads, qk_norm=qk_norm, qkv_bias=qkv_bias, epsilon=epsilon)
        self.mlp = Mlp(width, mlp_hidden, activation)
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width, epsilon), nn.LayerNorm(width, epsilon)
        self.attention_scale = LayerScale(width) if layer_scale else nn.Identity()
        self.mlp_scale = LayerScale(width) if layer_scale else nn.Identity()

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        def mix(h: Tensor) -> Tensor:
            return self.attention_scale(self.attention(h, h, key_mask=key_mask, causal=self.causal))

        if self.post_norm:
            x = self.attention_norm(x + mix(x))
            return self.mlp_norm(x + self.mlp_scale(self.mlp(x)))
        x = x + mix(self.attention_norm(x))
        return x + self.mlp_scale(self.mlp(self.mlp_norm(x)))


class Stack(nn.ModuleDict):
    """Blocks one after the other: block_0, block_1, ..."""

    def __init__(self, depth: int, width: int, num_heads: int, mlp_hidden: int, **options):
        blocks = {f"block_{i}": Block(width, num_heads, mlp_hidden, **options) for i in range(depth)}
        super().__init__(blocks)

    def forward(
        self, x: Tensor, key_mask: Tensor | None = None, levels: tuple[int, ...] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        """(output, the outputs of the blocks numbered in `levels`)."""
        outputs = []
        for block in self.values():
            x = block(x, key_mask)
            outputs.append(x)
        return x, [outputs[i] for i in levels]


class AttentionPool(nn.Module):
    """Pooling by one learned query (the "map" head of SigLIP): attention, then a residual MLP."""

    def __init__(self, width: int, num_heads: int, mlp_hidden: int, activation: str, epsilon: float):
        super().__init__()
        self.probe = nn.Parameter(torch.zeros(1, 1, width))
        self.attention = Attention(width, num_heads)
        self.mlp_norm = nn.LayerNorm(width, epsilon)
        self.mlp = Mlp(width, mlp_hidden, activation)

    def forward(self, x: Tensor) -> Tensor:
        """[b, l, d] -> [b, d]."""
        x = self.attention(self.probe.expand(len(x), -1, -1), x)
        return (x + self.mlp(self.mlp_norm(x)))[:, 0]


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of maps [b, c, h, w]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def resize(x: Tensor, size: tuple[int, int], mode: str, antialias: bool = True) -> Tensor:
    """Maps [b, c, h, w] at another size; antialias: smoothed where they shrink. mode: "bilinear" or "bicubic"."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode=mode, align_corners=False, antialias=antialias)


def resize_positions(
    positions: Tensor, old: tuple[int, int], new: tuple[int, int], antialias: bool = True
) -> Tensor:
    """Position embeddings [l, d] of one grid for another; rows before those of the grid (a class token's) stay."""
    if tuple(old) == tuple(new):
        return positions
    prefix = len(positions) - old[0] * old[1]
    grid = positions[prefix:].T.unflatten(1, tuple(old))[None]
    grid = resize(grid.float(), new, "bicubic", antialias)[0].flatten(1).T.to(positions.dtype)
    return torch.cat([positions[:prefix], grid])
