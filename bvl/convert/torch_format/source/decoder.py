"""The text decoder over visual tokens, in three layouts (gpt2, coca, prefix).

A sequence is a prefix, padded on the LEFT so that its last token stands right before the first word, then the text:

    [pad ...] [START] [controls ...] | first word ... last word [END] [pad ...]

Positions count real tokens only, so padding changes nothing.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bvl.convert.torch_format.source.decoder_layers import DecoderBlock, KeysValues, make_norm
from bvl.convert.torch_format.source.errors import UserError
from bvl.convert.torch_format.source.layers import Attention


class VisualTokens(nn.Module):
    """Image tokens -> what the decoder sees of the image: all or pooled tokens, or the null, at its width.

    The null stands for no image: one learned token (without `null`: of zeros), and the other places are masked
    (Kornblith et al. 2023, arXiv:2307.16686, section 3).
    """

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        width, count = config["visual_width"], config["visual_queries"]
        self.has_queries, self.has_projection = count > 0, width != config["width"]
        if count:
            heads = max(width // 64, 1)
            self.queries = nn.Parameter(torch.zeros(count, width))
            self.pool = Attention(width, heads if width % heads == 0 else 1)
            self.pool_norm = nn.LayerNorm(width)
        null = torch.zeros(width)
        self.null = nn.Parameter(null) if config["null"] else nn.Buffer(null, persistent=False)
        if self.has_projection:
            self.project = nn.Linear(width, config["width"])

    def forward(self, tokens: Tensor, dropped: Tensor) -> tuple[Tensor, Tensor]:
        """(visual tokens [b, s, w], which of them are there [b, s]); rows that are `dropped` [b] are the null."""
        if self.has_queries:
            tokens = self.pool_norm(self.pool(self.queries.expand(len(tokens), -1, -1), tokens))
        tokens, mask = replace_dropped(tokens, self.null, dropped)
        return self.project(tokens) if self.has_projection else tokens, mask


def replace_dropped(tokens: Tensor, null: Tensor, dropped: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [b, s, d] with the null in the first place of `dropped` rows and 0 elsewhere, and which are there."""
    first = torch.arange(tokens.shape[1], device=tokens.device) == 0
    replaced = torch.where(first[:, None], null, torch.zeros_like(null))
    return torch.where(dropped[:, None, None], replaced, tokens), first | ~dropped[:, None]


@dataclasses.dataclass
class DecoderState:
    """What the next token needs: keys and values so far of each block, and of the visual tokens; one row a text.

    key_mask [rows, length]: which keys are real. position [rows]: of the next token.
    """

    own: list[KeysValues]
    cross: list[KeysValues | None]
    key_mask: Tensor
    visual_mask: Tensor | None
    position: Tensor

    def spread(self, count: int) -> DecoderState:
        """Each row `count` times, side by side."""

        def repeat(x: Tensor) -> Tensor:
            return x.repeat_interleave(count, dim=0)

        return DecoderState(
            own=[(repeat(k), repeat(v)) for k, v in self.own],
            cross=[None if pair is None else (repeat(pair[0]), repeat(pair[1])) for pair in self.cross],
            key_mask=repeat(self.key_mask),
            visual_mask=None if self.visual_mask is None else repeat(self.visual_mask),
            position=repeat(self.position),
        )

    def reorder(self, rows: Tensor) -> DecoderState:
        """Row i goes on from rows[i], a text about the same image."""
        return dataclasses.replace(self, own=[(k[rows], v[rows]) for k, v in self.own])


