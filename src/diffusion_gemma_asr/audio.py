"""Sound in any form to mono float32 at 16 kHz, and long sound to chunks of at most 30 seconds.

`load_audio` decodes (PyAV, which brings its own FFmpeg) and resamples (soxr). `split` cuts long sound where
it is quietest. `is_silent` tells sound that holds nothing to transcribe, so that the model need not be asked.
"""

from __future__ import annotations

import io
import itertools
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeAlias

import av
import numpy as np
import soxr
from numpy.typing import NDArray

from diffusion_gemma_asr.errors import AudioError

SAMPLE_RATE = 16_000  # Hz, what every acoustic encoder here reads
MIN_DURATION_S = 0.1  # shorter sound holds no word and is refused
MAX_CHUNK_S = 30.0  # what a Whisper encoder reads at once
MIN_RATE_HZ, MAX_RATE_HZ = 4_000, 384_000
MAX_PEAK = 64.0  # full scale is 1: beyond this the samples are unscaled integers
SILENCE_DBFS = -60.0  # about 33 steps of 16-bit sound: far under the quietest speech worth recording
CUT_SEARCH_S = 5.0  # a chunk ends somewhere in its last five seconds
CUT_PAUSE_S = 0.2  # a pause between words; the closure of a "p" or "t" is shorter
FRAME = SAMPLE_RATE // 50  # 20 ms

AudioSource: TypeAlias = "str | os.PathLike[str] | bytes | BinaryIO | NDArray[np.generic]"
Samples: TypeAlias = NDArray[np.float32]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Chunk:
    """A piece of a longer sound.

    Attributes:
        offset_s: where it begins in the whole sound, in seconds.
        samples: (n,) float32, mono, 16 kHz.
    """

    offset_s: float
    samples: Samples

    @property
    def duration_s(self) -> float:
        return len(self.samples) / SAMPLE_RATE


def load_audio(source: AudioSource, sampling_rate: int = SAMPLE_RATE) -> Samples:
    """Read sound into the one form that the rest of the package knows.

    Args:
        source: path of a sound or video file; its bytes; a file object opened in binary mode; or an array of
            samples, (n,), (channels, n) or (n, channels), floats with full scale 1 or integers of any width.
        sampling_rate: of an array, in Hz. A file says its own.

    Returns:
        (n,) float32 at 16 kHz, the mean of the channels.

    Raises:
        AudioError: it cannot be read, is shorter than 0.1 s, or holds samples that are not finite numbers.
    """
    name = describe(source)
    if isinstance(source, np.ndarray):
        samples = _resample(iter([_mono(_channels_first(source, name), name)]), sampling_rate, name)
    elif isinstance(source, bytes):
        samples = _decode(io.BytesIO(source), name)
    elif isinstance(source, str | os.PathLike):
        samples = _decode(Path(source), name)
    elif isinstance(source, io.TextIOBase):
        raise AudioError(f"{name}: opened as text; open it in binary mode ('rb')")
    elif hasattr(source, "read"):
        samples = _decode(source, name)
    else:
        raise AudioError(f"{name}: cannot be read as sound; give a path, bytes, a binary file object or a numpy array")
    _check(samples, name)
    return samples


def describe(source: AudioSource) -> str:
    """What to call a source in a message: its path, or what kind of thing it is."""
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    return f"<{type(source).__name__}>"


def is_silent(samples: Samples) -> bool:
    """Whether sound is too faint to hold speech.

    It is when the loudest 20 ms frame stays under -60 dBFS (RMS around the frame's mean, so a constant offset
    is silence too; full scale is an RMS of 1).

    Args:
        samples: (n,) float32, 16 kHz.
    """
    whole = len(samples) // FRAME * FRAME
    frames = samples[:whole].reshape(-1, FRAME)  # (n,) -> (frames of 20 ms, 320)
    return float(frames.std(axis=1).max(initial=0.0)) < 10.0 ** (SILENCE_DBFS / 20.0)


def split(samples: Samples) -> list[Chunk]:
    """Cut sound into chunks of at most 30 seconds, each ending at the quietest point of the last five.

    Nothing is lost, repeated or padded: the chunks joined are the sound. Sound of up to 30 s is one chunk.

    Args:
        samples: (n,) float32, 16 kHz.
    """
    longest, shortest = round(MAX_CHUNK_S * SAMPLE_RATE), round(MIN_DURATION_S * SAMPLE_RATE)
    chunks, start = [], 0
    while len(samples) - start > longest:
        latest = min(start + longest, len(samples) - shortest)  # what remains can still be transcribed
        earliest = start + longest - round(CUT_SEARCH_S * SAMPLE_RATE)
        end = earliest + _quietest(samples[earliest:latest])
        chunks.append(Chunk(start / SAMPLE_RATE, samples[start:end]))
        start = end
    chunks.append(Chunk(start / SAMPLE_RATE, samples[start:]))
    return chunks


