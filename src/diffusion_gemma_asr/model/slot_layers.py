"""Layers over audio tokens: they hear a word whole before it is spelled, at a quarter of the encoder's frame rate or less.

Which tokens spell a stretch of sound depends on the word around it. A layer here is a Conformer's (Gulati et al. 2020, arXiv
2005.08100) with one feed-forward part: a convolution over neighbours, attention over all positions, then each on its own.
Order is heard by the convolutions alone. A position may stand for several slots, which it writes at once: short slots leave
CTC room for tokens that follow each other closely, and need not make the layers dearer.
"""

from __future__ import annotations

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
    """

    def __init__(self, input_size: int, output_size: int, width: int, layers: int, stride: int = 1):
        super().__init__()
        self.stride = stride
        self.in_proj = nn.Linear(stride * input_size, width)
        self.layers = nn.ModuleList(SlotLayer(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.out_proj = nn.Linear(width, stride * output_size, bias=False)
        nn.init.zeros_(self.out_proj.weight)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """(B, S, input_size), of which lengths (B,) slots hold sound → (B, S, output_size)."""
        batch, slots, width = x.shape
        x = x * length_mask(lengths, slots)[..., None].to(x.dtype)  # the end may lie within a position
        x = F.pad(x, (0, 0, 0, -slots % self.stride)).reshape(batch, -1, self.stride * width)
        mask = length_mask((lengths + self.stride - 1) // self.stride, x.shape[1])
        x = self.in_proj(x)
        for layer in self.layers:
            x = layer(x, mask)
        return self.out_proj(self.norm(x)).reshape(batch, x.shape[1] * self.stride, -1)[:, :slots]


class SlotLayer(nn.Module):
    """Convolution, attention and feed-forward, each added to what it is given."""

    def __init__(self, width: int):
        super().__init__()
        self.heads = width // HEAD_DIM
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

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x (B, S, width), mask (B, S) → (B, S, width)."""
        neighbours = F.glu(self.gated(self.conv_norm(x)), dim=-1) * mask[..., None].to(x.dtype)
        neighbours = F.silu(self.conv(neighbours.transpose(1, 2))).transpose(1, 2)
        x = x + self.mixed(neighbours)
        x = x + self.attended(self._attention(self.attention_norm(x), mask))
        return x + self.fc2(F.gelu(self.fc1(self.ffn_norm(x))))

    def _attention(self, x: Tensor, mask: Tensor) -> Tensor:
        batch, slots, width = x.shape
        q, k, v = self.qkv(x).view(batch, slots, 3, self.heads, HEAD_DIM).permute(2, 0, 3, 1, 4)  # each (B, heads, S, 64)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        return y.transpose(1, 2).reshape(batch, slots, width)
