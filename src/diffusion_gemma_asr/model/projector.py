"""AudioProjector: the trained bridge from encoder frames (20 ms) to audio tokens (slots of 160 ms, or of 80 ms where the
recipe says so) in the backbone's space."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import ProjectorConfig
from .decoder_layers import DecoderLayers
from .lengths import Length, length_mask, strided_length


class AudioProjector(nn.Module):
    """Convolutions over time, a linear layer to the backbone's width, and if asked for a Whisper decoder's layers beside it.

    A scaled projector's output is normalised and brought to the size of the backbone's token embeddings; unscaled, the
    linear layer's output stays as it is, which on the real backbone is some 30 times quieter than the token rows.

    Args:
        config: strides, kernels, channels, decoder layers, whether the output is scaled.
        input_size: width of an encoder frame.
        output_size: the backbone's hidden size.
        scale: root mean square of one output component; does not matter where the output is not scaled.
    """

    conv1: nn.Conv1d
    scale: Tensor
    acoustic_scale: Tensor
    decoder: DecoderLayers | None
    acoustic: nn.Conv1d | None

    def __init__(self, config: ProjectorConfig, input_size: int, output_size: int, scale: float = 1.0):
        super().__init__()
        hidden, self.strides, self.kernels = config.hidden_size, config.strides, config.kernels
        width = input_size
        for number, (stride, kernel) in enumerate(zip(self.strides, self.kernels, strict=True), 1):
            setattr(self, f"conv{number}", nn.Conv1d(width, hidden, kernel, stride, padding=kernel // 2))
            width = hidden
        self.linear = nn.Linear(hidden, output_size)
        layers, stride = config.decoder_layers, self.frames_per_slot
        self.decoder = DecoderLayers(hidden, input_size, output_size, layers, stride, config.dropout) if layers else None
        self.acoustic = nn.Conv1d(input_size, output_size, stride, stride) if config.acoustic else None
        if config.acoustic:
            self.register_buffer("acoustic_scale", torch.tensor(scale))
        self.scaled = config.scaled
        self.register_buffer("scale", torch.tensor(scale if config.scaled else 1.0))

    def forward(self, frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Projects encoder frames to audio tokens.

        Args:
            frames: (B, F, input_size), zeros behind each row's end.
            lengths: (B,) frames that hold sound.

        Returns:
            slots (B, S, output_size), S = output_length(F), zeros behind each end; slot_lengths (B,).
        """
        slot_lengths = self.output_length(lengths)
        x = frames.transpose(1, 2)  # (B, input_size, F)
        for done, convolution in enumerate(self.convolutions()):
            if done:
                seen = strided_length(lengths, self.strides[:done], self.kernels[:done])
                x = x * length_mask(seen, x.shape[2])[:, None].to(x.dtype)
            x = F.gelu(convolution(x))  # (B, hidden, shorter)
        x = x.transpose(1, 2)  # (B, S, hidden)
        slots = self.linear(x)
        if self.decoder is not None:
            slots = slots + self.decoder(x, slot_lengths, frames, lengths)
        if self.scaled:
            slots = F.rms_norm(slots, slots.shape[-1:]) * self.scale.to(slots.dtype)
        return slots * length_mask(slot_lengths, slots.shape[1])[..., None].to(slots.dtype), slot_lengths

    def prompted(self, frames: Tensor, lengths: Tensor, slots: Tensor) -> Tensor:
        """The audio tokens that prompts hold: those that CTC reads, or acoustic ones.

        An acoustic token is a linear map of the frames that its slot spans, normalised: what a Whisper's decoder attends to,
        with nothing decided yet.

        Args:
            frames: (B, F, input_size), zeros behind each row's end; lengths: (B,).
            slots: (B, S, output_size) of the same rows, see `forward`.

        Returns:
            (B, S, output_size), zeros behind each end.
        """
        if self.acoustic is None:
            return slots
        tokens = self._loud(of_slots(self.acoustic, frames, slots.shape[1]))
        return tokens * length_mask(self.output_length(lengths), slots.shape[1])[..., None].to(tokens.dtype)

    def without_sound(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """(count, output_size) audio tokens of prompts that hold no sound: noise, or what frames of zeros give."""
        if self.acoustic is None:
            return noise(count, self.linear.out_features, float(self.scale), generator)
        assert self.acoustic.bias is not None
        return self._loud(self.acoustic.bias.detach())[None].repeat(count, 1).to(self.linear.weight.device)

    def _loud(self, tokens: Tensor) -> Tensor:
        """Acoustic tokens at their scale."""
        return F.rms_norm(tokens, tokens.shape[-1:]) * self.acoustic_scale.to(tokens.dtype)

    def convolutions(self) -> list[nn.Conv1d]:
        """The convolutions, in their order."""
        return [getattr(self, f"conv{number}") for number in range(1, len(self.strides) + 1)]

    def output_length(self, frames: Length) -> Length:
        """Slots that so many frames become."""
        return strided_length(frames, self.strides, self.kernels)

    @property
    def frames_per_slot(self) -> int:
        """Encoder frames that make one slot."""
        return math.prod(self.strides)


def of_slots(acoustic: nn.Conv1d, frames: Tensor, count: int) -> Tensor:
    """What a map of each slot's frames makes of frames (B, F, D) of `count` slots: (B, count, H). Missing ones are zeros."""
    size = count * acoustic.stride[0]
    frames = F.pad(frames[:, :size], (0, 0, 0, max(0, size - frames.shape[1])))
    return acoustic(frames.transpose(1, 2)).transpose(1, 2)


def noise(count: int, width: int, scale: float, generator: torch.Generator | None = None) -> Tensor:
    """(count, width) random audio tokens; `scale` is the root mean square of their components."""
    return F.rms_norm(torch.randn(count, width, generator=generator), (width,)) * scale
