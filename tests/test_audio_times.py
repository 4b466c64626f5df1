"""Times count from the container's start, as in a player, and holes are silence."""

from __future__ import annotations

import io
import itertools
import logging
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from sounds import pitch, tone, write, write_film

from diffusion_gemma_asr.audio.read import SAMPLE_RATE, load_audio, read_blocks
from diffusion_gemma_asr.audio.timeline import LONGEST_HOLE_S, Timed, on_time
from diffusion_gemma_asr.audio.vad import VadOptions, speech_chunks
from diffusion_gemma_asr.errors import AudioError

RATE = {"libopus": 48_000, "ac3": 48_000, "libvorbis": 48_000, "mp2": 48_000, "libmp3lame": 48_000}


def loud_spans(samples: np.ndarray) -> list[tuple[float, float]]:
    """Seconds in which 20 ms hold more than 5 % of full scale."""
    frames = samples[: len(samples) // 320 * 320].reshape(-1, 320)
    loud = np.flatnonzero(np.diff(np.r_[0, np.abs(frames).max(axis=1) > 0.05, 0]))
    return [(a * 0.02, b * 0.02) for a, b in loud.reshape(-1, 2)]


def near(spans: list[tuple[float, float]], *expected: tuple[float, float], tolerance: float = 0.13) -> None:
    assert len(spans) == len(expected), spans
    np.testing.assert_allclose(spans, expected, atol=tolerance)


@pytest.mark.parametrize(
    ("ending", "codec"),
    [(".mp4", "aac"), (".mov", "pcm_s16le"), (".mkv", "aac"), (".mkv", "libmp3lame"), (".webm", "libopus"),
     (".ts", "aac"), (".ts", "mp2"), (".ts", "ac3"), (".mkv", "flac"), (".mp4", "libmp3lame")],
)  # fmt: skip
def test_sound_that_begins_after_the_picture(tmp_path: Path, ending: str, codec: str) -> None:
    rate = RATE.get(codec, 16_000)
    sound = tone(440, 1.0, rate)
    path = write_film(tmp_path / f"film{ending}", [sound], codec, rate=rate, move=lambda t: t + 2.5, picture_s=4.0)
    samples = load_audio(path)
    near(loud_spans(samples), (2.5, 3.5))
    assert not np.abs(samples[: 2 * SAMPLE_RATE]).any()
    assert pitch(samples[round(2.7 * SAMPLE_RATE) : round(3.3 * SAMPLE_RATE)]) == pytest.approx(440, abs=3)
    assert len(samples) / SAMPLE_RATE == pytest.approx(3.5, abs=0.15)


@pytest.mark.parametrize(
    ("ending", "codec"),
    [
        (".mp4", "aac"),
        (".mkv", "aac"),
        (".webm", "libopus"),
        (".ts", "aac"),
        (".ogg", "flac"),
        (".mkv", "ac3"),
        (".m4a", "aac"),
    ],
)
def test_holes_are_silence(tmp_path: Path, ending: str, codec: str) -> None:
    rate = RATE.get(codec, 16_000)
    path = write_film(
        tmp_path / f"holes{ending}", [tone(440, 4.0, rate)], codec, rate=rate,
        move=lambda t: t if t < 1 else None if t < 2 else t + 9,
    )  # fmt: skip
    samples = load_audio(path)
    near(loud_spans(samples), (0, 1), (11, 13))
    assert not np.abs(samples[2 * SAMPLE_RATE : 10 * SAMPLE_RATE]).max() > 1e-3


def test_sound_that_begins_long_after_the_picture(tmp_path: Path) -> None:
    sound = tone(440, 1.0, 44_100)
    path = write_film(tmp_path / "film.mpg", [sound], "mp2", rate=44_100, move=lambda t: t + 20, picture_s=22.0)
    near(loud_spans(load_audio(path)), (20, 21))
    near(loud_spans(load_audio(path.read_bytes())), (20, 21))


def test_times_are_the_same_for_bytes_file_objects_pipes_and_clips(tmp_path: Path) -> None:
    path = write_film(tmp_path / "late.mkv", [tone(440, 1.0)], "aac", move=lambda t: t + 3, picture_s=5.0)
    expected = load_audio(path)
    assert len(expected) / SAMPLE_RATE == pytest.approx(4.0, abs=0.15)
    np.testing.assert_array_equal(load_audio(path.read_bytes()), expected)
    np.testing.assert_array_equal(load_audio(io.BytesIO(path.read_bytes())), expected)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(path.read_bytes(),), daemon=True)
    writer.start()
    np.testing.assert_array_equal(load_audio(pipe), expected)
    writer.join()
    for clips in ((), ((2.0, 5.0),)):
        (chunk,) = speech_chunks(read_blocks(path), VadOptions("energy"), clips)
        assert (chunk.start, chunk.end) == pytest.approx((3.0, 4.0), abs=0.13)


