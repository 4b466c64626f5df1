"""Synthetic speech that sounds like people: sentences read by Kokoro-82M (Apache 2.0) in blended voices.

Whisper's encoder hears little of what espeak-ng says, and Kokoro's speech about as well as people's; German has a foreign
accent. Needs `pip install "misaki[zh]" phonemizer-fork espeakng-loader openvino` and a folder with `model.onnx`,
`config.json` (its `vocab`) and `voices/*.bin`, as in the ONNX export of Kokoro-82M v1.0; `runs/kokoro.sh` makes one.

    python -m diffusion_gemma_asr.data.synthetic.kokoro --model runs/kokoro --text text/es.txt --language es \
      --count 1100 --out runs/kokoro-es
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import soxr

from ...audio.read import SAMPLE_RATE
from ...errors import DataError, SynthesisError
from ..manifest import Utterance, read_manifest
from ..text import plain_text
from .copies import Distortion, distorted, draw_distortion
from .synth import pick_sentences, sound_duration, write_corpus, write_sound

KOKORO_RATE = 24_000  # Hz
LONGEST = 500  # phonemes of a sentence
# First letters of their names. No voice is German: Whisper base misheard a quarter of the words of six sentences in a
# Portuguese voice, half in an English one.
VOICES = {"en": "ab", "de": "p", "es": "e", "fr": "f", "hi": "h", "zh": "z"}
PHONEMES = {  # the voice of espeak-ng that writes them; Mandarin has a writer of its own
    "en": "en-us",
    "de": "de",
    "es": "es",
    "fr": "fr-fr",
    "hi": "hi",
}
GERMAN = (("ɔø", "Y"), ("aɪ", "I"), ("aʊ", "W"), ("ts", "ʦ"), ("ʏ", "y"), ("ɜ", "ɐ"))  # espeak-ng's symbols → Kokoro's
WORDS = (3, 28)  # fewest and most of a sentence
CHARACTERS = (4, 44)  # of one in Mandarin
NEEDS = 'Kokoro needs: pip install "misaki[zh]" phonemizer-fork espeakng-loader openvino'
# Not pinned: the only threads of two workers would share a core.
_SETTINGS = {"INFERENCE_PRECISION_HINT": "bf16", "INFERENCE_NUM_THREADS": 1, "ENABLE_CPU_PINNING": False}


class UnspeakableError(SynthesisError):
    """A line has no phonemes, or too many."""


@dataclass(frozen=True)
class Line:
    """One planned utterance."""

    text: str  # as written, with its punctuation, which gives the reading its pauses
    language: str
    voice: str  # of the language
    other: str  # any voice; both are blended
    share: float  # of `other`
    speed: float  # factor
    distortion: Distortion


class Kokoro:
    """The model of a folder, in bfloat16 where the processor has it, on one thread.

    Args:
        folder: see above.

    Raises:
        SynthesisError: misaki or OpenVINO is not installed, or the folder lacks a file.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            import openvino
        except ImportError as error:
            raise SynthesisError(f"{error}; {NEEDS}") from error
        for name in ("model.onnx", "config.json", "voices"):
            if not (self.folder / name).exists():
                raise SynthesisError(f"{self.folder / name}: not there; runs/kokoro.sh puts the folder together")
        self._vocab = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))["vocab"]
        self._run = openvino.Core().compile_model(self.folder / "model.onnx", "CPU", _SETTINGS)
        self._writers: dict[str, Callable[[str], tuple[str, Any]]] = {}

    def phonemes(self, text: str, language: str) -> str:
        """What is said, in the symbols of Kokoro; symbols that it does not know are left out."""
        if language not in self._writers:
            try:
                if language == "zh":
                    from misaki.zh import ZHG2P

                    self._writers[language] = ZHG2P()
                else:
                    from misaki.espeak import EspeakG2P

                    self._writers[language] = EspeakG2P(language=PHONEMES[language])
            except ImportError as error:
                raise SynthesisError(f"{error}; {NEEDS}") from error
        phonemes = self._writers[language](text)[0]
        for symbols, known in GERMAN if language == "de" else ():
            phonemes = phonemes.replace(symbols, known)
        return "".join(symbol for symbol in phonemes if symbol in self._vocab)

    def speak(self, line: Line) -> np.ndarray:
        """Reads a line aloud, without its distortion.

        Returns:
            (n,) float32 samples at 24 kHz.

        Raises:
            UnspeakableError: the line has no phonemes, or too many.
            SynthesisError: what writes phonemes is not installed.
        """
        phonemes = self.phonemes(line.text, line.language)
        if not 0 < len(phonemes) <= LONGEST:
            raise UnspeakableError(f"Kokoro cannot say {line.text!r}: {len(phonemes)} phonemes, 1 to {LONGEST} can be said")
        own, other = (self._style(voice, len(phonemes)) for voice in (line.voice, line.other))
        style = (1 - line.share) * own + line.share * other
        tokens = np.array([[0, *(self._vocab[symbol] for symbol in phonemes), 0]], np.int64)
        sound = self._run([tokens, style[None], np.array([line.speed], np.float32)])[0]
        return np.asarray(sound, np.float32).ravel()

    def _style(self, voice: str, phonemes: int) -> np.ndarray:
        """(256,): a voice has a style for every number of phonemes."""
        styles = np.fromfile(self.folder / "voices" / f"{voice}.bin", np.float32).reshape(-1, 256)
        return styles[min(phonemes, len(styles)) - 1]


