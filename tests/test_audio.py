from __future__ import annotations

import io
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from sounds import pitch, tone, write

from diffusion_gemma_asr.audio.read import SAMPLE_RATE, convert_blocks, duration_of, load_audio, read_blocks
from diffusion_gemma_asr.errors import AudioError


@pytest.mark.parametrize("rate", [8_000, 16_000, 48_000])
@pytest.mark.parametrize("ending", [".wav", ".flac", ".mp3", ".m4a", ".ogg"])
def test_every_format_gives_the_same_sound(tmp_path: Path, ending: str, rate: int) -> None:
    samples = load_audio(write(tmp_path / f"tone{ending}", tone(440, 1.0, rate), rate))
    assert samples.dtype == np.float32 and samples.ndim == 1
    assert len(samples) == pytest.approx(SAMPLE_RATE, abs=0.1 * SAMPLE_RATE)  # lossy codecs pad
    assert pitch(samples) == pytest.approx(440, abs=2)
    assert np.abs(samples[4000:12000]).max() == pytest.approx(0.3, rel=0.15)


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 96_000])
def test_any_rate_keeps_duration_and_pitch(tmp_path: Path, rate: int) -> None:
    from_file = load_audio(write(tmp_path / "tone.wav", tone(1000, 0.5, rate), rate))
    from_array = load_audio(tone(1000, 0.5, rate), sampling_rate=rate)
    for samples in (from_file, from_array):
        assert len(samples) == pytest.approx(SAMPLE_RATE // 2, abs=2)
        assert pitch(samples) == pytest.approx(1000, abs=2)
    n = min(len(from_file), len(from_array))
    np.testing.assert_allclose(from_file[:n], from_array[:n], atol=1e-4)  # 16-bit steps


@pytest.mark.parametrize("codec", ["pcm_u8", "pcm_s16le", "pcm_s24le", "pcm_s32le", "pcm_f32le", "pcm_f64le"])
def test_every_sample_format_has_full_scale_one(tmp_path: Path, codec: str) -> None:
    original = tone(440, 0.5)
    np.testing.assert_allclose(load_audio(write(tmp_path / "tone.wav", original, codec=codec)), original, atol=0.01)


def test_channels_are_averaged(tmp_path: Path) -> None:
    left, right = tone(440, 0.5), tone(880, 0.5)
    stereo = np.stack([left, right])
    mean = (left + right) / 2
    np.testing.assert_allclose(load_audio(stereo), mean, atol=1e-6)
    np.testing.assert_allclose(load_audio(stereo.T), mean, atol=1e-6)
    np.testing.assert_allclose(load_audio(write(tmp_path / "packed.wav", stereo)), mean, atol=1e-4)
    half = np.stack([left, np.zeros_like(left)])
    planar = load_audio(write(tmp_path / "planar.ogg", half))
    assert pitch(planar) == pytest.approx(440, abs=2)
    assert np.abs(planar).max() == pytest.approx(0.15, rel=0.15)


def test_path_text_bytes_and_file_object_are_the_same(tmp_path: Path) -> None:
    path = write(tmp_path / "tone.flac", tone(440, 0.3))
    expected = load_audio(path)
    data = path.read_bytes()
    with path.open("rb") as file:
        for source in (str(path), data, io.BytesIO(data), file):
            np.testing.assert_array_equal(load_audio(source), expected)


def test_a_pipe_can_be_read(tmp_path: Path) -> None:
    path = write(tmp_path / "tone.flac", tone(440, 0.3))
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(path.read_bytes(),))
    writer.start()
    np.testing.assert_array_equal(load_audio(pipe), load_audio(path))
    writer.join()


@pytest.mark.parametrize(
    ("array", "scale"),
    [
        (np.array([-128, 0, 64], np.int8), 128),
        (np.array([0, 128, 192], np.uint8), None),
        (np.array([-32768, 0, 16384], np.int16), 2**15),
        (np.array([-(2**31), 0, 2**30], np.int32), 2**31),
        (np.array([-1.0, 0.0, 0.5], np.float16), 1),
        (np.array([-1.0, 0.0, 0.5], np.float64), 1),
    ],
)
def test_integer_arrays_are_scaled(array: np.ndarray, scale: int | None) -> None:
    samples = load_audio(np.repeat(array, 1000))
    np.testing.assert_allclose(samples[[0, 1500, 2500]], [-1.0, 0.0, 0.5])


def test_a_damaged_file_gives_what_can_be_decoded(tmp_path: Path) -> None:
    path = write(tmp_path / "tone.mp3", tone(440, 3.0))
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 400] = bytes(400)
    path.write_bytes(data)
    samples = load_audio(path)
    assert 2.0 < len(samples) / SAMPLE_RATE < 3.2
    assert pitch(samples[:SAMPLE_RATE]) == pytest.approx(440, abs=2)


