"""AudioProjector: the trained bridge from encoder frames (20 ms) to audio tokens (slots of 160 ms, or of 80 ms where the
recipe says so) in the backbone's space."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import ProjectorConfig
from .lengths import length_mask, strided_length
from .slot_layers import SlotLayers


class AudioProjector(nn.Module):
    """Two convolutions over time, then a linear layer to the backbone's width, and deeper layers beside it if asked for.

    A scaled projector's output is normalised and brought to the size of the backbone's token embeddings; unscaled, the
    linear layer's output stays as it is, which on the real backbone is some 30 times quieter than the token rows.

    Args:
        config: strides, channels, deeper layers, whether the output is scaled.
        input_size: width of an encoder frame.
        output_size: the backbone's hidden size.
        scale: root mean square of one output component; does not matter where the output is not scaled.
    """

    scale: Tensor
    deep: SlotLayers | None

    def __init__(self, config: ProjectorConfig, input_size: int, output_size: int, scale: float = 1.0):
        super().__init__()
        hidden, self.strides = config.hidden_size, config.strides
        self.conv1 = nn.Conv1d(input_size, hidden, kernel_size=7, stride=self.strides[0], padding=3)
        self.conv2 = nn.Conv1d(hidden, hidden, kernel_size=5, stride=self.strides[1], padding=2)
        self.linear = nn.Linear(hidden, output_size)
        self.deep = (
            SlotLayers(
                hidden,
                output_size,
                config.layer_width,
                config.layers,
                config.layer_stride,
                config.rotary,
            )
            if config.layers
            else None
        )
        self.scaled = config.scaled
        self.register_buffer("scale", torch.tensor(scale if config.scaled else 1.0))

    def forward(self, frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Projects encoder frames to audio tokens.

        Args:
            frames: (B, F, input_size), zeros behind each row's end.
            lengths: (B,) frames that hold sound.

        Returns:
            slots (B, S, output_size), S = output_length(F, strides), zeros behind each end; slot_lengths (B,).
        """
        x = F.gelu(self.conv1(frames.transpose(1, 2)))  # (B, hidden, ceil(F / first stride))
        x = x * length_mask(strided_length(lengths, self.strides[:1]), x.shape[2])[:, None].to(x.dtype)
        x = F.gelu(self.conv2(x)).transpose(1, 2)  # (B, S, hidden)
        slot_lengths = self.output_length(lengths)
        slots = self.linear(x)
        if self.deep is not None:
            slots = slots + self.deep(x, slot_lengths)
        if self.scaled:
            slots = F.rms_norm(slots, slots.shape[-1:]) * self.scale.to(slots.dtype)
        return slots * length_mask(slot_lengths, slots.shape[1])[..., None].to(slots.dtype), slot_lengths

    def output_length(self, frames: Tensor) -> Tensor:
        """Slots that so many frames become."""
        return strided_length(frames, self.strides)

    @property
    def frames_per_slot(self) -> int:
        """Encoder frames that make one slot."""
        return self.strides[0] * self.strides[1]
