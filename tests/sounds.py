"""Sound made for tests, files of it, and a model that hears pitch instead of words.

A tone of 440 Hz is to the fake model what a spoken sentence is to the real one: its transcript, "440 hertz",
depends on the samples alone, so a test sees at once when chunks are lost, mixed up or resampled wrongly.
"""

from __future__ import annotations

import io
import wave
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import av
import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    pass

CODECS = {".wav": "pcm_s16le", ".flac": "flac", ".mp3": "libmp3lame", ".m4a": "aac", ".ogg": "libopus"}


def tone(hertz: float, seconds: float, rate: int = 16_000, amplitude: float = 0.3) -> NDArray[np.float32]:
    """(n,) a sine."""
    time_s = np.arange(round(seconds * rate)) / rate
    return (amplitude * np.sin(2 * np.pi * hertz * time_s)).astype(np.float32)


def write(path: Path, samples: NDArray[np.float32], rate: int = 16_000, codec: str | None = None) -> Path:
    """Write (n,) or (channels, n) floats to a file, in the codec of its ending or the one named."""
    planes = np.atleast_2d(samples).astype(np.float32)
    layout = {1: "mono", 2: "stereo"}[len(planes)]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec or CODECS[path.suffix], rate=rate)
        stream.layout = layout
        resampler = av.AudioResampler(format=stream.format, layout=layout, rate=rate, frame_size=stream.frame_size)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(planes), format="fltp", layout=layout)
        frame.sample_rate, frame.pts = rate, 0
        for piece in (*resampler.resample(frame), *resampler.resample(None), None):
            container.mux(stream.encode(piece))
    return path


def write_film(
    path: Path,
    tracks: Sequence[NDArray[np.float32]],
    codec: str,
    *,
    rate: int = 16_000,
    move: Callable[[float], float | None] = lambda time_s: time_s,
    picture_s: float = 0.0,
    default: int | None = None,
    **options: str,
) -> Path:
    """Write (n,) or (channels, n) floats as audio tracks, beside a black picture if it is to last.

    Args:
        move: the time of a packet, in seconds, to the one that is written; None leaves the packet out.
        default: number of the track that is marked as the default one.
        options: of the container.
    """
    with av.open(str(path), "w", options=options) as container:
        if picture_s:
            picture = container.add_stream(
                {".webm": "libvpx", ".ts": "mpeg2video", ".mpg": "mpeg2video"}.get(path.suffix, "mpeg4"), rate=25
            )
            picture.width = picture.height = 64
            picture.pix_fmt = "yuv420p"
        streams = [container.add_stream(codec, rate=rate) for _ in tracks]
        for number, (stream, samples) in enumerate(zip(streams, tracks, strict=True)):
            stream.layout = "stereo" if samples.ndim == 2 else "mono"
            if default is not None:
                stream.disposition = av.stream.Disposition.default if number == default else av.stream.Disposition(0)
        packets = []
        if picture_s:
            for number in range(round(picture_s * 25)):
                frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
                frame.pts = number
                packets += picture.encode(frame)
            packets += picture.encode(None)
        for stream, samples in zip(streams, tracks, strict=True):
            for packet in _encoded(stream, np.atleast_2d(samples), rate):
                time_s = move(float(packet.pts * packet.time_base))
                if time_s is not None:
                    packet.pts = packet.dts = round(time_s / packet.time_base)
                    packets.append(packet)
        container.mux(packets)
    return path


def _encoded(stream: av.AudioStream, planes: NDArray[np.float32], rate: int) -> list[av.Packet]:
    layout = stream.layout.name
    resampler = av.AudioResampler(format=stream.format, layout=layout, rate=rate, frame_size=stream.frame_size or 1024)
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(planes, np.float32), format="fltp", layout=layout)
    frame.sample_rate, frame.pts = rate, 0
    pieces = (*resampler.resample(frame), *resampler.resample(None), None)
    return [packet for piece in pieces for packet in stream.encode(piece)]


def write_wav(samples: NDArray[np.float32]) -> bytes:
    """A WAV file of (n,) floats at 16 kHz."""
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(16_000)
        out.writeframes((samples * 32767).astype("<i2").tobytes())
    return file.getvalue()


def pitch(samples: NDArray[np.float32], rate: int = 16_000) -> float:
    """Hertz of the strongest component."""
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return float(np.argmax(spectrum) * rate / len(samples))
