"""Layers over audio tokens: they hear a word whole before it is spelled, at a quarter of the encoder's frame rate or less.

Which tokens spell a stretch of sound depends on the word around it. A layer here is a Conformer's (Gulati et al. 2020, arXiv
2005.08100) with one feed-forward part: a convolution over neighbours, attention over all positions, then each on its own.
Attention tells distances by turned queries and keys (rotary, Su et al. 2021, arXiv 2104.09864) where the configuration says
so; else order is heard by the convolutions alone. A position may stand for several slots, which it writes at once: short
slots leave CTC room for tokens that follow each other closely, and need not make the layers dearer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .lengths import length_mask

KERNEL = 7  # positions that a convolution sees
HEAD_DIM = 64


class SlotLayers(nn.Module):
    """What deep layers add to the slots; nothing until training moves the last projection away from zero.

    Args:
        input_size: width of a slot as it comes in.
        output_size: width of what is added to it.
        width: of the layers; a multiple of 64.
        layers: how many.
        stride: slots of one position.
        rotary: whether attention tells distances.
        dropout: while training, of what enters the layers and of what each of their parts adds.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        width: int,
        layers: int,
        stride: int = 1,
        rotary: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.stride, self.rotary, self.dropout = stride, rotary, dropout
        self.in_proj = nn.Linear(stride * input_size, width)
        self.layers = nn.ModuleList(SlotLayer(width, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.out_proj = nn.Linear(width, stride * output_size, bias=False)
        nn.init.zeros_(self.out_proj.weight)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """(B, S, input_size), of which lengths (B,) slots hold sound → (B, S, output_size)."""
        batch, slots, width = x.shape
        x = x * length_mask(lengths, slots)[..., None].to(x.dtype)  # the end may lie within a position
        x = F.pad(x, (0, 0, 0, -slots % self.stride)).reshape(batch, -1, self.stride * width)
        mask = length_mask((lengths + self.stride - 1) // self.stride, x.shape[1])
        x = F.dropout(self.in_proj(x), self.dropout, self.training)
        turns = rotations(x.shape[1], x.device) if self.rotary else None
        for layer in self.layers:
            x = layer(x, mask, turns)
        return self.out_proj(self.norm(x)).reshape(batch, x.shape[1] * self.stride, -1)[:, :slots]


def rotations(positions: int, device: torch.device) -> Tensor:
    """(2, S, 32): cosines and sines of the angles by which rotary attention turns queries and keys of S positions."""
    rates = 10000.0 ** -(torch.arange(HEAD_DIM // 2, device=device) / (HEAD_DIM // 2))
    angles = torch.arange(positions, device=device)[:, None] * rates
    return torch.stack([angles.cos(), angles.sin()])


def turned(x: Tensor, turns: Tensor) -> Tensor:
    """Turns each pair of components of x (..., S, 64) by the angles of its position; see `rotations`."""
    cos, sin = turns.to(x.dtype)
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class SlotLayer(nn.Module):
    """Convolution, attention and feed-forward, each added to what it is given."""

    def __init__(self, width: int, dropout: float = 0.0):
        super().__init__()
        self.heads, self.dropout = width // HEAD_DIM, dropout
        self.conv_norm = nn.LayerNorm(width)
        self.gated = nn.Linear(width, 2 * width)
        self.conv = nn.Conv1d(width, width, KERNEL, padding=KERNEL // 2, groups=width)
        self.mixed = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.attended = nn.Linear(width, width)
        self.ffn_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width)

    def forward(self, x: Tensor, mask: Tensor, turns: Tensor | None = None) -> Tensor:
        """x (B, S, width), mask (B, S), turns of `rotations` or None → (B, S, width)."""
        neighbours = F.glu(self.gated(self.conv_norm(x)), dim=-1) * mask[..., None].to(x.dtype)
        neighbours = F.silu(self.conv(neighbours.transpose(1, 2))).transpose(1, 2)
        x = x + self._dropped(self.mixed(neighbours))
        x = x + self._dropped(self.attended(self._attention(self.attention_norm(x), mask, turns)))
        return x + self._dropped(self.fc2(self._dropped(F.gelu(self.fc1(self.ffn_norm(x))))))

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)

    def _attention(self, x: Tensor, mask: Tensor, turns: Tensor | None) -> Tensor:
        batch, slots, width = x.shape
        q, k, v = self.qkv(x).view(batch, slots, 3, self.heads, HEAD_DIM).permute(2, 0, 3, 1, 4)  # each (B, heads, S, 64)
        if turns is not None:
            q, k = turned(q, turns), turned(k, turns)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        return y.transpose(1, 2).reshape(batch, slots, width)
