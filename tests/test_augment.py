"""data/augment.py: bands of zeros where sound is, as wide as allowed, and nothing else changed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import WhisperFeatureExtractor

from diffusion_gemma_asr.data.augment import Masking, mask_bands, warp_frequencies, with_others

ROWS, FRAMES, CHANNELS = 600, 120, 16
TIME_ONLY = Masking(time_bands=1, time_width=20, channel_bands=0, channel_width=0)
CHANNELS_ONLY = Masking(time_bands=0, time_width=0, channel_bands=1, channel_width=5)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def hidden(masking: Masking, lengths: Tensor, seed: int = 0) -> Tensor:
    """(B, FRAMES, CHANNELS) bool: what became zero of features without zeros."""
    ones = torch.ones(len(lengths), FRAMES, CHANNELS)
    return mask_bands(ones, lengths, masking, seeded(seed)) == 0


def runs(row: Tensor) -> int:
    """(n,) bool → how many stretches of True."""
    return int((row & ~torch.cat([torch.tensor([False]), row[:-1]])).sum())


@pytest.mark.parametrize(("length", "widest"), [(120, 20), (60, 12), (7, 1), (4, 0)])
def test_a_band_of_time_lies_inside_its_row_and_covers_at_most_a_fifth(length: int, widest: int) -> None:
    mask = hidden(TIME_ONLY, torch.full((ROWS,), length))
    in_time = mask.any(2)  # (B, T)
    assert torch.equal(in_time, mask.all(2))  # over all channels
    assert not in_time[:, length:].any()
    widths = in_time.sum(1)
    assert set(widths.tolist()) == set(range(widest + 1))  # every width up to the limit, none above
    assert max(map(runs, in_time)) <= 1
    if widest:
        assert in_time[:, :length].any(0).all()  # the first and the last frame as well as any other


def test_every_row_keeps_to_its_own_length() -> None:
    lengths = torch.arange(5, 5 + ROWS) % FRAMES + 1
    in_time = hidden(TIME_ONLY, lengths).any(2)
    assert (in_time.sum(1) <= lengths // 5).all()
    assert not (in_time & (torch.arange(FRAMES) >= lengths[:, None])).any()


def test_a_band_of_channels_covers_all_time_and_at_most_its_width() -> None:
    mask = hidden(CHANNELS_ONLY, torch.full((ROWS,), 50))
    in_channels = mask.any(1)  # (B, W)
    assert torch.equal(in_channels, mask.all(1))
    assert set(in_channels.sum(1).tolist()) == set(range(6))
    assert max(map(runs, in_channels)) <= 1 and in_channels.any(0).all()


def test_as_many_bands_as_asked_for() -> None:
    masking = Masking(time_bands=3, time_width=4, channel_bands=2, channel_width=2)
    mask = hidden(masking, torch.full((ROWS,), FRAMES))
    assert max(map(runs, mask.all(2))) == 3
    assert max(map(runs, mask.all(1))) == 2
    assert not hidden(Masking(0, 20, 0, 5), torch.full((ROWS,), FRAMES)).any()


def test_many_bands_of_time_cover_at_most_half_of_a_short_row() -> None:
    lengths = torch.tensor([20, 60, FRAMES] * 200)
    covered = hidden(Masking(time_bands=10, time_width=30, channel_bands=0), lengths).all(2).sum(1)
    assert (covered <= lengths // 2).all()
    assert (covered > lengths // 5).any()


def test_what_is_not_hidden_is_as_it_was() -> None:
    features = torch.randn(8, FRAMES, CHANNELS, generator=seeded(1)) + 5
    before = features.clone()
    masked = mask_bands(features, torch.full((8,), 100), Masking(channel_width=4), seeded())
    assert torch.equal(features, before)
    assert masked.dtype == features.dtype and (masked == 0).any()
    assert torch.equal(masked[masked != 0], features[masked != 0])


def test_rows_differ_and_the_seed_decides() -> None:
    lengths = torch.full((ROWS,), FRAMES)
    first = hidden(Masking(channel_width=4), lengths)
    assert torch.equal(first, hidden(Masking(channel_width=4), lengths))
    assert not torch.equal(first, hidden(Masking(channel_width=4), lengths, seed=1))
    assert len(torch.unique(first.flatten(1), dim=0)) > ROWS / 2


def test_without_a_generator_torchs_own_decides() -> None:
    ones, lengths = torch.ones(4, FRAMES, CHANNELS), torch.full((4,), FRAMES)
    torch.manual_seed(3)
    first, second = mask_bands(ones, lengths, Masking()), mask_bands(ones, lengths, Masking())
    torch.manual_seed(3)
    assert torch.equal(first, mask_bands(ones, lengths, Masking())) and not torch.equal(first, second)


def tone_spectrogram(hertz: float) -> Tensor:
    """Log-mel frames of a second of a pure tone, (1, T, 80), without its first and last frames."""
    extractor = WhisperFeatureExtractor(feature_size=80)
    samples = np.sin(2 * np.pi * hertz * np.arange(16_000) / 16_000).astype(np.float32)
    mel = extractor(samples, sampling_rate=16_000, padding=False, truncation=False, return_tensors="pt")["input_features"]
    return mel.transpose(1, 2)[:, 5:-5]


@pytest.mark.parametrize("hertz", [400.0, 1500.0, 3000.0])
@pytest.mark.parametrize("factor", [0.85, 1.0, 1.3])
def test_warping_moves_a_tone_to_the_factors_frequency(hertz: float, factor: float) -> None:
    warped = warp_frequencies(tone_spectrogram(hertz), torch.tensor([factor]))
    expected = tone_spectrogram(factor * hertz)
    assert (warped.mean(1).argmax() - expected.mean(1).argmax()).abs() <= 1


def test_a_factor_of_one_changes_nothing_and_rows_have_their_own() -> None:
    mel = torch.randn(2, 7, 80, generator=torch.Generator().manual_seed(0))
    warped = warp_frequencies(mel, torch.tensor([1.0, 1.2]))
    torch.testing.assert_close(warped[0], mel[0], atol=1e-4, rtol=0)
    assert not torch.allclose(warped[1], mel[1], atol=0.1)
    torch.testing.assert_close(warp_frequencies(mel[1:], torch.tensor([1.2]))[0], warped[1])


def test_each_row_is_mixed_with_the_next() -> None:
    rows = torch.randn(3, 5, 2, generator=torch.Generator().manual_seed(0))
    rows[1, 3:] = 0  # ends sooner
    mixed = with_others(rows, torch.tensor([0.25, 0.0, 0.5]))
    torch.testing.assert_close(mixed[0, :3], 0.75 * rows[0, :3] + 0.25 * rows[1, :3])
    torch.testing.assert_close(mixed[0, 3:], 0.75 * rows[0, 3:])
    assert torch.equal(mixed[1], rows[1])
    torch.testing.assert_close(mixed[2], 0.5 * (rows[2] + rows[0]))
    torch.testing.assert_close(with_others(rows[:1], torch.tensor([0.4])), rows[:1])  # nobody else is there
