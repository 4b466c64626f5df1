"""Rows of unequal length in one tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

Length = TypeVar("Length", int, Tensor)


def length_mask(lengths: Tensor, size: int) -> Tensor:
    """(B,) lengths → (B, size) bool, True inside each row's length."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


def each_alone(
    compute: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], rows: Iterable[Tensor], lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """What `compute` gives for a batch, from one row at a time.

    Args:
        compute: rows and their lengths (B,) → (B, N, H) and the lengths (B,) of these.
        rows: each without padding.
        lengths: (B,) of the rows.
    """
    parts = [compute(row[None], length[None]) for row, length in zip(rows, lengths, strict=True)]
    return pad_sequence([result[0] for result, _ in parts], batch_first=True), torch.cat([length for _, length in parts])


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