def test_a_truncated_file_gives_its_beginning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for ending in (".wav", ".mp3", ".flac", ".ogg"):
        path = write(tmp_path / f"tone{ending}", tone(440, 3.0))
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
        assert 0.7 < len(load_audio(path)) / SAMPLE_RATE < 2.0
    assert "tone.flac: 1 damaged packets left out" in caplog.text


def bad_file(folder: Path, kind: str) -> Path:
    path = folder / f"{kind}.wav"
    if kind == "folder":
        path.mkdir()
    elif kind == "text":
        path.write_text("This is not sound.\n" * 50)
    elif kind == "empty":
        path.touch()
    elif kind == "short":
        write(path, tone(440, 0.05))
    elif kind == "nan":
        samples = tone(440, 0.5, 44_100)
        samples[[100, 200, 3000]] = np.nan, np.inf, -np.inf
        write(path, samples, rate=44_100, codec="pcm_f32le")
    elif kind == "header":
        write(path, tone(440, 0.5))
        path.write_bytes(path.read_bytes()[:44])
    return path


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("missing", "no such file"),
        ("folder", "a folder"),
        ("text", "cannot be read as sound"),
        ("empty", "empty file"),
        ("header", "cannot be read as sound"),
        ("short", r"holds 0.050 s of sound; the shortest that can be used is 0.1 s"),
        ("nan", r"a sample that is NaN or infinite at 0.002 s"),
    ],
)
def test_a_bad_file_is_named_in_one_line(tmp_path: Path, kind: str, says: str) -> None:
    path = bad_file(tmp_path, kind)
    with pytest.raises(AudioError, match=says) as caught:
        load_audio(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_video_without_sound(tmp_path: Path) -> None:
    import av

    path = tmp_path / "silent.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 16
        stream.pix_fmt = "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")
        for piece in (frame, None):
            container.mux(stream.encode(piece))
    with pytest.raises(AudioError, match="no audio stream"):
        load_audio(path)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (b"", "cannot be read as sound"),
        (b"no sound" * 100, "cannot be read as sound"),
        (io.BytesIO(b""), "cannot be read as sound"),
        (io.StringIO("text"), "binary mode"),
        (np.zeros(0, np.float32), "holds 0.000 s"),
        (np.zeros((0, 2), np.float32), "holds 0.000 s"),
        (np.zeros((2, 3, 4000), np.float32), "shape"),
        (np.full(4000, np.nan, np.float32), "NaN or infinite at 0.000 s"),
        (np.full(4000, 1e300), "NaN or infinite at 0.000 s"),
        (np.array(["a"] * 4000), "type <U1"),
        (np.zeros(4000, bool), "type bool"),
        (32767.0 * tone(440, 0.5), "full scale is 1"),
        ([0.0] * 4000, "give a path, bytes"),
        (None, "give a path, bytes"),
    ],
)
def test_other_sources_that_are_no_sound(source: object, says: str) -> None:
    with pytest.raises(AudioError, match=says):
        load_audio(source)


def test_a_rate_in_kilohertz_is_refused() -> None:
    with pytest.raises(AudioError, match="sampling rate 16 Hz"):
        load_audio(tone(440, 0.5), sampling_rate=16)


def test_blocks_are_the_sound_and_stay_small(tmp_path: Path) -> None:
    minute = tone(440, 60.0, 44_100)
    for source, rate in ((write(tmp_path / "minute.flac", minute, 44_100), 16_000), (minute, 44_100)):
        blocks = list(read_blocks(source, rate))
        assert max(len(block) for block in blocks) <= 30 * SAMPLE_RATE
        assert sum(len(block) for block in blocks) == pytest.approx(60 * SAMPLE_RATE, abs=2)
        np.testing.assert_array_equal(np.concatenate(blocks), load_audio(source, rate))


def test_reading_can_stop_in_the_middle(tmp_path: Path) -> None:
    blocks = read_blocks(write(tmp_path / "minute.flac", tone(440, 60.0)))
    assert len(next(blocks)) >= SAMPLE_RATE
    blocks.close()


def test_the_duration_a_file_claims(tmp_path: Path) -> None:
    assert duration_of(write(tmp_path / "tone.mp3", tone(440, 3.0))) == pytest.approx(3.0, abs=0.1)
    assert duration_of(bad_file(tmp_path, "text")) is None
    assert duration_of(tmp_path / "missing.wav") is None


def test_blocks_as_they_come() -> None:
    sound = tone(440, 1.0, rate=48_000)
    stereo = [(np.stack([block, block], axis=1) * 32767).astype(np.int16) for block in np.array_split(sound, 7)]
    np.testing.assert_allclose(np.concatenate(list(convert_blocks(stereo, 48_000))), load_audio(sound, 48_000), atol=1e-4)
    assert list(convert_blocks([])) == []
    for wrong, message in (([0.1], "one is a list"), (np.full(9, np.nan), "NaN"), (np.full(9, 900.0), "full scale is 1")):
        with pytest.raises(AudioError, match=message):
            list(convert_blocks([tone(440, 0.1), wrong]))
