"""Several channels to one, by a mix that inverted channels cannot cancel or by leaving the others; or all of them apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..errors import AudioError

Channel: TypeAlias = "Literal['mix', 'left', 'right'] | int"
Planes: TypeAlias = NDArray[np.float64]
Channels: TypeAlias = "Callable[[Planes, int], NDArray[np.float32]]"
"""(channels, n) floats at a rate in Hz, which follow those before, to (n,) or (channels, n) of what is wanted of them."""

NUMBERS = {"left": 0, "right": 1}
WINDOW = 2_048  # samples that get their signs together
MEMORY_S = 2.0  # correlations are those of about so many seconds
INVERTED, UPRIGHT = -0.6, 0.2  # correlation with the loudest channel under which one is inverted, over which it no longer is
LOUDER = 4.0  # times the power of the channel that the others are compared with: then it takes its place


def check_channel(channel: Channel, name: str) -> None:
    """Raises AudioError where it can be no channel of any sound."""
    number = isinstance(channel, int) and not isinstance(channel, bool)
    if (number and channel < 0) or not (number or channel == "mix" or channel in NUMBERS):  # type: ignore[operator]
        raise AudioError(f"{name}: channel is {channel!r}; choose 'mix', 'left', 'right' or a number from 0")


class Mixer:
    """Makes consecutive sound of several channels mono.

    The mix is the mean of the channels, exactly, as long as none is inverted. A channel that is (its correlation with the
    loudest one is under -0.6) enters the mean with the other sign, so that the two do not cancel; signs change gradually,
    over a window of at most 2,048 samples.
    """

    def __init__(self, channel: Channel, name: str):
        """
        Args:
            channel: 'mix'; or the one to take, 'left' is 0 and 'right' is 1.
            name: of the source, for messages.
        """
        check_channel(channel, name)
        self._channel, self._name = channel, name
        self._channels = 0  # of the sound so far
        self._reference = 0
        self._signs = np.ones(0)
        self._products = np.zeros((0, 0))  # (channels, channels)

    def __call__(self, planes: Planes, rate: int) -> NDArray[np.float32]:
        """(channels, n) floats at `rate` Hz, which follow those before -> (n,)."""
        with np.errstate(over="ignore", invalid="ignore"):  # NaN and infinity are looked for later
            return self._mono(planes, rate).astype(np.float32)

    def _mono(self, planes: Planes, rate: int) -> NDArray[np.float64]:
        if self._channel != "mix":
            return self._one(planes)
        if len(planes) == 1:
            return planes[0]
        first = self._channels != len(planes)
        if first:
            self._channels, self._reference = len(planes), 0
            self._signs, self._products = np.ones(len(planes)), np.zeros((len(planes), len(planes)))
        parts = []
        for at in range(0, planes.shape[1], WINDOW):
            window = planes[:, at : at + WINDOW]
            before = self._signs
            self._look(window, rate)
            if first:  # nothing to go over from
                before, first = self._signs, False
            parts.append(_mean(window, before, self._signs))
        return np.concatenate(parts) if parts else np.zeros(0)

    def _one(self, planes: Planes) -> NDArray[np.float64]:
        """The channel asked for; where a file has fewer channels from some place on, the last of those."""
        number = NUMBERS[self._channel] if isinstance(self._channel, str) else self._channel
        if not self._channels:
            if number >= len(planes):
                has = f"{len(planes)} channels, 0 to {len(planes) - 1}" if len(planes) > 1 else "1 channel (mono)"
                raise AudioError(f"{self._name}: has {has}; there is no channel {self._channel}")
            self._channels = len(planes)
        return planes[min(number, len(planes) - 1)]

    def _look(self, window: Planes, rate: int) -> None:
        """Finds the sign of every channel."""
        around_zero = window - window.mean(axis=1, keepdims=True)
        products = around_zero @ around_zero.T
        if not np.isfinite(products).all():
            return
        self._products = self._products * np.exp(-window.shape[1] / (MEMORY_S * rate)) + products
        power = np.diag(self._products)
        loudest = int(np.argmax(power))
        if power[loudest] > LOUDER * power[self._reference]:
            self._reference = loudest
        size = np.sqrt(power * power[self._reference])
        correlation = np.divide(self._products[self._reference], size, out=np.zeros_like(size), where=size > 0)
        relative = self._signs * self._signs[self._reference]
        turns = np.where(relative > 0, correlation < INVERTED, correlation > UPRIGHT) & (size > 0)
        self._signs = np.where(turns, -self._signs, self._signs)


class Apart:
    """Keeps the channels of consecutive sound apart: as many as it has at its beginning."""

    def __init__(self, name: str, most: int | None = None):
        """
        Args:
            name: of the source, for messages.
            most: sound that begins with more channels is mixed to one; None: whatever their number, they stay apart.
        """
        self._mixer, self._most = Mixer("mix", name), most
        self._count = 0

    def __call__(self, planes: Planes, rate: int) -> NDArray[np.float32]:
        """(channels, n) floats at `rate` Hz, which follow those before -> (as many as at first, n)."""
        self._count = self._count or (len(planes) if self._most is None or len(planes) <= self._most else 1)
        if self._count == 1 or (len(planes) > self._count and self._most is not None):
            mono = self._mixer(planes, rate)
            return np.broadcast_to(mono, (self._count, len(mono)))
        rows = np.minimum(np.arange(self._count), len(planes) - 1)  # where there are fewer now, the last of those
        with np.errstate(over="ignore", invalid="ignore"):
            return planes[rows].astype(np.float32)


def _mean(window: Planes, before: NDArray[np.float64], after: NDArray[np.float64]) -> NDArray[np.float64]:
    """(channels, n) -> (n,), with signs that go from those before to those after."""
    if (before == after).all():
        mean: NDArray[np.float64] = (window if (after == 1).all() else window * after[:, None]).mean(axis=0)
        return mean
    way = np.linspace(0.0, 1.0, window.shape[1])
    return (window * (before[:, None] + (after - before)[:, None] * way)).mean(axis=0)
