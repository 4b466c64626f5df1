"""data/synthetic/kokoro.py: plans are functions of their seed, voices are blended, what cannot be said is left out."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from diffusion_gemma_asr.audio.read import SAMPLE_RATE
from diffusion_gemma_asr.data.manifest import read_manifest
from diffusion_gemma_asr.data.synthetic import kokoro
from diffusion_gemma_asr.data.synthetic.copies import Distortion
from diffusion_gemma_asr.errors import DataError, SynthesisError

VOICES = ["af_one", "bm_two", "ef_three", "zf_four"]
PLAIN = Distortion(1.0, -6.0, None, None, False, 0)
LINE = kokoro.Line("Abba, ab.", "en", "af_one", "zf_four", share=0.25, speed=0.9, distortion=PLAIN)


def test_a_plan_is_a_function_of_its_seed() -> None:
    sentences = [f"Sentence {number}." for number in range(50)]
    assert kokoro.plan(sentences, "en", VOICES, 3) == kokoro.plan(sentences, "en", VOICES, 3)
    assert kokoro.plan(sentences, "en", VOICES, 3) != kokoro.plan(sentences, "en", VOICES, 4)


def test_a_sentence_is_read_by_a_voice_of_its_language_blended_with_any() -> None:
    lines = kokoro.plan(["We met."] * 400, "en", VOICES, 0)
    assert {line.voice for line in lines} == {"af_one", "bm_two"}
    assert {line.other for line in lines} == set(VOICES)
    assert 0 <= min(line.share for line in lines) < 0.05 and 0.45 < max(line.share for line in lines) <= 0.5


def test_a_language_without_a_voice_is_told() -> None:
    with pytest.raises(DataError, match="no voice for hi"):
        kokoro.plan(["नमस्ते"], "hi", VOICES, 0)


def test_a_folder_without_the_model_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", SimpleNamespace())
    with pytest.raises(SynthesisError, match=r"model\.onnx: not there; runs/kokoro\.sh"):
        kokoro.Kokoro(tmp_path)


def test_without_openvino_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(SynthesisError, match="pip install"):
        kokoro.Kokoro(tmp_path)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[kokoro.Kokoro, list]:
    """Kokoro with a model that hums, and what that was given."""
    folder = tmp_path / "kokoro"
    (folder / "voices").mkdir(parents=True)
    (folder / "model.onnx").touch()
    (folder / "config.json").write_text(json.dumps({"vocab": {"a": 5, "b": 6, ",": 3, ".": 4}}))
    for number, voice in enumerate(VOICES):  # a style of its own for every number of phonemes
        (number + np.arange(20, dtype=np.float32)[:, None] / 100 + np.zeros((1, 256), np.float32)).tofile(
            folder / "voices" / f"{voice}.bin"
        )
    given: list = []

    def run(inputs: list[np.ndarray]) -> list[np.ndarray]:
        given.append(inputs)
        return [np.sin(np.arange(kokoro.KOKORO_RATE, dtype=np.float32) / 20)[None]]

    core = SimpleNamespace(compile_model=lambda *settings: run)
    writer = SimpleNamespace(EspeakG2P=lambda language: lambda text: (text.lower(), None))
    monkeypatch.setitem(sys.modules, "openvino", SimpleNamespace(Core=lambda: core))
    monkeypatch.setitem(sys.modules, "misaki", SimpleNamespace(espeak=writer))
    monkeypatch.setitem(sys.modules, "misaki.espeak", writer)
    return kokoro.Kokoro(folder), given


def test_the_model_gets_known_phonemes_and_the_blend_of_two_voices(model: tuple[kokoro.Kokoro, list]) -> None:
    sound = model[0].speak(LINE)
    tokens, style, speed = model[1][0]
    assert tokens.tolist() == [[0, 5, 6, 6, 5, 3, 5, 6, 4, 0]]  # without the space, which the vocabulary lacks
    assert style.shape == (1, 256) and style.dtype == np.float32
    np.testing.assert_allclose(style, 0.75 * 0.07 + 0.25 * 3.07, atol=1e-6)  # of eight phonemes
    assert speed.tolist() == [np.float32(0.9)]
    assert sound.shape == (kokoro.KOKORO_RATE,)


def test_german_is_written_in_symbols_that_the_model_knows(model: tuple[kokoro.Kokoro, list]) -> None:
    model[0]._vocab |= {symbol: 9 for symbol in "YIWʦyɐ"}
    assert model[0].phonemes("aɪ ɔø aʊ ts ʏ ɜ b", "de") == "IYWʦyɐb"


@pytest.mark.parametrize("text", ["?!", "a" * 501])
def test_a_sentence_that_cannot_be_said_is_refused(model: tuple[kokoro.Kokoro, list], text: str) -> None:
    with pytest.raises(SynthesisError, match="phonemes"):
        model[0].speak(replace(LINE, text=text))


def test_a_sound_is_written_once_with_its_plain_text(
    model: tuple[kokoro.Kokoro, list], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kokoro, "_model", model[0])
    path = tmp_path / "000000.wav"
    row = kokoro._read_aloud((LINE, path))
    assert row is not None and (row.text, row.language, row.speaker) == ("abba ab", "en", "af_one+zf_four")
    assert row.duration == pytest.approx(1.0, abs=2 / SAMPLE_RATE)
    assert kokoro._read_aloud((LINE, path)) == row and len(model[1]) == 1
    assert kokoro._read_aloud((replace(LINE, text="?!"), tmp_path / "000001.wav")) is None


def test_a_missing_package_ends_the_run_and_leaves_nothing_out_in_silence(
    model: tuple[kokoro.Kokoro, list], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kokoro, "_model", model[0])
    monkeypatch.setitem(sys.modules, "misaki.espeak", None)
    with pytest.raises(SynthesisError, match="phonemizer-fork"):
        kokoro._read_aloud((LINE, tmp_path / "000000.wav"))


def test_the_command_reads_sentences_as_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "en.txt"
    text.write_text("He came, at last.\nIt was 5 o'clock then.\nGo on.\nShe left early.\n")
    (tmp_path / "voices").mkdir()
    (tmp_path / "voices" / "af_one.bin").touch()
    exclude = tmp_path / "dev.jsonl"
    exclude.write_text('{"audio_filepath": "a.wav", "text": "she left early", "language": "en", "duration": 1}\n')
    told: list = []
    monkeypatch.setattr(kokoro, "synthesise", lambda lines, *others: told.extend(lines))
    arguments = f"--model {tmp_path} --text {text} --out {tmp_path} --language en --count 1 --exclude {exclude}"
    kokoro.main(arguments.split())
    assert [line.text for line in told] == ["He came, at last."]
    assert [row.text for row in read_manifest(exclude)] == ["she left early"]
