"""Rows of unequal length in one tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

Length = TypeVar("Length", int, Tensor)


def length_mask(lengths: Tensor, size: int) -> Tensor:
    """(B,) lengths → (B, size) bool, True inside each row's length."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


def strided_length(frames: Length, strides: Sequence[int] = (4, 2)) -> Length:
    """What is left of so many frames behind convolutions with these strides: ceil(ceil(frames / 4) / 2), so 1500 → 188."""
    for stride in strides:
        frames = (frames + stride - 1) // stride
    return frames
