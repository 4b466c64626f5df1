"""Sound files to consecutive sound: PyAV, which brings its own FFmpeg, decodes one audio track of a container."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import av
import numpy as np
from av.container import InputContainer
from numpy.typing import NDArray

from ..errors import AudioError
from .arrays import scaled
from .inputs import File, open_container, unreadable
from .mix import Channels
from .timeline import LONGEST_HOLE_S, LONGEST_SILENCE_S, Timed, on_time

MIN_RATE_HZ, MAX_RATE_HZ = 4_000, 384_000
MAX_PEAK = 64.0  # full scale is 1: beyond this samples are unscaled integers, or what a decoder makes of damage
SILENT_PEAK = 1e-4  # three steps of 16-bit sound: a track under it holds nothing
READS = 20  # reading fails so many times in a row before it is given up
OGG_PAGE_S = 1.0  # ogg gives times to pages only: a hole inside of one seems to be at its beginning
BEGINS_ANEW = 0x0200  # AVFMT_TS_DISCONT: time may jump in such a format, and its duration is only what FFmpeg makes of that

logger = logging.getLogger(__name__)


@dataclass
class _Damage:
    """What could not be decoded, and where."""

    packets: int = 0
    first_s: float | None = None
    reason: str = ""
    stopped: bool = False

    def add(self, reason: object, time_s: float | None) -> None:
        self.packets += 1
        if self.packets == 1:
            self.reason, self.first_s = " ".join(str(reason).split()), time_s


def decode(source: File, name: str, track: int | None, channels: Channels) -> Iterator[Timed]:
    """Decode an audio track of a file, with silence where it has none.

    Packets that cannot be decoded (a broken tag at the end of an mp3, a damaged download) are left out, with one warning.

    Args:
        source: path, bytes or binary file object.
        name: of the source, for messages.
        track: number of the audio track, from 0; None is the one that the file marks as its default, else the first.
        channels: makes of those of the file what is wanted.

    Yields:
        consecutive sound from the container's start on; `time` does not matter any more.

    Raises:
        AudioError: it cannot be opened, has no such track, or nothing of it can be decoded.
    """
    with open_container(source, name) as container:
        stream = _track(container, track, name)
        begins_anew = int(container.format.flags) & BEGINS_ANEW
        duration_s = (container.duration or 0) / av.time_base if not begins_anew else 0.0
        longest_hole_s = max(LONGEST_HOLE_S, min(duration_s, LONGEST_SILENCE_S))
        reach_s = OGG_PAGE_S if container.format.name == "ogg" else 0.0
        yield from on_time(_pieces(container, stream, name, channels), name, longest_hole_s, reach_s)


def _track(container: InputContainer, track: int | None, name: str) -> av.AudioStream:
    streams = container.streams.audio
    if not streams:
        raise AudioError(f"{name}: holds no sound (no audio stream)")
    if track is None:
        chosen = next((stream for stream in streams if _is_default(stream)), streams[0])
    elif not isinstance(track, int) or isinstance(track, bool) or not 0 <= track < len(streams):
        has = f"{len(streams)} audio tracks, 0 to {len(streams) - 1}" if len(streams) > 1 else "1 audio track, number 0"
        raise AudioError(f"{name}: has {has}; there is no track {track}")
    else:
        chosen = streams[track]
    if chosen.codec_context is None:
        raise unreadable(name, f"the codec of audio track {streams.index(chosen)} is not known")
    return chosen


def _is_default(stream: av.AudioStream) -> bool:
    try:
        return bool(stream.disposition.value & 1)
    except (AttributeError, ValueError):  # PyAV before 14 does not say; flags that it does not know
        return False


def _pieces(container: InputContainer, stream: av.AudioStream, name: str, channels: Channels) -> Iterator[Timed]:
    """All that can be decoded, with its times from the container's start."""
    damage = _Damage()
    start_s = None if container.start_time is None else container.start_time / av.time_base
    exact = stream.codec_context.name.startswith("pcm_f")  # then what is not finite stood in the file
    any_sound, peak, lost = False, 0.0, False
    for packet in _packets(container, stream, damage):
        try:
            frames = stream.decode(packet)
        except av.error.FFmpegError as error:
            if packet is not None:
                damage.add(error.strerror or error, _seconds(packet.pts, packet.time_base, start_s))
            lost = True
            continue
        for frame in frames:
            time_s = _seconds(frame.pts, frame.time_base or stream.time_base, start_s)
            if start_s is None and frame.pts is not None:
                start_s, time_s = time_s, 0.0
            wrong = _wrong(frame)
            samples = np.zeros(0, np.float32) if wrong else channels(scaled(_planes(frame)), frame.sample_rate)
            loudest = float(np.abs(samples).max(initial=0.0))
            if not wrong and not exact and not loudest <= MAX_PEAK:  # NaN as well
                wrong = "samples beyond any scale"
            if wrong:
                damage.add(wrong, time_s)
                lost = True
                continue
            yield Timed(time_s, frame.sample_rate, samples, lost)
            any_sound, peak, lost = True, max(peak, loudest), False
    if damage.packets and not any_sound:
        raise unreadable(name, f"none of it can be decoded: {damage.reason}")
    if damage.packets:
        where = f", the first at {max(damage.first_s, 0.0):.1f} s" if damage.first_s is not None else ""
        rest = "; what is behind the last one cannot be read" if damage.stopped else ""
        logger.warning("%s: %d damaged packets left out%s (%s)%s", name, damage.packets, where, damage.reason, rest)
    others = [other for other in container.streams.audio if other.index != stream.index]
    if others and any_sound and peak < SILENT_PEAK:
        tracks = list(container.streams.audio)
        silent, numbers = tracks.index(stream), ", ".join(str(tracks.index(other)) for other in others)
        logger.warning("%s: audio track %d is silent; it has others to choose from: track %s", name, silent, numbers)


def _packets(container: InputContainer, stream: av.AudioStream, damage: _Damage) -> Iterator[av.Packet | None]:
    """The packets of a stream; None, once, where they end before the container does."""
    failures = 0
    while failures < READS:
        try:
            for packet in container.demux(stream):
                failures = 0
                yield packet
            return
        except IndexError:  # PyAV's own, at the end, where damage let streams appear on the way
            yield None
            return
        except av.error.FFmpegError as error:
            failures += 1
            if failures == 1:
                damage.add(error.strerror or error, None)
    damage.stopped = True
    yield None


def _seconds(pts: int | None, time_base: object, start_s: float | None) -> float | None:
    """A timestamp in seconds from the container's start."""
    if pts is None or time_base is None:
        return None
    return float(pts * time_base) - (start_s or 0.0)  # type: ignore[operator]


def _wrong(frame: av.AudioFrame) -> str:
    """What makes a frame impossible; "" if nothing does."""
    if not MIN_RATE_HZ <= frame.sample_rate <= MAX_RATE_HZ:
        return f"sampling rate {frame.sample_rate} Hz; it must be {MIN_RATE_HZ} to {MAX_RATE_HZ} Hz"
    return "" if frame.layout.nb_channels else "no channels"


def _planes(frame: av.AudioFrame) -> NDArray[np.generic]:
    """(channels, samples) of a decoded frame; packed formats come interleaved as (1, samples * channels)."""
    data = frame.to_ndarray()
    return data if frame.format.is_planar else data.reshape(-1, frame.layout.nb_channels).T
