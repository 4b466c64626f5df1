"""Whether the two channels of a recording hold different speech, such as the two ends of a telephone call.

Two microphones in one room hear the same voices, however far apart they are: delayed, reverberant, inverted, louder or
softer, the levels of frequency bands rise and fall together. Those of two people who speak into a channel each do not.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from .read import SAMPLE_RATE, Samples
from .vad import SILENCE_DBFS, WINDOW, speech_windows

ENOUGH_S = 30.0  # of sound in both channels at once, by which is decided
LONGEST_S = 120.0  # of a recording that is held until there is so much
ALIKE = 0.4  # correlation of levels: in one scene it is 0.78 and more, of two people under 0.35
SURELY_ALIKE = 0.6  # without a look for speech
COHERENT = 3.0  # times the coherence that chance gives: then one voice is in both channels
TOGETHER_S = 1.0  # both speak at once
ALONE_S = 2.0  # or each for so long while the other one does not
LAGS = 31  # windows, 1 s: by which one channel may be behind the other
LONG = 4096  # samples, 256 ms: in which most of a room's answer to a voice comes
LEAST_LONG = 8  # of these, for a coherence that means anything
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
    for block in blocks:
        held.append(block)
        length_s += block.shape[1] / SAMPLE_RATE
        heard_s += _loud(block).sum() * WINDOW / SAMPLE_RATE
        if len(block) != 2 or heard_s >= ENOUGH_S or length_s >= LONGEST_S:
            break

    def all_blocks() -> Iterator[Samples]:
        while held:
            yield held.popleft()
        yield from blocks

    apart = bool(held) and len(held[0]) == 2 and different_speech(np.concatenate(held, axis=1))
    return apart, all_blocks()


def different_speech(sound: Samples) -> bool:
    """Whether people speak in both of two channels, and not the same ones.

    Args:
        sound: (2, n) float32, 16 kHz.
    """
    loud = _loud(sound)
    levels = [_levels(row) for row in sound]
    if loud.any() and _correlation(levels[0][loud], levels[1][loud]) >= SURELY_ALIKE:
        return False
    one, other = (speech_windows(row) for row in sound)
    spoken_s = min(one.sum(), other.sum()) * WINDOW / SAMPLE_RATE
    together = one & other
    together_s = together.sum() * WINDOW / SAMPLE_RATE
    if together_s < TOGETHER_S and spoken_s - together_s < ALONE_S:
        return False
    return not (_coherent(sound, together) or _alike(levels, one, other))


def _loud(sound: Samples) -> NDArray[np.bool_]:
    """(2, n) -> (n // 512,): whether both channels hold sound."""
    whole = sound[:, : sound.shape[1] // WINDOW * WINDOW].reshape(len(sound), -1, WINDOW)
    return (whole.std(axis=2) >= 10.0 ** (SILENCE_DBFS / 20.0)).all(axis=0)


def _levels(samples: Samples) -> NDArray[np.float64]:
    """(n,) -> (n // 512, bands) in dB, of windows of 32 ms."""
    windows = samples[: len(samples) // WINDOW * WINDOW].reshape(-1, WINDOW) * np.hanning(WINDOW)
    power = np.square(np.abs(np.fft.rfft(windows, axis=1)))
    low, high, bands = BANDS_HZ
    edges = np.round(np.geomspace(low, high, bands + 1) * WINDOW / SAMPLE_RATE).astype(int)
    edges = np.maximum.accumulate(np.maximum(edges, edges[0] + np.arange(len(edges))))  # a bin each at least
    level = 10.0 * np.log10(np.add.reduceat(power, edges, axis=1)[:, :-1] + 1e-12)  # the last one is what is above
    return np.maximum(level, level.max(initial=-120.0) - DYNAMICS_DB)


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


def _coherent(sound: Samples, together: NDArray[np.bool_]) -> bool:
    """Whether one wave is in both channels where they hold speech, by the mean of their magnitude-squared coherence."""
    starts = np.arange(0, sound.shape[1] - LONG + 1, LONG // 2)
    starts = starts[together[(starts + LONG // 2) // WINDOW]] if len(together) else starts[:0]
    if len(starts) < LEAST_LONG:
        return False
    window = np.hanning(LONG)
    cross, power = np.zeros(LONG // 2 + 1, complex), np.zeros((2, LONG // 2 + 1))
    for start in starts:
        spectra = np.fft.rfft(sound[:, start : start + LONG] * window, axis=1)
        cross += spectra[0] * spectra[1].conj()
        power += np.square(np.abs(spectra))
    low, high = (round(hertz * LONG / SAMPLE_RATE) for hertz in BANDS_HZ[:2])
    coherence = np.square(np.abs(cross)) / np.maximum(power[0] * power[1], 1e-30)
    return float(coherence[low:high].mean()) >= COHERENT * 1.8 / len(starts)  # windows overlap: fewer are independent
