"""data/synthetic/distort.py: rooms ring as long as asked, telephones are narrow, noise is as loud as asked."""

from __future__ import annotations

import numpy as np
import pytest
from sounds import pitch, tone

from diffusion_gemma_asr.audio.read import SAMPLE_RATE
from diffusion_gemma_asr.data.synthetic.distort import add_noise, change_speed, reverberate, telephone


def test_a_room_rings_on_for_as_long_as_asked() -> None:
    click = np.zeros(SAMPLE_RATE, np.float32)
    click[0] = 1.0
    heard = reverberate(click, 0.4, np.random.default_rng(0))
    assert heard.dtype == np.float32 and len(heard) == len(click)
    assert np.sum(heard**2) == pytest.approx(1, rel=1e-3)
    early, late = (np.mean(heard[round(at * SAMPLE_RATE) :][:800] ** 2) for at in (0.05, 0.25))
    assert 10 * np.log10(early / late) == pytest.approx(60 * 0.2 / 0.4, abs=3)  # 60 dB in 0.4 s
    assert not heard[round(0.41 * SAMPLE_RATE) :].round(6).any()


def test_a_telephone_carries_a_narrow_band() -> None:
    time = np.arange(SAMPLE_RATE) / SAMPLE_RATE
    parts = {hertz: 0.2 * np.sin(2 * np.pi * hertz * time) for hertz in (100, 1000, 5300)}
    heard = telephone(sum(parts.values()).astype(np.float32))
    power = {hertz: abs(2 * np.mean(heard * part)) / 0.04 for hertz, part in parts.items()}
    assert power[1000] == pytest.approx(1, abs=0.05) and power[100] < 0.01 and power[5300] < 0.01
    assert len(np.unique(heard)) <= 255  # 8 bits


@pytest.mark.parametrize("snr_db", [0.0, 20.0])
def test_noise_is_as_loud_as_asked(snr_db: float) -> None:
    sound = tone(300, 1.0)
    noise = add_noise(sound, snr_db, np.random.default_rng(1)) - sound
    assert 10 * np.log10(np.mean(sound**2) / np.mean(noise**2)) == pytest.approx(snr_db, abs=0.1)


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_another_speed_is_another_length_and_pitch(factor: float) -> None:
    sound = tone(400, 1.0)
    heard = change_speed(sound, factor)
    assert heard.dtype == np.float32 and len(heard) == pytest.approx(len(sound) / factor, abs=40)
    assert pitch(heard) == pytest.approx(400 * factor, rel=0.02)