class Decoder(nn.Module):
    """Texts from visual tokens: whole sequences (training) by forward, token by token by prefill and step.

    A language model alone sees no images: visual tokens and their mask are then None.
    """

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.config = config
        width, vocab_size = config["width"], config["vocab_size"]
        self.visual_tokens = VisualTokens(config) if config["visual_width"] else None
        self.token_embed = nn.Parameter(torch.zeros(vocab_size, width))
        self.rotary = config["layout"] == "prefix"
        if not self.rotary:
            self.positions = nn.Parameter(torch.zeros(config["max_positions"], width))
        if not config["tied_head"]:
            self.head = nn.Parameter(torch.zeros(vocab_size, width))
        for i, block in enumerate(config["blocks"]):
            self.add_module(f"block_{i}", DecoderBlock(config, block))
        self.norm = make_norm(config)
        if config["unimodal_norm"]:
            self.unimodal_norm = make_norm(config)
        if config["text_class"]:
            self.text_class = nn.Parameter(torch.zeros(width))

    @property
    def blocks(self) -> list[DecoderBlock]:
        return [getattr(self, f"block_{i}") for i in range(len(self.config["blocks"]))]

    def forward(
        self, visual: Tensor | None, visual_mask: Tensor | None, tokens: Tensor, mask: Tensor
    ) -> Tensor:
        """Hidden states [b, l, d] of sequences; `logits` of state i are for token i + 1."""
        return self._whole(visual, visual_mask, tokens, mask)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., v] of the token after each hidden state."""
        table = self.token_embed if self.config["tied_head"] else self.head
        return (hidden @ table.T.to(hidden.dtype)).float()

    def prefill(
        self,
        visual: Tensor | None,
        visual_mask: Tensor | None,
        prefix: Tensor,
        prefix_mask: Tensor,
        max_new: int,
    ) -> tuple[Tensor, DecoderState]:
        """(logits [b, v] of the first token after the prefix, state to write up to max_new tokens from)."""
        length = prefix.shape[1]
        if not self.rotary and length + max_new > self.config["max_positions"]:
            raise UserError(
                f"{length} tokens and {max_new} further ones, but the decoder was made for "
                f"{self.config['max_positions']}: write shorter texts (max_length)"
            )
        hidden, own, cross = self._whole(visual, visual_mask, prefix, prefix_mask)
        in_front = self.rotary and visual is not None
        start = visual.shape[1] if in_front else 0
        key_mask = torch.cat([visual_mask, prefix_mask], dim=1) if in_front else prefix_mask
        state = DecoderState(own, cross, key_mask, visual_mask, start + prefix_mask.sum(1))
        return self.logits(hidden[:, -1]), state

    def step(self, state: DecoderState, tokens: Tensor) -> tuple[Tensor, DecoderState]:
        """(logits [rows, v] after the tokens [rows], the state with them)."""
        positions = state.position[:, None]
        x = self._embed(tokens[:, None], positions)
        key_mask = F.pad(state.key_mask, (0, 1), value=True)
        own = []
        for block, past, cross in zip(self.blocks, state.own, state.cross, strict=True):
            x, heads = block(x, key_mask[:, None, None], positions, cross, state.visual_mask, past)
            own.append(heads)
        state = dataclasses.replace(state, own=own, key_mask=key_mask, position=state.position + 1)
        return self.logits(self.norm(x[:, 0])), state

    def embed_text(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        """Layout coca: what the blocks that do not see the image make of texts [b, t, d], and of the class token behind.

        The class token sees the text and one place behind it, but itself only where the text fills the context.
        """
        count, positions = tokens.shape[1], token_positions(mask)
        if self.config["text_class"]:
            # The class token sees a place of padding, which has its own position in open_clip.
            positions = torch.arange(count, device=tokens.device).expand(len(tokens), -1)
        x = self._embed(tokens, positions)
        if self.config["text_class"]:
            behind = self.text_class + self.positions[count]
            x = torch.cat([x, behind.expand(len(x), 1, -1)], dim=1)
            mask = F.pad(mask, (1, 0), value=True)
            positions = F.pad(positions, (0, 1), value=count)
        seen = causal_mask(mask)[:, None]
        for block in self.blocks[: self.config["num_unimodal"]]:
            x, _ = block(x, seen, positions, None, None)
        x = self.unimodal_norm(x)
        return x[:, :count], x[:, count] if self.config["text_class"] else None

    def _embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = F.embedding(tokens, self.token_embed)
        return x if self.rotary else x + F.embedding(positions, self.positions)

    def _whole(
        self, visual: Tensor | None, visual_mask: Tensor | None, tokens: Tensor, mask: Tensor
    ) -> tuple[Tensor, list[KeysValues], list[KeysValues | None]]:
        """(hidden states, keys and values of each self-attention, and of each cross-attention)."""
        if not self.rotary and tokens.shape[1] > self.config["max_positions"]:
            raise UserError(
                f"{tokens.shape[1]} tokens, but the decoder was made for {self.config['max_positions']}"
            )
        length = tokens.shape[1]
        positions = token_positions(mask)
        x = self._embed(tokens, positions)
        if self.rotary and visual is not None:
            count = visual.shape[1]
            x = torch.cat([visual.to(x.dtype), x], dim=1)
            in_front = torch.arange(count, device=x.device).expand(len(x), -1)
            positions = torch.cat([in_front, count + positions], dim=1)
            mask = torch.cat([visual_mask, mask], dim=1)
        seen, own, cross = causal_mask(mask)[:, None], [], []
        for block in self.blocks:
            cross.append(block.visual(visual))
            x, heads = block(x, seen, positions, cross[-1], visual_mask)
            own.append(heads)
        return self.norm(x[:, -length:]), own, cross


def causal_mask(mask: Tensor) -> Tensor:
    """[b, l, l]: each token sees the real ones before it, and itself if it is real."""
    length = mask.shape[1]
    return torch.ones(length, length, dtype=torch.bool, device=mask.device).tril() & mask[:, None]


def token_positions(mask: Tensor) -> Tensor:
    """0 for the first real token, and so on; padding in front has 0 as well."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)
