"""One live transcription: sound goes in on one side, OpenAI's realtime events come out on the other.

A thread of its own runs `transcribe.live` on what an `Inbox` hands it, and lets the scheduler decode. Committed words are
`delta` events, which are never taken back; an item is a stretch of speech between two pauses, or, without turn detection,
what lies between two commits.
"""

from __future__ import annotations

import logging
import math
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..audio.vad import Chunk
from ..errors import AsrError, first_line
from ..transcribe.live import LiveUpdate, live_updates
from ..transcribe.recordings import TranscribeOptions
from ..transcribe.results import Segment, Word, joiner
from .realtime_inbox import Block, Gone, Inbox, LiveSettings, Order
from .requests import Closed

EVERY_S = 1.0  # of speech between two decodings of it
LAG_EVERY_S = 0.5  # of sound between two reports of the lag
TRANSCRIPTION = "conversation.item.input_audio_transcription"

logger = logging.getLogger(__name__)

Emit = Callable[[dict[str, Any]], None]
"""Takes an event without its id; is called from the session's thread."""


class Cleared(Exception):
    """The client takes back the sound that it has not committed."""


@dataclass
class _Item:
    """What is being transcribed, under the id by which the client knows it."""

    id: str
    before: str | None  # the item before it
    begins_s: float
    ends_s: float
    words: list[Word] = field(default_factory=list)
    text: str = ""
    partial: str = ""
    languages: list[str] = field(default_factory=list)

    def event(self, kind: str, status: str) -> dict[str, Any]:
        """conversation.item.KIND"""
        content = [{"type": "input_audio", "transcript": self.text or None}]
        item = {"id": self.id, "object": "realtime.item", "type": "message", "role": "user", "status": status}
        return {
            "type": f"conversation.item.{kind}",
            "previous_item_id": self.before,
            "item": {**item, "content": content},
        }


