"""Distorted copies of a corpus: each utterance once more at another speed and loudness, some in a room, in noise, through a
telephone, deterministic by seed.

    python -m diffusion_gemma_asr.data.copies speech/en-train.jsonl runs/mini/copies-en --seed 1

A frozen encoder's frames are computed once for each sound, so that what is to be heard in training has to lie on disk.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from ..audio import SAMPLE_RATE
from .distort import add_noise, change_speed, reverberate, telephone
from .manifest import Utterance, read_manifest, write_manifest
from .synth import read_sound, write_sound


@dataclass(frozen=True)
class Distortion:
    """What one copy sounds like; the options of `draw_distortion` say how often.

    speed is a factor; gain_db is the peak against full scale; snr_db the ratio of speech to added noise, reverberation_s the
    time in which the echo falls by 60 dB, None for none; seed drives the noise and the room.
    """

    speed: float
    gain_db: float
    snr_db: float | None
    reverberation_s: float | None
    telephone: bool
    seed: int


def draw_distortion(rng: random.Random, noises: float = 0.5, rooms: float = 0.3, telephones: float = 0.15) -> Distortion:
    """Speed from 0.88 to 1.14, peak from -18 to -1 dB, and by the given probabilities noise at 5 to 30 dB, a room with an
    echo of 0.1 to 0.6 s, a telephone."""
    return Distortion(
        speed=round(rng.uniform(0.88, 1.14), 3),
        gain_db=round(rng.uniform(-18.0, -1.0), 2),
        snr_db=round(rng.uniform(5.0, 30.0), 2) if rng.random() < noises else None,
        reverberation_s=round(rng.uniform(0.1, 0.6), 2) if rng.random() < rooms else None,
        telephone=rng.random() < telephones,
        seed=rng.randrange(2**31),
    )


def distorted(samples: np.ndarray, how: Distortion) -> np.ndarray:
    """The copy of a sound: (n,) float32 in [-1, 1] at 16 kHz."""
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
    """Writes a copy of every utterance to `folder/wav/` and `folder/manifest.jsonl`; copies that are there stay.

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
        write_sound(path, distorted(read_sound(utterance.audio_filepath), how))
    duration = round((path.stat().st_size - 44) / 2 / SAMPLE_RATE, 3)
    return replace(utterance, audio_filepath=str(path.resolve()), duration=duration)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make distorted copies of a corpus.")
    parser.add_argument("manifest")
    parser.add_argument("folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    print(make_copies(read_manifest(args.manifest), args.folder, args.seed, args.workers))
