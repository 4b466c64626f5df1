"""data/synthetic/synth.py: the same plan sounds the same, held-out voices stay held out, levels are those asked for."""

from __future__ import annotations

import wave
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from diffusion_gemma_asr.data.manifest import read_manifest
from diffusion_gemma_asr.data.synthetic import espeak, synth
from diffusion_gemma_asr.data.synthetic.synth import (
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
    espeak.library_name() is None, reason="needs the espeak-ng library (Debian: apt-get install espeak-ng)"
)
LINE = Line("we met again", "en", "en-us+Alex", rate=160, pitch=50, gain_db=-6.0, snr_db=None, seed=5)


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
    """Two names of one voice would let a held-out voice be heard in training; the first is no variant at all."""
    sounds: dict[bytes, str] = {}
    for voice in ("en-us", *(f"en-us+{variant}" for variant in HELD_OUT_VARIANTS + TRAIN_VARIANTS)):
        sound = espeak.speak("no", voice, 300, 50).samples.tobytes()
        assert sound not in sounds, f"{voice} sounds like {sounds[sound]}"
        sounds[sound] = voice


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
    speech = espeak.speak(LINE.text, LINE.voice, LINE.rate, LINE.pitch)
    spoken_s = len(speech.samples) / speech.sample_rate
    assert 0.1 <= len(render(LINE)) / SAMPLE_RATE - spoken_s <= 0.5


@needs_espeak
@pytest.mark.parametrize("voice", ["xx-nowhere", "en-us+Nobody"])
def test_an_unknown_voice_is_an_error_that_names_it(tmp_path: Path, voice: str) -> None:
    with pytest.raises(SynthesisError, match=voice.replace("+", r"\+")):
        render(replace(LINE, voice=voice))
    with pytest.raises(SynthesisError, match=voice.replace("+", r"\+")):  # from a worker as well
        synthesise([LINE, replace(LINE, voice=voice)], tmp_path, workers=1)
    assert not (tmp_path / "manifest.jsonl").exists()


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


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """A file that is written again has another inode or time."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in (folder / "wav").iterdir()}


@needs_espeak
def test_a_second_call_renders_only_what_is_missing(tmp_path: Path) -> None:
    lines = plan(["one", "two", "three"], "en", TRAIN_VARIANTS, 2)
    manifest = synthesise(lines[:2], tmp_path, workers=1)
    one, two = (Path(u.audio_filepath) for u in read_manifest(manifest))
    before, sound = stamps(tmp_path), two.read_bytes()
    two.unlink()
    synthesise(lines, tmp_path, workers=1)
    assert [u.text for u in read_manifest(manifest)] == ["one", "two", "three"]
    assert stamps(tmp_path)[one.name] == before[one.name] and two.read_bytes() == sound

    before, rows = stamps(tmp_path), manifest.read_bytes()
    synthesise(lines, tmp_path, workers=1)
    assert stamps(tmp_path) == before and manifest.read_bytes() == rows


def test_a_missing_espeak_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(espeak, "library_name", lambda: None)
    with pytest.raises(SynthesisError, match="apt-get install espeak-ng"):
        render(LINE)


# -- sentences ---------------------------------------------------------------------------------------------

TEXT = "The cat sat.\nthe cat sat!\nA dog, it barked; twice.\nOne\nHe said: no.\nBirds sing songs.\n"


def test_sentences_are_different_plain_and_of_the_length_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    everything = {"the cat sat", "a dog it barked twice", "he said no", "birds sing songs"}
    assert sorted(pick_sentences(path, 4, seed=0)) == sorted(everything)
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
def test_the_command_line_keeps_voices_apart(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    found = {}
    for name, extra in (("train", []), ("held", ["--held_out_voices"])):
        arguments = ["--text", str(tmp_path / "text.txt"), "--out", str(tmp_path / name), "--workers", "1"]
        synth.main([*arguments, "--count", "2", *extra])
        found[name] = read_manifest(tmp_path / name / "manifest.jsonl")
    assert {u.speaker.split("+")[1] for u in found["train"]} <= set(TRAIN_VARIANTS)
    assert {u.speaker.split("+")[1] for u in found["held"]} <= set(HELD_OUT_VARIANTS)


# -- rooms and telephones --------------------------------------------------------------------------------------


def test_a_plan_draws_rooms_and_telephones_and_leaves_the_rest_as_it_was() -> None:
    sentences = [f"sentence {i}" for i in range(1000)]
    dry = plan(sentences, "fr", TRAIN_VARIANTS, 3)
    assert all(line.reverberation_s is None and not line.telephone for line in dry)
    lines = plan(sentences, "fr", TRAIN_VARIANTS, 3, rooms=0.5, telephones=0.2)
    echoes = [line.reverberation_s for line in lines if line.reverberation_s is not None]
    assert 0.45 < len(echoes) / 1000 < 0.55 and min(echoes) >= 0.1 and max(echoes) <= 0.6
    assert 0.16 < sum(line.telephone for line in lines) / 1000 < 0.24


@needs_espeak
@pytest.mark.parametrize("language", sorted(synth.ACCENTS))
def test_every_accent_speaks_its_language(language: str) -> None:
    said = {"en": "good day", "de": "guten tag", "fr": "bon jour", "es": "buenos días", "hi": "नमस्ते", "zh": "你好"}
    for accent in synth.ACCENTS[language]:
        line = replace(LINE, text=said[language], language=language, voice=f"{accent}+Alex", reverberation_s=0.2)
        sound, phonemes = synth.render_with_phonemes(replace(line, telephone=True))
        assert 0.4 < len(sound) / SAMPLE_RATE < 2.5 and np.abs(sound).max() > 0.1
        assert len([symbol for symbol, _, _ in phonemes if not symbol.startswith("_")]) >= 4


@needs_espeak
def test_mandarin_is_read_in_mandarin() -> None:
    """Not as the names of its tones' numbers in English, which is what the voice "cmn" does."""
    phonemes = synth.render_with_phonemes(replace(LINE, text="他", language="zh", voice="cmn-latn-pinyin+Alex"))[1]
    assert next(symbol for symbol, _, _ in phonemes if not symbol.startswith("_")).startswith("t")
    assert len(phonemes) < 8


def test_sentences_of_mandarin_are_measured_in_characters(tmp_path: Path) -> None:
    path = tmp_path / "zh.txt"
    path.write_text("他是日本人。\n好。\n圖書館在哪裡？\nTom在家里睡觉。\n我们早餐吃了三明治。\n", encoding="utf-8")
    assert sorted(pick_sentences(path, 2, 0, "zh")) == sorted(["他是日本人", "我们早餐吃了三明治"])