def _quietest(samples: Samples) -> int:
    """Index of the middle of the 0.2 s with the least energy; the last one where several are equal."""
    frames = samples[: len(samples) // FRAME * FRAME].reshape(-1, FRAME)  # (n,) -> (frames, 320)
    energy = np.square(frames, dtype=np.float64).sum(axis=1)
    width = round(CUT_PAUSE_S * SAMPLE_RATE / FRAME)
    smooth = np.convolve(energy, np.ones(width), mode="valid")  # (frames - width + 1,)
    first = len(smooth) - 1 - int(np.argmin(smooth[::-1]))
    return (first + width // 2) * FRAME


def _existing_file(path: Path) -> str:
    """The path as PyAV wants it; absolute, so that FFmpeg cannot take "name:" at its head for a protocol."""
    if not path.exists():
        raise AudioError(f"{path}: no such file")
    if path.is_dir():
        raise AudioError(f"{path}: a folder, not a sound file; name the files in it")
    if path.is_file() and path.stat().st_size == 0:  # a pipe has no size
        raise AudioError(f"{path}: empty file (0 bytes)")
    return str(path.absolute())


def _decode(file: Path | BinaryIO, name: str) -> Samples:
    """Decode the first audio stream of a file into mono float32 at 16 kHz, block by block.

    Packets that cannot be decoded (a broken tag at the end of an mp3, a damaged download) are left out with a
    warning.
    """
    try:
        opened = _existing_file(file) if isinstance(file, Path) else file
        with av.open(opened, mode="r", metadata_errors="ignore") as container:
            if not container.streams.audio:
                raise AudioError(f"{name}: holds no sound (no audio stream)")
            # A stream may change its rate on the way (chained ogg files): every run is resampled by itself.
            runs = itertools.groupby(_decoded_frames(container, name), key=lambda frame: frame.sample_rate)
            parts = [_resample((_mono(_planes(f), name) for f in run), rate, name) for rate, run in runs]
    except (av.error.FFmpegError, OSError) as error:
        reason = error.strerror or str(error)
        raise AudioError(f"{name}: cannot be read as sound ({reason}); give wav, flac, mp3, m4a, ogg or the like") from error
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def _decoded_frames(container: av.container.InputContainer, name: str) -> Iterator[av.AudioFrame]:
    damaged = 0
    for packet in container.demux(container.streams.audio[0]):
        try:
            yield from packet.decode()
        except av.error.InvalidDataError:
            damaged += 1
    if damaged:
        logger.warning("%s: %d damaged packets left out", name, damaged)


def _planes(frame: av.AudioFrame) -> NDArray[np.generic]:
    """(channels, samples) of a decoded frame; packed formats come interleaved as (1, samples * channels)."""
    data = frame.to_ndarray()
    return data if frame.format.is_planar else data.reshape(-1, len(frame.layout.channels)).T


def _channels_first(array: NDArray[np.generic], name: str) -> NDArray[np.generic]:
    """(n,), (channels, n) or (n, channels) -> (channels, n); of two axes the shorter one is the channels."""
    if array.ndim not in (1, 2):
        raise AudioError(f"{name}: shape {array.shape}; give (n,), (channels, n) or (n, channels)")
    planes = np.atleast_2d(array)
    return planes.T if planes.shape[0] > planes.shape[1] else planes


def _mono(planes: NDArray[np.generic], name: str) -> Samples:
    """(channels, n) of any number type -> (n,) float32 with full scale 1, the mean of the channels."""
    kind = planes.dtype.kind
    if kind not in "iuf":
        raise AudioError(f"{name}: samples of type {planes.dtype}; give floats or integers")
    with np.errstate(over="ignore", invalid="ignore"):  # NaN and infinity are counted later
        mean: NDArray[np.float64] = planes.mean(axis=0, dtype=np.float64) if planes.size else np.zeros(0)
        if kind != "f":
            half_range = 2.0 ** (8 * planes.dtype.itemsize - 1)
            mean = (mean - half_range if kind == "u" else mean) / half_range
        return mean.astype(np.float32)


def _resample(blocks: Iterator[Samples], rate: int, name: str) -> Samples:
    """Consecutive blocks (n_i,) at `rate` Hz -> (n,) at 16 kHz, holding the result and one block."""
    if not MIN_RATE_HZ <= rate <= MAX_RATE_HZ:
        raise AudioError(f"{name}: sampling rate {rate} Hz; it must be {MIN_RATE_HZ} to {MAX_RATE_HZ} Hz")
    stream = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32") if rate != SAMPLE_RATE else None
    parts, total, broken = [np.zeros(0, np.float32)], 0, 0
    for block in blocks:
        total += len(block)
        broken += len(block) - int(np.isfinite(block).sum())  # before the resampler spreads them
        parts.append(stream.resample_chunk(block) if stream else block)
    if broken:
        raise AudioError(f"{name}: {broken} of {total} samples are NaN or infinite; repair the sound first")
    if stream:
        parts.append(stream.resample_chunk(np.zeros(0, np.float32), last=True))
    return np.concatenate(parts)


def _check(samples: Samples, name: str) -> None:
    duration_s = len(samples) / SAMPLE_RATE
    if duration_s < MIN_DURATION_S:
        raise AudioError(f"{name}: holds {duration_s:.3f} s of sound; the shortest that can be used is {MIN_DURATION_S} s")
    peak = float(np.abs(samples).max())
    if peak > MAX_PEAK:
        raise AudioError(f"{name}: samples reach {peak:.0f}, full scale is 1; divide 16-bit samples by 32768")
