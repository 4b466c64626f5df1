"""Whether the two channels of a recording hold different speech, such as the two ends of a telephone call.

Two microphones in one room hear the same voices, however far apart they are: delayed, reverberant, inverted, louder or
softer, the levels of frequency bands rise and fall together. Those of two people who speak into a channel each do not.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from ..errors import AudioError
from .detectors import SILENCE_DBFS, WINDOW
from .read import SAMPLE_RATE, Samples
from .vad import speech_windows

ENOUGH_S = 30.0  # of sound in both channels at once, by which is decided
LONGEST_S = 120.0  # of a recording that is held until there is so much
ALIKE = 0.4  # correlation of levels: in one scene it was 0.54 and more, of two people 0.21 and less
SURELY_ALIKE = 0.6  # without a look for speech
TOGETHER_S = 1.0  # both speak at once
ALONE_S = 2.0  # or each for so long while the other one does not
LAGS = 31  # windows, 1 s: by which one channel may be behind the other
SLOW = 31  # windows, 1 s: levels that change more slowly say where somebody sits, not what is said
BANDS_HZ = (150.0, 4000.0, 16)  # lowest, highest, how many
DYNAMICS_DB = 50.0  # under the loudest; what is below is background


def held_apart(blocks: Iterable[Samples]) -> tuple[bool, Iterator[Samples]]:
    """Decides by the beginning of a recording whether its channels are to be transcribed one by one.

    Args:
        blocks: consecutive (channels, n_i) float32, 16 kHz.

    Returns:
        whether there are two channels that hold different speech, by the first 30 s that hold sound in both, looked for in
        the first two minutes; and all blocks, from the first one on.
    """
    blocks, held = iter(blocks), deque[Samples]()
    heard_s = length_s = 0.0
    broken: AudioError | None = None
    try:
        for block in blocks:
            held.append(block)
            length_s += block.shape[1] / SAMPLE_RATE
            heard_s += _loud(block).sum() * WINDOW / SAMPLE_RATE
            if len(block) != 2 or heard_s >= ENOUGH_S or length_s >= LONGEST_S:
                break
    except AudioError as error:  # to be told behind the sound that came before it
        broken = error

    def all_blocks() -> Iterator[Samples]:
        while held:
            yield held.popleft()
        if broken is not None:
            raise broken
        yield from blocks

    apart = bool(held) and len(held[0]) == 2 and different_speech(np.concatenate(held, axis=1))
    return apart, all_blocks()


def different_speech(sound: Samples) -> bool:
    """Whether people speak in both of two channels, and not the same ones.

    Args:
        sound: (2, n) float32, 16 kHz.
    """
    loud = _loud(sound)
    if not loud.any():
        return False
    levels = [_levels(row) for row in sound]
    if _correlation(levels[0][loud], levels[1][loud]) >= SURELY_ALIKE:
        return False
    one, other = (speech_windows(row) for row in sound)
    spoken_s = min(one.sum(), other.sum()) * WINDOW / SAMPLE_RATE
    together = one & other
    together_s = together.sum() * WINDOW / SAMPLE_RATE
    if together_s < TOGETHER_S and spoken_s - together_s < ALONE_S:
        return False
    return not _alike(levels, one, other)


def _loud(sound: Samples) -> NDArray[np.bool_]:
    """(2, n) -> (n // 512,): whether both channels hold sound."""
    whole = sound[:, : sound.shape[1] // WINDOW * WINDOW].reshape(len(sound), -1, WINDOW)
    return (whole.std(axis=2) >= 10.0 ** (SILENCE_DBFS / 20.0)).all(axis=0)


def _levels(samples: Samples) -> NDArray[np.float64]:
    """(n,) -> (n // 512, bands) in dB, of windows of 32 ms, around their means in the second around each.

    So of two voices that are each loud in one channel and faint in the other, the channels are alike all the same.
    """
    windows = samples[: len(samples) // WINDOW * WINDOW].reshape(-1, WINDOW) * np.hanning(WINDOW)
    power = np.square(np.abs(np.fft.rfft(windows, axis=1)))
    low, high, bands = BANDS_HZ
    edges = np.round(np.geomspace(low, high, bands + 1) * WINDOW / SAMPLE_RATE).astype(int)
    level = 10.0 * np.log10(np.add.reduceat(power, edges, axis=1)[:, :-1] + 1e-12)  # the last one is what is above
    level = np.maximum(level, level.max(initial=-120.0) - DYNAMICS_DB)
    total = np.pad(level, ((SLOW // 2 + 1, SLOW // 2), (0, 0)), mode="edge").cumsum(axis=0)
    return level - (total[SLOW:] - total[:-SLOW]) / SLOW


def _correlation(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Of levels (windows, bands) around the mean of each band; 0 where nothing changes."""
    one, other = one - one.mean(axis=0), other - other.mean(axis=0)
    size = np.sqrt(np.square(one).sum() * np.square(other).sum())
    return float((one * other).sum() / size) if size else 0.0


def _alike(levels: list[NDArray[np.float64]], one: NDArray[np.bool_], other: NDArray[np.bool_]) -> bool:
    """Whether levels correlate where both channels hold speech, one of them being behind by a second at most."""
    count, most = len(one), min(one.sum(), other.sum())
    for lag in range(-LAGS, LAGS + 1):
        first = slice(max(0, lag), count + min(0, lag))
        second = slice(max(0, -lag), count + min(0, -lag))
        both = one[first] & other[second]
        if 2 * both.sum() >= most and _correlation(levels[0][first][both], levels[1][second][both]) >= ALIKE:
            return True
    return False
