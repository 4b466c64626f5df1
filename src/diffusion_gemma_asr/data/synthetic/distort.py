"""Waveform augmentation: reverberation, telephone coding, noise, speed."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import soxr

from ...audio.read import SAMPLE_RATE


class Conditions(Protocol):
    """Under what speech is recorded."""

    @property
    def gain_db(self) -> float:
        """Peak against full scale."""

    @property
    def snr_db(self) -> float | None:
        """Speech to added noise; None adds none."""

    @property
    def reverberation_s(self) -> float | None:
        """RT60 of the room; None is no room."""

    @property
    def telephone(self) -> bool:
        """Whether it comes through one."""


def recorded(samples: np.ndarray, how: Conditions, rng: np.random.Generator) -> np.ndarray:
    """(n,) float32 samples at 16 kHz as they sound in a room, with noise, through a telephone: (n,) float32 in [-1, 1]."""
    if how.reverberation_s is not None:
        samples = reverberate(samples, how.reverberation_s, rng)
    samples = samples * (10 ** (how.gain_db / 20) / max(float(np.abs(samples).max()), 1e-4))
    if how.snr_db is not None:
        samples = add_noise(samples, how.snr_db, rng)
    if how.telephone:
        samples = telephone(samples)
    return np.clip(samples, -1.0, 1.0).astype(np.float32)


def reverberate(samples: np.ndarray, seconds: float, rng: np.random.Generator) -> np.ndarray:
    """Convolves with a random room response: exponentially decaying noise (Polack 1988) behind the direct sound.

    Args:
        samples: (n,) at 16 kHz.
        seconds: RT60, the time in which the echo falls by 60 dB.
        rng: of the response; the direct sound gets between a third and nine tenths of its energy.

    Returns:
        (n,) float32; the echo beyond the last sample is cut.
    """
    count = round(seconds * SAMPLE_RATE)
    tail = rng.standard_normal(count) * 10 ** (-3 * np.arange(count) / count)
    direct = rng.uniform(1 / 3, 0.9)
    response = tail * np.sqrt((1 - direct) / max(float(np.sum(tail**2)), 1e-12))
    response[0] = np.sqrt(direct)
    size = 1 << (len(samples) + count - 1).bit_length()
    echoing = np.fft.irfft(np.fft.rfft(samples, size) * np.fft.rfft(response, size), size)
    return echoing[: len(samples)].astype(np.float32)


def telephone(samples: np.ndarray) -> np.ndarray:
    """Telephone bandwidth and coding: 300 to 3400 Hz, 8-bit mu-law (ITU-T G.711).

    Args:
        samples: (n,) in [-1, 1] at 16 kHz.

    Returns:
        (n,) float32 in [-1, 1] at 16 kHz.
    """
    spectrum = np.fft.rfft(samples)
    hertz = np.fft.rfftfreq(len(samples), 1 / SAMPLE_RATE)
    spectrum[(hertz < 300) | (hertz > 3400)] = 0
    narrow = np.clip(np.fft.irfft(spectrum, len(samples)), -1.0, 1.0)
    coded = np.round(127 * np.sign(narrow) * np.log1p(255 * np.abs(narrow)) / np.log(256)) / 127
    return (np.sign(coded) * (256 ** np.abs(coded) - 1) / 255).astype(np.float32)


def add_noise(samples: np.ndarray, snr_db: float, rng: np.random.Generator) -> np.ndarray:
    """Adds coloured noise, whose power falls as 1/f^a with a drawn from 0 (white) to 2 (brown).

    Args:
        samples: (n,).
        snr_db: power of the sound over that of the noise, in dB.
        rng: of the noise.

    Returns:
        (n,).
    """
    spectrum = np.fft.rfft(rng.standard_normal(len(samples)))
    spectrum /= np.maximum(np.arange(len(spectrum)), 1.0) ** (rng.uniform(0.0, 2.0) / 2)
    noise = np.fft.irfft(spectrum, len(samples))
    power = float(np.mean(samples**2)) / 10 ** (snr_db / 10)
    return samples + (noise * np.sqrt(power / max(float(np.mean(noise**2)), 1e-12))).astype(np.float32)


def change_speed(samples: np.ndarray, factor: float) -> np.ndarray:
    """Changes the speed, and with it the pitch, by resampling (Ko et al. 2015): (n,) → (n / factor,)."""
    return soxr.resample(samples, SAMPLE_RATE * factor, SAMPLE_RATE).astype(np.float32)
