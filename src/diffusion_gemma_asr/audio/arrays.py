"""Arrays of samples, whatever their shape and number type, to floats with full scale 1."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ..errors import AudioError

BLOCK = 1 << 20  # samples that are looked at together
WIDTHS = (16, 24, 32, 64)  # bits that samples in wide integers may have
SURELY_LOUD = 1_024  # steps: 16-bit sound reaches them, the noise of a 32-bit converter stays a little above them


def channels_first(array: NDArray[np.generic], name: str) -> NDArray[np.generic]:
    """(n,), (channels, n) or (n, channels) -> (channels, n); of two axes the shorter one is the channels."""
    if array.ndim not in (1, 2):
        raise AudioError(f"{name}: shape {array.shape}; give (n,), (channels, n) or (n, channels)")
    if array.dtype.kind not in "iuf":
        raise AudioError(f"{name}: samples of type {array.dtype}; give floats or integers")
    if not array.size:
        return array.reshape(1, 0)
    planes = np.atleast_2d(array)
    return planes.T if planes.shape[0] > planes.shape[1] else planes


def slices(planes: NDArray[np.generic]) -> Iterator[NDArray[np.generic]]:
    """(channels, n) in pieces, so that what is computed from them stays small."""
    for first in range(0, max(planes.shape[-1], 1), BLOCK):
        yield planes[:, first : first + BLOCK]


def scaled(planes: NDArray[np.generic], bits: int | None = None) -> NDArray[np.float64]:
    """(channels, n) of any number type -> the same with full scale 1.

    Args:
        bits: that integers have, None: as many as their type; unsigned ones are silent in the middle of its range.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # NaN and infinity are looked for later
        values = planes.astype(np.float64)
    if planes.dtype.kind == "f":
        return values
    half_range = 2.0 ** ((bits or 8 * planes.dtype.itemsize) - 1)
    return (values - half_range if planes.dtype.kind == "u" else values) / half_range


def bits_of(planes: NDArray[np.generic], name: str) -> int | None:
    """How many bits the samples of a whole recording have.

    Integers often come in a wider type than they were recorded in: `numpy.array` of a list makes 64 bits of them. So signed
    ones of 32 or 64 bits are taken for the narrowest of 16, 24, 32 and 64 bits that holds them all.

    Args:
        planes: (channels, n).

    Raises:
        AudioError: they can only be silence, or are floats that hold unscaled integers.
    """
    kind, size = planes.dtype.kind, planes.dtype.itemsize
    if kind == "f":
        _refuse_unscaled(planes, name)
        return None
    if size <= 2 or not planes.size:
        return None
    low, high = int(planes.min()), int(planes.max())
    if kind == "u":
        if high < 1 << 16:
            raise AudioError(f"{name}: {planes.dtype} samples that reach only {high}; give int16, or floats")
        return None
    return next(bits for bits in WIDTHS if -(1 << bits - 1) <= low and high < 1 << bits - 1)


def _refuse_unscaled(planes: NDArray[np.generic], name: str) -> None:
    """Raises AudioError where all floats are whole numbers beyond full scale."""
    peak = 0.0
    for part in slices(planes):
        if not np.isfinite(part).all() or (part != np.rint(part)).any():
            return
        peak = max(peak, float(np.abs(part).max(initial=0.0)))
    if 1.0 < peak <= 1 << 31:
        raise AudioError(f"{name}: whole numbers that reach {peak:.0f}, full scale is 1; divide 16-bit samples by 32768")


class BlockScale:
    """Scales sound that comes block by block, of which the loudest sample is not known before its end."""

    def __init__(self, name: str):
        self._name = name
        self._peak = 0  # of 32-bit integers

    def __call__(self, planes: NDArray[np.generic]) -> NDArray[np.float64]:
        """(channels, n) -> the same with full scale 1, integers by the range of their type."""
        kind, size = planes.dtype.kind, planes.dtype.itemsize
        if kind != "f" and (size > 4 or (kind == "u" and size > 2)):
            raise AudioError(
                f"{self._name}: samples of type {planes.dtype}, whose full scale is not known; give int16, int32 or floats"
            )
        if kind == "i" and size == 4 and planes.size:
            self._peak = max(self._peak, int(planes.max()), -int(planes.min()))
        return scaled(planes)

    def check(self) -> None:
        """To be called at the end: raises AudioError where 32-bit integers held 16-bit samples."""
        if SURELY_LOUD <= self._peak <= 1 << 15:
            raise AudioError(
                f"{self._name}: int32 samples that reach only {self._peak} of {1 << 31}; give 16-bit samples as int16"
            )
