"""English read by flite, whose voices are cut from recordings of people: deterministic by seed.

Whisper's encoder hears in it about what it hears in people's speech, unlike in espeak-ng's. A core makes 40 s a second.
Needs the program flite (Debian: `apt-get install flite`).

    python -m diffusion_gemma_asr.data.synthetic.flite --text text/en.txt --count 6000 --out runs/flite-en
"""

from __future__ import annotations

import argparse
import io
import random
import subprocess
import wave
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import soxr

from ...audio.read import SAMPLE_RATE
from ...errors import SynthesisError
from ..manifest import Utterance, read_manifest
from ..text import plain_text
from .copies import Distortion, distorted, draw_distortion
from .synth import pick_sentences, sound_duration, write_corpus, write_sound

VOICES = ("rms", "slt", "awb", "kal16")  # an American man and woman, a Scot, and diphones of an American man
WORDS = (3, 28)  # fewest and most of a sentence


@dataclass(frozen=True)
class Line:
    """One planned utterance."""

    text: str  # as written, with its punctuation, which gives the reading its pauses
    voice: str
    stretch: float  # factor of the durations
    distortion: Distortion


def plan(sentences: Sequence[str], seed: int) -> list[Line]:
    """Draws voice, rate and distortion of every sentence.

    Args:
        sentences: texts to read, in English.
        seed: of all draws.

    Returns:
        a line for each sentence, in order.
    """
    rng = random.Random(seed)
    lines = []
    for sentence in sentences:
        how = draw_distortion(rng, noises=0.4, rooms=0.25, telephones=0.1)
        lines.append(Line(sentence, rng.choice(VOICES), round(rng.uniform(0.75, 1.25), 2), how))
    return lines


def speak(line: Line) -> np.ndarray:
    """Reads a line aloud, without its distortion.

    Returns:
        (n,) float32 samples in [-1, 1] at 16 kHz.

    Raises:
        SynthesisError: flite is not installed, or makes no sound of the text.
    """
    settings = ("-voice", line.voice, "--setf", f"duration_stretch={line.stretch}")
    try:
        told = subprocess.run(("flite", *settings, "-t", line.text, "-o", "/dev/stdout"), capture_output=True, check=True)
        with wave.open(io.BytesIO(told.stdout)) as file:
            samples = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32) / 32768
            rate = file.getframerate()
    except FileNotFoundError as error:
        raise SynthesisError("flite is not installed; on Debian or Ubuntu: apt-get install flite") from error
    except (subprocess.CalledProcessError, wave.Error) as error:
        raise SynthesisError(f"flite could not say {line.text!r}: {error}; give it another text") from error
    if not samples.any():
        raise SynthesisError(f"flite could not say {line.text!r}: no sound; give it another text")
    return soxr.resample(samples, rate, SAMPLE_RATE)


def synthesise(lines: Sequence[Line], folder: str | Path, workers: int = 2) -> Path:
    """Reads every line into `folder/wav/` and writes `folder/manifest.jsonl`; sounds that are there are kept.

    Args:
        lines: see `plan`.
        folder: created if missing.
        workers: processes.

    Returns:
        the manifest's path.

    Raises:
        SynthesisError: see `speak`.
    """
    return write_corpus(_read_aloud, [(line, ["flite", asdict(line)]) for line in lines], folder, workers)


def _read_aloud(task: tuple[Line, Path]) -> Utterance:
    line, path = task
    if not path.exists():
        write_sound(path, distorted(speak(line), line.distortion))
    return Utterance(str(path), plain_text(line.text, "en"), "en", sound_duration(path), f"flite-{line.voice}")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; `arguments` None are those of the process."""
    parser = argparse.ArgumentParser(description="Make synthetic English speech with flite.")
    parser.add_argument("--text", type=Path, required=True, help="text file, one sentence a line")
    parser.add_argument("--out", type=Path, required=True, help="folder for wav files and manifest.jsonl")
    parser.add_argument("--count", type=int, required=True, help="how many sentences to draw")
    parser.add_argument("--exclude", nargs="*", default=(), help="manifests whose sentences are not drawn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args(arguments)
    exclude = {plain_text(u.text, "en") for manifest in args.exclude for u in read_manifest(manifest)}
    sentences = pick_sentences(args.text, args.count, args.seed, "en", exclude, WORDS, as_written=True)
    print(synthesise(plan(sentences, args.seed), args.out, args.workers))


if __name__ == "__main__":
    main()
