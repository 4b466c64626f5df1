"""Continuous batching across requests: the speech of all of them shares the rows of one engine.

Recordings are cut into chunks of at most 30 s as they are read, some chunks ahead of what is decoded. One thread takes
chunks round-robin over requests, so that a short file never waits behind an hour, encodes them, adds their canvases to an
engine, and makes a step of all canvases under way. A request that nobody waits for any more leaves its rows at once. On a
processor, short recordings go first (rows.py).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import NamedTuple

import torch

from ..audio.read import AudioSource
from ..audio.vad import Chunk
from ..denoise.decode import OnStep
from ..denoise.options import MAX_SEED
from ..errors import AsrError, first_line
from ..memory import give_back_memory, of_device
from ..model.model import DiffusionGemmaASR
from ..transcribe.recordings import ChunkText, TranscribeOptions, chunk_segment
from ..transcribe.results import Segment
from .chunks import Batch, draft_chunks, encode_chunks, text_of, token_logprobs
from .requests import DRAFT, Busy, Closed, Event, Failed, Readers, Request, Task, chunk_request, recording_reads
from .rows import QUICK_S, Rows, is_newcomer
from .turns import Turns

__all__ = ["DRAFT", "Busy", "Closed", "Event", "Failed", "Pace", "Request", "Scheduler"]

PATIENCE = 16  # chunks of others that came after it may be taken before one of a request that was served before
READING_S = 0.1  # that readers get between two turns of the engine while rows are empty for want of what they read
TRIM_S = 5.0  # free memory goes back to the system so often at most
LAST_S = 30.0  # for the step under way to end when the scheduler is closed

logger = logging.getLogger(__name__)


class Pace(NamedTuple):
    """How much is taken at once.

    Attributes:
        entering_s: seconds of sound that are encoded between two steps, or one chunk: other requests wait meanwhile.
        open_s: seconds of sound under way at once; a request that has nothing under way comes in all the same.
    """

    entering_s: float
    open_s: float


PACES = {"cpu": Pace(20.0, 240.0), "cuda": Pace(240.0, 960.0)}  # a CPU gains nothing from larger batches


class Scheduler:
    """Transcribes many recordings at once with one model; all of its methods may be called from any thread.

    Args:
        model: that decodes; nobody else may use it meanwhile.
        rows: canvases under way at once.
        max_queue: requests that may wait or run at once.
        readers: threads that decode and cut sound. Sound that is slow to come, or an hour without speech, keeps one of them.
        pace: how much is taken at once; None: as suits the model's device.
    """

    def __init__(
        self,
        model: DiffusionGemmaASR,
        *,
        rows: int = 16,
        max_queue: int = 256,
        readers: int = 8,
        pace: Pace | None = None,
    ):
        self.model, self.rows, self.max_queue = model, rows, max_queue
        self.pace = pace or of_device(PACES, model.device)
        self._requests: list[Request] = []  # in the order in which they came
        self._open: set[Task] = set()  # taken from their requests, not yet done
        self._batch: Batch | None = None  # a long one, encoded in the last turn
        self._follow: deque[Task] = deque()  # drafted, for another canvas
        self._taken = 0
        self._rows = Rows(model)
        self._changed = threading.Condition()
        self._closing = self._dropping = False
        self._trimmed = time.monotonic()
        self._turns = Turns(torch.get_num_threads() if model.device.type == "cpu" else None, self._reading_s)
        self._readers = Readers(self._changed, lambda: self._requests, 2 * rows, readers, self._turns)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # -- from other threads -----------------------------------------------------------------------------------------

    def submit(
        self,
        audio: AudioSource,
        options: TranscribeOptions,
        on_event: Callable[[Event], None],
        on_step: OnStep | None = None,
        logprobs: bool = False,
    ) -> Request:
        """Begins to transcribe a recording.

        Args:
            audio: path, bytes, binary file object or array; read as it is needed, and when the request was cancelled perhaps
                for a moment longer.
            options: `batch_size` does not matter.
            on_event, on_step: see `Request`; they must not wait for anything.
            logprobs: whether those of the tokens are wanted.

        Raises:
            AsrError: the model was not trained for what is asked.
            Busy: `max_queue` requests are waiting or running.
            Closed: it is closing.
        """
        self._check(options)
        request = Request(
            options, on_event, on_step, {} if logprobs else None, recording_reads(audio, options, self._turns.computing)
        )
        self._add(request, self.max_queue)
        return request

    def cancel(self, request: Request) -> None:
        """Forgets a request: its rows are free before the next step, and from now on nothing is called any more."""
        request.end()
        with self._changed:
            self._changed.notify_all()

    def decode_chunk(self, chunk: Chunk, options: TranscribeOptions) -> Future[Segment | None]:
        """Begins to decode one chunk, as `recordings.transcribe_chunk`.

        Returns:
            what becomes its segment, or AsrError where it cannot be decoded. Cancelled, it frees its rows before the next
                step.

        Raises:
            AsrError: as `submit`, but never Busy.
        """
        result: Future[Segment | None] = Future()

        def on_event(event: Event) -> None:
            if result.done() or not result.set_running_or_notify_cancel():  # it is there already, or nobody waits for it
                return
            if isinstance(event, AsrError):
                result.set_exception(event)
            else:
                result.set_result(event if isinstance(event, Segment) else None)

        self._check(options)
        request = chunk_request(chunk, options, on_event)
        self._add(request, None)
        result.add_done_callback(lambda done: self.cancel(request) if done.cancelled() else None)
        return result

    def close(self, drain: bool = True, timeout: float | None = None) -> None:
        """Takes no more requests, and returns when those there are have ended.

        Args:
            drain: False ends them at once; they are told `Closed`.
            timeout: seconds to wait at most; then the rest is ended so.
        """
        with self._changed:
            self._closing = True
            self._dropping |= not drain
            self._changed.notify_all()
        self._thread.join(timeout if drain else LAST_S)
        if drain and self._thread.is_alive():
            self.close(drain=False)
        self._readers.end()
        self._readers.join(1.0)

    @property
    def depth(self) -> int:
        """Requests that wait or run."""
        return len(self._requests)

    @property
    def busy_rows(self) -> int:
        """Canvases under way."""
        return len(self._rows)

    def _check(self, options: TranscribeOptions) -> None:
        """Raises AsrError on what would fail in the engine's thread, and with it what others wait for."""
        options.decode.check(self.model)
        if not 0 <= options.decode.seed < MAX_SEED:
            raise AsrError(f"seed is {options.decode.seed}; choose a number from 0 to 2^53")

    def _add(self, request: Request, most: int | None) -> None:
        with self._changed:
            if self._closing or not self._thread.is_alive():
                raise Closed("the server is shutting down; try again later")
            if most is not None and len(self._requests) >= most:
                raise Busy(f"{len(self._requests)} requests are waiting; try again later")
            request.taken_at = self._taken - PATIENCE
            self._requests.append(request)
            self._changed.notify_all()

    # -- the engine's thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        with torch.inference_mode():
            while self._wait():
                try:
                    with self._turns.engine():
                        self._turn()
                except Exception as error:  # one bad batch must not stop the server
                    self._fail(error)
        self._readers.end()

    def _wait(self) -> bool:
        """Waits until there is something to do; False once all is done and nothing more will come."""
        with self._changed:
            while not self._work():
                if self._closing and not self._requests:
                    return False
                self._changed.wait()
            return True

    def _work(self) -> bool:
        if self._open or (self._dropping and self._requests):
            return True
        return any(r.over or r.waiting or r.told in r.results for r in self._requests)

    def _reading_s(self) -> float:
        """Seconds that the engine leaves to the readers before its next turn, if they have so much to do."""
        reading = [request for request in self._requests if request.reading]
        if any(not request.read for request in reading):  # nothing of it is there yet
            return READING_S
        if not reading:
            return 0.0
        waiting = sum(len(request.waiting) for request in self._requests)
        if waiting >= self.rows - len(self._rows):
            return READING_S / 10
        return READING_S / 3 if self._rows.quick or self._newcomers() else READING_S

    def _newcomers(self) -> bool:
        """Whether a request waits to begin, with something short."""
        return any(is_newcomer(request) for request in self._requests)

    def _turn(self) -> None:
        """Requests that are over leave, others come in, all canvases make a step."""
        if self._dropping:
            for request in list(self._requests):
                request.tell(Closed("the server is shutting down; try again later"))
        self._leave()
        quick = self._rows.quick_turn(self._newcomers())
        self._enter(quick)
        for task, finished in self._rows.step(quick):
            assert task.decoding is not None
            task.decoding.take(finished)
            self._go_on(task)
        self._hand_on()
        self._leave()
        self._trim()

    def _leave(self) -> None:
        """Requests that are over give back all that they have."""
        with self._changed:
            gone = [request for request in self._requests if request.over]
            if not gone:
                return
            self._requests = [request for request in self._requests if request not in gone]
            unread = [request for request in gone if not (request.reading or request.read_all)]
            for request in gone:
                request.read_all |= not request.reading
                request.waiting.clear()
                request.results.clear()
            self._changed.notify_all()
        for request in unread:
            request.reads.close()
        self._open = {task for task in self._open if task.request not in gone}
        self._follow = deque(task for task in self._follow if task in self._open)
        self._rows.keep(self._open)

    def _enter(self, quick: bool) -> None:
        """Fills free rows: first with further canvases of what was begun, then with chunks of all requests in turn.

        A long batch is drafted in the turn behind the one in which it was encoded, so that a quick turn may come between.

        Args:
            quick: only what is short, of requests that begin.
        """
        batch, free = self._batch, self.rows - len(self._rows)
        ready = [self._follow.popleft() for _ in range(min(free, len(self._follow)))]
        free -= len(ready) + (0 if batch is None else len(batch.tasks))
        drafted: list[Task] = []
        if quick:
            for encoded in self._encode(self._next_chunks(free, QUICK_S, newcomers=True)):
                drafted += self._draft(encoded)
        elif batch is None:
            for encoded in self._encode(self._next_chunks(free, self.pace.entering_s)):
                if encoded.seconds > QUICK_S:
                    self._batch = encoded
                else:
                    drafted += self._draft(encoded)
        else:
            self._batch = None
            drafted = self._draft(batch)
        for task in drafted:
            if task.decoding is not None and task.decoding.done:
                self._go_on(task)
            else:
                ready.append(task)
        self._rows.add(ready)

    def _next_chunks(self, free: int, most_s: float, newcomers: bool = False) -> list[Task]:
        """At most so many chunks and seconds of sound, from the requests that have waited longest.

        Args:
            newcomers: only what is short, of requests that begin; else the first chunk is taken however long it is.
        """
        tasks: list[Task] = []
        seconds, open_s = 0.0, sum(task.chunk.duration for task in self._open)

        def fits(request: Request) -> bool:
            if not request.waiting or request.over or (newcomers and not is_newcomer(request)):
                return False
            duration = request.waiting[0].chunk.duration
            if request.open and open_s + seconds + duration > self.pace.open_s:
                return False
            return seconds + duration <= most_s or not tasks

        with self._changed:
            while len(tasks) < free and (fitting := [request for request in self._requests if fits(request)]):
                request = min(fitting, key=lambda r: r.taken_at)
                tasks.append(request.waiting.popleft())
                seconds += tasks[-1].chunk.duration
                self._taken += 1
                request.taken_at, request.open = self._taken, request.open + 1
            self._open.update(tasks)
            self._changed.notify_all()
        return tasks

    def _encode(self, tasks: list[Task]) -> list[Batch]:
        batches, failed = encode_chunks(self.model, tasks)
        for task, error in failed:
            self._done(task, error)
        return batches

    def _draft(self, batch: Batch) -> list[Task]:
        return draft_chunks(self.model, batch, [task for task in batch.tasks if task in self._open])

    def _go_on(self, task: Task) -> None:
        result = text_of(self.model, task)
        if result is None:
            self._follow.append(task)
        else:
            self._done(task, result)

    def _done(self, task: Task, result: ChunkText | AsrError) -> None:
        self._open.discard(task)
        task.request.open -= 1
        task.request.results[task.place] = result if isinstance(result, AsrError) else (task.chunk, result)

    def _hand_on(self) -> None:
        """Hands on what is ready, each request's in order."""
        with self._changed:
            requests = [request for request in self._requests if request.told in request.results]
        for request in requests:
            while request.told in request.results and not request.over:
                result = request.results.pop(request.told)
                request.told += 1
                if not isinstance(result, tuple):
                    request.tell(result)
                    continue
                try:
                    self._hand_on_text(request, *result)
                except Exception as error:
                    logger.error("a text cannot be handed on", exc_info=error)
                    request.tell(Failed(f"the model failed: {first_line(error)}"))

    def _hand_on_text(self, request: Request, chunk: Chunk, result: ChunkText) -> None:
        segment = chunk_segment(request.segments, chunk, result, self.model, request.options)
        if segment is None:
            return
        if request.logprobs is not None:
            request.logprobs[segment.id] = token_logprobs(self.model, result.decoded)
        request.segments += 1
        request.tell(segment)

    def _trim(self) -> None:
        """Gives back free memory now and then, rather when there is nothing to do."""
        since = time.monotonic() - self._trimmed
        if since > 10 * TRIM_S or (since > TRIM_S and not self._requests):
            give_back_memory()
            self._trimmed = time.monotonic()

    def _fail(self, error: Exception) -> None:
        """All that is under way has failed for a reason that nobody foresaw."""
        logger.error("the model failed", exc_info=error)
        self._rows, self._batch = Rows(self.model), None
        self._follow.clear()
        for task in list(self._open):
            self._done(task, Failed(f"the model failed: {first_line(error)}"))
