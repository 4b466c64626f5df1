"""data/synthetic/espeak.py: the library says what the program says, again and again, and its phoneme times are right."""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from diffusion_gemma_asr.data.synthetic import espeak, synth
from diffusion_gemma_asr.data.synthetic.espeak import Speech, speak
from diffusion_gemma_asr.data.synthetic.synth import HELD_OUT_VARIANTS, TRAIN_VARIANTS, Line, render, render_with_phonemes
from diffusion_gemma_asr.errors import SynthesisError

pytestmark = pytest.mark.skipif(
    espeak.library_name() is None, reason="needs the espeak-ng library (Debian: apt-get install espeak-ng)"
)
TEXT = "the cat sat on a paper bag, and then she left"
LINE = Line("seven people", "en", "en-us+Alex", rate=160, pitch=50, gain_db=-6.0, snr_db=None, seed=5)


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(espeak, "library_name", lambda: None)
    yield


def program(text: str, voice: str, rate: int, pitch: int) -> np.ndarray:
    command = ["espeak-ng", "-v", voice, "-s", str(rate), "-p", str(pitch), "--stdout", "--stdin"]
    wav = subprocess.run(command, input=text.encode(), capture_output=True, check=True).stdout
    return np.frombuffer(wav[44:], "<i2")


def level(speech: Speech, start: float, end: float) -> float:
    samples = speech.samples[round(start * speech.sample_rate) : round(end * speech.sample_rate)]
    return float(np.sqrt(np.mean(samples.astype(np.float64) ** 2)))


# -- samples -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="needs the espeak-ng program")
@pytest.mark.parametrize(
    ("voice", "same_voice"),
    [
        ("en-us", "en-us"),
        ("en-us+Andy", "en-us+Andy"),
        ("en-us+klatt3", "en-us+klatt3"),
        ("en-us+Mr serious", "en-us+Mr serious"),
        ("en-gb", "en-gb"),
        ("en-gb+f3", "gmw/en+f3"),  # the program drops the variant of "en-gb+f3"
    ],
)
def test_samples_are_those_of_the_program(voice: str, same_voice: str) -> None:
    speech = speak(TEXT, voice, 170, 40)
    assert speech.sample_rate == 22_050 and speech.samples.dtype == np.int16
    assert np.array_equal(speech.samples, program(TEXT, same_voice, 170, 40))


def test_nothing_is_left_over_from_what_was_said_before() -> None:
    first = speak("no", "en-us+klatt3", 160, 50)
    speak(TEXT, "en-gb+Andy", 190, 90)
    again = speak("no", "en-us+klatt3", 160, 50)
    assert np.array_equal(first.samples, again.samples) and first.phonemes == again.phonemes


def test_a_worker_process_says_the_same() -> None:
    here = speak("no", "en-us+Andy", 160, 50)
    with ProcessPoolExecutor(1) as pool:
        there = pool.submit(speak, "no", "en-us+Andy", 160, 50).result()
    assert np.array_equal(here.samples, there.samples) and here.phonemes == there.phonemes


def test_every_variant_of_the_plans_is_a_voice_of_its_own_in_the_british_accent_too() -> None:
    names = ["en-gb", *(f"en-gb+{variant}" for variant in HELD_OUT_VARIANTS + TRAIN_VARIANTS)]
    assert len({speak("no", name, 300, 50).samples.tobytes() for name in names}) == len(names)


# -- phonemes ----------------------------------------------------------------------------------------------


def test_phonemes_are_in_order_without_gaps_up_to_the_end_of_the_sound() -> None:
    speech = speak(TEXT, "en-us", 160, 50)
    starts, ends = ([p[i] for p in speech.phonemes] for i in (1, 2))
    assert starts[1:] == ends[:-1] and all(start < end for start, end in zip(starts, ends, strict=True))
    assert starts[0] < 0.03 and ends[-1] == pytest.approx(len(speech.samples) / speech.sample_rate, abs=0.002)
    last = max(end for symbol, _, end in speech.phonemes if not symbol.startswith("_"))
    assert last == pytest.approx(np.flatnonzero(speech.samples)[-1] / speech.sample_rate, abs=0.005)


def test_the_symbols_are_those_of_the_words() -> None:
    symbols = [symbol for symbol, _, _ in speak("the cat sat", "en-us", 160, 50).phonemes]
    assert symbols == ["D", "@2", "k", "a", "t", "s", "a", "t", "_:"]


