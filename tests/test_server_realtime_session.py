"""Live transcription without a server: tones stand for words, which are never taken back."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
from spoken import RATE, WORDS, Sound, WordModel, pause, said
from tiny_model import tiny_model

from diffusion_gemma_asr.errors import AsrError
from diffusion_gemma_asr.transcribe.recordings import TranscribeOptions, transcribe_chunk

pytest.importorskip("fastapi", reason="needs the extra [server]")

from diffusion_gemma_asr.server.errors import ApiError
from diffusion_gemma_asr.server.realtime_inbox import LiveSettings
from diffusion_gemma_asr.server.realtime_session import LiveSession
from diffusion_gemma_asr.server.realtime_settings import DECODERS, Session

DELTA, COMPLETED = (f"conversation.item.input_audio_transcription.{kind}" for kind in ("delta", "completed"))


@dataclass
class Told:
    """Collects what a session says."""

    events: list[dict[str, Any]] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)

    def of(self, *kinds: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["type"] in kinds]

    def wait(self, kind: str, count: int = 1) -> None:
        """Until so many events of a kind have come."""
        wait_until(lambda: len(self.of(kind)) >= count)


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened in time"
        time.sleep(0.002)


def future_of(decode: Callable[..., Any]) -> Callable[..., Future[Any]]:
    """As the scheduler decodes: what it gives becomes the segment, here at once."""

    def begin(*args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(decode(*args))
        except AsrError as error:
            future.set_exception(error)
        return future

    return begin


def settings(model: WordModel, slow_s: float = 0.0, **more: Any) -> LiveSettings:
    def decode(*args: Any) -> Any:
        time.sleep(slow_s)
        return transcribe_chunk(model, *args)  # type: ignore[arg-type]

    return LiveSettings(future_of(decode), TranscribeOptions(vad_method="energy", sampling_rate=RATE), **more)


@contextmanager
def session(chosen: LiveSettings) -> Iterator[tuple[LiveSession, Told]]:
    told = Told()
    live = LiveSession(chosen, told.events.append, told.ended.set)
    try:
        yield live, told
    finally:
        live.inbox.close()
        assert told.ended.wait(10)


def say(live: LiveSession, sound: Sound, block_s: float = 0.1) -> None:
    samples = (32767 * sound).astype(np.int16)
    size = round(block_s * RATE)
    for first in range(0, len(samples), size):
        live.inbox.put(samples[first : first + size], len(samples[first : first + size]) / RATE)


def speak(live: LiveSession, sound: Sound) -> None:
    """As `say`, but no faster than it is taken."""
    for first in range(0, len(sound), RATE // 10):
        say(live, sound[first : first + RATE // 10])
        wait_until(lambda: not live.inbox.waiting_s)


def check_items(told: Told) -> list[str]:
    """Looks at what holds for all items; their transcripts."""
    completed = told.of(COMPLETED)
    committed = told.of("input_audio_buffer.committed")
    assert [event["item_id"] for event in completed] == [event["item_id"] for event in committed]
    ids = [None, *(event["item_id"] for event in committed)]
    assert [event["previous_item_id"] for event in committed] == ids[:-1]
    for event in completed:
        deltas = [delta["delta"] for delta in told.of(DELTA) if delta["item_id"] == event["item_id"]]
        assert "".join(deltas) == event["transcript"]
        kinds = [other["type"] for other in told.events if other.get("item_id") == event["item_id"]]
        assert kinds.index("input_audio_buffer.committed") < kinds.index(COMPLETED) == len(kinds) - 1
    return [event["transcript"] for event in completed]


def written(words: list[int]) -> str:
    return " ".join(map(str, words))


def test_a_pause_ends_an_item() -> None:
    with session(settings(WordModel(), partial=True)) as (live, told):
        speak(live, np.concatenate([pause(1.0), said(WORDS), pause(1.0), said(WORDS[:4]), pause(1.0)]))
        told.wait(COMPLETED, 2)
        assert check_items(told) == [written(WORDS), written(WORDS[:4])]
    started, stopped = told.of("input_audio_buffer.speech_started"), told.of("input_audio_buffer.speech_stopped")
    assert [event["audio_start_ms"] for event in started] == pytest.approx([1000, 6400], abs=60)
    assert [event["audio_end_ms"] for event in stopped] == pytest.approx([5300, 8060], abs=120)
    assert told.of(COMPLETED)[0]["usage"]["seconds"] == pytest.approx(4.3, abs=0.15)
    partials = told.of("transcript.partial")
    assert any(event["text"] for event in partials) and partials[-1]["text"] == ""


def test_without_turns_a_commit_ends_an_item() -> None:
    with session(settings(WordModel(), turns=False)) as (live, told):
        say(live, np.concatenate([said(WORDS[:3]), pause(1.0), said(WORDS[3:])]))
        live.inbox.order("commit")
        say(live, pause(1.0))
        live.inbox.order("commit")
        say(live, said(WORDS[:2]))
        live.inbox.order("commit")
        told.wait(COMPLETED, 3)
        assert check_items(told) == [written(WORDS), "", written(WORDS[:2])]
    assert not told.of("input_audio_buffer.speech_started", "input_audio_buffer.speech_stopped")
    assert [event["usage"]["seconds"] for event in told.of(COMPLETED)] == pytest.approx([5.4, 1.0, 0.88], abs=0.01)


def test_a_commit_ends_an_item_before_its_pause() -> None:
    with session(settings(WordModel())) as (live, told):
        say(live, said(WORDS))
        live.inbox.order("commit")
        told.wait(COMPLETED)
        assert check_items(told) == [written(WORDS)]


def test_what_is_cleared_is_forgotten() -> None:
    with session(settings(WordModel(), turns=False)) as (live, told):
        speak(live, said(WORDS))
        told.wait(DELTA)
        live.inbox.order("clear")
        say(live, said(WORDS[:2]))
        live.inbox.order("commit")
        told.wait(COMPLETED)
        (item,) = told.of("conversation.item.deleted")
        assert item["item_id"] == told.of(DELTA)[0]["item_id"]
        assert [event["transcript"] for event in told.of(COMPLETED)] == [written(WORDS[:2])]


def test_settings_hold_for_the_sound_behind_them() -> None:
    with session(settings(WordModel(), turns=False)) as (live, told):
        say(live, said(WORDS[:4]))
        live.inbox.order(settings(WordModel(), turns=False, logprobs=True))
        say(live, said(WORDS[4:]))
        live.inbox.order("commit")
        told.wait(COMPLETED)
        assert check_items(told) == [written(WORDS)]
    assert "logprobs" not in told.of(DELTA)[0] and told.of(DELTA)[-1]["logprobs"][0]["logprob"] == pytest.approx(-0.1)


def test_a_session_that_is_behind_leaves_out_decodings_and_says_how_far_it_is_behind() -> None:
    sound = np.concatenate([said(WORDS * 3), pause(1.0)])
    prompt, late = WordModel(), WordModel()
    with session(settings(prompt)) as (live, told):
        speak(live, sound)
        told.wait(COMPLETED)
        transcript = check_items(told)
    with session(settings(late, slow_s=0.3, lag=True)) as (live, told):
        say(live, sound)
        told.wait(COMPLETED)
        assert check_items(told) == transcript == [written(WORDS * 3)]
        wait_until(lambda: live.inbox.lag_s == 0.0)
    assert late.calls <= 4 < prompt.calls
    lags = [event["lag_s"] for event in told.of("transcript.lag")]
    assert lags[-1] == 0.0 and max(lags) <= len(sound) / RATE


def test_sound_that_cannot_be_decoded_fails_alone() -> None:
    model, calls = WordModel(), itertools.count()

    def decode(*args: Any) -> Any:
        if next(calls) == 2:
            raise AsrError("no memory")
        return transcribe_chunk(model, *args)  # type: ignore[arg-type]

    options = TranscribeOptions(vad_method="energy", sampling_rate=RATE)
    with session(LiveSettings(future_of(decode), options)) as (live, told):
        speak(live, said(WORDS[:8]))
        told.wait("conversation.item.input_audio_transcription.failed")
        say(live, np.concatenate([pause(1.0), said(WORDS[:2]), pause(1.0)]))
        wait_until(lambda: any(event["transcript"] == written(WORDS[:2]) for event in told.of(COMPLETED)))


@pytest.mark.parametrize("name, codec", [("audio/pcmu", "pcm_mulaw"), ("audio/pcma", "pcm_alaw")])
def test_g711_is_decoded_as_ffmpeg_does(name: str, codec: str) -> None:
    data = bytes(range(256))
    decoder = av.CodecContext.create(codec, "r")
    decoder.sample_rate, decoder.layout, decoder.format = 8000, "mono", "s16"  # type: ignore[attr-defined]
    frames = decoder.decode(av.Packet(data))  # type: ignore[attr-defined]
    expected = np.concatenate([frame.to_ndarray()[0] for frame in frames])
    session = Session().updated({"audio": {"input": {"format": {"type": name}}}})
    np.testing.assert_array_equal(session.samples(data), expected)
    assert session.rate == 8000 and len(DECODERS[name]) == 256


@pytest.mark.parametrize(
    "change, param",
    [
        ({"type": "realtime"}, "session.type"),
        ({"audio": {"input": {"format": {"rate": 44100}}}}, "session.audio.input.format.rate"),
        ({"audio": {"input": {"format": {"rate": 8000}}}}, "session.audio.input.format.rate"),
        ({"audio": {"input": {"transcription": {"stepz": 3}}}}, "session.audio.input.transcription.stepz"),
        ({"audio": {"input": {"turn_detection": {"type": "semantic_vad"}}}}, "session.audio.input.turn_detection.type"),
        ({"voice": "ash"}, "session.voice"),
        ("transcription", "session"),
    ],
)
def test_a_setting_that_cannot_be_used_is_named(change: Any, param: str) -> None:
    with pytest.raises(ApiError) as caught:
        Session().updated(change)
    assert caught.value.param == param


def test_a_session_that_is_closed_gives_up_its_decoding() -> None:
    asked: list[Future[Any]] = []

    def decode(*args: Any) -> Future[Any]:
        asked.append(Future())
        return asked[-1]

    options = TranscribeOptions(vad_method="energy", sampling_rate=RATE)
    with session(LiveSettings(decode, options)) as (live, told):
        say(live, said(WORDS))
        wait_until(lambda: bool(asked))
        live.inbox.close()
        assert told.ended.wait(10)
    assert [decoding.cancelled() for decoding in asked] == [True] and not told.events


def test_what_cannot_be_chosen_is_told_as_it_is() -> None:
    turns = {"threshold": 0.3, "prefix_padding_ms": 10, "silence_duration_ms": 2000, "idle_timeout_ms": 5000}
    chosen = Session().updated({"audio": {"input": {"turn_detection": turns, "transcription": {"delay": "low"}}}})
    told = chosen.shown("sess_1", "mini")["audio"]["input"]
    assert told["transcription"]["delay"] is None and told["transcription"]["model"] == "mini"
    assert {name: value for name, value in told["turn_detection"].items() if value is not None} == {
        "type": "server_vad",
        "threshold": 0.3,
        "prefix_padding_ms": 400,
        "silence_duration_ms": 500,
    }
    scheduler: Any = SimpleNamespace(model=WordModel(), decode_chunk=None)
    assert chosen.settings(scheduler).options.vad_onset == 0.3


def test_a_context_too_long_for_the_model_is_named(whisper_folder: Path, backbone_folder: Path) -> None:
    model = tiny_model(whisper_folder, backbone_folder, reads_context=True)
    scheduler: Any = SimpleNamespace(model=model, decode_chunk=None)
    asked = {"language": "en", "prompt": "mill " * 700}
    with pytest.raises(ApiError, match="shorten them") as caught:
        Session().updated({"audio": {"input": {"transcription": asked}}}).settings(scheduler)
    assert caught.value.param == "session.audio.input.transcription.prompt"


def test_an_update_changes_what_it_names() -> None:
    first = Session().updated(
        {"audio": {"input": {"transcription": {"language": "en"}, "turn_detection": {"threshold": 0.3}}}}
    )
    second = first.updated({"audio": {"input": {"format": {"type": "audio/pcm", "rate": 16000}, "turn_detection": None}}})
    assert second.transcription.language == "en" and second.rate == 16000
    assert first.audio.input.turn_detection is not None and second.audio.input.turn_detection is None
