"""Sound made for tests, files of it, and a model that hears pitch instead of words.

A tone of 440 Hz is to the fake model what a spoken sentence is to the real one: its transcript, "440 hertz",
depends on the samples alone, so a test sees at once when chunks are lost, mixed up or resampled wrongly.
"""

from __future__ import annotations

import io
import wave
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from diffusion_gemma_asr.ctc import TokenSpan
from diffusion_gemma_asr.decoding import Shown
from diffusion_gemma_asr.denoise import DenoiseOptions
from diffusion_gemma_asr.errors import AsrError

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
        resampler = av.AudioResampler(
            format=stream.format, layout=layout, rate=rate, frame_size=stream.frame_size
        )
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(planes), format="fltp", layout=layout)
        frame.sample_rate, frame.pts = rate, 0
        for piece in (*resampler.resample(frame), *resampler.resample(None), None):
            container.mux(stream.encode(piece))
    return path


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


@dataclass(frozen=True)
class HeardPitch:
    """What the model returns for one sound, as `model.Decoded`."""

    text: str
    tokens: list[int]
    logprobs: list[float]
    steps: int
    draft: str
    spans: list[TokenSpan] | None
    language: str

    def as_drafted(self) -> HeardPitch:
        return replace(self, text=self.draft, tokens=[3], logprobs=[-0.125])


@dataclass
class PitchModel:
    """Stands in for DiffusionGemmaASR: transcribes every sound to its pitch, to the nearest 20 Hz.

    Attributes:
        loops: {pitch: the seeds with which its text goes round in circles}.
    """

    loops: dict[int, tuple[int, ...]] = field(default_factory=dict)
    drafts: bool = True
    slot_s: float = 0.16
    draft_text: str = "a draft"

    batches: list[list[int]] = field(default_factory=list)  # samples of every sound, call by call
    # language, options, seed, start, engine, rows of every call
    asked: list[tuple[str, Sequence[str] | None, str]] = field(default_factory=list)  # language, among, context
    calls: list[tuple[str, DenoiseOptions | int | None, int, str | None, str, int]] = field(default_factory=list)

    def transcribe_batch(
        self,
        audio: Sequence[NDArray[np.float32]],
        language: str = "en",
        options: DenoiseOptions | int | None = None,
        seed: int = 0,
        start: str | None = None,
        engine: str = "fast",
        rows: int = 32,
        on_done: Callable[[int], None] | None = None,
        align: bool = False,
        on_step: Callable[[int, list[list[Shown]]], None] | None = None,
        among: Sequence[str] | None = None,
        context: str = "",
    ) -> list[HeardPitch]:
        if language not in ("en", "de", "auto"):
            raise AsrError(f"language {language} is not one of en, de")
        self.asked.append((language, among, context))
        found = language if language != "auto" else (among or ["en"])[-1]
        self.batches.append([len(samples) for samples in audio])
        self.calls.append((language, options, seed, start, engine, rows))
        heard = [self._hear(samples, seed, align, found) for samples in audio]
        if on_step is not None:
            for step in (0, 1):
                on_step(step, [[Shown(one.text, float(step))] for one in heard])
        for index in reversed(range(len(audio))):
            if on_done:
                on_done(index)
        return heard

    def text(self, tokens: Sequence[int]) -> str:
        """A token is a word: its number."""
        return " ".join(str(token) for token in tokens)

    def _hear(self, samples: NDArray[np.float32], seed: int, align: bool, language: str) -> HeardPitch:
        assert samples.dtype == np.float32 and samples.ndim == 1
        hertz = round(pitch(samples) / 20) * 20
        spans = [TokenSpan(1, 2, -0.1), TokenSpan(4, 5, -0.1)] if align else None
        text = f" {hertz} hertz" if seed not in self.loops.get(hertz, ()) else f" {hertz}" * 9
        return HeardPitch(text, [hertz, 7], [-0.25, -0.75], 2, self.draft_text, spans, language)
