"""data/synth.py: the same plan sounds the same, held-out voices stay held out, levels are those asked for."""

from __future__ import annotations

import shutil
import subprocess
import sys
import wave
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from diffusion_gemma_asr.data import synth
from diffusion_gemma_asr.data.manifest import read_manifest
from diffusion_gemma_asr.data.synth import (
    HELD_OUT_VARIANTS,
    SAMPLE_RATE,
    TRAIN_VARIANTS,
    Line,
    pick_sentences,
    plan,
    render,
    synthesise,
)
from diffusion_gemma_asr.errors import DataError, SynthesisError

needs_espeak = pytest.mark.skipif(
    shutil.which("espeak-ng") is None, reason="needs espeak-ng (Debian: apt-get install espeak-ng)"
)
LINE = Line("we met again", "en", "en-us+Alex", rate=160, pitch=50, gain_db=-6.0, snr_db=None, seed=5)


def without_espeak(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on no program is found, as on a machine without espeak-ng."""
    (folder / "empty").mkdir()
    monkeypatch.setenv("PATH", str(folder / "empty"))


def read_wav(path: str) -> np.ndarray:
    with wave.open(path) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, SAMPLE_RATE)
        return np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32) / 32767


# -- plan --------------------------------------------------------------------------------------------------


def test_a_plan_is_a_function_of_its_seed() -> None:
    sentences = [f"sentence {i}" for i in range(20)]
    assert plan(sentences, "en", TRAIN_VARIANTS, 3) == plan(sentences, "en", TRAIN_VARIANTS, 3)
    assert plan(sentences, "en", TRAIN_VARIANTS, 3) != plan(sentences, "en", TRAIN_VARIANTS, 4)


def test_a_plan_says_every_sentence_in_order_in_the_voices_given() -> None:
    sentences = [f"sentence {i}" for i in range(2000)]
    lines = plan(sentences, "en", ("Alex", "Lee"), 0)
    assert [line.text for line in lines] == sentences
    assert {line.voice.split("+")[0] for line in lines} == set(synth.ACCENTS["en"])
    assert {line.voice.split("+")[1] for line in lines} == {"Alex", "Lee"}
    assert len({line.seed for line in lines}) == len(lines)
    noisy = [line.snr_db for line in lines if line.snr_db is not None]
    assert 0.55 < len(noisy) / len(lines) < 0.65 and 10 <= min(noisy) < 11 and 39 < max(noisy) <= 40
    gains = [line.gain_db for line in lines]
    assert -18 <= min(gains) < -17 and -2 < max(gains) <= -1
    assert {line.rate for line in lines} == set(range(135, 196))
    assert {line.pitch for line in lines} == set(range(30, 71))


def test_no_voice_is_both_held_out_and_trained_on() -> None:
    assert not {name.lower() for name in HELD_OUT_VARIANTS} & {name.lower() for name in TRAIN_VARIANTS}
    for names in (HELD_OUT_VARIANTS, TRAIN_VARIANTS):
        assert len(set(names)) == len(names)


@needs_espeak
def test_every_variant_is_a_voice_of_its_own() -> None:
    """espeak-ng reads a variant that it does not know in the accent's default voice, and says nothing.

    So a misspelt name would sound the same in training and held out.
    """
    sounds: dict[bytes, str] = {}
    for variant in ("nosuchvariant", *HELD_OUT_VARIANTS, *TRAIN_VARIANTS):
        command = ["espeak-ng", "-v", f"en-us+{variant}", "--stdout", "no"]
        sound = subprocess.run(command, capture_output=True, check=True).stdout
        assert sound not in sounds, f"{variant} sounds like {sounds[sound]}"
        sounds[sound] = variant


# -- sound -------------------------------------------------------------------------------------------------


@needs_espeak
def test_the_same_line_gives_the_same_samples_and_another_seed_others() -> None:
    noisy = replace(LINE, snr_db=20.0)
    first = render(noisy)
    assert first.dtype == np.float32 and first.ndim == 1 and np.abs(first).max() <= 1
    assert np.array_equal(first, render(noisy))
    other = render(replace(noisy, seed=6))
    assert first.shape != other.shape or not np.array_equal(first, other)


@needs_espeak
def test_the_peak_is_the_gain_asked_for() -> None:
    for gain_db in (-18.0, -6.0, -1.0):
        peak = np.abs(render(replace(LINE, gain_db=gain_db))).max()
        assert 20 * np.log10(peak) == pytest.approx(gain_db, abs=0.01)


@needs_espeak
@pytest.mark.parametrize("snr_db", [10.0, 25.0, 40.0])
def test_the_noise_is_as_far_under_the_speech_as_asked_for(snr_db: float) -> None:
    clean = render(LINE)
    noise = render(replace(LINE, snr_db=snr_db)) - clean
    measured = 10 * np.log10(np.mean(clean**2) / np.mean(noise**2))
    assert measured == pytest.approx(snr_db, abs=0.1)


@needs_espeak
def test_rate_and_voice_are_heard() -> None:
    assert len(render(replace(LINE, rate=110))) > 1.2 * len(render(replace(LINE, rate=195)))
    assert not np.array_equal(render(LINE), render(replace(LINE, voice="en-us+Andrea")))


@needs_espeak
def test_speech_takes_as_long_as_espeak_says_it_between_two_short_pauses() -> None:
    command = [
        "espeak-ng",
        "-v",
        LINE.voice,
        "-s",
        str(LINE.rate),
        "-p",
        str(LINE.pitch),
        "--stdout",
        LINE.text,
    ]
    wav = subprocess.run(command, capture_output=True, check=True).stdout
    spoken_s = (len(wav) - 44) / 2 / int.from_bytes(wav[24:28], "little")  # its header names the sample rate
    assert 0.1 <= len(render(LINE)) / SAMPLE_RATE - spoken_s <= 0.5


@needs_espeak
def test_an_unknown_accent_is_an_error_that_names_voice_and_text() -> None:
    with pytest.raises(SynthesisError, match=r"we met again.*xx-nowhere"):
        render(replace(LINE, voice="xx-nowhere"))


# -- a corpus ----------------------------------------------------------------------------------------------


@needs_espeak
def test_a_corpus_holds_what_was_rendered(tmp_path: Path) -> None:
    lines = plan(["good morning", "good night"], "en", HELD_OUT_VARIANTS, 1)
    rows = read_manifest(synthesise(lines, tmp_path, workers=1))
    assert [(u.text, u.language, u.speaker) for u in rows] == [(s.text, s.language, s.voice) for s in lines]
    for line, row in zip(lines, rows, strict=True):
        samples = read_wav(row.audio_filepath)
        assert row.duration == pytest.approx(len(samples) / SAMPLE_RATE, abs=1e-3)
        assert np.abs(samples - render(line)).max() <= 1.01 / 32767


@needs_espeak
def test_a_second_call_renders_only_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = plan(["one", "two", "three"], "en", TRAIN_VARIANTS, 2)
    manifest = synthesise(lines[:2], tmp_path, workers=1)
    first = {u.text: Path(u.audio_filepath) for u in read_manifest(manifest)}
    stamps = {text: path.stat().st_mtime_ns for text, path in first.items()}
    before = first["two"].read_bytes()
    first["two"].unlink()
    synthesise(lines, tmp_path, workers=1)
    assert [u.text for u in read_manifest(manifest)] == ["one", "two", "three"]
    assert first["one"].stat().st_mtime_ns == stamps["one"] and first["two"].read_bytes() == before

    without_espeak(tmp_path, monkeypatch)  # whatever would be rendered now raises
    synthesise(lines, tmp_path, workers=1)
    assert [u.text for u in read_manifest(manifest)] == ["one", "two", "three"]


def test_a_missing_espeak_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_espeak(tmp_path, monkeypatch)
    with pytest.raises(SynthesisError, match="apt-get install espeak-ng"):
        render(LINE)
    with pytest.raises(SynthesisError, match="apt-get install espeak-ng"):  # from a worker as well
        synthesise([LINE], tmp_path / "corpus", workers=1)
    assert not (tmp_path / "corpus" / "manifest.jsonl").exists()


# -- sentences ---------------------------------------------------------------------------------------------

TEXT = "The cat sat.\nthe cat sat!\nA dog, it barked; twice.\nOne\nHe said: no.\nBirds sing songs.\n"


def test_sentences_are_different_plain_and_of_the_length_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    everything = {"the cat sat", "a dog it barked twice", "he said no", "birds sing songs"}
    assert sorted(pick_sentences(path, 4, seed=0)) == sorted(everything)
    assert set(pick_sentences(path, 3, seed=0, words=(3, 4))) == everything - {"a dog it barked twice"}
    assert set(pick_sentences(path, 3, seed=0, exclude={"he said no"})) == everything - {"he said no"}


def test_sentences_are_drawn_by_seed(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(f"line {a}{b}" for a in "abcdefgh" for b in "abcdefgh"), encoding="utf-8")
    first, again, other = (pick_sentences(path, 9, seed=seed) for seed in (1, 1, 2))
    assert first == again != other


def test_too_few_sentences_or_no_file(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    with pytest.raises(DataError, match=r"text\.txt: 4 sentences of 2 to 13 words, 5 were asked for"):
        pick_sentences(tmp_path / "text.txt", 5, seed=0)
    with pytest.raises(DataError, match=r"gone\.txt: no such text file"):
        pick_sentences(tmp_path / "gone.txt", 1, seed=0)


@needs_espeak
def test_the_command_line_keeps_voices_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    found = {}
    for name, extra in (("train", []), ("held", ["--held_out_voices"])):
        arguments = ["--text", str(tmp_path / "text.txt"), "--out", str(tmp_path / name), "--workers", "1"]
        monkeypatch.setattr(sys, "argv", ["synth", *arguments, "--count", "2", *extra])
        synth.main()
        found[name] = read_manifest(tmp_path / name / "manifest.jsonl")
    assert {u.speaker.split("+")[1] for u in found["train"]} <= set(TRAIN_VARIANTS)
    assert {u.speaker.split("+")[1] for u in found["held"]} <= set(HELD_OUT_VARIANTS)
