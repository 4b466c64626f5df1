"""Sound in any form to a stream of float32 at 16 kHz; soxr resamples, the modules beside this one do the rest."""

from __future__ import annotations

import io
import itertools
import os
import stat
from collections.abc import Iterable, Iterator
from typing import BinaryIO, TypeAlias

import av
import numpy as np
import soxr
from numpy.typing import NDArray

from ..errors import AudioError
from . import inputs
from .arrays import BlockScale, bits_of, channels_first, scaled, slices
from .decode import MAX_PEAK, MAX_RATE_HZ, MIN_RATE_HZ, decode
from .mix import Apart, Channel, Channels, Mixer

SAMPLE_RATE = 16_000  # Hz, what every acoustic encoder here reads
MIN_DURATION_S = 0.1  # shorter sound holds no word and is refused

AudioSource: TypeAlias = "str | os.PathLike[str] | bytes | BinaryIO | NDArray[np.generic]"
Samples: TypeAlias = NDArray[np.float32]


def load_audio(
    source: AudioSource, sampling_rate: int = SAMPLE_RATE, *, track: int | None = None, channel: Channel = "mix"
) -> Samples:
    """All of a recording at once; see `read_blocks`.

    Returns:
        (n,) float32 at 16 kHz.
    """
    return np.concatenate(list(read_blocks(source, sampling_rate, track=track, channel=channel)))


def read_blocks(
    source: AudioSource, sampling_rate: int = SAMPLE_RATE, *, track: int | None = None, channel: Channel = "mix"
) -> Iterator[Samples]:
    """Read sound, block by block, into the one form that the rest of the package knows.

    Times count from the start of a container, as in a player: sound that begins later than the picture begins with silence,
    and holes are silence. Damaged packets are left out with a warning, and are silence as well.

    Args:
        source: path of a sound or video file or of a pipe; its bytes; a file object opened in binary mode; or an array of
            samples, (n,), (channels, n) or (n, channels), floats with full scale 1 or integers. Pipes, and file objects
            without `seek`, are read once, as they come. A file object that was read before is read from where it stands if
            the beginning of a sound file is there, otherwise from its start. Integers of 8 and 16 bits are scaled by the
            range of their type; wider ones by the narrowest of 16, 24, 32 and 64 bits that holds them all.
        sampling_rate: of an array, in Hz. A file says its own.
        track: number of the audio track, from 0; None is the one that the file marks as its default, else the first.
        channel: 'mix' is the mean of the channels, in which inverted ones do not cancel out; 'left', 'right' or a number
            from 0 is one of them.

    Yields:
        (n_i,) float32 at 16 kHz, about a second each: consecutive, and at least one of them.

    Raises:
        AudioError: it cannot be read, has no such track or channel, is shorter than 0.1 s, or holds samples that are not
            finite numbers or not scaled.
    """
    name = describe(source)
    yield from _read(source, sampling_rate, track, Mixer(channel, name))


def read_channels(
    source: AudioSource, sampling_rate: int = SAMPLE_RATE, *, track: int | None = None, most: int | None = None
) -> Iterator[Samples]:
    """As `read_blocks`, with the channels side by side.

    Args:
        source, sampling_rate, track: see `read_blocks`.
        most: sound of more channels is mixed to one.

    Yields:
        (channels, n_i) float32 at 16 kHz: as many channels as the sound has at its beginning. Where it has fewer from some
        place on, the last of those goes on in their places.
    """
    yield from _read(source, sampling_rate, track, Apart(describe(source), most))


def _read(source: AudioSource, sampling_rate: int, track: int | None, channels: Channels) -> Iterator[Samples]:
    name = describe(source)
    if isinstance(source, np.ndarray):
        if track not in (None, 0):
            raise AudioError(f"{name}: an array has 1 audio track, number 0; there is no track {track}")
        blocks = _resample(_array_blocks(source, sampling_rate, name, channels), sampling_rate, name)
    else:
        pieces = decode(_file(source, name), name, track, channels)
        # A stream may change its rate on the way (chained ogg files): every run is resampled by itself.
        runs = itertools.groupby(pieces, key=lambda piece: piece.rate)
        blocks = (
            block for rate, run in runs for block in _resample((piece.samples for piece in run), rate, name)
        )  # fmt: skip
    yield from _checked(_joined(blocks, SAMPLE_RATE), name)