def test_pauses_are_silent_and_a_vowel_starts_where_it_gets_louder() -> None:
    speech = speak("the cat packed a tap, and then she left", "en-us", 160, 50)
    vowels = 0
    for (before, _, _), (symbol, start, end) in zip(speech.phonemes, speech.phonemes[1:], strict=False):
        if symbol.startswith("_"):
            assert level(speech, start + 0.002, end) < 5
        elif symbol == "a" and before in ("k", "p", "t2"):  # cat, packed, tap
            vowels += 1
            assert level(speech, start + 0.01, start + 0.05) > 2 * level(speech, start - 0.02, start)
    assert vowels == 3


# -- errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "voice", "message"),
    [
        ("no", "xx-nowhere", "no voice 'xx-nowhere'"),
        ("no", "xx-nowhere+Andy", "no voice 'xx-nowhere'"),
        ("no", "en-us+Nobody", "no voice variant 'Nobody'"),
        ("no", "en-us+linda.txt", "no voice variant 'linda.txt'"),
        ("", "en-us", "could not say ''"),
    ],
)
def test_what_cannot_be_said_is_an_error_that_names_it(text: str, voice: str, message: str) -> None:
    with pytest.raises(SynthesisError, match=message):
        speak(text, voice, 160, 50)
    assert speak("no", "en-us", 160, 50).samples.any()  # and the next call works


def test_a_missing_library_says_how_to_install_it(no_library: None) -> None:
    with pytest.raises(SynthesisError, match="apt-get install espeak-ng"):
        speak("no", "en-us", 160, 50)


def test_a_library_in_use_elsewhere_is_left_alone() -> None:
    name = espeak.library_name()
    assert name is not None
    held = ctypes.CDLL(name)
    try:
        with pytest.raises(SynthesisError, match="in use by something else"):
            speak("no", "en-us", 160, 50)
    finally:
        espeak._unload(held)
    assert speak("no", "en-us", 160, 50).samples.any()


# -- in a corpus -------------------------------------------------------------------------------------------


def test_times_are_shifted_with_the_sound() -> None:
    """In the rendered samples, too, pauses are silent and the words lie between first and last phoneme."""
    samples, phonemes = render_with_phonemes(LINE)
    assert np.array_equal(samples, render(LINE))
    spoken = [p for p in phonemes if not p[0].startswith("_")]
    loud = np.flatnonzero(np.abs(samples) > 1e-3) / synth.SAMPLE_RATE
    assert loud[0] == pytest.approx(spoken[0][1], abs=0.01) and loud[-1] == pytest.approx(spoken[-1][2], abs=0.01)


def test_a_corpus_lists_the_phonemes_in_the_order_of_the_manifest(tmp_path: Path) -> None:
    lines = [replace(LINE, text=text) for text in ("two", "one", "three")]
    manifest = synth.synthesise(lines, tmp_path, workers=1)
    text = (tmp_path / "phonemes.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(row) for row in text.splitlines()]
    listed = [json.loads(row)["audio_filepath"] for row in manifest.read_text(encoding="utf-8").splitlines()]
    assert [row["audio_filepath"] for row in rows] == listed
    for line, row in zip(lines, rows, strict=True):
        expected = render_with_phonemes(line)[1]
        assert [symbol for symbol, _, _ in row["phonemes"]] == [symbol for symbol, _, _ in expected]
        assert np.allclose([p[1:] for p in row["phonemes"]], [p[1:] for p in expected], atol=1e-4)

    (tmp_path / "phonemes.jsonl").unlink()
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "wav").iterdir()}
    synth.synthesise(lines, tmp_path, workers=1)  # from the files beside the sounds
    assert (tmp_path / "phonemes.jsonl").read_text(encoding="utf-8") == text
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "wav").iterdir()} == before


def test_sound_without_phonemes_is_rendered_again_to_the_same_bytes(tmp_path: Path) -> None:
    synth.synthesise([LINE], tmp_path, workers=1)
    (wav,) = tmp_path.glob("wav/*.wav")
    before = wav.read_bytes()
    wav.with_suffix(".json").unlink()
    synth.synthesise([LINE], tmp_path, workers=1)
    assert wav.read_bytes() == before and wav.with_suffix(".json").exists()
