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


def strided_length(frames: Length, strides: Sequence[int] = (4, 2), kernels: Sequence[int] | None = None) -> Length:
    """What is left of so many frames behind convolutions that are padded by half their kernel on either side.

    With odd kernels ceil(ceil(frames / 4) / 2), so 1500 → 188; an even kernel has room for one more where the stride fits.

    Args:
        frames: at least 1.
        strides: of the convolutions.
        kernels: of the same convolutions; None: all odd.
    """
    for stride, kernel in zip(strides, kernels or [1] * len(strides), strict=True):
        frames = (frames - kernel % 2) // stride + 1
    return frames
