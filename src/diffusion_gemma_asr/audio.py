"""Sound in any form to a stream of mono float32 at 16 kHz: PyAV, which brings its own FFmpeg, decodes, soxr resamples."""

from __future__ import annotations

import io
import itertools
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeAlias

import av
import numpy as np
import soxr
from numpy.typing import NDArray

from diffusion_gemma_asr.errors import AudioError

SAMPLE_RATE = 16_000  # Hz, what every acoustic encoder here reads
MIN_DURATION_S = 0.1  # shorter sound holds no word and is refused
MIN_RATE_HZ, MAX_RATE_HZ = 4_000, 384_000
MAX_PEAK = 64.0  # full scale is 1: beyond this the samples are unscaled integers
ARRAY_BLOCK = 1 << 20  # samples of an array that are looked at together

AudioSource: TypeAlias = "str | os.PathLike[str] | bytes | BinaryIO | NDArray[np.generic]"
Samples: TypeAlias = NDArray[np.float32]

logger = logging.getLogger(__name__)


def load_audio(source: AudioSource, sampling_rate: int = SAMPLE_RATE) -> Samples:
    """All of a recording at once; see `read_blocks`.

    Returns:
        (n,) float32 at 16 kHz, the mean of the channels.
    """
    return np.concatenate(list(read_blocks(source, sampling_rate)))


def read_blocks(source: AudioSource, sampling_rate: int = SAMPLE_RATE) -> Iterator[Samples]:
    """Read sound, block by block, into the one form that the rest of the package knows.

    Args:
        source: path of a sound or video file; its bytes; a file object opened in binary mode; or an array of
            samples, (n,), (channels, n) or (n, channels), floats with full scale 1 or integers of any width.
        sampling_rate: of an array, in Hz. A file says its own.

    Yields:
        (n_i,) float32 at 16 kHz, about a second each, the mean of the channels: consecutive, and at least one of them.

    Raises:
        AudioError: it cannot be read, is shorter than 0.1 s, or holds samples that are not finite numbers.
    """
    name = describe(source)
    if isinstance(source, np.ndarray):
        planes = _channels_first(source, name)
        blocks = _resample((_mono(part, name) for part in _slices(planes)), sampling_rate, name)
    elif isinstance(source, bytes):
        blocks = _decode(io.BytesIO(source), name)
    elif isinstance(source, str | os.PathLike):
        blocks = _decode(Path(source), name)
    elif isinstance(source, io.TextIOBase):
        raise AudioError(f"{name}: opened as text; open it in binary mode ('rb')")
    elif hasattr(source, "read"):
        blocks = _decode(source, name)
    else:
        raise AudioError(f"{name}: cannot be read as sound; give a path, bytes, a binary file object or a numpy array")
    yield from _checked(_joined(blocks, SAMPLE_RATE), name)


def convert_blocks(blocks: Iterable[NDArray[np.generic]], sampling_rate: int = SAMPLE_RATE) -> Iterator[Samples]:
    """Sound that comes block by block, as from a microphone, into the form that the rest of the package knows.

    Args:
        blocks: consecutive arrays of samples, (n_i,), (channels, n_i) or (n_i, channels), floats with full scale 1 or
            integers of any width.
        sampling_rate: in Hz.

    Yields:
        (m_i,) float32 at 16 kHz for each block, and at another rate one more at the end; some may be empty.

    Raises:
        AudioError: a block is no array, or holds samples that are not finite numbers or not scaled.
    """
    name = "<blocks>"

    def mono() -> Iterator[Samples]:
        for block in blocks:
            if not isinstance(block, np.ndarray):
                raise AudioError(f"{name}: one is a {type(block).__name__}; give numpy arrays of samples")
            yield _mono(_channels_first(block, name), name)

    for block in _resample(mono(), sampling_rate, name):
        _check_scale(block, name)
        yield block


def duration_of(path: str | os.PathLike[str]) -> float | None:
    """Seconds that a file says it lasts, without reading it; None where it does not say or cannot be opened."""
    try:
        with av.open(os.fspath(path), metadata_errors="ignore") as container:
            return container.duration / av.time_base if container.duration else None
    except (av.error.FFmpegError, OSError, ValueError):
        return None


def describe(source: AudioSource) -> str:
    """What to call a source in a message: its path, or what kind of thing it is."""
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    return f"<{type(source).__name__}>"


def _slices(planes: NDArray[np.generic]) -> Iterator[NDArray[np.generic]]:
    """(channels, n) in pieces, so that what is computed from them stays small."""
    for first in range(0, max(planes.shape[-1], 1), ARRAY_BLOCK):
        yield planes[:, first : first + ARRAY_BLOCK]


def _joined(blocks: Iterator[Samples], enough: int) -> Iterator[Samples]:
    """The same samples in blocks of at least `enough`, but for the last."""
    parts: list[Samples] = []
    for block in blocks:
        parts.append(block)
        if sum(map(len, parts)) >= enough:
            yield np.concatenate(parts)
            parts = []
    if parts:
        yield np.concatenate(parts)


def _checked(blocks: Iterator[Samples], name: str) -> Iterator[Samples]:
    """The blocks, as long as they can be used; an error at the end if all of them together are too short."""
    total = 0
    for block in blocks:
        _check_scale(block, name)
        total += len(block)
        yield block
    if (duration_s := total / SAMPLE_RATE) < MIN_DURATION_S:
        raise AudioError(f"{name}: holds {duration_s:.3f} s of sound; the shortest that can be used is {MIN_DURATION_S} s")


def _check_scale(block: Samples, name: str) -> None:
    peak = float(np.abs(block).max(initial=0.0))
    if peak > MAX_PEAK:
        raise AudioError(f"{name}: samples reach {peak:.0f}, full scale is 1; divide 16-bit samples by 32768")


def _existing_file(path: Path) -> str:
    """The path as PyAV wants it; absolute, so that FFmpeg cannot take "name:" at its head for a protocol."""
    if not path.exists():
        raise AudioError(f"{path}: no such file")
    if path.is_dir():
        raise AudioError(f"{path}: a folder, not a sound file; name the files in it")
    if path.is_file() and path.stat().st_size == 0:  # a pipe has no size
        raise AudioError(f"{path}: empty file (0 bytes)")
    return str(path.absolute())


def _decode(file: Path | BinaryIO, name: str) -> Iterator[Samples]:
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
            for rate, run in runs:
                yield from _resample((_mono(_planes(f), name) for f in run), rate, name)
    except (av.error.FFmpegError, OSError) as error:
        reason = error.strerror or str(error)
        raise AudioError(f"{name}: cannot be read as sound ({reason}); give wav, flac, mp3, m4a, ogg or the like") from error


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


def _resample(blocks: Iterator[Samples], rate: int, name: str) -> Iterator[Samples]:
    """Consecutive blocks (n_i,) at `rate` Hz -> consecutive blocks at 16 kHz."""
    if not MIN_RATE_HZ <= rate <= MAX_RATE_HZ:
        raise AudioError(f"{name}: sampling rate {rate} Hz; it must be {MIN_RATE_HZ} to {MAX_RATE_HZ} Hz")
    stream = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32") if rate != SAMPLE_RATE else None
    total = 0
    for block in blocks:
        finite = np.isfinite(block)  # before the resampler spreads what is not
        if not finite.all():
            where_s = (total + int(np.argmin(finite))) / rate
            raise AudioError(f"{name}: a sample that is NaN or infinite at {where_s:.3f} s; repair the sound first")
        total += len(block)
        yield stream.resample_chunk(block) if stream else block
    if stream:
        yield stream.resample_chunk(np.zeros(0, np.float32), last=True)
