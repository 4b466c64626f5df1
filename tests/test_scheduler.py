"""Continuous batching across requests: each is transcribed as if it were alone, none waits for or falls with another."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from sounds import write_wav
from tiny_model import clips, tiny_model

from diffusion_gemma_asr.audio.read import Samples
from diffusion_gemma_asr.audio.vad import Chunk
from diffusion_gemma_asr.checkpoint.load import load_checkpoint
from diffusion_gemma_asr.denoise.clip import Shown
from diffusion_gemma_asr.denoise.options import DecodeOptions
from diffusion_gemma_asr.errors import AsrError, AudioError
from diffusion_gemma_asr.model.drafts import Encoded, GreedyCtc, Heard
from diffusion_gemma_asr.model.model import DiffusionGemmaASR
from diffusion_gemma_asr.server.scheduler import DRAFT, Busy, Closed, Event, Failed, Pace, Request, Scheduler
from diffusion_gemma_asr.transcribe.recordings import End, TranscribeOptions, transcribe_chunk, transcribe_many
from diffusion_gemma_asr.transcribe.results import Segment, Transcript, language_of

PATIENCE_S = 60.0
EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "en.flac"
DENOISED = TranscribeOptions(decode=DecodeOptions(language="en", start="noise", steps=3), vad_method="energy")
QUIET = np.zeros(16_000, np.float32)


def recording(pieces_s: Sequence[float], seed: int = 0) -> Samples:
    """Noise in pieces with pauses between them: each piece is a chunk."""
    pieces = clips([round(16_000 * seconds) for seconds in pieces_s], seed)
    return np.concatenate([part for piece in pieces for part in (piece, QUIET)])


@dataclass
class Client:
    """Gathers what a request is told."""

    segments: list[Segment] = field(default_factory=list)
    end: End | AsrError | None = None
    steps: list[tuple[int, int, list[Shown]]] = field(default_factory=list)
    _some: threading.Event = field(default_factory=threading.Event)
    _done: threading.Event = field(default_factory=threading.Event)

    def on_event(self, event: Event) -> None:
        assert self.end is None
        if isinstance(event, Segment):
            self.segments.append(event)
        else:
            self.end = event
            self._done.set()
        self._some.set()

    def on_step(self, chunk: int, step: int, shown: list[Shown]) -> None:
        self.steps.append((chunk, step, shown))

    def wait(self) -> Client:
        assert self._done.wait(PATIENCE_S), "no end came"
        return self

    def wait_for_text(self) -> None:
        assert self._some.wait(PATIENCE_S), "no text came"

    @property
    def transcript(self) -> Transcript:
        assert isinstance(self.wait().end, End), self.end
        segments = tuple(self.segments)
        return Transcript.from_segments(segments, language_of(segments, "en"), self.end.duration)


@pytest.fixture(scope="module")
def model(whisper_folder: Path, backbone_folder: Path) -> DiffusionGemmaASR:
    return tiny_model(whisper_folder, backbone_folder)


@pytest.fixture
def scheduler(model: DiffusionGemmaASR) -> Iterator[Scheduler]:
    with_threads = threading.active_count()
    scheduler = Scheduler(model, rows=4)
    yield scheduler
    scheduler.close(drain=False)
    assert scheduler.depth == scheduler.busy_rows == 0
    assert threading.active_count() == with_threads


def assert_same(ours: Transcript, expected: Transcript) -> None:
    assert ours.text == expected.text and ours.duration == expected.duration
    for one, other in zip(ours.segments, expected.segments, strict=True):
        assert (one.id, one.text, one.tokens, one.start, one.end) == (
            other.id,
            other.text,
            other.tokens,
            other.start,
            other.end,
        )
        assert one.avg_logprob == pytest.approx(other.avg_logprob, abs=5e-3)
        assert [word.word for word in one.words or ()] == [word.word for word in other.words or ()]


def until(holds: object) -> None:
    """Waits until a function gives something true."""
    assert callable(holds)
    ends = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < ends, "it did not come to pass"
        time.sleep(0.005)


@pytest.mark.parametrize("start", ["noise", "draft"])
@pytest.mark.parametrize("pace", [Pace(4.0, 6.0), Pace(100.0, 400.0)], ids=["a few at once", "many at once"])
def test_a_transcript_does_not_depend_on_what_else_is_in_the_batch(model: DiffusionGemmaASR, start: str, pace: Pace) -> None:
    rng = np.random.default_rng(0)
    sounds = [recording(rng.uniform(0.4, 5.0, rng.integers(1, 5)), seed) for seed in range(10)]
    options = [
        replace(
            DENOISED,
            decode=DecodeOptions(language=("en", "de")[i % 2], start=start, steps=1 + i % 3, seed=i),  # type: ignore[arg-type]
            word_timestamps=i % 3 == 0,
        )
        for i in range(len(sounds))
    ]
    expected = [next(transcribe_many(model, [sound], one)) for sound, one in zip(sounds, options, strict=True)]
    scheduler = Scheduler(model, rows=5, pace=pace)
    clients = [Client() for _ in sounds]
    for client, sound, one in zip(clients, sounds, options, strict=True):
        scheduler.submit(sound, one, client.on_event)
    for client, whole in zip(clients, expected, strict=True):
        assert isinstance(whole, Transcript) and whole.segments
        assert_same(client.transcript, whole)
    scheduler.close()


@pytest.fixture(scope="module")
def bundled() -> DiffusionGemmaASR:
    return load_checkpoint("mini", device="cpu", local_files_only=True)


@pytest.mark.parametrize("start", [None, "draft"])
def test_the_bundled_model_writes_what_it_writes_alone(bundled: DiffusionGemmaASR, start: str | None) -> None:
    options = TranscribeOptions(decode=DecodeOptions(language="en", start=start))  # type: ignore[arg-type]
    (expected,) = transcribe_many(bundled, [EXAMPLE], options)
    assert isinstance(expected, Transcript) and "follow the river" in expected.text
    scheduler = Scheduler(bundled)
    clients = [Client() for _ in range(6)]
    for client, source in zip(clients, [EXAMPLE, str(EXAMPLE), EXAMPLE.read_bytes()] * 2, strict=True):
        scheduler.submit(source, options, client.on_event)
    for client in clients:
        assert_same(client.transcript, expected)
    scheduler.close()


def test_a_short_recording_is_answered_while_a_long_one_runs(scheduler: Scheduler) -> None:
    long, short = Client(), Client()
    scheduler.submit(recording([6.0] * 30), DENOISED, long.on_event)
    long.wait_for_text()
    before = len(long.segments)
    scheduler.submit(recording([1.0]), DENOISED, short.on_event)
    assert short.transcript.segments
    assert len(long.segments) - before <= 4 and long.end is None
    assert len(long.transcript.segments) == 30


def test_many_short_ones_do_not_stop_a_long_one(scheduler: Scheduler) -> None:
    long, stop = Client(), threading.Event()

    def others() -> None:
        while not stop.is_set():
            client = Client()
            scheduler.submit(recording([0.5] * 2), DENOISED, client.on_event)
            client.wait()

    crowd = [threading.Thread(target=others) for _ in range(6)]
    for thread in crowd:
        thread.start()
    scheduler.submit(recording([8.0] * 8), DENOISED, long.on_event)
    assert len(long.transcript.segments) == 8
    stop.set()
    for thread in crowd:
        thread.join()


def test_who_cancels_gets_nothing_more_and_frees_the_rows(scheduler: Scheduler) -> None:
    client = Client()
    request = scheduler.submit(recording([5.0] * 40), DENOISED, client.on_event, client.on_step)
    client.wait_for_text()
    scheduler.cancel(request)
    segments, steps = len(client.segments), len(client.steps)
    until(lambda: scheduler.depth == 0 and scheduler.busy_rows == 0)
    time.sleep(0.05)
    assert client.end is None and (len(client.segments), len(client.steps)) == (segments, steps)
    other = Client()
    scheduler.submit(recording([1.0]), DENOISED, other.on_event)
    assert other.transcript.segments


def test_a_request_may_be_cancelled_where_it_is_told_something(scheduler: Scheduler) -> None:
    requests: list[Request] = []
    told: list[Event] = []

    def on_event(event: Event) -> None:
        told.append(event)
        scheduler.cancel(requests[0])

    requests.append(scheduler.submit(recording([1.0] * 10), DENOISED, on_event))
    until(lambda: scheduler.depth == 0)
    assert len(told) == 1


def test_a_bad_recording_does_not_lose_the_others(scheduler: Scheduler) -> None:
    cut_off = write_wav(recording([1.0]))[:100]
    nan = recording([1.0, 1.0])
    nan[30_000] = np.nan
    bad, good = [Client() for _ in range(5)], [Client() for _ in range(5)]
    sources = [b"no sound", cut_off, nan, "/no/such/file.wav", np.zeros(100, np.float32)]
    for one, other, source in zip(bad, good, sources, strict=True):
        scheduler.submit(source, DENOISED, one.on_event)
        scheduler.submit(recording([1.0]), DENOISED, other.on_event)
    assert all(isinstance(client.wait().end, AudioError) for client in bad)
    texts = {client.transcript.text for client in good}
    assert len(texts) == 1


def test_sound_that_does_not_come_blocks_nobody(scheduler: Scheduler) -> None:
    class Slow(io.BytesIO):
        comes = threading.Event()

        def read(self, size: int | None = -1) -> bytes:
            assert self.comes.wait(PATIENCE_S)
            return super().read(size)

    slow, others = Client(), [Client() for _ in range(20)]
    scheduler.submit(Slow(write_wav(recording([1.0]))), DENOISED, slow.on_event)
    for client in others:
        scheduler.submit(recording([0.5]), DENOISED, client.on_event)
    assert all(client.transcript.segments for client in others) and slow.end is None
    Slow.comes.set()
    assert slow.transcript.segments


def test_too_many_requests_are_refused(model: DiffusionGemmaASR) -> None:
    scheduler = Scheduler(model, max_queue=3)
    clients = [Client() for _ in range(3)]
    for client in clients:
        scheduler.submit(recording([2.0] * 5), DENOISED, client.on_event)
    with pytest.raises(Busy, match="3 requests are waiting"):
        scheduler.submit(recording([1.0]), DENOISED, Client().on_event)
    assert all(client.transcript.segments for client in clients)
    until(lambda: scheduler.depth == 0)
    again = Client()
    scheduler.submit(recording([1.0]), DENOISED, again.on_event)
    assert again.transcript.segments
    scheduler.close()


def test_what_the_model_cannot_do_is_refused_at_once(scheduler: Scheduler) -> None:
    with pytest.raises(AsrError, match="context"):
        scheduler.submit(QUIET, replace(DENOISED, decode=DecodeOptions(language="en", hotwords="mill")), Client().on_event)
    assert scheduler.depth == 0


def test_closing_waits_for_what_is_under_way(model: DiffusionGemmaASR) -> None:
    scheduler, client = Scheduler(model), Client()
    scheduler.submit(recording([2.0] * 5), DENOISED, client.on_event)
    scheduler.close()
    assert isinstance(client.end, End) and len(client.segments) == 5
    with pytest.raises(Closed):
        scheduler.submit(QUIET, DENOISED, Client().on_event)
    with pytest.raises(Closed):
        scheduler.decode_chunk(Chunk(0.0, clips([16_000])[0], 0.0, 1.0, 1.0), DENOISED)


@pytest.mark.parametrize("how", [{"drain": False}, {"timeout": 0.05}])
def test_who_is_cut_off_by_closing_is_told_so(model: DiffusionGemmaASR, how: dict[str, float]) -> None:
    scheduler, client = Scheduler(model), Client()
    scheduler.submit(recording([5.0] * 200), DENOISED, client.on_event)
    client.wait_for_text()
    scheduler.close(**how)  # type: ignore[arg-type]
    assert isinstance(client.wait().end, Closed) and len(client.segments) < 200


def test_a_failure_of_the_model_ends_what_is_under_way_and_nothing_else(
    whisper_folder: Path, backbone_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails = False
    plain = GreedyCtc.hear

    def hear(greedy: GreedyCtc, encoded: Encoded) -> Heard:
        if fails:
            raise RuntimeError("out of memory\nand more")
        return plain(greedy, encoded)

    monkeypatch.setattr(GreedyCtc, "hear", hear)
    model = tiny_model(whisper_folder, backbone_folder)
    options = replace(DENOISED, decode=DecodeOptions(language="en", start="draft", steps=3))
    scheduler = Scheduler(model, rows=4)
    (alone,) = transcribe_many(model, [recording([1.0])], options)
    for _ in range(3):
        fails = True
        failing = [Client() for _ in range(6)]
        for client in failing:
            scheduler.submit(recording([1.0, 1.0]), options, client.on_event)
        for client in failing:
            assert isinstance(client.wait().end, Failed)
            assert str(client.end) == "the model failed: out of memory"
        until(lambda: scheduler.depth == 0 and scheduler.busy_rows == 0)
        fails = False
        works = Client()
        scheduler.submit(recording([1.0]), options, works.on_event)
        assert isinstance(alone, Transcript)
        assert_same(works.transcript, alone)
    scheduler.close()


def test_a_caller_who_fails_stops_nobody_else(scheduler: Scheduler) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("gone")

    good = Client()
    scheduler.submit(recording([1.0] * 4), DENOISED, fail)
    scheduler.submit(recording([1.0] * 4), DENOISED, Client().on_event, fail)
    scheduler.submit(recording([1.0] * 4), DENOISED, good.on_event)
    assert len(good.transcript.segments) == 4
    until(lambda: scheduler.depth == 0 and scheduler.busy_rows == 0)


def test_a_chunk_is_decoded_as_it_is_elsewhere(model: DiffusionGemmaASR, scheduler: Scheduler) -> None:
    chunk = Chunk(3.0, clips([30_000])[0], 3.0, 4.8, 0.9)
    options = replace(DENOISED, word_timestamps=True)
    expected = transcribe_chunk(model, chunk, options)
    crowd = [Client() for _ in range(8)]
    for client in crowd:
        scheduler.submit(recording([2.0] * 3), DENOISED, client.on_event)
    ours = scheduler.decode_chunk(chunk, options).result(PATIENCE_S)
    assert ours is not None and expected is not None
    assert (ours.text, ours.id, ours.start, ours.end) == (expected.text, 0, 3.0, 4.8)
    assert [(w.word, w.start) for w in ours.words or ()] == [(w.word, w.start) for w in expected.words or ()]
    with pytest.raises(AudioError):
        scheduler.decode_chunk(replace(chunk, samples=np.zeros(40 * 16_000, np.float32)), options).result(PATIENCE_S)
    assert all(client.transcript.segments for client in crowd)


def test_a_chunk_that_nobody_waits_for_frees_its_rows(scheduler: Scheduler) -> None:
    endless = replace(DENOISED, decode=replace(DENOISED.decode, steps=10**6))
    decoding = scheduler.decode_chunk(Chunk(0.0, clips([30_000])[0], 0.0, 1.8, 0.9), endless)
    until(lambda: scheduler.busy_rows)
    assert decoding.cancel()
    until(lambda: scheduler.depth == 0 and scheduler.busy_rows == 0)


@pytest.mark.parametrize("start", [None, "draft", "noise"])
def test_whoever_watches_sees_the_draft_and_every_step(bundled: DiffusionGemmaASR, start: str | None) -> None:
    scheduler, client = Scheduler(bundled), Client()
    options = TranscribeOptions(decode=DecodeOptions(start=start, steps=5))  # type: ignore[arg-type]
    request = scheduler.submit(EXAMPLE, options, client.on_event, client.on_step, logprobs=True)
    (segment,) = client.transcript.segments
    scheduler.close()
    steps = [step for _, step, _ in client.steps]
    assert steps == [DRAFT, *range(steps[-1] + 1)] and 1 <= steps[-1] <= 5
    _, _, last = client.steps[-1]
    assert "".join(piece.text for piece in last).strip() == segment.text
    assert all(0 <= piece.confidence <= 1 for piece in last)
    assert request.logprobs is not None
    assert "".join(text for text, _ in request.logprobs[0]).strip() == segment.text
    total = sum(value for _, value in request.logprobs[0])
    assert total == pytest.approx(segment.avg_logprob * len(segment.tokens))


def test_nothing_grows_over_some_hundred_requests(scheduler: Scheduler) -> None:
    process = psutil.Process()
    sounds = [write_wav(recording([0.3 + 0.1 * (i % 7)], i)) for i in range(20)]
    memory, threads = [], []
    for _ in range(4):
        clients = [Client() for _ in range(50)]
        for i, client in enumerate(clients):
            request = scheduler.submit(io.BytesIO(sounds[i % len(sounds)]), DENOISED, client.on_event)
            if i % 8 == 0:
                scheduler.cancel(request)
        assert all(client.transcript.segments for i, client in enumerate(clients) if i % 8)
        until(lambda: scheduler.depth == 0)
        memory.append(process.memory_info().rss)
        threads.append(threading.active_count())
    assert memory[-1] - memory[1] < 30e6 and threads[-1] == threads[0]
