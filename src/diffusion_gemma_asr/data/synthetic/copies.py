"""Distorted copies of a corpus: other speed and loudness, sometimes a room, noise or a telephone; deterministic by seed.

    make_copies(read_manifest("speech/en-train.jsonl"), "runs/mini/copies-en", seed=1)

The frames of a frozen encoder are computed once per sound file, so waveform augmentation has to be done beforehand.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from ...audio.read import SAMPLE_RATE
from ..manifest import Utterance, write_manifest
from ..sound import read_utterance
from .distort import add_noise, change_speed, reverberate, telephone
from .synth import write_sound


@dataclass(frozen=True)
class Distortion:
    """The distortion of one copy."""

    speed: float  # factor
    gain_db: float  # peak against full scale
    snr_db: float | None  # speech to added noise; None adds none
    reverberation_s: float | None  # RT60 of the room; None is no room
    telephone: bool
    seed: int  # of the noise and the room


def draw_distortion(rng: random.Random, noises: float = 0.5, rooms: float = 0.3, telephones: float = 0.15) -> Distortion:
    """Draws a speed of 0.88 to 1.14, a peak of -18 to -1 dB, and further distortions by their probabilities.

    Args:
        rng: of all draws.
        noises: probability of noise, at an SNR of 5 to 30 dB.
        rooms: probability of reverberation, of 0.1 to 0.6 s.
        telephones: probability of telephone bandwidth and coding.
    """
    return Distortion(
        speed=round(rng.uniform(0.88, 1.14), 3),
        gain_db=round(rng.uniform(-18.0, -1.0), 2),
        snr_db=round(rng.uniform(5.0, 30.0), 2) if rng.random() < noises else None,
        reverberation_s=round(rng.uniform(0.1, 0.6), 2) if rng.random() < rooms else None,
        telephone=rng.random() < telephones,
        seed=rng.randrange(2**31),
    )


def distorted(samples: np.ndarray, how: Distortion) -> np.ndarray:
    """Applies a distortion.

    Args:
        samples: (n,) float32 at 16 kHz.
        how: the distortion.

    Returns:
        (n / speed,) float32 in [-1, 1] at 16 kHz.
    """
    rng = np.random.default_rng(how.seed)
    samples = change_speed(samples, how.speed)
    if how.reverberation_s is not None:
        samples = reverberate(samples, how.reverberation_s, rng)
    samples = samples * (10 ** (how.gain_db / 20) / max(float(np.abs(samples).max()), 1e-4))
    if how.snr_db is not None:
        samples = add_noise(samples, how.snr_db, rng)
    if how.telephone:
        samples = telephone(samples)
    return np.clip(samples, -1.0, 1.0).astype(np.float32)


def make_copies(utterances: Sequence[Utterance], folder: str | Path, seed: int, workers: int = 2) -> Path:
    """Writes a distorted copy of every utterance to `folder/wav/`, and `folder/manifest.jsonl`; skips existing files.

    Args:
        utterances: to copy.
        folder: created if missing.
        seed: of the distortions.
        workers: processes.

    Returns:
        the manifest's path.

    Raises:
        AudioError: a sound cannot be read.
    """
    folder = Path(folder)
    (folder / "wav").mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    planned = [(number, u, draw_distortion(rng)) for number, u in enumerate(utterances)]
    with ProcessPoolExecutor(workers) as pool:
        rows = list(pool.map(partial(_copy, folder=folder), planned, chunksize=16))
    write_manifest(folder / "manifest.jsonl", rows)
    return folder / "manifest.jsonl"


def _copy(planned: tuple[int, Utterance, Distortion], folder: Path) -> Utterance:
    number, utterance, how = planned
    path = folder / "wav" / f"{number:06d}.wav"
    if not path.exists():
        write_sound(path, distorted(read_utterance(utterance), how))
    duration = round((path.stat().st_size - 44) / 2 / SAMPLE_RATE, 3)
    return replace(utterance, audio_filepath=str(path.resolve()), duration=duration, offset=0.0)
