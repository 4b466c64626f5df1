"""Feature augmentation for training: masking, frequency warping, other voices.

Masking is SpecAugment's (Park et al. 2019, arXiv 1904.08779), on spectrograms or on encoder frames. Frequency warping
imitates other vocal tracts (vocal tract length perturbation, Jaitly & Hinton 2013).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers.audio_utils import hertz_to_mel, mel_to_hertz


@dataclass(frozen=True)
class Masking:
    """How much SpecAugment masks."""

    time_bands: int = 2  # masked bands of time in each row
    time_width: int = 20  # frames of such a band at most; many bands are narrower in a short row
    channel_bands: int = 2  # masked bands of channels in each row
    channel_width: int = 12  # channels of such a band at most


def log_uniform(bounds: Sequence[float], count: int) -> Tensor:
    """Draws random factors, uniform in their logarithm.

    Args:
        bounds: the smallest and the largest factor.
        count: how many to draw.

    Returns:
        (count,) factors.
    """
    low, high = bounds
    return low * (high / low) ** torch.rand(count)


def warp_frequencies(mel: Tensor, factors: Tensor) -> Tensor:
    """Scales the frequencies of Whisper's log-mel spectrograms: energy at f Hz moves to factor * f.

    Values between two source bins are interpolated linearly; sources above 8 kHz repeat the top bin.

    Args:
        mel: (B, T, bins), Slaney's mel scale from 0 to 8 kHz.
        factors: (B,), 1 changes nothing; above 1 a vocal tract is shorter, its formants and pitch higher.

    Returns:
        (B, T, bins), a new tensor.
    """
    bins = mel.shape[2]
    top = hertz_to_mel(8000.0, mel_scale="slaney")
    width = top / (bins + 1)  # bin k is centred at (k + 1) * width
    hertz = mel_to_hertz(np.arange(1, bins + 1) * width, mel_scale="slaney")  # (bins,)
    sources = hertz[None] / factors.double().numpy()[:, None]  # (B, bins) Hz
    source_mel = hertz_to_mel(np.minimum(sources, 8000.0), mel_scale="slaney")
    source_bins = torch.from_numpy(source_mel / width - 1).clamp(0, bins - 1)  # (B, bins), fractional
    low = source_bins.floor().long().clamp(max=bins - 2)  # (B, bins)
    share = (source_bins - low).to(mel.dtype)[:, None]
    below, above = (mel.gather(2, index[:, None].expand_as(mel)) for index in (low, low + 1))
    return below * (1 - share) + above * share


def with_others(features: Tensor, shares: Tensor) -> Tensor:
    """Mixes each row with the next one, as if somebody else spoke at the same time.

    CTC misreads hardly any audio token of speech that the projector was trained on, however many frames are masked or noisy.
    Mixed with others' frames they are as doubtful as those of speech that it has not met.

    Args:
        features: (B, T, W), zeros behind each row's end; the first row follows the last.
        shares: (B,) of the other row, from 0 to 1.

    Returns:
        (B, T, W), a new tensor; a row that ends sooner is mixed with silence behind its end.
    """
    share = shares[:, None, None].to(features)
    return features * (1 - share) + features.roll(-1, 0) * share


def mask_bands(features: Tensor, lengths: Tensor, masking: Masking, generator: torch.Generator | None = None) -> Tensor:
    """Sets random bands of time and of channels to zero; each row draws its bands independently.

    Args:
        features: (B, T, W).
        lengths: (B,) frames without padding; a band of time covers at most a fifth of them, all together at most half.
        masking: number and largest width of the bands.
        generator: of the draws; None is torch's default.

    Returns:
        (B, T, W), a new tensor.
    """
    batch, frames, channels = features.shape
    keep = torch.ones(batch, frames, channels, dtype=torch.bool)
    for _ in range(masking.time_bands):
        widest = torch.clamp(lengths // max(5, 2 * masking.time_bands), max=masking.time_width)
        keep &= ~_band(widest, lengths, frames, generator)[:, :, None]
    for _ in range(masking.channel_bands):
        widest = torch.full((batch,), masking.channel_width)
        keep &= ~_band(widest, torch.full((batch,), channels), channels, generator)[:, None, :]
    return features * keep.to(features)


def _band(widest: Tensor, lengths: Tensor, size: int, generator: torch.Generator | None) -> Tensor:
    """(B, size) bool: one random band in each row, at most `widest` (B,) wide and inside `lengths` (B,)."""
    width = (torch.rand(len(lengths), generator=generator) * (widest + 1)).long()
    start = (torch.rand(len(lengths), generator=generator) * (lengths - width + 1)).long()
    index = torch.arange(size)
    return (index >= start[:, None]) & (index < (start + width)[:, None])
