"""AudioProjector: the trained bridge from encoder frames (20 ms) to audio tokens (slots of 160 ms, or of 80 ms where the
recipe says so) in the backbone's space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .encoder import length_mask
from .recipe import ProjectorRecipe
from .slot_layers import SlotLayers
from .speller import Speller

Length = TypeVar("Length", int, Tensor)
Projector: TypeAlias = "AudioProjector | LinearProjector"


def output_length(frames: Length, strides: Sequence[int] = (4, 2)) -> Length:
    """Slots that `frames` encoder frames become: ceil(ceil(frames / 4) / 2), so 1500 → 188."""
    for stride in strides:
        frames = (frames + stride - 1) // stride
    return frames


def new_projector(
    recipe: ProjectorRecipe, input_size: int, output_size: int, scale: float | None = None, characters: int = 0,
    phonemes: int = 0,
) -> Projector:  # fmt: skip
    """The projector that a recipe describes; the arguments are those of the classes, and how many characters and phonemes
    there are for a speller to write."""
    if recipe.kind == "linear":
        return LinearProjector(input_size, output_size, scale)
    deep = recipe.layers, recipe.layer_width, recipe.layer_stride
    projector = AudioProjector(input_size, output_size, recipe.hidden_size, scale, recipe.strides, *deep)
    if recipe.spelling_layers:
        projector.speller = Speller(input_size, characters, recipe.spelling_layers, recipe.spelling_width, phonemes)
    return projector


class AudioProjector(nn.Module):
    """Two convolutions over time, then a linear layer to the backbone's width, and deeper layers beside it if asked for.

    With `scale` the output is normalised and brought to the size of the backbone's token embeddings; without it the linear
    layer's output stays as it is, which on the real backbone is some 30 times quieter than the token rows.

    Args:
        input_size: width of an encoder frame.
        output_size: the backbone's hidden size.
        hidden_size: channels between the convolutions.
        scale: root mean square of one output component; None leaves the output alone.
        strides: of the two convolutions: 4 and 2 make a slot of 8 frames, 160 ms; 2 and 2 one of 80 ms.
        layers, layer_width, layer_stride: of `SlotLayers`, whose result is added to the linear layer's; if there are any.
    """

    scale: Tensor
    deep: SlotLayers | None

    def __init__(
        self, input_size: int, output_size: int, hidden_size: int = 1280, scale: float | None = None,
        strides: tuple[int, int] = (4, 2), layers: int = 0, layer_width: int = 384, layer_stride: int = 1,
    ):  # fmt: skip
        super().__init__()
        self.speller: Speller | None = None  # a branch of its own, see `new_projector`
        self.strides = strides
        self.conv1 = nn.Conv1d(input_size, hidden_size, kernel_size=7, stride=strides[0], padding=3)
        self.conv2 = nn.Conv1d(hidden_size, hidden_size, kernel_size=5, stride=strides[1], padding=2)
        self.linear = nn.Linear(hidden_size, output_size)
        self.deep = SlotLayers(hidden_size, output_size, layer_width, layers, layer_stride) if layers else None
        self.scaled = scale is not None
        self.register_buffer("scale", torch.tensor(1.0 if scale is None else scale))

    def forward(self, frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Projects encoder frames to audio tokens.

        Args:
            frames: (B, F, input_size), zeros behind each row's end.
            lengths: (B,) frames that hold sound.

        Returns:
            slots (B, S, output_size), S = output_length(F, strides), zeros behind each end; slot_lengths (B,).
        """
        x = F.gelu(self.conv1(frames.transpose(1, 2)))  # (B, hidden, ceil(F / first stride))
        x = x * length_mask(output_length(lengths, self.strides[:1]), x.shape[2])[:, None].to(x.dtype)
        x = F.gelu(self.conv2(x)).transpose(1, 2)  # (B, S, hidden)
        slot_lengths = self.output_length(lengths)
        slots = self.linear(x)
        if self.deep is not None:
            slots = slots + self.deep(x, slot_lengths)
        return _finish(slots, self.scale if self.scaled else None, slot_lengths), slot_lengths

    def output_length(self, frames: Tensor) -> Tensor:
        """Slots that so many frames become."""
        return output_length(frames, self.strides)

    @property
    def frames_per_slot(self) -> int:
        """Encoder frames that make one slot."""
        return self.strides[0] * self.strides[1]


class LinearProjector(nn.Module):
    """One slot a frame, by a linear layer alone: the bridge of the baseline that has no acoustic encoder.

    The arguments are those of `AudioProjector`.
    """

    scale: Tensor

    def __init__(self, input_size: int, output_size: int, scale: float | None = None):
        super().__init__()
        self.speller: Speller | None = None
        self.linear = nn.Linear(input_size, output_size)
        self.scaled = scale is not None
        self.register_buffer("scale", torch.tensor(1.0 if scale is None else scale))

    def forward(self, frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """See `AudioProjector.forward`; S = F."""
        return _finish(self.linear(frames), self.scale if self.scaled else None, lengths), lengths

    def output_length(self, frames: Tensor) -> Tensor:
        """Slots that so many frames become: as many."""
        return frames

    @property
    def frames_per_slot(self) -> int:
        """Encoder frames that make one slot: one."""
        return 1


def _finish(slots: Tensor, scale: Tensor | None, lengths: Tensor) -> Tensor:
    """Brings slots (B, S, H) to the scale, if there is one, and sets what is behind each end to zero."""
    if scale is not None:
        slots = F.rms_norm(slots, slots.shape[-1:]) * scale.to(slots.dtype)
    return slots * length_mask(lengths, slots.shape[1])[..., None].to(slots.dtype)