class LiveSession:
    """Transcribes what comes into its inbox until that is closed.

    Args:
        settings: that hold until an order brings others.
        emit: takes the events, from the session's thread.
        on_end: called from that thread when it ends.

    Attributes:
        inbox: where sound and orders go.
    """

    def __init__(self, settings: LiveSettings, emit: Emit, on_end: Callable[[], None]):
        self.inbox = Inbox()
        self._settings, self._emit, self._on_end = settings, emit, on_end
        self._item: _Item | None = None
        self._last_item: str | None = None
        self._items = 0  # that have ended
        self._stream_s = self._committed_s = self._lag_told_s = 0.0  # where the stream began, the last commit was, ...
        self._thread = threading.Thread(target=self._run, name="live", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while True:
                self._carry_out(*self._transcribe())
        except Gone:
            pass
        except Closed as error:
            self._emit(error_event(str(error), kind="server_error", code="shutting_down"))
        except Exception:  # the client is told, and its session ends
            logger.exception("a live transcription failed")
            self._emit(error_event("the server failed; its log says why", kind="server_error", code="internal_error"))
        finally:
            self._on_end()

    def _transcribe(self) -> tuple[Order | None, bool]:
        """Transcribes sound up to the next order.

        Returns:
            the order, None where the sound before it could not be transcribed; whether an item ended because of it.
        """
        order: Order | None = None
        items = 0

        def blocks(taken: Block | Order) -> Iterator[Block]:
            nonlocal order, items
            while isinstance(taken, np.ndarray):
                yield taken
                self._tell_lag()
                taken = self.inbox.take()
            order, items = taken, self._items
            if order == "clear":
                raise Cleared

        self._stream_s = self.inbox.taken_s
        first = self.inbox.take()
        if not isinstance(first, np.ndarray):  # without sound there is no need of detectors, which take time and memory
            return first, False
        try:
            for update in live_updates(self._decode, blocks(first), self._settings.options, EVERY_S):
                self._take(update)
        except Cleared:
            pass
        except Closed:
            raise
        except AsrError as error:
            self._fail(error)
        return order, order is not None and self._items > items

    def _carry_out(self, order: Order | None, ended: bool) -> None:
        if order is None:
            return
        if isinstance(order, LiveSettings):
            if self._item is not None and self._settings.turns:
                self._end_item()
            self._settings = order
            return
        if order == "commit" and not ended:
            if self._item is None:
                self._begin_item(self._committed_s)
            self._end_item()
        elif order == "clear":
            self._emit({"type": "input_audio_buffer.cleared"})
            if self._item is not None:  # its words are known to the client already
                self._emit({"type": "conversation.item.deleted", "item_id": self._item.id})
                self._item = None
        self._committed_s = self.inbox.taken_s

    def _decode(self, chunk: Chunk, options: TranscribeOptions) -> Segment | None:
        self.inbox.check()
        segment = self.inbox.wait_for(self._settings.decode(chunk, options))
        if segment is not None and segment.words:
            if self._item is None:
                begins = self._stream_s + chunk.start
                self._begin_item(begins if self._settings.turns else self._committed_s, begins)
            assert self._item is not None
            self._item.ends_s = self._stream_s + chunk.end
            self._item.languages.append(segment.language)
        return segment

    def _take(self, update: LiveUpdate) -> None:
        """Hands on what is new."""
        item = self._item
        if item is None:  # all that was said of it had been committed before
            return
        if update.committed:
            text = "".join(word.word for word in update.committed)
            if not item.text:
                text = text.lstrip()
            elif not text[0].isspace():  # the first word behind a change of settings
                text = joiner(item.languages[-1]) + text
            item.text += text
            item.words += update.committed
            logprobs = {"logprobs": _logprobs(update.committed)} if self._settings.logprobs else {}
            self._emit(_about(item, "delta", delta=text, **logprobs))
        if self._settings.partial and update.partial != item.partial:
            space = joiner(item.languages[-1]) if item.text and update.partial else ""
            self._emit(
                {"type": "transcript.partial", "item_id": item.id, "content_index": 0, "text": space + update.partial}
            )
        item.partial = update.partial
        if self._settings.turns and (update.segment is not None or not (item.words or item.partial)):
            self._end_item()

    def _begin_item(self, begins_s: float, speech_s: float | None = None) -> None:
        self._item = _Item(f"item_{secrets.token_hex(8)}", self._last_item, begins_s, self.inbox.taken_s)
        if self._settings.turns and speech_s is not None:
            start = {"audio_start_ms": round(1000 * speech_s), "item_id": self._item.id}
            self._emit({"type": "input_audio_buffer.speech_started", **start})
        for kind in ("created", "added"):
            self._emit(self._item.event(kind, "in_progress"))

    def _end_item(self) -> None:
        """The item is committed, and its transcript is what has been said of it."""
        item, settings = self._item, self._settings
        assert item is not None
        self._item, self._last_item, self._items = None, item.id, self._items + 1
        if not settings.turns:
            item.ends_s = self.inbox.taken_s
        elif item.languages:
            end = {"audio_end_ms": round(1000 * item.ends_s), "item_id": item.id}
            self._emit({"type": "input_audio_buffer.speech_stopped", **end})
        committed = {"item_id": item.id, "previous_item_id": item.before}
        self._emit({"type": "input_audio_buffer.committed", **committed})
        self._emit(item.event("done", "completed"))
        more: dict[str, Any] = {"languages": [{"code": code} for code in dict.fromkeys(item.languages)]}
        if settings.logprobs:
            more["logprobs"] = _logprobs(item.words)
        usage = {"type": "duration", "seconds": round(max(0.0, item.ends_s - item.begins_s), 3)}
        self._emit(_about(item, "completed", transcript=item.text, usage=usage, **more))

    def _fail(self, error: AsrError) -> None:
        """What was under way cannot be transcribed; the session goes on."""
        item, self._item = self._item, None
        if item is None:
            self._emit(error_event(first_line(error), kind="server_error"))
            return
        self._last_item, self._items = item.id, self._items + 1
        told = {"type": "server_error", "code": "transcription_failed", "message": first_line(error), "param": None}
        self._emit(_about(item, "failed", error=told))

    def _tell_lag(self) -> None:
        heard_s = self.inbox.taken_s
        if self._settings.lag and heard_s - self._lag_told_s >= LAG_EVERY_S:
            self._lag_told_s = heard_s
            lag_s = self.inbox.waiting_s
            self._emit({"type": "transcript.lag", "lag_s": round(lag_s, 3), "heard_s": round(heard_s, 3)})


def error_event(
    message: str,
    *,
    kind: str = "invalid_request_error",
    code: str | None = None,
    param: str | None = None,
    event_id: str | None = None,
) -> dict[str, Any]:
    """OpenAI's `error` event.

    Args:
        message: what is wrong and what to do about it.
        kind, code: OpenAI's names of what happened.
        param: the field that is wrong.
        event_id: of the client's event that is wrong.
    """
    error = {"type": kind, "code": code, "message": message, "param": param, "event_id": event_id}
    return {"type": "error", "error": error}


def _about(item: _Item, kind: str, **fields: Any) -> dict[str, Any]:
    return {"type": f"{TRANSCRIPTION}.{kind}", "item_id": item.id, "content_index": 0, **fields}


def _logprobs(words: Sequence[Word]) -> list[dict[str, Any]]:
    """One entry a word."""
    rows = [(word.word, math.log(max(word.probability, 1e-10))) for word in words]
    return [{"token": text, "logprob": value, "bytes": list(text.encode())} for text, value in rows]
