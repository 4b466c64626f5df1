"""What training does to features: SpecAugment-style masking (Park et al. 2019, arXiv 1904.08779) on spectrograms or on
encoder frames; frequency warping of spectrograms, which makes other vocal tracts out of one (Jaitly & Hinton 2013); another
tempo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.audio_utils import hertz_to_mel, mel_to_hertz


@dataclass(frozen=True)
class Masking:
    """How much is hidden: so many bands of time of at most `time_width` frames, and of at most `channel_width`
    channels."""

    time_bands: int = 2
    time_width: int = 20
    channel_bands: int = 2
    channel_width: int = 12


def log_uniform(bounds: Sequence[float], count: int) -> Tensor:
    """(count,) random factors between two bounds, uniform in their logarithm."""
    low, high = bounds
    return low * (high / low) ** torch.rand(count)


def warp_frequencies(mel: Tensor, factors: Tensor) -> Tensor:
    """Stretches the frequencies of Whisper's log-mel spectrograms: what was at f Hz comes to lie at factor * f.

    Bins between two old ones are interpolated; what would come from above 8 kHz is the top bin's value.

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
    at = torch.from_numpy(hertz_to_mel(np.minimum(sources, 8000.0), mel_scale="slaney") / width - 1).clamp(0, bins - 1)
    low = at.floor().long().clamp(max=bins - 2)  # (B, bins)
    share = (at - low).to(mel.dtype)[:, None]
    below, above = (mel.gather(2, index[:, None].expand_as(mel)) for index in (low, low + 1))
    return below * (1 - share) + above * share


def change_tempo(mel: Tensor, lengths: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """Stretches log-mel spectrograms in time, without a change of pitch; frames between two old ones are interpolated.

    Args:
        mel: (B, T, bins), zeros behind each end.
        lengths: (B,) frames that hold sound.
        factors: (B,), 1 changes nothing; above 1 is faster.

    Returns:
        (B, T', bins), a new tensor, zeros behind each end, and lengths (B,), at least 2.
    """
    wanted = (lengths / factors).round().long().clamp(min=2)
    rows = [
        functional.interpolate(row[None, :n].transpose(1, 2), size=size, mode="linear")[0].T
        for row, n, size in zip(mel, lengths.tolist(), wanted.tolist(), strict=True)
    ]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True), wanted


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
