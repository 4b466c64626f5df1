"""Synthetic speech: sentences read by espeak-ng in many voices, deterministic by seed.

`plan()` draws voice and distortion of each sentence, `render()` computes the samples of one planned line, `synthesise()`
writes a corpus (16-bit wav files, a manifest and the times of the phonemes). The same line gives the same samples on every
machine with the same espeak-ng.

    python -m diffusion_gemma_asr.data.synthetic.synth --text text/de.txt --language de --count 100 --out runs/dev-de
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import wave
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import soxr

from ...audio.read import SAMPLE_RATE
from ...errors import DataError
from ...files import whole_file, write_whole
from ..manifest import Utterance, read_manifest, write_manifest
from ..text import plain_text, speakable
from .distort import recorded
from .espeak import speak

P = TypeVar("P")
Phoneme = tuple[str, float, float]  # espeak-ng's symbol, start and end in seconds
# espeak-ng voices of each language, sampled uniformly: American English twice as often as British. Not the voice "cmn",
# which in 1.51 reads tone numbers aloud in English.
ACCENTS = {
    "en": ("en-us", "en-us", "en-gb"),
    "de": ("de",),
    "fr": ("fr-fr", "fr-fr", "fr-be", "fr-ch"),
    "es": ("es", "es-419"),
    "hi": ("hi",),
    "zh": ("cmn-latn-pinyin",),
}
LENGTHS = {"zh": (4, 24)}  # fewest and most characters of a sentence
WORDS = (2, 13)  # fewest and most words of a sentence in other languages
# espeak-ng's human-like voice variants by file name (case-sensitive): without monsters, robots and whispers, and without
# caleb, a duplicate of klatt.
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
    """One planned utterance: text, voice and distortion."""

    text: str
    language: str
    voice: str  # of espeak-ng, with its variant
    rate: int  # words per minute
    pitch: int  # espeak's 0 to 99
    gain_db: float  # peak against full scale
    snr_db: float | None  # speech to added noise; None adds none
    seed: int  # of the noise and the room
    reverberation_s: float | None = None  # RT60 of the room; None is no room
    telephone: bool = False  # through a telephone


def plan(
    sentences: Sequence[str], language: str, variants: Sequence[str], seed: int, rooms: float = 0.0, telephones: float = 0.0
) -> list[Line]:
    """Draws voice, rate, pitch, loudness and distortions for every sentence.

    Args:
        sentences: texts to read.
        language: code.
        variants: espeak-ng voice variants to sample from.
        seed: of all draws.
        rooms: share of the sentences with reverberation, of 0.1 to 0.6 s.
        telephones: share of the sentences through a telephone.

    Returns:
        a line for each sentence, in order.
    """
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
                reverberation_s=round(rng.uniform(0.1, 0.6), 2) if rooms and rng.random() < rooms else None,
                telephone=bool(telephones) and rng.random() < telephones,
            )
        )
    return lines


def render(line: Line) -> np.ndarray:
    """Synthesises one line.

    Returns:
        (n,) float32 samples in [-1, 1] at 16 kHz.

    Raises:
        SynthesisError: espeak-ng is missing, or rejects the voice or the text.
    """
    return render_with_phonemes(line)[0]


def render_with_phonemes(line: Line) -> tuple[np.ndarray, list[Phoneme]]:
    """As `render`, with the times of the phonemes.

    Returns:
        (n,) float32 samples in [-1, 1] at 16 kHz, and (symbol, start, end) of every phoneme and pause, in order, in seconds
        from the first sample; see `espeak.Speech`.

    Raises:
        SynthesisError: espeak-ng is missing, or rejects the voice or the text.
    """
    speech = speak(line.text, line.voice, line.rate, line.pitch)
    samples = soxr.resample(speech.samples.astype(np.float32) / 32768.0, speech.sample_rate, SAMPLE_RATE)
    rng = np.random.default_rng(line.seed)
    pause = [np.zeros(int(rng.uniform(0.05, 0.25) * SAMPLE_RATE), np.float32) for _ in range(2)]
    samples = np.concatenate([pause[0], samples, pause[1]])
    shift = len(pause[0]) / SAMPLE_RATE
    phonemes = [(symbol, start + shift, end + shift) for symbol, start, end in speech.phonemes]
    return recorded(samples, line, rng), phonemes


def synthesise(lines: Sequence[Line], folder: str | Path, workers: int = 2) -> Path:
    """Renders every line into `folder/wav/`, writes `folder/manifest.jsonl` and `folder/phonemes.jsonl`.

    File names are hashes of the lines, so existing files are reused. `phonemes.jsonl` has one object per line in the
    manifest's order: audio_filepath, relative to the folder, and phonemes, a list of [symbol, start, end] with times in
    seconds.

    Args:
        lines: see `plan`.
        folder: created if missing.
        workers: processes.

    Returns:
        the manifest's path.

    Raises:
        SynthesisError: espeak-ng is missing, or rejects a voice or a text.
    """
    folder = Path(folder)
    (folder / "wav").mkdir(parents=True, exist_ok=True)
    rows = []
    with (
        ProcessPoolExecutor(workers) as pool,
        whole_file(folder / "phonemes.jsonl") as part,
        part.open("w", encoding="utf-8") as file,
    ):
        for row, phonemes in pool.map(partial(_render_to_file, folder=folder), lines, chunksize=64):
            rows.append(row)
            name = json.dumps(os.path.relpath(row.audio_filepath, folder), ensure_ascii=False)
            file.write(f'{{"audio_filepath": {name}, "phonemes": {phonemes}}}\n')
    manifest = folder / "manifest.jsonl"
    write_manifest(manifest, rows)
    return manifest


def _render_to_file(line: Line, folder: Path) -> tuple[Utterance, str]:
    """Writes NAME.wav and NAME.json (the phonemes) unless both exist; returns the manifest row and the JSON text."""
    path = folder / "wav" / f"{name_of(asdict(line))}.wav"
    phonemes_path = path.with_suffix(".json")
    if path.exists() and phonemes_path.exists():
        phonemes = phonemes_path.read_text(encoding="utf-8")
    else:
        samples, spans = render_with_phonemes(line)
        phonemes = json.dumps([(symbol, round(start, 4), round(end, 4)) for symbol, start, end in spans])
        write_whole(phonemes_path, phonemes)
        write_sound(path, samples)
    return Utterance(str(path), line.text, line.language, sound_duration(path), line.voice), phonemes


def write_corpus(
    write: Callable[[tuple[P, Path]], Utterance | None],
    planned: Iterable[tuple[P, object]],
    folder: str | Path,
    workers: int,
    initializer: Callable[..., object] | None = None,
    initargs: tuple[Any, ...] = (),
) -> Path:
    """Writes a sound of all that is planned to `folder/wav/`, in several processes, and `folder/manifest.jsonl`.

    Args:
        write: writes one sound to the path that it is given, unless it is there; returns its row, or None to leave it out.
        planned: what it is given, each with all that the sound is made of (`name_of`).
        folder: created if missing.
        workers: processes.
        initializer, initargs: called in each of them first.

    Returns:
        the manifest's path.
    """
    sounds, manifest = Path(folder, "wav"), Path(folder, "manifest.jsonl")
    sounds.mkdir(parents=True, exist_ok=True)
    tasks = [(one, sounds / f"{name_of(made_of)}.wav") for one, made_of in planned]
    with ProcessPoolExecutor(workers, initializer=initializer, initargs=initargs) as pool:
        rows = [row for row in pool.map(write, tasks, chunksize=8) if row is not None]
    write_manifest(manifest, rows)
    return manifest


def name_of(made_of: object) -> str:
    """A name for a sound by everything that it is made of, as JSON knows it: what is made otherwise has another one."""
    return hashlib.sha1(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]


def write_sound(path: Path, samples: np.ndarray) -> None:
    """Writes (n,) samples in [-1, 1] at 16 kHz as a 16-bit wav file, atomically."""
    with whole_file(path) as part, wave.open(str(part), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes((samples * 32767).astype("<i2").tobytes())


def sound_duration(path: Path) -> float:
    """Seconds, to the millisecond, of a file that `write_sound` wrote."""
    return round((path.stat().st_size - 44) / 2 / SAMPLE_RATE, 3)


def pick_sentences(
    path: str | Path,
    count: int,
    seed: int,
    language: str = "en",
    exclude: Collection[str] = (),
    sizes: tuple[int, int] | None = None,
    as_written: bool = False,
) -> list[str]:
    """Samples different sentences from a text file; lines that are not `speakable` are ignored.

    Args:
        path: text file, one sentence per line.
        count: sentences to sample.
        seed: of the sample.
        language: code.
        exclude: sentences not to sample, as plain text (data/text.py).
        sizes: fewest and most words, in Mandarin characters; None: 2 to 13 words, 4 to 24 characters.
        as_written: with case and punctuation.

    Returns:
        the sentences, as plain text unless `as_written`.

    Raises:
        DataError: no such file, or it has too few such sentences.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such text file; give --text a file with one sentence a line")
    shortest, longest = sizes or LENGTHS.get(language, WORDS)
    fitting: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        plain = plain_text(line, language)
        size = len(plain) if language == "zh" else len(plain.split())
        if shortest <= size <= longest and plain not in exclude and speakable(line, language):
            fitting.setdefault(plain, line.strip() if as_written else plain)
    if len(fitting) < count:
        raise DataError(f"{path}: {len(fitting)} sentences of {shortest} to {longest} words, {count} were asked for")
    return random.Random(seed).sample(list(fitting.values()), count)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; `arguments` None are those of the process."""
    parser = argparse.ArgumentParser(description="Make synthetic speech with espeak-ng.")
    parser.add_argument("--text", required=True, help="text file, one sentence a line")
    parser.add_argument("--out", required=True, help="folder for wav files and manifest.jsonl")
    parser.add_argument("--count", type=int, help="how many sentences to draw (default: the whole file, in order)")
    parser.add_argument("--exclude", nargs="*", default=(), help="manifests whose sentences are not drawn")
    parser.add_argument("--language", default="en", choices=sorted(ACCENTS))
    parser.add_argument("--held_out_voices", action="store_true", help="use the voices that training never hears")
    parser.add_argument("--rooms", type=float, default=0.0, help="share of the sentences that are spoken in a room")
    parser.add_argument("--telephones", type=float, default=0.0, help="share that is heard through a telephone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args(arguments)
    if args.count is None:
        lines = Path(args.text).read_text(encoding="utf-8").splitlines()
        sentences = [plain_text(line, args.language) for line in lines if line.strip()]
    else:
        exclude = {u.text for manifest in args.exclude for u in read_manifest(manifest)}
        sentences = pick_sentences(args.text, args.count, args.seed, args.language, exclude)
    variants = HELD_OUT_VARIANTS if args.held_out_voices else TRAIN_VARIANTS
    lines_planned = plan(sentences, args.language, variants, args.seed, args.rooms, args.telephones)
    print(synthesise(lines_planned, args.out, args.workers))


if __name__ == "__main__":
    main()
