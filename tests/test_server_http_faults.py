"""The server where models come and go, and with clients that lie, stall or die."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from server_runs import (  # noqa: F401  fixtures; it skips where an extra is absent
    BEFORE,
    BODY,
    EXAMPLE,
    PATIENCE_S,
    SETTINGS,
    TEXT,
    LiveServer,
    client,
    connection,
    die,
    form,
    header,
    httpx,
    minutes,
    model,
    openai,
    server,
    serving,
    speech,
    start_process,
    until,
    uploads_on_disk,
)
from test_odd_files import odd_files

from diffusion_gemma_asr.errors import AsrError, CheckpointError
from diffusion_gemma_asr.model.model import DiffusionGemmaASR
from diffusion_gemma_asr.server.command import ServeOptions, serve
from diffusion_gemma_asr.server.gate import Gate
from diffusion_gemma_asr.server.settings import ServerSettings
from diffusion_gemma_asr.strict import from_options

# -- models come and go ------------------------------------------------------------------------------------------------


def test_while_a_model_is_loaded_it_says_so(model: DiffusionGemmaASR) -> None:
    may_load = threading.Event()

    def load(name: str) -> DiffusionGemmaASR:
        assert may_load.wait(PATIENCE_S)
        return model

    settings = ServerSettings(models=("mini",), device="cpu", load_wait_s=0.05)
    with serving(settings, load, ready=False) as server:
        assert server.get("/health").status_code == 200
        assert server.get("/ready").status_code == 503
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
        with pytest.raises(openai.InternalServerError) as caught:
            client.audio.transcriptions.create(model="mini", file=EXAMPLE)
        assert caught.value.status_code == 503 and caught.value.code == "model_loading"
        threading.Timer(0.3, may_load.set).start()
        again = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=2)
        assert again.audio.transcriptions.create(model="mini", file=EXAMPLE).text.startswith(TEXT)


def test_a_model_that_cannot_be_loaded_is_tried_again(model: DiffusionGemmaASR) -> None:
    tries: list[str] = []

    def load(name: str) -> DiffusionGemmaASR:
        tries.append(name)
        if len(tries) < 3:
            raise CheckpointError("the disk is not there; mount it")
        return model

    with serving(ServerSettings(models=("./far/mini",), device="cpu"), load, ready=False) as server:
        until(lambda: tries)
        failed = server.transcribe(EXAMPLE.read_bytes())
        assert failed.status_code == 503 and "the disk is not there" in failed.json()["error"]["message"]
        assert server.transcribe(EXAMPLE.read_bytes()).json()["text"].startswith(TEXT)
        assert set(tries) == {"./far/mini"}


def test_a_model_that_nobody_uses_is_unloaded(model: DiffusionGemmaASR) -> None:
    loads: list[str] = []

    def load(name: str) -> DiffusionGemmaASR:
        loads.append(name)
        return model

    settings = ServerSettings(models=("mini", "other/model"), device="cpu", idle_unload_s=0.4)
    with serving(settings, load) as server:
        assert server.transcribe(EXAMPLE.read_bytes()).json()["text"].startswith(TEXT)
        assert server.transcribe(EXAMPLE.read_bytes(), model="other/model").json()["text"].startswith(TEXT)
        assert [one["id"] for one in server.get("/v1/models").json()["data"]] == ["mini", "other/model"]
        assert server.get("/v1/models/other/model").json()["id"] == "other/model"
        until(lambda: not server.models.schedulers)
        assert server.get("/ready").status_code == 200 and not server.models.schedulers
        assert server.transcribe(EXAMPLE.read_bytes()).json()["text"].startswith(TEXT)
        assert loads == ["mini", "other/model", "mini"]


def test_a_server_that_ends_takes_no_more(model: DiffusionGemmaASR) -> None:
    with serving(SETTINGS, lambda name: model) as server:
        server.models.drain()
        refused = server.transcribe(EXAMPLE.read_bytes())
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "shutting_down"
        assert refused.headers["retry-after"] == "1"
        assert server.get("/ready").status_code == 503 and server.get("/health").status_code == 200


def test_sigterm_lets_what_is_under_way_end(minutes: bytes) -> None:
    process, url = start_process(stderr=subprocess.PIPE)
    try:
        until(lambda: process.poll() is None and responds(f"{url}/ready"))
        with httpx.stream("POST", f"{url}/v1/audio/transcriptions", **form(minutes, stream="true")) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert events[-1]["type"] == "transcript.text.done" and events[-1]["text"].count(TEXT) >= 18
        _, err = process.communicate(timeout=PATIENCE_S)
        assert process.returncode in (0, -signal.SIGTERM), err
        assert "Traceback" not in err, err
    finally:
        process.kill()
        process.wait()


def responds(url: str) -> bool:
    """Whether a server is there and says 200."""
    try:
        return bool(httpx.get(url).status_code == 200)
    except httpx.TransportError:
        return False


def test_a_fault_of_ours_counts_as_one() -> None:
    """The answer to it is written outside of what counts."""

    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("a bug")

    counted: list[int] = []
    metrics = SimpleNamespace(count=lambda scope, status, seconds: counted.append(status))
    models = SimpleNamespace(settings=ServerSettings(models=("mini",)), draining=False)
    gate = Gate(broken, models, metrics)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError):
        asyncio.run(gate({"type": "http", "path": "/v1/models", "headers": []}, None, None))  # type: ignore[arg-type]
    assert counted == [500]


def test_counters_count(server: LiveServer) -> None:
    def value(name: str) -> float:
        lines = server.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"diffusion_gemma_asr_{name}"))

    ok, bad, seconds = (
        value('requests_total{path="/v1/audio/transcriptions",status="200"}'),
        'status="400"}',
        value("audio_seconds_total"),
    )
    refused = value(f'requests_total{{path="/v1/audio/transcriptions",{bad}')
    server.transcribe(EXAMPLE.read_bytes())
    server.transcribe(b"no sound")
    assert value('requests_total{path="/v1/audio/transcriptions",status="200"}') == ok + 1
    assert value(f'requests_total{{path="/v1/audio/transcriptions",{bad}') == refused + 1
    assert value("audio_seconds_total") == pytest.approx(seconds + 3.003, abs=0.01)
    assert value("request_seconds_count") >= 2 and value("models_loaded") == 1
    assert value("queue_depth") == value("busy_rows") == 0


def test_options_of_the_command_are_settings() -> None:
    assert ServeOptions().settings() == ServerSettings(models=("mini",))
    chosen = from_options(ServeOptions, {"model": ("mini", "a/b"), "idle_unload": 60.0, "cors": ("*",), "api_key": ""})
    settings = chosen.settings()
    assert (settings.models, settings.idle_unload_s, settings.origins) == (("mini", "a/b"), 60.0, ("*",))
    assert settings.api_key is None
    for wrong in ({"max_upload_mb": 0.0}, {"rows": 0}, {"idle_unload": -1.0}, {"model": ()}, {"api_key": "ключ"}):
        with pytest.raises(AsrError):
            from_options(ServeOptions, wrong)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        serve(ServerSettings(models=("./nowhere",)), port=0)


# -- clients that lie, stall or die ------------------------------------------------------------------------------------


def test_clients_that_die_while_they_upload_leave_nothing(server: LiveServer) -> None:
    for _ in range(5):
        with connection(server) as sock:
            sock.sendall(header(50_000_000) + BODY + bytes(3_000_000))
            until(lambda: server.models.under_way)
            die(sock)
    server.wait_until_quiet()
    assert uploads_on_disk() == BEFORE
    assert server.transcribe(EXAMPLE.read_bytes()).status_code == 200


@pytest.mark.parametrize("stream", ["true", "false"])
def test_clients_that_die_while_they_wait_free_their_rows(server: LiveServer, minutes: bytes, stream: str) -> None:
    with contextlib.ExitStack() as all_of_them:
        socks = [all_of_them.enter_context(connection(server)) for _ in range(4)]
        request = httpx.Request(
            "POST", f"{server.url}/v1/audio/transcriptions", **without_timeout(form(minutes, stream=stream))
        )
        content = request.read()
        head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
        for sock in socks:
            sock.sendall(f"POST /v1/audio/transcriptions HTTP/1.1\r\n{head}\r\n".encode() + content)
        if stream == "true":
            for sock in socks:
                assert sock.recv(1000).startswith(b"HTTP/1.1 200")
        until(lambda: sum(scheduler.depth for scheduler in server.models.schedulers.values()) == 4)
        began = time.monotonic()
        for sock in socks:
            die(sock)
        server.wait_until_quiet()
    assert time.monotonic() - began < 4.0  # less than four times 70 s of sound take
    assert uploads_on_disk() == BEFORE
    assert server.transcribe(EXAMPLE.read_bytes()).status_code == 200


def without_timeout(content: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key != "timeout"}


def test_a_claim_of_2_gb_is_refused_at_once(server: LiveServer) -> None:
    with connection(server) as sock:
        sock.sendall(header(2_000_000_000) + BODY)
        began = time.monotonic()
        answer = sock.recv(10_000)
        assert answer.startswith(b"HTTP/1.1 413") and time.monotonic() - began < 2.0
        answer += sock.recv(10_000) if answer.endswith(b"\r\n\r\n") else b""
        assert json.loads(answer.split(b"\r\n\r\n", 1)[1])["error"]["code"] == "too_large"
    server.wait_until_quiet()


def test_an_upload_that_grows_too_large_is_refused_while_it_comes(model: DiffusionGemmaASR) -> None:
    settings = ServerSettings(models=("mini",), device="cpu", max_upload_mb=2)
    with serving(settings, lambda name: model) as server:

        def endless() -> Iterator[bytes]:
            yield BODY
            for _ in range(100):
                yield bytes(100_000)

        kind = {"Content-Type": "multipart/form-data; boundary=x"}
        answer = httpx.post(f"{server.url}/v1/audio/transcriptions", content=endless(), headers=kind, timeout=PATIENCE_S)
        assert answer.status_code == 413 and answer.json()["error"]["param"] == "file"
        with pytest.raises(openai.APIStatusError) as caught:
            client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
            client.audio.transcriptions.create(model="mini", file=bytes(3_000_000))
        assert caught.value.status_code == 413
        server.wait_until_quiet()
        assert uploads_on_disk() == BEFORE


def test_a_header_without_a_body_waits_for_so_long_and_no_longer(model: DiffusionGemmaASR) -> None:
    settings = ServerSettings(models=("mini",), device="cpu", body_wait_s=0.5, max_queue=3)
    with serving(settings, lambda name: model) as server, contextlib.ExitStack() as held:
        socks = [held.enter_context(connection(server)) for _ in range(2)]
        socks[0].sendall(header(1000))
        socks[1].sendall(header(None) + b"%x\r\n%s\r\n" % (len(BODY), BODY))
        until(lambda: server.models.under_way == 2)
        assert server.transcribe(EXAMPLE.read_bytes()).json()["text"].startswith(TEXT)
        for sock in socks:
            assert sock.recv(10_000).startswith(b"HTTP/1.1 408")
        server.wait_until_quiet()


def test_50_odd_files_stop_nobody(server: LiveServer, tmp_path: Path) -> None:
    files = odd_files(tmp_path)[::4]
    assert len(files) == 50
    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(lambda file: server.transcribe(file.read_bytes(), file.name), files))
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 400} and statuses.count(400) >= 5 and statuses.count(200) >= 5
    assert all("error" in answer.json() for answer in answers if answer.status_code == 400)
    server.wait_until_quiet()
    assert uploads_on_disk() == BEFORE
    assert server.transcribe(EXAMPLE.read_bytes()).json()["text"].startswith(TEXT)


def test_a_client_on_a_slow_line_delays_nobody(server: LiveServer) -> None:
    content = (
        BODY + EXAMPLE.read_bytes() + b'\r\n--x\r\nContent-Disposition: form-data; name="model"\r\n\r\nmini\r\n--x--\r\n'
    )
    with connection(server) as slow:
        slow.sendall(header(len(content), "Connection: close\r\n"))
        quick = []
        for number in range(10):
            slow.sendall(content[number * len(content) // 10 : (number + 1) * len(content) // 10])
            began = time.monotonic()
            assert server.transcribe(EXAMPLE.read_bytes()).status_code == 200
            quick.append(time.monotonic() - began)
        answer = b"".join(iter(lambda: slow.recv(10_000), b""))
    assert answer.startswith(b"HTTP/1.1 200") and TEXT.encode() in answer
    assert sorted(quick)[5] < 2.0


def test_connections_that_say_nothing_stop_nobody(server: LiveServer) -> None:
    with contextlib.ExitStack() as all_of_them:
        for number in range(200):
            sock = all_of_them.enter_context(connection(server))
            if number % 2:
                sock.sendall(b"POST /v1/audio/transcr")
        assert server.transcribe(EXAMPLE.read_bytes()).json()["text"].startswith(TEXT)
