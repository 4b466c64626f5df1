"""deploy/ray_serve.py: two replicas on this machine, of which one is killed."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

ray = pytest.importorskip("ray", reason="needs the package ray[serve]")
serve = pytest.importorskip("ray.serve", reason="needs the package ray[serve]")
httpx = pytest.importorskip("httpx", reason="needs the package httpx")
psutil = pytest.importorskip("psutil", reason="needs the package psutil")

ROOT = Path(__file__).parents[1]
EXAMPLE = (ROOT / "examples" / "en.flac").read_bytes()
PATIENCE_S = 60.0


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where the deployment listens."""
    monkeypatch.syspath_prepend(ROOT / "deploy")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # the replicas have to find it too
    monkeypatch.setenv("DIFFUSION_GEMMA_ASR_MODEL", "mini")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False)
    try:
        import ray_serve

        serve.start(http_options={"host": "127.0.0.1", "port": port})
        two = ray_serve.Transcriber.options(num_replicas=2, autoscaling_config=None, ray_actor_options={"num_cpus": 0.5})
        serve.run(two.bind(), name="asr", route_prefix="/")
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


def replicas() -> list[Any]:
    """Processes of the deployment that this one has started."""
    return [child for child in psutil.Process().children(recursive=True) if "ServeReplica:asr" in " ".join(child.cmdline())]


@pytest.mark.slow
def test_a_replica_is_killed(url: str) -> None:
    def transcribe(number: int) -> tuple[int, str]:
        files, data = {"file": ("en.flac", EXAMPLE)}, {"model": "whisper-1"}
        answer = httpx.post(f"{url}/v1/audio/transcriptions", files=files, data=data, timeout=PATIENCE_S)
        return answer.status_code, answer.text

    assert httpx.get(f"{url}/ready", timeout=PATIENCE_S).status_code == 200
    with ThreadPoolExecutor(4) as pool:
        (first,) = set(pool.map(transcribe, range(8)))
        assert first[0] == 200 and "follow the river" in first[1]
        one, _ = replicas()
        os.kill(one.pid, signal.SIGKILL)
        assert set(pool.map(transcribe, range(16))) == {first}
