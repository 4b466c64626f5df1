"""The bundled model on the bundled example: from a file to words, through the denoising decoder."""

from __future__ import annotations

import json
from pathlib import Path

import jiwer
import numpy as np
import pytest

import diffusion_gemma_asr as asr
from diffusion_gemma_asr.cli import main
from diffusion_gemma_asr.data.text import plain_english

EXAMPLES = Path(__file__).parents[1] / "examples"
PRESET = Path(asr.__file__).parent / "presets" / "mini"


@pytest.fixture(scope="module")
def mini() -> asr.DiffusionGemmaASR:
    return asr.load("mini")


def test_the_example_is_transcribed(mini: asr.DiffusionGemmaASR) -> None:
    said = plain_english((EXAMPLES / "en.txt").read_text(encoding="utf-8"))
    transcript = asr.transcribe(EXAMPLES / "en.flac", mini)
    assert set(said.split()) & set(transcript.text.split()), transcript.text
    assert jiwer.cer(said, transcript.text) < 0.5, transcript.text


def test_the_same_seed_gives_the_same_words(mini: asr.DiffusionGemmaASR) -> None:
    first = asr.transcribe(EXAMPLES / "en.flac", mini, seed=3)
    assert first == asr.transcribe(EXAMPLES / "en.flac", mini, seed=3)


def test_silence_gives_nothing(mini: asr.DiffusionGemmaASR) -> None:
    assert asr.transcribe(np.zeros(16_000 * 3, np.float32), mini).text == ""


def test_the_command_line_prints_the_transcript(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["transcribe", str(EXAMPLES / "en.flac"), "-f", "json"])
    assert done.value.code == 0
    assert json.loads(capsys.readouterr().out)["text"].strip()


def test_the_bundle_is_small() -> None:
    size = sum(path.stat().st_size for path in PRESET.rglob("*") if path.is_file())
    assert size < 40e6