def test_a_container_that_starts_at_any_time_starts_at_zero(tmp_path: Path) -> None:
    for ending in (".mkv", ".ts"):
        path = write_film(tmp_path / f"later{ending}", [tone(440, 1.0)], "aac", move=lambda t: t + 5000)
        near(loud_spans(load_audio(path)), (0, 1))


@pytest.mark.parametrize("ending", [".wav", ".flac", ".mp3", ".m4a", ".ogg"])
def test_whole_files_get_no_silence(tmp_path: Path, ending: str) -> None:
    for rate in (16_000, 48_000):
        spans = loud_spans(load_audio(write(tmp_path / f"tone{ending}", tone(440, 3.0, rate), rate)))
        near(spans, (0, 3), tolerance=0.08)


def test_rounded_timestamps_change_nothing(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    plain = load_audio(write_film(tmp_path / "plain.mkv", [tone(440, 5.0)], "flac"))
    jitter = write_film(tmp_path / "jitter.mkv", [tone(440, 5.0)], "flac", move=lambda t: t + rng.uniform(0, 0.03))
    np.testing.assert_array_equal(load_audio(jitter), plain)


def place(*pieces: tuple[float | None, float], lost: int = -1) -> tuple[list[tuple[float, float]], float]:
    """(time, duration) in seconds of pieces of sound to the spans they take, and the seconds of all of it."""
    timed = [
        Timed(time_s, 100, np.ones(round(duration * 100), np.float32), number == lost)
        for number, (time_s, duration) in enumerate(pieces)
    ]
    sound = np.concatenate([np.zeros(0), *(piece.samples for piece in on_time(timed, "x"))])
    edges = np.flatnonzero(np.diff(np.r_[0, sound, 0])).reshape(-1, 2) / 100
    return [(float(a), float(b)) for a, b in edges], len(sound) / 100


def test_a_timeline() -> None:
    assert place((0, 1), (1, 1), (None, 1)) == ([(0, 3)], 3)
    assert place((2, 1), (3, 1)) == ([(2, 4)], 4)
    assert place((0, 1), (1.05, 1), (2.04, 1)) == ([(0, 3)], 3)  # jitter
    assert place((0, 1), (1.05, 1), lost=1) == ([(0, 1), (1.05, 2.05)], 2.05)  # no jitter behind a lost packet
    assert place((0, 1), (5, 1), (6, 1)) == ([(0, 1), (5, 7)], 7)
    small = [(i * 1.02, 1.0) for i in range(20)]  # holes that add up
    spans, total = place(*small)
    assert total == pytest.approx(20 * 1.02, abs=0.11) and sum(b - a for a, b in spans) == pytest.approx(20)


def test_timestamps_that_lie(caplog: pytest.LogCaptureFixture) -> None:
    assert place((0, 1), (500, 1), (2, 1), (3, 1)) == ([(0, 4)], 4)  # one among right ones
    assert place((10, 1), (0, 1), (12, 1)) == ([(10, 13)], 13)
    assert not caplog.text
    assert place((0, 1), (1, 1), (0, 1), (1, 1), (4, 1)) == ([(0, 4), (6, 7)], 7)  # recordings behind each other
    assert "x: timestamps jump 1 times" in caplog.text
    assert place((0, 1), (1e9, 1), (1e9 + 1, 1)) == ([(0, 3)], 3)
    assert place((0, 1), (-1e9, 1), (1e9, 1), (0, 1)) == ([(0, 4)], 4)
    holes = [(i * LONGEST_HOLE_S, 1.0) for i in range(1, 40)]
    assert place(*holes)[1] < 13 * LONGEST_HOLE_S  # all of them together


def test_a_hole_inside_a_page_of_ogg_does_not_part_words(tmp_path: Path) -> None:
    pause = np.zeros(round(0.7 * 48_000), np.float32)
    sound = np.concatenate([pause, tone(440, 2.6, 48_000), pause, pause, tone(440, 2.0, 48_000)])  # pages are a second long
    path = write_film(tmp_path / "hole.ogg", [sound], "libopus", rate=48_000, move=lambda t: t if t < 3.7 else t + 10)
    near(loud_spans(load_audio(path)), (0.7, 3.3), (14.7, 16.7))


@pytest.mark.parametrize(
    ("ending", "codec"), [(".ac3", "ac3"), (".mkv", "ac3"), (".mp4", "aac"), (".ts", "mp2"), (".flac", "flac"),
                          (".mp3", "libmp3lame"), (".mkv", "flac"), (".webm", "libopus")],
)  # fmt: skip
@pytest.mark.parametrize("length", [30, 300, 3000])
def test_damage_costs_what_is_damaged(
    tmp_path: Path, ending: str, codec: str, length: int, caplog: pytest.LogCaptureFixture
) -> None:
    rate = RATE.get(codec, 16_000)
    sound = np.concatenate([tone(440, 4.0, rate), tone(880, 4.0, rate)])
    path = write_film(tmp_path / f"film{ending}", [sound], codec, rate=rate)
    data = bytearray(path.read_bytes())
    rng = np.random.default_rng(length)
    middle = len(data) // 2
    data[middle : middle + length] = rng.bytes(length)
    samples = load_audio(bytes(data))
    lost_s = 0.3 + 8.0 * length / len(data)
    assert pitch(samples[:SAMPLE_RATE]) == pytest.approx(440, abs=3)
    assert pitch(samples[-SAMPLE_RATE:]) == pytest.approx(880, abs=3)
    assert len(samples) / SAMPLE_RATE == pytest.approx(8.0, abs=0.3 if ending in (".mp4", ".webm") else lost_s)
    assert sum("damaged packets left out" in record.message for record in caplog.records) <= 1


def test_a_damaged_packet_is_silence_and_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_film(tmp_path / "tone.mkv", [tone(440, 3.0, 48_000)], "ac3", rate=48_000)
    whole = load_audio(path)
    assert not caplog.text
    data = bytearray(path.read_bytes())
    frames = [at for at in range(len(data)) if data[at : at + 2] == b"\x0b\x77"]  # where AC-3 frames begin
    for number in (20, 21, 50):
        data[frames[number] : frames[number] + 40] = bytes(40)
    samples = load_audio(bytes(data))
    assert len(samples) == pytest.approx(len(whole), abs=64)
    spans = loud_spans(samples)
    silent = [(end, begin) for (_, end), (begin, _) in itertools.pairwise(spans)]
    near(silent, (20 * 0.032, 22 * 0.032), (50 * 0.032, 51 * 0.032), tolerance=0.04)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "<bytes>: 3 damaged packets left out, the first at 0.6 s" in record.message


def test_where_nothing_can_be_decoded(tmp_path: Path) -> None:
    path = write_film(tmp_path / "tone.mkv", [tone(440, 1.0, 48_000)], "ac3", rate=48_000)
    data = path.read_bytes().replace(b"\x0b\x77", b"\x00\x00")
    path.write_bytes(data)
    with pytest.raises(AudioError, match=r"tone.mkv: cannot be read as sound \(none of it can be decoded") as caught:
        load_audio(path)
    assert "\n" not in str(caught.value)
