"""SpecAugment-style masking (Park et al. 2019, arXiv 1904.08779) on spectrograms or on encoder frames."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Masking:
    """How much is hidden: so many bands of time of at most `time_width` frames, and of at most `channel_width`
    channels."""

    time_bands: int = 2
    time_width: int = 20
    channel_bands: int = 2
    channel_width: int = 12


def mask_bands(features: Tensor, lengths: Tensor, masking: Masking, generator: torch.Generator | None = None) -> Tensor:
    """Sets random bands of time and of channels to zero, other bands in every row.

    Args:
        features: (B, T, W).
        lengths: (B,) real frames; a band of time covers at most a fifth of them.

    Returns:
        (B, T, W), a new tensor.
    """
    batch, frames, channels = features.shape
    keep = torch.ones(batch, frames, channels, dtype=torch.bool)
    for _ in range(masking.time_bands):
        widest = torch.clamp(lengths // 5, max=masking.time_width)
        keep &= ~_band(widest, lengths, frames, generator)[:, :, None]
    for _ in range(masking.channel_bands):
        widest = torch.full((batch,), masking.channel_width)
        keep &= ~_band(widest, torch.full((batch,), channels), channels, generator)[:, None, :]
    return features * keep.to(features)


def _band(widest: Tensor, lengths: Tensor, size: int, generator: torch.Generator | None) -> Tensor:
    """(B, size) bool: one band a row, its width drawn up to `widest`, its place inside `lengths`."""
    width = (torch.rand(len(lengths), generator=generator) * (widest + 1)).long()
    start = (torch.rand(len(lengths), generator=generator) * (lengths - width + 1)).long()
    at = torch.arange(size)
    return (at >= start[:, None]) & (at < (start + width)[:, None])
