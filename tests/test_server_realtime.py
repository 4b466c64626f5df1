"""Live transcription over a socket: OpenAI's client and events, and clients that misbehave."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soxr
from spoken import RATE, WordModel

from diffusion_gemma_asr.audio.read import load_audio

pytest.importorskip("fastapi", reason="needs the extra [server]")
openai = pytest.importorskip("openai", reason="needs openai's client")
websockets = pytest.importorskip("websockets", reason="needs websockets")

from server_fixture import LiveServer, serving  # noqa: E402
from websockets.asyncio.client import connect as connect_async  # noqa: E402
from websockets.exceptions import ConnectionClosed, InvalidStatus  # noqa: E402
from websockets.sync.client import connect  # noqa: E402

from diffusion_gemma_asr.server import realtime  # noqa: E402
from diffusion_gemma_asr.server.settings import ServerSettings  # noqa: E402

EXAMPLE = Path(__file__).parents[1] / "examples" / "en.flac"
DELTA, COMPLETED = (f"conversation.item.input_audio_transcription.{kind}" for kind in ("delta", "completed"))


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened in time"
        time.sleep(0.002)


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with serving(ServerSettings(models=("mini",), max_sockets=20)) as server:
        yield server
        wait_until(lambda: not server.models.sockets)
    assert not sessions_left()


def socket_url(server: LiveServer) -> str:
    return server.url.replace("http", "ws") + "/v1/realtime"


def sessions_left() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "live"]


def pcm(rate: int, times: int = 1, gap_s: float = 1.0) -> bytes:
    """The example, with a pause behind it, as a client sends it."""
    sound = np.concatenate([load_audio(EXAMPLE), np.zeros(round(gap_s * RATE), np.float32)] * times)
    return (32767 * soxr.resample(sound, RATE, rate)).astype("<i2").tobytes()


def audio_input(rate: int = 24000, **more: Any) -> dict[str, Any]:
    return {"format": {"type": "audio/pcm", "rate": rate}, "transcription": {"model": "mini", "language": "en"}, **more}


def append(data: bytes) -> str:
    return json.dumps({"type": "input_audio_buffer.append", "audio": base64.b64encode(data).decode()})


def update(include: list[str] | None = None, **fields: Any) -> str:
    change = {"type": "transcription", "include": include, "audio": {"input": fields}}
    return json.dumps({"type": "session.update", "session": change})


def until(client: Any, kind: str) -> list[dict[str, Any]]:
    """The events up to the next one of a kind."""
    events = [json.loads(client.recv(timeout=30))]
    while events[-1]["type"] != kind:
        events.append(json.loads(client.recv(timeout=30)))
    return events


def error_of(client: Any, event: str) -> dict[str, Any]:
    client.send(event)
    return until(client, "error")[-1]["error"]


@pytest.mark.parametrize("turns", [{"type": "server_vad", "threshold": 0.5}, None])
def test_openais_client(server: LiveServer, turns: dict[str, Any] | None) -> None:
    data, events = pcm(24000), []
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none").realtime.connect(
        model="gpt-live-transcribe", extra_query={"intent": "transcription"}
    ) as client:
        assert client.recv().type == "session.created"
        noise = {"type": "near_field"}
        chosen = audio_input(turn_detection=turns, noise_reduction=noise)
        client.session.update(session={"type": "transcription", "audio": {"input": chosen}})
        assert client.recv().type == "session.updated"
        for first in range(0, len(data), 4800):
            client.input_audio_buffer.append(audio=base64.b64encode(data[first : first + 4800]).decode())
        if turns is None:
            client.input_audio_buffer.commit()
        for event in client:
            events.append(event)
            if event.type == COMPLETED:
                break
    kinds = list(dict.fromkeys(type(event).__name__ for event in events))
    vad = ["InputAudioBufferSpeechStartedEvent", "InputAudioBufferSpeechStoppedEvent"] if turns else []
    assert kinds == [
        *vad[:1],
        "ConversationItemCreatedEvent",
        "ConversationItemAdded",
        "ConversationItemInputAudioTranscriptionDeltaEvent",
        *vad[1:],
        "InputAudioBufferCommittedEvent",
        "ConversationItemDone",
        "ConversationItemInputAudioTranscriptionCompletedEvent",
    ]
    assert events[-1].transcript == "".join(event.delta for event in events if event.type == DELTA)
    assert events[-1].transcript.startswith("follow")
    assert events[-1].usage.type == "duration" and [one.code for one in events[-1].languages] == ["en"]
    assert len({event.event_id for event in events}) == len(events)


def test_the_transcript_does_not_depend_on_the_rate(server: LiveServer) -> None:
    transcripts = set()
    for rate in (16000, 24000):
        with connect(socket_url(server)) as client:
            client.send(update(**audio_input(rate, turn_detection=None)))
            client.send(append(pcm(rate)))
            client.send(json.dumps({"type": "input_audio_buffer.commit"}))
            transcripts.add(until(client, COMPLETED)[-1]["transcript"])
    assert all("follow the river until you" in text for text in transcripts)  # played at a wrong rate it is none of this


def test_optional_events_come_when_they_are_asked_for(server: LiveServer) -> None:
    optional = {"transcript.partial", "transcript.lag"}
    for include in ([], [*optional, "item.input_audio_transcription.logprobs"]):
        with connect(socket_url(server)) as client:
            client.send(update(include, **audio_input()))
            data = pcm(24000)
            for first in range(0, len(data), 48000):
                client.send(append(data[first : first + 48000]))
                time.sleep(0.2)  # so that it is not taken as one
            events = until(client, COMPLETED)
            client.send(append(bytes(48000)))
            if include:
                events += until(client, "transcript.lag")
        assert {event["type"] for event in events} & optional == (optional if include else set())
        deltas = [event for event in events if event["type"] == DELTA]
        assert all(("logprobs" in event) == bool(include) for event in deltas)


def test_mistakes_are_answered_and_the_session_goes_on(server: LiveServer) -> None:
    with connect(socket_url(server)) as client:
        until(client, "session.created")
        assert error_of(client, "{")["code"] == "invalid_event"
        assert error_of(client, "[" * 100_000)["code"] == "invalid_event"
        unknown = error_of(client, json.dumps({"type": "response.create", "event_id": "mine"}))
        assert unknown["event_id"] == "mine" and "response.create" in unknown["message"]
        assert error_of(client, json.dumps({"type": "input_audio_buffer.append", "audio": "?"}))["param"] == "audio"
        assert error_of(client, json.dumps({"type": "input_audio_buffer.append"}))["param"] == "audio"
        assert error_of(client, append(b"odd"))["param"] == "audio"
        assert error_of(client, append(bytes(48000 * 121)))["param"] == "audio"
        assert (
            error_of(client, json.dumps({"type": "input_audio_buffer.commit"}))["code"] == "input_audio_buffer_commit_empty"
        )
        where = "session.audio.input.transcription"
        for wrong, param in (
            ({"model": "large"}, "model"),
            ({"language": "it"}, "language"),
            ({"languages": ["en", "it"]}, "languages"),
            ({"keywords": ["mill"]}, "keywords"),
            ({"prompt": "a tale"}, "prompt"),
            ({"steps": 0}, "steps"),
        ):
            assert error_of(client, update(transcription=wrong))["param"] == f"{where}.{param}"
        client.send(append(pcm(24000)))
        assert until(client, COMPLETED)[-1]["transcript"].startswith("follow")


def test_a_model_that_is_not_there(server: LiveServer) -> None:
    with connect(f"{socket_url(server)}?model=large") as client:
        assert json.loads(client.recv(timeout=5))["error"]["code"] == "model_not_found"
        with pytest.raises(ConnectionClosed):
            client.recv(timeout=5)


def test_the_key() -> None:
    bearer = {"additional_headers": {"Authorization": "Bearer s3cret"}}
    protocols = {"subprotocols": ["realtime", "openai-insecure-api-key.s3cret"]}
    with serving(ServerSettings(models=("mini",), api_key="s3cret"), lambda name: WordModel(), ready=False) as server:
        url = socket_url(server)
        for address, more in ((url, bearer), (url, protocols), (f"{url}?api_key=s3cret", {"origin": "https://example.org"})):
            with connect(address, **more) as client:
                until(client, "session.created")
        for address, more in (
            (url, {}),
            (url, {"additional_headers": {"Authorization": "Bearer wrong"}}),
            (url, {"subprotocols": ["realtime", "openai-insecure-api-key.wrong"]}),
            (f"{url}?api_key=", {}),
        ):
            with pytest.raises(InvalidStatus) as caught, connect(address, **more):
                pass
            assert caught.value.response.status_code == 401
            assert json.loads(caught.value.response.body)["error"]["code"] == "invalid_api_key"


def test_pages_of_other_sites_are_refused_unless_they_are_named() -> None:
    settings = ServerSettings(models=("mini",), origins=("https://example.org",))
    with serving(settings, lambda name: WordModel(), ready=False) as server:
        for origin in (server.url, "https://example.org"):
            with connect(socket_url(server), origin=origin) as client:
                until(client, "session.created")
        with pytest.raises(InvalidStatus) as caught, connect(socket_url(server), origin="https://example.com"):
            pass
    assert caught.value.response.status_code == 403


def test_more_sockets_than_there_may_be(server: LiveServer) -> None:
    wait_until(lambda: not sessions_left())

    async def many() -> tuple[list[Any], list[int]]:
        clients = await asyncio.gather(*(connect_async(socket_url(server)) for _ in range(50)))
        firsts = [json.loads(await client.recv()) for client in clients]
        refused = [client for client, first in zip(clients, firsts, strict=True) if first["type"] == "error"]
        await asyncio.gather(*(client.wait_closed() for client in refused))
        codes = [client.close_code for client in refused]
        await asyncio.gather(*(client.close() for client in clients))
        return firsts, codes

    firsts, codes = asyncio.run(many())
    assert sum(first["type"] == "session.created" for first in firsts) == 20
    refused = [first["error"] for first in firsts if first["type"] == "error"]
    assert {error["code"] for error in refused} == {"too_many_sessions"} and codes == [1013] * 30
    wait_until(lambda: not sessions_left())
    with connect(socket_url(server)) as client:
        until(client, "session.created")


def test_a_client_that_is_killed_leaves_nothing(server: LiveServer) -> None:
    with connect(socket_url(server)) as other:
        until(other, "session.created")
        client = connect(socket_url(server)).__enter__()
        client.send(update(**audio_input()))
        client.send(append(pcm(24000, times=5)))
        until(client, DELTA)
        linger = (1).to_bytes(4, "little") + bytes(4)
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)  # as the kernel does for a killed process
        client.socket.shutdown(socket.SHUT_RDWR)
        wait_until(lambda: len(sessions_left()) == 1)
        other.send(append(pcm(24000)))
        assert until(other, COMPLETED)[-1]["transcript"].startswith("follow")
    wait_until(lambda: not sessions_left() and not server.models.sockets and server.quiet)


def test_a_client_that_takes_nothing_is_let_go(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once where too many events wait for it, or when one of them has not left in `send_s`: whichever comes first."""
    monkeypatch.setattr(realtime, "Limits", partial(realtime.Limits, send_s=1.0))  # buffers may fill before events do
    with socket.create_connection(server.address) as raw:
        raw.settimeout(2)
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        key = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13"
        request = (
            f"GET /v1/realtime HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n{key}\r\n\r\n"
        )
        raw.sendall(request.encode())
        wait_until(lambda: len(sessions_left()) == 1)
        text = json.dumps({"type": "x" * 80, "event_id": "y" * 500}).encode()
        frame = b"\x81\xfe" + len(text).to_bytes(2, "big") + bytes(4) + text  # masked with zeros
        with pytest.raises(OSError):
            for _ in range(2000):
                raw.sendall(frame * 50)
        wait_until(lambda: not sessions_left())
    with connect(socket_url(server)) as client:
        until(client, "session.created")


def test_sound_faster_than_it_is_transcribed_is_held_back_not_lost(server: LiveServer) -> None:
    times = 30
    with connect(socket_url(server), max_queue=None) as client:
        client.send(update(**audio_input(16000)))
        data = pcm(16000, times)
        sender = threading.Thread(
            target=lambda: [client.send(append(data[first : first + 32000])) for first in range(0, len(data), 32000)]
        )
        sender.start()
        transcripts = [until(client, COMPLETED)[-1]["transcript"] for _ in range(times)]
        sender.join(10)
    assert len(transcripts) == times and all(text.startswith("follow") for text in transcripts)