def convert_blocks(
    blocks: Iterable[NDArray[np.generic]], sampling_rate: int = SAMPLE_RATE, *, channel: Channel = "mix"
) -> Iterator[Samples]:
    """Sound that comes block by block, as from a microphone, into the form that the rest of the package knows.

    Args:
        blocks: consecutive arrays of samples, (n_i,), (channels, n_i) or (n_i, channels), floats with full scale 1 or
            integers of 8, 16 or signed 32 bits, scaled by the range of their type.
        sampling_rate: in Hz.
        channel: see `read_blocks`.

    Yields:
        (m_i,) float32 at 16 kHz for each block, and at another rate one more at the end; some may be empty.

    Raises:
        AudioError: a block is no array, or holds samples that are not finite numbers or not scaled, there is no such
            channel; or, at the end, 32-bit integers held 16-bit samples.
    """
    name = "<blocks>"
    scale, mixer = BlockScale(name), Mixer(channel, name)

    def mono() -> Iterator[Samples]:
        for block in blocks:
            if not isinstance(block, np.ndarray):
                raise AudioError(f"{name}: one is a {type(block).__name__}; give numpy arrays of samples")
            yield mixer(scale(channels_first(block, name)), sampling_rate)

    for block in _resample(mono(), sampling_rate, name):
        _check_scale(block, name)
        yield block
    scale.check()


def duration_of(path: str | os.PathLike[str]) -> float | None:
    """Seconds that a file says it lasts, without reading it.

    Returns:
        None where it does not say or cannot be opened, and for whatever is no regular file: a pipe can be read only once.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return None
        with inputs.open_container(path, describe(path)) as container:
            return container.duration / av.time_base if container.duration else None
    except (AudioError, OSError, ValueError):
        return None


def describe(source: AudioSource) -> str:
    """What to call a source in a message: its path, the name of a file object, or what kind of thing it is."""
    return inputs.describe(source)


def _file(source: AudioSource, name: str) -> inputs.File:
    """The source, if it is a path, bytes or a file object."""
    if isinstance(source, io.TextIOBase):
        raise AudioError(f"{name}: opened as text; open it in binary mode ('rb')")
    if isinstance(source, str | os.PathLike | bytes | bytearray | memoryview) or hasattr(source, "read"):
        return source  # type: ignore[return-value]
    raise AudioError(f"{name}: cannot be read as sound; give a path, bytes, a binary file object or a numpy array")


def _array_blocks(array: NDArray[np.generic], rate: int, name: str, channels: Channels) -> Iterator[Samples]:
    planes = channels_first(array, name)
    bits = bits_of(planes, name)
    for part in slices(planes):
        yield channels(scaled(part, bits), rate)


def _joined(blocks: Iterator[Samples], enough: int) -> Iterator[Samples]:
    """The same samples in blocks of at least `enough`, but for the last."""
    parts: list[Samples] = []
    for block in blocks:
        parts.append(block)
        if sum(part.shape[-1] for part in parts) >= enough:
            yield np.concatenate(parts, axis=-1)
            parts = []
    if parts:
        yield np.concatenate(parts, axis=-1)


def _checked(blocks: Iterator[Samples], name: str) -> Iterator[Samples]:
    """The blocks, as long as they can be used; an error at the end if all of them together are too short."""
    total = 0
    for block in blocks:
        _check_scale(block, name)
        total += block.shape[-1]
        yield block
    if (duration_s := total / SAMPLE_RATE) < MIN_DURATION_S:
        raise AudioError(f"{name}: holds {duration_s:.3f} s of sound; the shortest that can be used is {MIN_DURATION_S} s")


def _check_scale(block: Samples, name: str) -> None:
    peak = float(np.abs(block).max(initial=0.0))
    if peak > MAX_PEAK:
        raise AudioError(f"{name}: samples reach {peak:.0f}, full scale is 1; divide 16-bit samples by 32768")


def _resample(blocks: Iterator[Samples], rate: int, name: str) -> Iterator[Samples]:
    """Consecutive blocks (n_i,) or (channels, n_i) at `rate` Hz -> consecutive blocks at 16 kHz."""
    if not MIN_RATE_HZ <= rate <= MAX_RATE_HZ:
        raise AudioError(f"{name}: sampling rate {rate} Hz; it must be {MIN_RATE_HZ} to {MAX_RATE_HZ} Hz")
    stream, total = None, 0
    for block in blocks:
        finite = np.isfinite(block)  # before the resampler spreads what is not
        if not finite.all():
            where_s = (total + int(np.argmin(np.atleast_2d(finite).all(axis=0)))) / rate
            raise AudioError(f"{name}: a sample that is NaN or infinite at {where_s:.3f} s; repair the sound first")
        total += block.shape[-1]
        if rate == SAMPLE_RATE:
            yield block
            continue
        stream = stream or soxr.ResampleStream(rate, SAMPLE_RATE, len(np.atleast_2d(block)), dtype="float32")
        yield stream.resample_chunk(np.ascontiguousarray(block.T)).T
    if stream:
        yield stream.resample_chunk(np.zeros_like(block.T[:0]), last=True).T
