"""What goes to a live transcription's thread: sound, orders, settings, and what is waited for there."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..audio.vad import Chunk
from ..transcribe.recordings import TranscribeOptions
from ..transcribe.results import Segment

Decoding: TypeAlias = "Future[Segment | None]"
Block: TypeAlias = NDArray[np.int16]


@dataclass(frozen=True)
class LiveSettings:
    """How sound is transcribed from some moment on.

    Attributes:
        decode: begins to decode a chunk; what it gives can be cancelled.
        options: of the transcription; `sampling_rate` is that of the sound.
        turns: whether pauses end items; else commits alone do.
        partial, lag, logprobs: which of the optional events and fields are wanted.
    """

    decode: Callable[[Chunk, TranscribeOptions], Decoding]
    options: TranscribeOptions
    turns: bool = True
    partial: bool = False
    lag: bool = False
    logprobs: bool = False

    @property
    def rate(self) -> int:
        """Samples per second."""
        assert self.options.sampling_rate is not None
        return self.options.sampling_rate


class Sound(NamedTuple):
    """Samples and how long they last."""

    block: Block
    seconds: float


Order: TypeAlias = "Literal['commit', 'clear'] | LiveSettings"


class Gone(Exception):
    """Nobody waits for results any more."""


class Inbox:
    """Sound and orders on their way to a session's thread, in the order in which they came; safe between threads."""

    def __init__(self) -> None:
        self._waiting: deque[Sound | Order] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._waiting_s = self._under_way_s = 0.0
        self._decoding: Decoding | None = None  # that the thread waits for
        self.taken_s = 0.0  # seconds of sound that the thread has taken or that were cleared

    def __len__(self) -> int:
        """Blocks of sound and orders that nobody has taken yet."""
        return len(self._waiting)

    @property
    def waiting_s(self) -> float:
        """Seconds of sound that nobody has taken yet."""
        return self._waiting_s

    @property
    def lag_s(self) -> float:
        """As `waiting_s`, and those of the block that was taken last, until the next one is asked for."""
        return self._waiting_s + self._under_way_s

    def put(self, block: Block, seconds: float) -> None:
        """Adds sound."""
        with self._changed:
            self._waiting.append(Sound(block, seconds))
            self._waiting_s += seconds
            self._changed.notify()

    def order(self, order: Order) -> None:
        """Adds an order; "clear" takes back what waits behind the last commit."""
        with self._changed:
            while order == "clear" and self._waiting and isinstance(last := self._waiting[-1], Sound):
                self._waiting.pop()
                self._waiting_s -= last.seconds
                self.taken_s += last.seconds
            self._waiting.append(order)
            self._changed.notify()

    def close(self) -> None:
        """Nobody waits for results any more: a decoding under way is given up."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._changed.notify()
            decoding = self._decoding
        if decoding is not None:
            decoding.cancel()

    def check(self) -> None:
        """Raises Gone if it is."""
        if self._closed:
            raise Gone

    def wait_for(self, decoding: Decoding) -> Segment | None:
        """What a decoding gives.

        Raises:
            Gone: see there.
        """
        with self._changed:
            self._decoding = decoding
            if self._closed:
                decoding.cancel()
        try:
            segment = decoding.result()
        except CancelledError:
            raise Gone from None
        finally:
            self._decoding = None
        self.check()
        return segment

    def take(self) -> Block | Order:
        """Waits for the next order, or for sound: all that has gathered before the next order, as one block.

        Raises:
            Gone: see there.
        """
        with self._changed:
            self._under_way_s = 0.0
            while not self._waiting and not self._closed:
                self._changed.wait()
            self.check()
            sounds: list[Sound] = []
            while self._waiting:
                first = self._waiting[0]
                if not isinstance(first, Sound):
                    if not sounds:
                        self._waiting.popleft()
                        return first
                    break
                sounds.append(first)
                self._waiting.popleft()
            seconds = sum(sound.seconds for sound in sounds)
            self._waiting_s -= seconds
            self._under_way_s = seconds
            self.taken_s += seconds
            return np.concatenate([sound.block for sound in sounds])
