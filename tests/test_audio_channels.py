"""Channels and tracks: which of them are heard, and that none cancels another."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from sounds import pitch, tone, write, write_film

from diffusion_gemma_asr.audio.mix import Apart
from diffusion_gemma_asr.audio.read import SAMPLE_RATE, convert_blocks, load_audio, read_blocks, read_channels
from diffusion_gemma_asr.errors import AudioError


def noise(seconds: float, seed: int, amplitude: float = 0.1) -> np.ndarray:
    return (amplitude * np.random.default_rng(seed).standard_normal(round(seconds * SAMPLE_RATE))).astype(np.float32)


def loudness(samples: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(samples, dtype=np.float64))))


def words(seed: int = 0) -> np.ndarray:
    """Four seconds of noise that comes and goes as words do."""
    sound = noise(4.0, seed)
    sound *= np.repeat(np.random.default_rng(seed + 1).uniform(0, 1, 16).astype(np.float32), len(sound) // 16)
    return sound


@pytest.mark.parametrize("factor", [-1.0, -0.98, -0.5, -2.0])
def test_an_inverted_channel_does_not_cancel_the_other(tmp_path: Path, factor: float) -> None:
    left = 0.5 * words()
    stereo = np.stack([left, np.float32(factor) * left])
    expected = (1 + abs(factor)) / 2
    for samples in (
        load_audio(stereo),
        load_audio(stereo.T),
        load_audio(write(tmp_path / "inverted.wav", stereo)),
        load_audio(write(tmp_path / "inverted.flac", stereo)),
        np.concatenate(list(convert_blocks(np.array_split(stereo.T, 50)))),
    ):
        assert loudness(samples) == pytest.approx(expected * loudness(left), rel=0.02)
        assert abs(np.corrcoef(samples, left)[0, 1]) > 0.999


def test_an_inverted_channel_with_noise_of_its_own() -> None:
    speech = words()
    stereo = np.stack([speech + noise(4, 5, 0.01), -0.7 * speech + noise(4, 6, 0.01)])
    assert abs(np.corrcoef(load_audio(stereo), speech)[0, 1]) > 0.98


def test_inverted_channels_of_many() -> None:
    speech = words()
    weights = np.array([0.2, -1.0, 0.2, 0.9, 0.0, -0.5], np.float32)
    samples = load_audio(weights[:, None] * speech)
    assert loudness(samples) == pytest.approx(np.abs(weights).sum() / 6 * loudness(speech), rel=0.02)


@pytest.mark.parametrize(
    "right", [words(0), words(7), 0 * words(0), words(0) + noise(4, 3), np.roll(words(0), 5), -0.3 * words(0) + words(7)]
)
def test_channels_that_are_not_inverted_give_their_mean_exactly(right: np.ndarray) -> None:
    stereo = np.stack([words(0), right])
    mean = stereo.mean(axis=0, dtype=np.float64).astype(np.float32)
    np.testing.assert_array_equal(load_audio(stereo), mean)
    np.testing.assert_array_equal(np.concatenate(list(convert_blocks(np.array_split(stereo, 9, axis=1)))), mean)


def test_a_channel_that_becomes_inverted_turns_without_a_click() -> None:
    hum = tone(100, 12.0)
    right = hum * np.where(np.arange(len(hum)) < 4 * SAMPLE_RATE, 1, -1).astype(np.float32)
    samples = load_audio(np.stack([hum, right]))
    assert np.abs(np.diff(samples)).max() < 1.5 * np.abs(np.diff(hum)).max()
    assert loudness(samples[-4 * SAMPLE_RATE :]) == pytest.approx(loudness(hum), rel=0.01)


def test_one_channel(tmp_path: Path) -> None:
    stereo = np.stack([tone(440, 1.0), tone(880, 1.0)])
    files = write(tmp_path / "two.wav", stereo), write(tmp_path / "two.m4a", stereo, codec="aac"), stereo, stereo.T
    for source in files:
        assert [round(pitch(row[2000:14000]), -1) for row in all_channels(source)] == [440, 880]
        for channel, hertz in (("left", 440), ("right", 880), (0, 440), (1, 880)):
            assert pitch(load_audio(source, channel=channel)[2000:14000]) == pytest.approx(hertz, abs=3)
    blocks = list(convert_blocks(np.array_split(stereo, 7, axis=1), channel="right"))
    np.testing.assert_array_equal(np.concatenate(blocks), stereo[1])
    mono = tone(440, 1.0)
    assert all_channels(mono).shape == (1, SAMPLE_RATE)
    np.testing.assert_array_equal(load_audio(mono, channel=0), mono)


def all_channels(source: object, **how: object) -> np.ndarray:
    return np.concatenate(list(read_channels(source, **how)), axis=1)


@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_channels_side_by_side_are_what_each_is_alone(tmp_path: Path, rate: int) -> None:
    stereo = np.stack([tone(440, 2.5, rate), tone(880, 2.5, rate, 0.1)])
    for source in (write(tmp_path / "two.flac", stereo, rate), write(tmp_path / "two.ogg", stereo, 48_000)):
        alone = [load_audio(source, channel=number) for number in (0, 1)]
        np.testing.assert_allclose(all_channels(source), alone, atol=1e-6)


@pytest.mark.parametrize("most", [None, 2])
def test_channels_that_come_and_go(most: int | None) -> None:
    one, two = words(0)[None], np.stack([words(1), words(2)])
    three = np.concatenate([one, two])
    apart = Apart("sound", most)
    np.testing.assert_array_equal(apart(two, SAMPLE_RATE), two)
    np.testing.assert_array_equal(apart(one, SAMPLE_RATE), np.concatenate([one, one]))
    grown = apart(three, SAMPLE_RATE)
    np.testing.assert_allclose(grown, three[:2] if most is None else np.tile(three.mean(axis=0), (2, 1)), atol=1e-7)
    apart = Apart("sound", most)
    np.testing.assert_array_equal(apart(one, SAMPLE_RATE), one)
    assert apart(two, SAMPLE_RATE).shape == (1, two.shape[1])


def test_more_channels_than_wanted_are_mixed() -> None:
    three = np.stack([words(0), words(1), words(2)])
    np.testing.assert_array_equal(all_channels(three, most=2)[0], load_audio(three))
    assert all_channels(three, most=2).shape[0] == 1 and all_channels(three).shape[0] == 3


@pytest.mark.parametrize(
    ("channel", "says"),
    [
        (2, "two.wav: has 2 channels, 0 to 1; there is no channel 2"),
        (-1, "channel is -1; choose"),
        ("centre", "channel is 'centre'; choose 'mix', 'left', 'right' or a number from 0"),
        (True, "channel is True"),
        (None, "channel is None"),
        (0.0, "channel is 0.0"),
    ],
)
def test_channels_that_do_not_exist(tmp_path: Path, channel: object, says: str) -> None:
    path = write(tmp_path / "two.wav", np.stack([tone(440, 0.5)] * 2))
    with pytest.raises(AudioError, match=says):
        load_audio(path, channel=channel)
    if channel == 2:
        with pytest.raises(AudioError, match="there is no channel right"):
            load_audio(tone(440, 0.5), channel="right")
    with pytest.raises(AudioError):
        list(convert_blocks([np.stack([tone(440, 0.5)] * 2)], channel=channel))


def film(folder: Path, *hertz: float, **how: object) -> Path:
    tracks = [tone(one, 1.0) if one else np.zeros(SAMPLE_RATE, np.float32) for one in hertz]
    return write_film(folder / "film.mkv", tracks, "aac", **how)


def heard(*args: object, **how: object) -> int:
    return round(pitch(load_audio(*args, **how)[2000:14000]) / 20) * 20


def test_the_default_track_is_heard(tmp_path: Path) -> None:
    assert heard(film(tmp_path, 440, 880, 1320, default=1)) == 880
    assert heard(film(tmp_path, 440, 880, 1320, default=0)) == 440
    assert heard(film(tmp_path, 440, 880, default=7)) == 440  # none is


def test_a_track_by_its_number(tmp_path: Path) -> None:
    path = film(tmp_path, 440, 880, default=1)
    for source in (path, path.read_bytes(), io.BytesIO(path.read_bytes())):
        assert [heard(source, track=number) for number in (None, 0, 1)] == [880, 440, 880]
    stereo = write_film(tmp_path / "stereo.mkv", [tone(440, 1.0), np.stack([tone(440, 1.0)] * 2)], "aac")
    assert [len(all_channels(stereo, track=number)) for number in (0, 1)] == [1, 2]


def test_tracks_that_do_not_exist(tmp_path: Path) -> None:
    path = film(tmp_path, 440, 880)
    for track in (2, -1, "1", True):
        with pytest.raises(AudioError, match=f"film.mkv: has 2 audio tracks, 0 to 1; there is no track {track}"):
            load_audio(path, track=track)
    with pytest.raises(AudioError, match="has 1 audio track, number 0; there is no track 1"):
        load_audio(film(tmp_path, 440), track=1)
    with pytest.raises(AudioError, match="an array has 1 audio track, number 0; there is no track 1"):
        load_audio(tone(440, 1.0), track=1)


def test_a_silent_track_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    list(read_blocks(film(tmp_path, 0, 440)))
    assert "film.mkv: audio track 0 is silent; it has others to choose from: track 1" in caplog.text
    caplog.clear()
    list(read_blocks(film(tmp_path, 0, 440), track=1))
    list(read_blocks(film(tmp_path, 440, 0)))
    list(read_blocks(film(tmp_path, 0)))
    assert not caplog.text
