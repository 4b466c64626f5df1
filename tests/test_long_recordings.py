"""Recordings with a known script, transcribed by the bundled model: errors, times, memory; and sound without speech."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import diffusion_gemma_asr as asr
from diffusion_gemma_asr.data.synthetic.espeak import library_name

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
needs_espeak = pytest.mark.skipif(
    library_name() is None, reason="needs the espeak-ng library (Debian: apt-get install espeak-ng)"
)


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))  # for its `pages`
    try:
        spec = importlib.util.spec_from_file_location("long_recordings", BENCHMARKS / "long_recordings.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["long_recordings"] = module  # dataclasses look there
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCHMARKS))
    return module


@pytest.fixture(scope="module")
def mini() -> asr.Recognizer:
    return asr.load("mini", device="cpu")


@needs_espeak
def test_three_minutes(bench: ModuleType, mini: asr.Recognizer, tmp_path: Path) -> None:
    script = bench.write_recording(tmp_path / "recording.wav", 3.0)
    transcript = mini.transcribe(tmp_path / "recording.wav")
    figures = bench.compare(script, bench.read_alone(mini, script), transcript)
    assert figures["segments"] == figures["utterances"] == len(script) > 30
    assert figures["start_error_s"]["largest"] < 0.3
    assert figures["wer"] < 1.1 * figures["wer_alone"] + 0.05  # some 300 words: a few of them are chance


@needs_espeak
@pytest.mark.slow
def test_sixty_minutes(bench: ModuleType, mini: asr.Recognizer, tmp_path: Path) -> None:
    long = bench.measure_recording(mini, tmp_path / "hour.wav", 60.0)
    short = bench.measure_recording(mini, tmp_path / "minutes.wav", 10.0)
    assert long["wer"] < 1.1 * long["wer_alone"]
    assert long["start_error_s"]["within_0.3"] >= 0.995  # a voice that voice activity detection hardly takes for one
    assert long["peak_memory_mb"] - short["peak_memory_mb"] < 100


@needs_espeak
def test_word_times(bench: ModuleType, mini: asr.Recognizer) -> None:
    errors = bench.word_errors(mini, 20)
    assert len(errors["script"]) == 2 * 120 and len(errors["transcript"]) > 2 * 20
    assert np.median(errors["script"]) < 0.1 and np.percentile(errors["script"], 95) < 0.25
    assert np.median(errors["transcript"]) < 0.1


@pytest.mark.parametrize("kind", ["silence", "white noise", "tone"])
def test_ten_minutes_without_speech(mini: asr.Recognizer, kind: str) -> None:
    n = 600 * 16_000
    time_s = np.arange(n) / 16_000
    sound = {
        "silence": lambda: np.zeros(n),
        "white noise": lambda: 0.1 * np.random.default_rng(0).standard_normal(n),
        "tone": lambda: 0.3 * np.sin(2 * np.pi * 440 * time_s),
    }[kind]().astype(np.float32)
    transcript = mini.transcribe(sound)
    assert (transcript.text, transcript.segments, transcript.duration) == ("", (), 600.0)


def test_music_of_plain_tones_gives_nothing(mini: asr.Recognizer) -> None:
    """Chords and arpeggios with overtones and decay, a minute of them."""
    rng = np.random.default_rng(1)
    sound = np.zeros(60 * 16_000, np.float32)
    time_s = np.arange(16_000) / 16_000
    for beat in range(0, len(sound) - 16_000, 4_000):
        hertz = 110 * 2 ** (rng.choice([0, 3, 5, 7, 10, 12, 15]) / 12 + rng.integers(0, 3))
        overtones = sum(np.sin(2 * np.pi * k * hertz * time_s) / k for k in range(1, 6))
        sound[beat : beat + 16_000] += (0.1 * overtones * np.exp(-4 * time_s)).astype(np.float32)
    assert mini.transcribe(sound).text == ""
