"""AudioProjector: the trained bridge from encoder frames (20 ms) to audio tokens (160 ms slots) in the backbone's
space."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .encoder import length_mask

Length = TypeVar("Length", int, Tensor)


def output_length(frames: Length) -> Length:
    """Slots that `frames` encoder frames become: ceil(ceil(frames / 4) / 2), so 1500 → 188."""
    return ((frames + 3) // 4 + 1) // 2


class AudioProjector(nn.Module):
    """Two convolutions over time (strides 4 and 2), then a linear layer to the backbone's width.

    With `scale` the output is normalised and brought to the size of the backbone's token embeddings; without it the linear
    layer's output stays as it is, which on the real backbone is some 30 times quieter than the token rows.

    Args:
        input_size: width of an encoder frame.
        output_size: the backbone's hidden size.
        hidden_size: channels between the convolutions.
        scale: root mean square of one output component; None leaves the output alone.
    """

    scale: Tensor

    def __init__(self, input_size: int, output_size: int, hidden_size: int = 1280, scale: float | None = None):
        super().__init__()
        self.conv1 = nn.Conv1d(input_size, hidden_size, kernel_size=7, stride=4, padding=3)
        self.conv2 = nn.Conv1d(hidden_size, hidden_size, kernel_size=5, stride=2, padding=2)
        self.linear = nn.Linear(hidden_size, output_size)
        self.scaled = scale is not None
        self.register_buffer("scale", torch.tensor(1.0 if scale is None else scale))

    def forward(self, frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Projects encoder frames to audio tokens.

        Args:
            frames: (B, F, input_size), zeros behind each row's end.
            lengths: (B,) frames that hold sound.

        Returns:
            slots (B, S, output_size), S = output_length(F), zeros behind each end; slot_lengths (B,).
        """
        x = F.gelu(self.conv1(frames.transpose(1, 2)))  # (B, hidden, ceil(F/4))
        x = x * length_mask((lengths + 3) // 4, x.shape[2])[:, None].to(x.dtype)
        x = F.gelu(self.conv2(x)).transpose(1, 2)  # (B, S, hidden)
        x = self.linear(x)
        if self.scaled:
            x = F.rms_norm(x, x.shape[-1:]) * self.scale.to(x.dtype)
        slot_lengths = output_length(lengths)
        return x * length_mask(slot_lengths, x.shape[1])[..., None].to(x.dtype), slot_lengths
