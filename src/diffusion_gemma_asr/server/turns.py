"""Who computes: the engine's thread, or those that look for speech in what was uploaded.

On a processor, torch's products wait for the slowest of their threads, so that all of them wait for a core that looks for
speech meanwhile. Taking turns is faster for both.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Turns:
    """Lets the engine compute alone, and some readers together before each of its turns.

    Args:
        together: readers that compute at once; None: nobody waits for anybody, since the engine computes elsewhere.
        reading_s: seconds that the engine leaves them before its turn, as long as one of them has something to do.
    """

    def __init__(self, together: int | None, reading_s: Callable[[], float]):
        self._together, self._reading_s = together, reading_s
        self._changed = threading.Condition()
        self._computing = self._waiting = 0  # readers
        self._owed = 0  # readers that begin before the engine does, since they waited when its last turn ended
        self._engine = False
        self._slice_ends = math.inf  # from then on the engine, which waits, lets no more of them begin

    @contextmanager
    def engine(self) -> Iterator[None]:
        """A turn of the engine."""
        if self._together is None:
            yield
            return
        with self._changed:
            began = time.monotonic()
            self._slice_ends = began + self._reading_s()
            while self._computing or self._owed or time.monotonic() < self._slice_ends:
                left = self._slice_ends - time.monotonic()
                self._changed.wait(left if left > 0 else None)  # who computes tells when that ends
                self._slice_ends = began + self._reading_s()
            self._engine = True
        try:
            yield
        finally:
            with self._changed:
                self._engine, self._slice_ends = False, math.inf
                self._owed = min(self._waiting, self._together)
                self._changed.notify_all()

    @contextmanager
    def computing(self) -> Iterator[None]:
        """A reader that looks for speech in a piece of sound."""
        if self._together is None:
            yield
            return
        with self._changed:
            self._waiting += 1
            while self._engine or self._computing >= self._together or self._over():
                self._changed.wait()
            self._waiting -= 1
            self._computing += 1
            self._owed = max(0, self._owed - 1)
        try:
            yield
        finally:
            with self._changed:
                self._computing -= 1
                self._changed.notify_all()

    def read(self) -> None:
        """A reader has read something, which may be what the engine waits for."""
        with self._changed:
            self._changed.notify_all()

    def _over(self) -> bool:
        return not self._owed and time.monotonic() >= self._slice_ends
