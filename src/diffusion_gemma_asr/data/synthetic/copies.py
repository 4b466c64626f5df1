"""Distorted copies of a corpus: other speed and loudness, sometimes a room, noise or a telephone; deterministic by seed.

    python -m diffusion_gemma_asr.data.synthetic.copies --manifest speech/en-train.jsonl --out runs/copies-en --join 28

The frames of a frozen encoder are computed once per sound file, so waveform augmentation has to be done beforehand.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from ...audio.read import SAMPLE_RATE
from ..manifest import Utterance, read_manifest
from ..sound import read_utterance
from .distort import change_speed, recorded
from .synth import sound_duration, write_corpus, write_sound


@dataclass(frozen=True)
class Distortion:
    """The distortion of one copy."""

    speed: float  # factor
    gain_db: float  # peak against full scale
    snr_db: float | None  # speech to added noise; None adds none
    reverberation_s: float | None  # RT60 of the room; None is no room
    telephone: bool
    seed: int  # of the noise and the room


PAUSE_S = (0.1, 0.6)  # between utterances that are joined
UNSPACED = ("zh",)  # languages whose words no space parts


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
    return recorded(change_speed(samples, how.speed), how, np.random.default_rng(how.seed))


def joined(utterances: Sequence[Utterance], longest_s: float, rng: random.Random) -> list[list[Utterance]]:
    """Groups of neighbours: people speak for longer than the utterances of a corpus last.

    Each group is filled up to a length of its own, drawn between 0 and `longest_s`; so some remain alone.

    Args:
        utterances: those of one speaker follow each other; an utterance without a speaker may join any such neighbour.
        longest_s: of a group with its pauses, if it has more than one utterance.
        rng: of all draws.

    Returns:
        the groups, in order; each has one speaker and one language.
    """
    groups: list[list[Utterance]] = []
    length = limit = 0.0
    for utterance in utterances:
        same = bool(groups) and (groups[-1][0].speaker, groups[-1][0].language) == (utterance.speaker, utterance.language)
        length += PAUSE_S[1] + utterance.duration
        if same and length <= limit:
            groups[-1].append(utterance)
        else:
            groups.append([utterance])
            length, limit = utterance.duration, rng.uniform(0.0, longest_s)
    return groups


def make_copies(
    utterances: Sequence[Utterance], folder: str | Path, seed: int, workers: int = 2, join_s: float = 0.0
) -> Path:
    """Writes a distorted copy of every utterance to `folder/wav/`, and `folder/manifest.jsonl`; skips existing files.

    Args:
        utterances: to copy.
        folder: created if missing.
        seed: of the distortions.
        workers: processes.
        join_s: neighbours of one speaker become one utterance of at most so many seconds (`joined`); 0 joins none.

    Returns:
        the manifest's path.

    Raises:
        AudioError: a sound cannot be read.
    """
    rng = random.Random(seed)
    groups = joined(utterances, join_s, random.Random(seed)) if join_s else [[u] for u in utterances]
    copies = [(group, draw_distortion(rng)) for group in groups]
    planned = [(copy, [[u.key for u in copy[0]], asdict(copy[1])]) for copy in copies]
    return write_corpus(_copy, planned, folder, workers)


def _copy(task: tuple[tuple[Sequence[Utterance], Distortion], Path]) -> Utterance:
    (group, how), path = task
    if not path.exists():
        rng = random.Random(how.seed)
        parts = [read_utterance(group[0])]
        for utterance in group[1:]:
            parts += [np.zeros(round(rng.uniform(*PAUSE_S) * SAMPLE_RATE), np.float32), read_utterance(utterance)]
        write_sound(path, distorted(np.concatenate(parts), how))
    text = ("" if group[0].language in UNSPACED else " ").join(u.text for u in group)
    return replace(group[0], audio_filepath=str(path.resolve()), text=text, duration=sound_duration(path), offset=0.0)


def main() -> None:
    """Parses the command line and writes the copies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--manifest", type=Path, required=True, help="JSONL list of utterances")
    parser.add_argument("--out", type=Path, required=True, help="folder for the copies and their manifest")
    parser.add_argument("--seed", type=int, default=1, help="of the distortions")
    parser.add_argument("--join", type=float, default=0.0, metavar="S", help="join neighbours of one speaker up to S s")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    told = parser.parse_args()
    print(make_copies(read_manifest(told.manifest), told.out, told.seed, told.workers, told.join))


if __name__ == "__main__":
    main()
