"""Recordings on their way through the scheduler, and the threads that read them ahead of what is decoded."""

from __future__ import annotations

import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import Tensor

from ..audio.vad import Chunk, Turn
from ..denoise.clip import ClipDecoding
from ..denoise.decode import OnStep
from ..errors import AsrError, AudioError, first_line
from ..transcribe.recordings import ChunkText, End, TranscribeOptions, recording_events
from ..transcribe.results import Segment
from .turns import Turns

FEW = 2  # chunks of a request that wait at least, as long as there are more
MAX_BEGUN = 64  # recordings that are read at once: each has a detector of speech of 10 MB
DRAFT = -1  # the step under which `on_step` is shown a chunk's draft

Event: TypeAlias = "Segment | End | AsrError"
Reads: TypeAlias = "Generator[tuple[Chunk | End | AudioError, float]]"
TokenLogprobs: TypeAlias = "list[tuple[str, float]]"
"""What each token adds to a text, and its log-probability in nats."""

logger = logging.getLogger(__name__)


class Busy(AsrError):
    """So many requests are waiting that another one would wait for too long."""


class Closed(AsrError):
    """The scheduler takes no more requests."""


class Failed(AsrError):
    """The model or the server failed, whatever the sound."""


@dataclass(eq=False)
class Request:
    """A recording on its way, as `Scheduler.submit` gives it. What is not named here is the scheduler's.

    Attributes:
        options: how it is transcribed.
        on_event: called, from another thread, with each segment in order, then with the end or the error that cut it short.
        on_step: called with the number of a chunk, its step, and what is on its canvas: the draft as step DRAFT, what the
            canvas starts with as 0, and what it holds after each step; None: nobody watches.
        logprobs: by a segment's number, those of its tokens; filled before the segment is handed on. None: nobody asked.
    """

    options: TranscribeOptions
    on_event: Callable[[Event], None]
    on_step: OnStep | None
    logprobs: dict[int, TokenLogprobs] | None
    reads: Reads
    waiting: deque[Task] = field(default_factory=deque)  # chunks that were read, not yet encoded
    results: dict[int, tuple[Chunk, ChunkText] | End | AsrError] = field(default_factory=dict)  # by place, until its turn
    read: int = 0  # places that were read
    read_at: int = 0  # when it was read last, counted in reads
    reading: bool = False
    read_all: bool = False  # its reads are closed, or whoever said so is about to close them
    taken_at: int = 0  # when a chunk of it was taken last, counted in chunks
    open: int = 0  # chunks under way
    told: int = 0  # places that `on_event` knows of
    segments: int = 0
    over: bool = False  # nothing more is called
    calls: threading.RLock = field(default_factory=threading.RLock)  # held during calls

    def end(self) -> None:
        """From now on nothing is called any more."""
        with self.calls:
            self.over = True

    def tell(self, event: Event) -> None:
        """Hands on what comes next, unless nobody waits any more."""
        with self.calls:
            if self.over:
                return
            self.over = not isinstance(event, Segment)
            self._call(self.on_event, event)

    def show(self, place: int, step: int, decoding: ClipDecoding, canvas: tuple[Tensor, Tensor] | None = None) -> None:
        """Shows a canvas with its entropies, or the draft, to whoever watches."""
        with self.calls:
            if not self.over and self.on_step is not None:
                shown = decoding.shown_draft() if canvas is None else decoding.shown(*canvas)
                self._call(self.on_step, place, step, shown)

    def _call(self, function: Callable[..., None], *values: object) -> None:
        try:
            function(*values)
        except Exception:  # a fault of this caller's must not stop the others
            logger.exception("a request was dropped, since whoever waits for it failed")
            self.over = True


@dataclass(eq=False)
class Task:
    """A chunk of a request: its place among what was read; its decoding, once it is drafted."""

    request: Request
    place: int
    chunk: Chunk
    decoding: ClipDecoding | None = None
    again: bool = False  # for the second time, with another seed


def chunk_request(chunk: Chunk, options: TranscribeOptions, on_event: Callable[[Event], None]) -> Request:
    """A request for one chunk, which needs no reading."""
    request = Request(options, on_event, None, None, _nothing())
    request.waiting.append(Task(request, 0, chunk))
    request.results[1], request.read_all = End(chunk.end), True
    return request


def recording_reads(audio: object, options: TranscribeOptions, turn: Turn) -> Reads:
    """As `recordings.recording_events`, a generator that can be closed."""
    yield from recording_events(audio, options, turn)  # type: ignore[arg-type]


def _nothing() -> Reads:
    yield from ()


class Readers:
    """Threads that read requests ahead of what is decoded, in turn.

    Args:
        changed: the lock of everything; they notify whoever waits when something was read.
        requests: gives the requests there are.
        ahead: chunks that may wait, of all requests together.
        count: of threads.
        turns: with the engine.
    """

    def __init__(
        self, changed: threading.Condition, requests: Callable[[], Sequence[Request]], ahead: int, count: int, turns: Turns
    ):
        self._changed, self._requests, self._ahead, self._turns = changed, requests, ahead, turns
        self._reads = itertools.count(1)
        self._ended = False
        self._threads = [threading.Thread(target=self._run, name="reader", daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        """Lets the threads end behind what they are reading; does not wait for it."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def join(self, timeout: float) -> None:
        """Waits until they have ended, for so many seconds each at most."""
        for thread in self._threads:
            thread.join(timeout)

    def _run(self) -> None:
        while (request := self._next()) is not None:
            event: Chunk | End | AsrError
            try:
                event, _ = next(request.reads)
            except AsrError as error:
                event = error
            except Exception as error:  # of a library: the request must not wait for ever
                event = AudioError(f"cannot be read as sound ({first_line(error)})")
            with self._changed:
                request.reading = False
                place, request.read = request.read, request.read + 1
                if isinstance(event, Chunk):
                    request.waiting.append(Task(request, place, event))
                else:
                    request.results[place] = event
                last = request.over or not isinstance(event, Chunk)
                request.read_all |= last
                self._changed.notify_all()
            self._turns.read()
            if last:
                request.reads.close()
            del request, event  # they hold sound, and may have to wait long for the next

    def _next(self) -> Request | None:
        """Waits for a request that wants to be read; None once all is over."""
        with self._changed:
            while not self._ended:
                if (request := self._wanting()) is not None:
                    request.reading, request.read_at = True, next(self._reads)
                    return request
                self._changed.wait()
            return None

    def _wanting(self) -> Request | None:
        """The request to read next, if there is one.

        What was begun goes on to its second chunk before another one begins, so that short recordings are closed soon.
        """
        requests = self._requests()
        ahead = sum(len(request.waiting) + request.reading for request in requests)
        begun = sum(request.read_at > 0 and not request.read_all for request in requests)

        def wants(request: Request) -> bool:
            if request.reading or request.read_all or request.over:
                return False
            if request.read_at and len(request.waiting) < FEW:
                return True
            return ahead < self._ahead and (request.read_at > 0 or begun < MAX_BEGUN)

        wanting = [request for request in requests if wants(request)]
        return min(wanting, key=_turn) if wanting else None


def _turn(request: Request) -> tuple[bool, bool, int]:
    """By which requests are read: such as have few chunks waiting come first, of these the ones that were begun."""
    return len(request.waiting) >= FEW, request.read_at == 0, request.read_at
