"""Sound put where its timestamps say: holes become silence, so that times count from the container's start."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

JITTER_S = 0.1  # containers round timestamps, encoders pad, and capture clocks waver: less than this is no hole
LOST_S = 0.002  # behind a packet that was left out, a hole is expected and filled exactly
BACKWARDS_S = 1.0  # timestamps that jump back so far have begun anew; a smaller overlap is made up for in the next hole
LONGEST_HOLE_S = 3_600.0  # a timestamp further ahead is wrong, unless the container says that it lasts so long
LONGEST_SILENCE_S = 12 * 3_600.0  # of all holes of a file together, and of one whatever the container says

logger = logging.getLogger(__name__)


class Timed(NamedTuple):
    """A piece of decoded sound.

    Attributes:
        time: where it belongs, in seconds from the container's start; None where nobody knows.
        rate: in Hz.
        samples: (n,) float32, or (channels, n) where they are kept apart.
        lost: something before it could not be decoded.
    """

    time: float | None
    rate: int
    samples: NDArray[np.float32]
    lost: bool = False

    @property
    def duration(self) -> float:
        """In seconds."""
        return self.samples.shape[-1] / self.rate


def on_time(
    pieces: Iterable[Timed], name: str, longest_hole_s: float = LONGEST_HOLE_S, reach_s: float = 0.0
) -> Iterator[Timed]:
    """Consecutive sound, with silence where the pieces leave holes. No sample of a piece is ever left out or changed.

    A single timestamp that contradicts the ones around it is ignored. Where time jumps back by more than a second (a
    recording behind a recording) or ahead by more than `longest_hole_s`, the sound follows without a hole, and time goes on
    from there.

    Args:
        pieces: in the order in which they were decoded.
        name: of the source, for messages.
        longest_hole_s: the longest hole to believe in, in seconds.
        reach_s: a hole may in truth come up to so many seconds of sound later than the timestamps say. It goes where the
            sound is quietest.

    Yields:
        the pieces, and pieces of silence of a second at most.
    """
    end = 0.0  # of the sound so far, in seconds
    shift = 0.0  # from timestamps to seconds of sound, since time jumped
    silence, jumps = 0.0, 0
    until_hole: int | None = None  # pieces before a hole that was found
    ahead = _Ahead(pieces)
    for piece in ahead:
        gap = piece.time + shift - end if piece.time is not None else 0.0
        if until_hole:
            until_hole -= 1
        elif piece.lost or abs(gap) <= JITTER_S or not _agree(end - shift + piece.duration, ahead.next()):
            if gap < -BACKWARDS_S or gap > longest_hole_s or silence + max(gap, 0.0) > LONGEST_SILENCE_S:
                shift -= gap
                jumps += 1
            elif gap > (LOST_S if piece.lost else JITTER_S):
                if until_hole is None and reach_s and end:
                    until_hole = _quietest([piece, *ahead.next_ones(reach_s)])
                if not until_hole:
                    yield from _silence(round(gap * piece.rate), piece)
                    silence += gap
                    end += gap
                until_hole = until_hole - 1 if until_hole else None
        yield piece
        end += piece.duration
    if jumps:
        logger.warning("%s: timestamps jump %d times; what follows may have other times than in a player", name, jumps)


def _agree(time_s: float, following: Timed | None) -> bool:
    """Whether the following piece says that it begins at a time."""
    return following is not None and following.time is not None and abs(following.time - time_s) <= JITTER_S


class _Ahead:
    """The pieces one by one, with a look at those that come next."""

    def __init__(self, pieces: Iterable[Timed]):
        self._pieces = iter(pieces)
        self._held: deque[Timed] = deque()

    def __iter__(self) -> Iterator[Timed]:
        while self.next() is not None:
            yield self._held.popleft()

    def next(self) -> Timed | None:
        return next(iter(self.next_ones(0.0)), None)

    def next_ones(self, reach_s: float) -> list[Timed]:
        """At least one, if there is one, and as many as last so long together."""
        while not self._held or sum(piece.duration for piece in self._held) < reach_s:
            piece = next(self._pieces, None)
            if piece is None:
                break
            self._held.append(piece)
        return list(self._held)


def _quietest(pieces: list[Timed]) -> int:
    """Number of the piece before which a hole is heard least: 0 unless another place is far quieter."""
    power = np.array(
        [np.mean(np.square(piece.samples, dtype=np.float64)) if piece.samples.size else 0.0 for piece in pieces]
    )
    around = power + np.r_[power[0], power[:-1]]  # of each piece and the one before it
    best = int(np.argmin(around))
    return best if around[best] < 0.01 * around.max() and around[best] < 0.1 * around[0] else 0


def _silence(count: int, like: Timed) -> Iterator[Timed]:
    while count > 0:
        n = min(count, like.rate)
        yield Timed(None, like.rate, np.zeros((*like.samples.shape[:-1], n), np.float32))
        count -= n
