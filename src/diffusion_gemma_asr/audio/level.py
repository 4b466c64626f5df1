"""How loud a recording is: very quiet speech is raised before it is looked for, as detectors expect a usual level."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import numpy as np

from .read import SAMPLE_RATE, Samples

USUAL_DBFS = -40.0  # RMS of the loudest quarter of a second: speech so loud, with peaks of about -28, stays as it is
TARGET_DBFS = -30.0  # to which quieter speech is raised
BOUND_DB = 60.0  # nothing is raised by more
CONTRAST_DB = 7.0  # speech is louder than its quieter parts by 10 dB and more; noise and hum are not, and stay as they are
MEMORY_S = 60.0  # of sound that counts
LOOK_AHEAD_S = 30.0  # heard ahead where nothing is of usual level
WINDOW = 512  # samples, 32 ms
LONG = 4  # windows, 128 ms: two of three in a row have to be loud, so that a click is not


class Level:
    """By how much to raise sound: a number that depends on what was heard in the last minute.

    It is exactly 1 as long as anything there is of usual level or nothing stands out from the background, and 1000 (60 dB)
    at most.
    """

    def __init__(self) -> None:
        count = round(MEMORY_S * SAMPLE_RATE / (LONG * WINDOW))
        self._power: deque[np.ndarray] = deque(maxlen=count)  # (LONG,) each: mean square of windows, around their means
        self._rest = np.zeros(0, np.float32)
        self._loudest = 0.0  # mean square of the loudest sound that lasts, 0 where too little was heard
        self._gain: float | None = 1.0

    def hear(self, block: Samples) -> None:
        """Takes (n,) samples at 16 kHz, which follow those before."""
        sound = np.concatenate([self._rest, block])
        whole = len(sound) // (LONG * WINDOW) * (LONG * WINDOW)
        self._rest = sound[whole:]
        if whole:
            self._power.extend(sound[:whole].reshape(-1, LONG, WINDOW).var(axis=2, dtype=np.float64))
            self._loudest, self._gain = self._measure(), None

    @property
    def usual(self) -> bool:
        """Whether something in the last minute is of usual level."""
        return self._loudest >= 10.0 ** (USUAL_DBFS / 10.0)

    @property
    def gain(self) -> float:
        """What to multiply samples with, at least 1."""
        if self._gain is None:
            self._gain = self._find()
        return self._gain

    def _measure(self) -> float:
        if len(self._power) < 3:
            return 0.0
        power = np.mean(self._power, axis=1)
        return float(np.median([power[:-2], power[1:-1], power[2:]], axis=0).max())

    def _find(self) -> float:
        if self._loudest == 0.0 or self.usual:
            return 1.0
        windows = np.ravel(self._power)
        background = np.percentile(windows[windows > 0], 10)
        if self._loudest < background * 10.0 ** (CONTRAST_DB / 10.0):
            return 1.0
        return float(np.clip(10.0 ** (TARGET_DBFS / 20.0) / np.sqrt(self._loudest), 1.0, 10.0 ** (BOUND_DB / 20.0)))


def raised(samples: Samples, gain: float) -> Samples:
    """Samples multiplied with a gain, within full scale; the very same ones where it is 1."""
    return samples if gain == 1.0 else np.clip(samples * np.float32(gain), -1.0, 1.0)


class HeardAhead:
    """Gives blocks back, each after `level` has heard what comes behind it, up to 30 s, where nothing is of usual level."""

    def __init__(self, level: Level):
        self._level = level
        self._held: deque[Samples] = deque()
        self._length = 0

    def feed(self, block: Samples) -> Iterator[Samples]:
        """Takes the next block; gives those that need not wait any more."""
        self._level.hear(block)
        self._held.append(block)
        self._length += len(block)
        while self._held and (self._level.usual or self._length > LOOK_AHEAD_S * SAMPLE_RATE):
            self._length -= len(self._held[0])
            yield self._held.popleft()

    def finish(self) -> Iterator[Samples]:
        """Those that are left at the end."""
        while self._held:
            yield self._held.popleft()