def plan(sentences: Sequence[str], language: str, voices: Sequence[str], seed: int) -> list[Line]:
    """Draws voices, speed and distortion of every sentence.

    Args:
        sentences: texts to read.
        language: code of one of `VOICES`.
        voices: names of all voices there are.
        seed: of all draws.

    Returns:
        a line for each sentence, in order.

    Raises:
        DataError: none of the voices speaks the language.
    """
    rng = random.Random(seed)
    own = [voice for voice in voices if voice[0] in VOICES[language]]
    if not own:
        raise DataError(f"no voice for {language}: names begin with one of {VOICES[language]!r}")
    lines = []
    for sentence in sentences:
        how = draw_distortion(rng, noises=0.4, rooms=0.25, telephones=0.1)
        how = replace(how, speed=round(rng.uniform(0.94, 1.06), 3))  # changes the pitch as well
        share = round(rng.uniform(0.0, 0.5), 2)  # above, it no longer sounds like a native speaker
        lines.append(
            Line(sentence, language, rng.choice(own), rng.choice(voices), share, round(rng.uniform(0.8, 1.25), 2), how)
        )
    return lines


def synthesise(lines: Sequence[Line], model: str | Path, folder: str | Path, workers: int = 2) -> Path:
    """Reads every line into `folder/wav/` and writes `folder/manifest.jsonl`; sounds that are there are kept.

    Args:
        lines: see `plan`.
        model: folder of Kokoro.
        folder: created if missing.
        workers: processes, each with a model of its own.

    Returns:
        the manifest's path.

    Raises:
        SynthesisError: see `Kokoro`.
    """
    return write_corpus(_read_aloud, [(line, asdict(line)) for line in lines], folder, workers, _load, (model,))


_model: Kokoro | None = None  # of this worker


def _load(folder: str | Path) -> None:
    global _model
    _model = Kokoro(folder)


def _read_aloud(task: tuple[Line, Path]) -> Utterance | None:
    """None where Kokoro cannot say the line."""
    line, path = task
    assert _model is not None
    if not path.exists():
        try:
            sound = _model.speak(line)
        except UnspeakableError:
            return None
        write_sound(path, distorted(soxr.resample(sound, KOKORO_RATE, SAMPLE_RATE), line.distortion))
    text, speaker = plain_text(line.text, line.language), f"{line.voice}+{line.other}"
    return Utterance(str(path), text, line.language, sound_duration(path), speaker)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; `arguments` None are those of the process."""
    parser = argparse.ArgumentParser(description="Make synthetic speech with Kokoro.")
    parser.add_argument("--model", type=Path, required=True, help="folder with model.onnx, config.json and voices/")
    parser.add_argument("--text", type=Path, required=True, help="text file, one sentence a line")
    parser.add_argument("--out", type=Path, required=True, help="folder for wav files and manifest.jsonl")
    parser.add_argument("--count", type=int, required=True, help="how many sentences to draw")
    parser.add_argument("--exclude", nargs="*", default=(), help="manifests whose sentences are not drawn")
    parser.add_argument("--language", required=True, choices=sorted(VOICES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args(arguments)
    exclude = {u.text for manifest in args.exclude for u in read_manifest(manifest)}
    sizes = CHARACTERS if args.language == "zh" else WORDS
    sentences = pick_sentences(args.text, args.count, args.seed, args.language, exclude, sizes, as_written=True)
    voices = sorted(path.stem for path in (args.model / "voices").glob("*.bin"))
    print(synthesise(plan(sentences, args.language, voices, args.seed), args.model, args.out, args.workers))


if __name__ == "__main__":
    main()
