"""The bundled models on the bundled examples: from a file to words."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import diffusion_gemma_asr as asr
from diffusion_gemma_asr.app.cli import main
from diffusion_gemma_asr.audio.read import load_audio
from diffusion_gemma_asr.checkpoint.load import PRESETS
from diffusion_gemma_asr.data.synthetic import espeak
from diffusion_gemma_asr.data.synthetic.synth import Line, render
from diffusion_gemma_asr.data.text import plain_english, plain_text
from diffusion_gemma_asr.denoise.decode import decode_clips
from diffusion_gemma_asr.denoise.options import DecodeOptions
from diffusion_gemma_asr.evaluate.metrics import count
from diffusion_gemma_asr.transcribe.recognizer import Recognizer

EXAMPLES = Path(__file__).parents[1] / "examples"
EXAMPLE_SENTENCES = EXAMPLES.parent / "recipes" / "lists" / "examples-en.txt"


@pytest.fixture(scope="module")
def mini() -> Recognizer:
    return asr.load("mini")


def test_real_words_are_found(mini: Recognizer) -> None:
    """The bundled model is weak (docs/results/languages.md): of new sentences it must find more than half of the words."""
    if espeak.library_name() is None:
        pytest.skip("needs the espeak-ng library (Debian: apt-get install espeak-ng)")
    said = [plain_english(line) for line in EXAMPLE_SENTENCES.read_text(encoding="utf-8").splitlines()]
    clips = [render(Line(text, "en", "en-us", 160, 50, -3.0, 30.0, 1)) for text in said]
    written = [decoded.text for decoded in decode_clips(mini.model, clips, DecodeOptions())]
    right = sum(len(set(a.split()) & set(b.split())) for a, b in zip(said, written, strict=True))
    assert right / sum(len(set(text.split())) for text in said) > 0.55


@pytest.mark.parametrize("start", [None, "draft", "noise"])
def test_the_audio_decides(mini: Recognizer, start: str | None) -> None:
    """Other sound, other words: the transcript comes from the audio, not from the language model alone."""
    sound = load_audio(EXAMPLES / "en.flac")
    forward, backward = (mini.transcribe(clip, start=start).text for clip in (sound, np.ascontiguousarray(sound[::-1])))
    assert forward and forward != backward


def test_the_same_seed_gives_the_same_words(mini: Recognizer) -> None:
    first = mini.transcribe(EXAMPLES / "en.flac", seed=3, start="noise")
    assert first.segments[0].decoder == "denoising"
    assert first == mini.transcribe(EXAMPLES / "en.flac", seed=3, start="noise")


def test_silence_gives_nothing(mini: Recognizer) -> None:
    assert mini.transcribe(np.zeros(16_000 * 3, np.float32)).text == ""


def test_the_command_line_prints_the_transcript(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["transcribe", str(EXAMPLES / "en.flac"), "-f", "json"])
    assert not done.value.code
    assert json.loads(capsys.readouterr().out)["text"].strip()


def test_the_bundles_are_small() -> None:
    """A package index takes wheels of at most 100 MB."""
    assert sum(path.stat().st_size for path in PRESETS.rglob("*") if path.is_file()) < 80e6  # as they travel in the package


SIX = ("en", "de", "fr", "es", "hi", "zh")
WHISPER_BASE = EXAMPLES.parents[1] / "shared" / "models" / "whisper-base-encoder"


def mean_character_errors(recognizer: Recognizer) -> float:
    """Of the examples, which nobody trained on, in six languages; the drafts, before the denoiser touches them."""
    rates = []
    for code in SIX:
        said = plain_text((EXAMPLES / f"{code}.txt").read_text(encoding="utf-8"), code)
        sound = load_audio(EXAMPLES / f"{code}.flac")
        (decoded,) = decode_clips(recognizer.model, [sound], DecodeOptions(language=code))
        rates.append(count(said, plain_text(decoded.draft, code), "character").rate)
    return sum(rates) / len(rates)


def test_six_languages() -> None:
    """Weak as well; text that has nothing to do with the sound is wrong by 80 % and more."""
    recognizer = asr.load("mini")
    assert recognizer.languages == SIX and recognizer.model.config.finds_language
    assert mean_character_errors(recognizer) < 0.4


def test_six_languages_with_whispers_encoder() -> None:
    """See `test_six_languages`."""
    if not WHISPER_BASE.is_dir():
        pytest.skip("needs the encoder of openai/whisper-base")
    assert mean_character_errors(asr.load("base", encoder=WHISPER_BASE)) < 0.45
