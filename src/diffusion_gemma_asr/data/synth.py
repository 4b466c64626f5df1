"""Synthetic speech: sentences read out by espeak-ng in many voices, deterministic by seed.

`plan()` draws who says what and how, `render()` makes the sound of one plan row, `synthesise()` writes a whole corpus
(16-bit wav files, a manifest and the times of the phonemes). The same plan row gives the same samples on every machine
with the same espeak-ng.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import wave
from collections.abc import Collection, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import soxr

from ..audio import SAMPLE_RATE, load_audio
from ..errors import DataError
from .espeak import speak
from .manifest import Utterance, read_manifest, write_manifest
from .text import plain_english

Phoneme = tuple[str, float, float]  # espeak-ng's symbol, start and end in seconds
ACCENTS = {"en": ("en-us", "en-us", "en-gb")}  # drawn from uniformly: two American voices to one British
# espeak-ng's voice variants that sound like a person, by file name (letter case counts); the monsters, robots and
# whispers are left out, and caleb, which sounds exactly as klatt.
HELD_OUT_VARIANTS = (
    "Alicia", "Andy", "Denis", "Hugo", "linda", "Mike", "paul", "steph2", "zac", "f3", "m4", "klatt3",
)  # fmt: skip
TRAIN_VARIANTS = (
    "adam", "Alex", "Andrea", "Annie", "antonio", "aunty", "belinda", "benjamin", "boris", "david", "Diogo",
    "ed", "edward", "edward2", "Gene", "Gene2", "gustave", "Henrique", "iven", "iven2", "iven3", "iven4",
    "Jacky", "john", "Lee", "marcelo", "Marco", "Mario", "max", "Michael", "michel", "miguel", "Mr serious",
    "Nguyen", "pablo", "pedro", "quincy", "rob", "robert", "steph", "steph3", "anika", "f1", "f2", "f4", "f5",
    "grandma", "grandpa", "klatt", "klatt2", "klatt4", "m1", "m2", "m3", "m5", "m6", "m7", "m8", "norbert",
    "sandro", "shelby", "travis", "victor",
)  # fmt: skip


@dataclass(frozen=True)
class Line:
    """One plan row: what is said, and how.

    rate is in words a minute and pitch in espeak's 0–99; gain_db is the peak against full scale; snr_db is the ratio of
    speech to added noise, None for none; seed drives the noise.
    """

    text: str
    language: str
    voice: str
    rate: int
    pitch: int
    gain_db: float
    snr_db: float | None
    seed: int


def plan(sentences: Sequence[str], language: str, variants: Sequence[str], seed: int) -> list[Line]:
    """Draws a voice, a rate, a pitch, a loudness and a noise level for every sentence, in order."""
    rng = random.Random(seed)
    lines = []
    for sentence in sentences:
        accent = rng.choice(ACCENTS[language])
        variant = rng.choice(list(variants))
        lines.append(
            Line(
                text=sentence,
                language=language,
                voice=f"{accent}+{variant}",
                rate=rng.randint(135, 195),
                pitch=rng.randint(30, 70),
                gain_db=round(rng.uniform(-18.0, -1.0), 2),
                snr_db=round(rng.uniform(10.0, 40.0), 2) if rng.random() < 0.6 else None,
                seed=rng.randrange(2**31),
            )
        )
    return lines


def render(line: Line) -> np.ndarray:
    """Makes the sound of one plan row.

    Returns:
        (n,) float32 samples in [-1, 1] at 16 kHz.

    Raises:
        SynthesisError: espeak-ng is missing, or refuses the voice or the text.
    """
    return render_with_phonemes(line)[0]


def render_with_phonemes(line: Line) -> tuple[np.ndarray, list[Phoneme]]:
    """As `render`, with the phonemes that espeak-ng spoke and where they lie in the samples.

    Returns:
        (n,) float32 samples in [-1, 1] at 16 kHz, and (symbol, start, end) of every phoneme and pause of the speech, in
        order, in seconds from the first sample; see `espeak.Speech` for the symbols and for where a stop starts.

    Raises:
        SynthesisError: espeak-ng is missing, or refuses the voice or the text.
    """
    speech = speak(line.text, line.voice, line.rate, line.pitch)
    samples = soxr.resample(speech.samples.astype(np.float32) / 32768.0, speech.sample_rate, SAMPLE_RATE)
    rng = np.random.default_rng(line.seed)
    pause = [np.zeros(int(rng.uniform(0.05, 0.25) * SAMPLE_RATE), np.float32) for _ in range(2)]
    samples = np.concatenate([pause[0], samples, pause[1]])
    samples *= 10 ** (line.gain_db / 20) / max(float(np.abs(samples).max()), 1e-4)
    if line.snr_db is not None:
        samples = samples + _noise(rng, len(samples), samples, line.snr_db)
    shift = len(pause[0]) / SAMPLE_RATE
    phonemes = [(symbol, start + shift, end + shift) for symbol, start, end in speech.phonemes]
    return np.clip(samples, -1.0, 1.0).astype(np.float32), phonemes


def _noise(rng: np.random.Generator, n: int, speech: np.ndarray, snr_db: float) -> np.ndarray:
    """Noise whose spectrum falls as 1/f^a, a drawn from white (0) to brown (2), at `snr_db` under the speech."""
    spectrum = np.fft.rfft(rng.standard_normal(n))
    spectrum /= np.maximum(np.arange(len(spectrum)), 1.0) ** (rng.uniform(0.0, 2.0) / 2)
    noise = np.fft.irfft(spectrum, n)
    power = float(np.mean(speech**2)) / 10 ** (snr_db / 10)
    return (noise * np.sqrt(power / max(float(np.mean(noise**2)), 1e-12))).astype(np.float32)


def synthesise(lines: Sequence[Line], folder: str | Path, workers: int = 2) -> Path:
    """Renders every line into `folder/wav/`, writes `folder/manifest.jsonl` and `folder/phonemes.jsonl`.

    A file's name is a hash of its plan row, so a second call makes only what is missing. `phonemes.jsonl` has one object
    a line in the manifest's order: audio_filepath, relative to the folder, and phonemes, a list of [symbol, start,
    end] with times in seconds.

    Returns:
        the manifest's path.

    Raises:
        SynthesisError: espeak-ng is missing, or refuses a voice or a text.
    """
    folder = Path(folder)
    (folder / "wav").mkdir(parents=True, exist_ok=True)
    rows = []
    part = folder / "phonemes.jsonl.part"
    with ProcessPoolExecutor(workers) as pool, part.open("w", encoding="utf-8") as file:
        for row, phonemes in pool.map(partial(_render_to_file, folder=folder), lines, chunksize=64):
            rows.append(row)
            name = json.dumps(os.path.relpath(row.audio_filepath, folder), ensure_ascii=False)
            file.write(f'{{"audio_filepath": {name}, "phonemes": {phonemes}}}\n')
    part.replace(folder / "phonemes.jsonl")
    manifest = folder / "manifest.jsonl"
    write_manifest(manifest, rows)
    return manifest


def _render_to_file(line: Line, folder: Path) -> tuple[Utterance, str]:
    """Makes NAME.wav and NAME.json, the phonemes, where one is missing; returns the manifest row and the JSON text."""
    name = hashlib.sha1(json.dumps(asdict(line), sort_keys=True).encode()).hexdigest()[:16]
    path = folder / "wav" / f"{name}.wav"
    phonemes_path = path.with_suffix(".json")
    if path.exists() and phonemes_path.exists():
        phonemes = phonemes_path.read_text(encoding="utf-8")
    else:
        samples, spans = render_with_phonemes(line)
        phonemes = json.dumps([(symbol, round(start, 4), round(end, 4)) for symbol, start, end in spans])
        part = path.with_suffix(".part")
        part.write_text(phonemes, encoding="utf-8")
        part.rename(phonemes_path)
        with wave.open(str(part), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(SAMPLE_RATE)
            file.writeframes((samples * 32767).astype("<i2").tobytes())
        part.rename(path)
    duration = (path.stat().st_size - 44) / 2 / SAMPLE_RATE
    return Utterance(str(path), line.text, line.language, round(duration, 3), line.voice), phonemes


def read_sound(path: str) -> np.ndarray:
    """`load_audio` for training: the wav files made here are read plainly, ten times faster than FFmpeg opens them.

    Raises:
        AudioError: it cannot be read; see `load_audio`, which reads everything else.
    """
    if path.endswith(".wav"):
        with suppress(wave.Error, OSError, EOFError), wave.open(path) as file:
            if (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, SAMPLE_RATE):
                return np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32) / 32768
    return load_audio(path)


def pick_sentences(
    path: str | Path, count: int, seed: int, words: tuple[int, int] = (2, 13), exclude: Collection[str] = ()
) -> list[str]:
    """Draws `count` different plain-English sentences of `words[0]` to `words[1]` words from a text file, one a line.

    Sentences in `exclude` (plain English, too) are not drawn.

    Raises:
        DataError: no such file, or it holds fewer such sentences.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such text file; give --text a file with one sentence a line")
    plain = dict.fromkeys(plain_english(line) for line in path.read_text(encoding="utf-8").splitlines())
    fitting = [s for s in plain if words[0] <= len(s.split()) <= words[1] and s not in exclude]
    if len(fitting) < count:
        raise DataError(f"{path}: {len(fitting)} sentences of {words[0]} to {words[1]} words, {count} were asked for")
    return random.Random(seed).sample(fitting, count)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make synthetic speech with espeak-ng.")
    parser.add_argument("--text", required=True, help="text file, one sentence a line")
    parser.add_argument("--out", required=True, help="folder for wav files and manifest.jsonl")
    parser.add_argument("--count", type=int, help="how many sentences to draw (default: the whole file, in order)")
    parser.add_argument("--exclude", help="a manifest whose sentences are not drawn")
    parser.add_argument("--language", default="en", choices=sorted(ACCENTS))
    parser.add_argument("--held_out_voices", action="store_true", help="use the voices that training never hears")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    if args.count is None:
        sentences = [plain_english(s) for s in Path(args.text).read_text(encoding="utf-8").splitlines() if s.strip()]
    else:
        exclude = {u.text for u in read_manifest(args.exclude)} if args.exclude else ()
        sentences = pick_sentences(args.text, args.count, args.seed, exclude=exclude)
    variants = HELD_OUT_VARIANTS if args.held_out_voices else TRAIN_VARIANTS
    manifest = synthesise(plan(sentences, args.language, variants, args.seed), args.out, args.workers)
    print(manifest)


if __name__ == "__main__":
    main()
