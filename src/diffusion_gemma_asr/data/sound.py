"""Reads the sound of utterances: whole files, the part of a file that a manifest names, or what lies in a Shar."""

from __future__ import annotations

import io
import os
import wave
from contextlib import closing, suppress

import numpy as np

from ..audio.read import MIN_DURATION_S, SAMPLE_RATE, Samples, read_blocks
from ..errors import AudioError
from .manifest import Utterance
from .shar import read_from, tar_of

ROUNDING = SAMPLE_RATE // 1000  # samples; manifests round durations to 1 ms, which must not cut off the end of a file


def read_utterance(utterance: Utterance) -> Samples:
    """Reads the samples of an utterance; the file is not decoded beyond its end.

    Args:
        utterance: starts at `offset` and lasts `duration` seconds, or to the end of the file if that is earlier.

    Returns:
        (n,) float32 at 16 kHz.

    Raises:
        AudioError: the file cannot be read, ends before the part begins, or holds less than 0.1 s of it.
    """
    start = round(utterance.offset * SAMPLE_RATE)
    end = round((utterance.offset + utterance.duration) * SAMPLE_RATE)
    path = utterance.audio_filepath
    if tar := tar_of(path):
        samples = _decoded_part(_Named(read_from(tar, path), path), start, end + ROUNDING)
    else:
        part = _part_of_wav(path, start, end + ROUNDING)
        samples = _decoded_part(path, start, end + ROUNDING) if part is None else part
    if len(samples) >= end - start + ROUNDING:  # the file goes on
        samples = samples[: end - start]
    if len(samples) < MIN_DURATION_S * SAMPLE_RATE:
        raise AudioError(
            f"{utterance.audio_filepath}: {len(samples) / SAMPLE_RATE:.3f} s of sound from {utterance.offset:g} s on for "
            f"{utterance.duration:g} s; check offset and duration, the shortest that can be used is {MIN_DURATION_S} s"
        )
    return samples


def _part_of_wav(path: str, start: int, end: int) -> Samples | None:
    """Samples start to end of a mono 16-bit wav file at 16 kHz; None for any other file, or if the part is empty."""
    if not path.lower().endswith(".wav"):
        return None
    # ValueError: half a sample at the end of a truncated file.
    with suppress(wave.Error, OSError, EOFError, ValueError), wave.open(os.fspath(path)) as file:
        if (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, SAMPLE_RATE):
            file.setpos(start)
            data = file.readframes(end - start)
            return np.frombuffer(data, "<i2").astype(np.float32) / np.float32(32768) if data else None
    return None


class _Named(io.BytesIO):
    """A file in memory that has a name in messages."""

    def __init__(self, content: bytes, name: str):
        super().__init__(content)
        self.name = name


def _decoded_part(source: str | _Named, start: int, end: int) -> Samples:
    """Samples start to end of a file in any format, decoded as a stream."""
    parts, position = [np.zeros(0, np.float32)], 0
    with closing(read_blocks(source)) as blocks:  # type: ignore[type-var]
        for block in blocks:
            if position + len(block) > start:
                parts.append(block[max(0, start - position) : end - position])
            position += len(block)
            if position >= end:
                break
    return np.concatenate(parts)
