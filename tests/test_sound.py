"""data/sound.py: exactly the part of a file that is an utterance's, and nothing read that lies behind it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from sounds import pitch, tone, write

from diffusion_gemma_asr.audio.read import SAMPLE_RATE, Samples, load_audio
from diffusion_gemma_asr.data import sound
from diffusion_gemma_asr.data.manifest import Utterance
from diffusion_gemma_asr.data.sound import read_utterance
from diffusion_gemma_asr.errors import AudioError

STEPS = np.concatenate([tone(200 * step, 1.0) for step in (1, 2, 3, 4, 5)])  # a second of each pitch


def part(path: Path, offset: float, duration: float) -> Samples:
    return read_utterance(Utterance(str(path), "", "en", duration, offset=offset))


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.WAV", "a.mp3", "a.ogg"])
def test_each_part_is_its_own(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name.lower(), STEPS).rename(tmp_path / name)
    whole = load_audio(path)
    for step in range(5):
        samples = part(path, step, 1.0)
        assert samples.dtype == np.float32 and len(samples) == pytest.approx(SAMPLE_RATE, abs=500 * (step == 4))
        assert pitch(samples[1000:-1000]) == pytest.approx(200 * (step + 1), abs=3)
    np.testing.assert_allclose(part(path, 0.3, 2.7), whole[4800:48000], atol=1e-4)
    np.testing.assert_allclose(part(path, 0, 99), whole, atol=1e-4)


def test_another_rate_and_two_channels(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", np.stack([tone(300, 2.0, 44_100), tone(300, 2.0, 44_100)]), 44_100)
    np.testing.assert_array_equal(part(path, 0.5, 0.5), load_audio(path)[8000:16000])


def test_rounding_loses_no_sample_of_a_whole_file(tmp_path: Path) -> None:
    for name in ("a.wav", "a.flac"):
        path = write(tmp_path / name, tone(440, 1.0)[:-9])
        assert len(part(path, 0.0, round(15_991 / SAMPLE_RATE, 3))) == 15_991
        assert len(part(path, 0.0, 0.99)) == 15_840


def test_what_lies_behind_is_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.flac", STEPS)
    read = []

    def counted(source: str) -> Iterator[Samples]:
        for second in range(5):
            read.append(second)
            yield STEPS[second * SAMPLE_RATE : (second + 1) * SAMPLE_RATE]

    monkeypatch.setattr(sound, "read_blocks", counted)
    np.testing.assert_array_equal(part(path, 1.5, 0.4), STEPS[24_000:30_400])
    assert read == [0, 1]


@pytest.mark.parametrize("name", ["a.wav", "a.flac"])
def test_a_part_that_is_not_there_is_an_error(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, STEPS)
    for offset, duration in ((7.0, 1.0), (5.0, 1.0), (4.95, 1.0), (1.0, 0.05)):
        with pytest.raises(AudioError, match=rf"{name}: 0\.0\d\d s of sound from .*; check offset and duration"):
            part(path, offset, duration)
    with pytest.raises(AudioError, match=r"gone\.wav: no such file"):
        part(tmp_path / "gone.wav", 0.0, 1.0)


def test_a_wav_file_cut_short_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", STEPS)
    path.write_bytes(path.read_bytes()[: -SAMPLE_RATE - 1])  # half a second, and half a sample
    assert len(part(path, 4.0, 1.0)) == pytest.approx(8000, abs=100)
    assert len(load_audio(path)) == pytest.approx(72_000, abs=100)
