"""Counters for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import Scope

from .models import Models

PREFIX = "diffusion_gemma_asr"
BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)
COUNTED = ("/v1/audio/transcriptions", "/v1/audio/translations", "/v1/models")  # other paths count as one: they could be any


class Metrics:
    """What /metrics tells, each server its own.

    Args:
        models: whose queues and rows are shown.

    Attributes:
        sound: seconds of sound that were transcribed.
    """

    def __init__(self, models: Models):
        self._registry = CollectorRegistry()
        self._requests = Counter(f"{PREFIX}_requests", "Requests answered.", ["path", "status"], registry=self._registry)
        text = "From the first byte of a transcription's request to the last of its answer."
        self._seconds = Histogram(f"{PREFIX}_request_seconds", text, buckets=BUCKETS_S, registry=self._registry)
        self.sound = Counter(f"{PREFIX}_audio_seconds", "Seconds of sound transcribed.", registry=self._registry)
        gauges = {
            "queue_depth": ("Requests that wait or run.", lambda: sum(s.depth for s in models.schedulers.values())),
            "busy_rows": ("Canvases under way.", lambda: sum(s.busy_rows for s in models.schedulers.values())),
            "models_loaded": ("Models in memory.", lambda: len(models.schedulers)),
            "live_sessions": ("Open sockets.", lambda: models.sockets),
            "live_lag_seconds": (
                "Sound that came and is not transcribed yet, of the socket that is furthest behind.",
                lambda: max((session.inbox.lag_s for session in models.sessions), default=0.0),
            ),
        }
        for name, (text, value) in gauges.items():
            Gauge(f"{PREFIX}_{name}", text, registry=self._registry).set_function(value)

    def count(self, scope: Scope, status: int, seconds: float) -> None:
        """Notes an answer."""
        path = next((path for path in COUNTED if scope["path"].startswith(path)), "other")
        self._requests.labels(path, str(status)).inc()
        if path == COUNTED[0]:
            self._seconds.observe(seconds)

    def text(self) -> bytes:
        """All of it, in Prometheus' format."""
        return generate_latest(self._registry)
