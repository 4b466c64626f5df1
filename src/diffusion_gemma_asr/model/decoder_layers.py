"""Layers of a Whisper decoder over audio tokens: what Whisper knows about reading its encoder's frames, everywhere at once.

Whisper's decoder (Radford et al. 2022, arXiv 2212.04356) writes token after token: each of its layers looks at the tokens so
far, at the encoder's frames, and at each token alone. Here audio tokens take the place of tokens. Each stands for a stretch
of sound, so it looks at its neighbours on both sides, and at the frames around it. What is near counts more: attention has a
bias that falls with distance (ALiBi, Press et al. 2021, arXiv 2108.12409), learnt for each head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .lengths import length_mask

HEAD_DIM = 64
SELF_SLOPES = (1.0, 0.01)  # by which attention falls with each slot between, in nats: of the first head and of the last
CROSS_SLOPES = (0.5, 0.02)  # the same with each frame


class DecoderLayers(nn.Module):
    """What layers of a decoder add to the slots.

    Args:
        input_size: width of a slot as it comes in.
        width: of an encoder frame and of the layers, which Whisper has alike; a multiple of 64.
        output_size: width of what is added to a slot.
        layers: how many.
        stride: encoder frames of one slot.
        dropout: while training, of what enters the layers and of what each of their parts adds.
    """

    def __init__(self, input_size: int, width: int, output_size: int, layers: int, stride: int, dropout: float = 0.0):
        super().__init__()
        self.stride, self.dropout = stride, dropout
        self.in_proj = nn.Linear(input_size, width)
        self.layers = nn.ModuleList(DecoderLayer(width, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.out_proj = nn.Linear(width, output_size, bias=False)

    def forward(self, x: Tensor, lengths: Tensor, frames: Tensor, frame_lengths: Tensor) -> Tensor:
        """Slots (B, S, input_size), of which lengths (B,) hold sound, and the frames (B, F, width) that they were made
        of, frame_lengths (B,) → (B, S, output_size)."""
        slots, count = x.shape[1], frames.shape[1]
        at = torch.arange(slots, device=x.device, dtype=torch.float32)
        near = (at[:, None] - at).abs()  # (S, S) slots between
        frame = torch.arange(count, device=x.device, dtype=torch.float32)
        here = (frame - (at[:, None] + 0.5) * self.stride + 0.5).abs()  # (S, F) frames between
        own = hidden_bias(lengths, slots)
        theirs = hidden_bias(frame_lengths, count)
        x = F.dropout(self.in_proj(x), self.dropout, self.training)
        for layer in self.layers:
            x = layer(x, frames, near, here, own, theirs)
        return self.out_proj(self.norm(x))


def hidden_bias(lengths: Tensor, size: int) -> Tensor:
    """(B,) lengths → (B, 1, 1, size): 0 where attention may look, -inf behind each end."""
    mask = length_mask(lengths, size)
    return torch.zeros(mask.shape, device=lengths.device).masked_fill_(~mask, -math.inf)[:, None, None]


class DecoderLayer(nn.Module):
    """Attention over slots, attention over frames, feed-forward; each added to what it is given."""

    def __init__(self, width: int, dropout: float = 0.0):
        super().__init__()
        self.dropout = dropout
        self.self_norm, self.cross_norm, self.ffn_norm = (nn.LayerNorm(width) for _ in range(3))
        self.self_attention = Attention(width, SELF_SLOPES)
        self.cross_attention = Attention(width, CROSS_SLOPES)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, frames: Tensor, near: Tensor, here: Tensor, own: Tensor, theirs: Tensor) -> Tensor:
        """x (B, S, width), frames (B, F, width), distances near (S, S), here (S, F), two `hidden_bias` → (B, S, width)."""
        y = self.self_norm(x)
        x = x + self._dropped(self.self_attention(y, y, near, own))
        x = x + self._dropped(self.cross_attention(self.cross_norm(x), frames, here, theirs))
        return x + self._dropped(self.fc2(F.gelu(self.fc1(self.ffn_norm(x)))))

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class Attention(nn.Module):
    """Attention with a bias that falls with distance."""

    def __init__(self, width: int, slopes: tuple[float, float]):
        super().__init__()
        self.heads = width // HEAD_DIM
        self.q, self.k, self.v = nn.Linear(width, width), nn.Linear(width, width, bias=False), nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        first, last = (math.log(slope) for slope in slopes)
        self.log_slopes = nn.Parameter(torch.linspace(first, last, self.heads))

    def forward(self, x: Tensor, other: Tensor, distance: Tensor, bias: Tensor) -> Tensor:
        """x (B, S, width) looks at other (B, N, width), distance (S, N), bias (B, 1, 1, N) → (B, S, width)."""
        batch, slots, width = x.shape

        def split(y: Tensor) -> Tensor:
            return y.view(batch, -1, self.heads, HEAD_DIM).transpose(1, 2)

        q, k, v = split(self.q(x)), split(self.k(other)), split(self.v(other))
        far = -self.log_slopes.exp()[:, None, None] * distance  # (heads, S, N)
        mask = (far + bias).to(q.dtype)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).reshape(batch, slots, width))
