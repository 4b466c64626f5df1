"""The step that never waits for the host: fixed shapes, nothing read back, compiled once a bucket, plain draws."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_jobs import LENGTHS, SAMPLES, SURE_EARLY, TO_THE_END, Queue, assert_same
from tiny_model import clips, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion_gemma_asr.denoise import queue as queue_module
from diffusion_gemma_asr.denoise.canvas import uniform_canvas
from diffusion_gemma_asr.denoise.decode import decode_clips
from diffusion_gemma_asr.denoise.engine import Engine, Job
from diffusion_gemma_asr.denoise.options import DecodeOptions
from diffusion_gemma_asr.denoise.queue import engine_for, run_queue
from diffusion_gemma_asr.denoise.static_engine import KEPT, Bucket, StaticEngine, bucket_for
from diffusion_gemma_asr.denoise.steps import DenoiseOptions
from diffusion_gemma_asr.model.model import DiffusionGemmaASR

WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique", "equal")


@pytest.fixture(scope="module")
def model(whisper_folder: Path, backbone_folder: Path) -> DiffusionGemmaASR:
    return tiny_model(whisper_folder, backbone_folder)


@pytest.fixture(scope="module")
def queue(model: DiffusionGemmaASR) -> Queue:
    return Queue(model, clips(SAMPLES))


class NothingIsReadBack(TorchDispatchMode):
    """Refuses operations that wait for the device: those that give the host a value, or a shape that depends on values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        indices = [x for x in (args[1] if name in ("index", "index_put_") else ()) if x is not None]
        if name in WAITS or any(x.dtype == torch.bool for x in indices):
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


def test_buckets() -> None:
    assert bucket_for(1, 1, 1) == (1, 16, 64)
    assert bucket_for(5, 33, 64) == Bucket(8, 48, 64)
    assert bucket_for(32, 256, 65) == Bucket(32, 256, 128)
    assert bucket_for(33, 257, 400) == Bucket(64, 512, 448)


def test_on_a_cpu_rows_are_not_padded(model: DiffusionGemmaASR) -> None:
    assert isinstance(engine_for(model.backbone), Engine)


def test_nothing_in_a_step_waits_for_the_device(model: DiffusionGemmaASR, queue: Queue) -> None:
    def watched(step: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            with NothingIsReadBack():
                step()

        return run

    engine = StaticEngine(model.backbone, record=watched)
    finished = dict(run_queue(model.backbone, queue.jobs(), queue.read, SURE_EARLY, 3, engine=engine))
    assert_same([finished[number] for number in range(len(LENGTHS))], queue.plain(SURE_EARLY))
    with pytest.raises(AssertionError, match="waits for the device"), NothingIsReadBack():
        torch.tensor([0.0, 1.0]).nonzero()


def test_two_hundred_clips_compile_the_step_once_a_bucket(model: DiffusionGemmaASR, queue: Queue) -> None:
    """No graph breaks (`fullgraph`), and no more compilations than buckets: counted by torch._dynamo."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    recorded: list[Callable[[], None]] = []

    def compiled(step: Callable[[], None]) -> Callable[[], None]:
        recorded.append(step)
        return torch.compile(step, fullgraph=True, dynamic=False, backend="eager")

    rng = random.Random(0)
    jobs, sources = [], [rng.randrange(len(LENGTHS)) for _ in range(200)]
    for number in range(200):
        generator = torch.Generator().manual_seed(number)
        canvas = uniform_canvas(1, rng.choice([3, 8, 16, 24, 40]), model.backbone.vocab_size, generator)[0]
        jobs.append(Job(canvas, generator))
    engine = StaticEngine(model.backbone, record=compiled)
    options = DenoiseOptions(steps=2)
    read = lambda numbers: queue.read([sources[number] for number in numbers])  # noqa: E731
    finished = dict(run_queue(model.backbone, jobs, read, options, 16, engine=engine))
    assert len(finished) == 200
    stats = torch._dynamo.utils.counters
    assert 1 < len(recorded) <= 12
    assert stats["stats"]["unique_graphs"] == len(recorded)
    assert not stats["graph_break"]
    for number in (0, 77, 199):
        generator = torch.Generator().manual_seed(number)
        again = Job(uniform_canvas(1, len(jobs[number].canvas), model.backbone.vocab_size, generator)[0], generator)
        alone = dict(
            run_queue(model.backbone, [again], lambda _, n=number: read([n]), options, 1, engine=Engine(model.backbone))
        )
        assert_same([finished[number]], [alone[0]])


def test_the_memory_of_few_buckets_is_kept(model: DiffusionGemmaASR, queue: Queue) -> None:
    engine = StaticEngine(model.backbone)
    for number, width in enumerate(range(8, 8 + 32 * (KEPT + 3), 32)):
        generator = torch.Generator().manual_seed(number)
        job = Job(uniform_canvas(1, width, model.backbone.vocab_size, generator)[0], generator)
        engine.add([number], [job], [DenoiseOptions(steps=1)], queue.read([0]))
        assert len(engine._buckets) <= KEPT
        assert [number for number, _ in [*engine.step(), *engine.step()]] == [number]


@pytest.mark.parametrize("late", [False, True])
def test_generators_end_where_the_plain_loop_leaves_them(model: DiffusionGemmaASR, queue: Queue, late: bool) -> None:
    """A row that stops early has drawn for a step too many, which must not change what its next canvas draws."""
    options = SURE_EARLY if late else TO_THE_END
    states = []
    for engine in (Engine(model.backbone), StaticEngine(model.backbone)):
        jobs = queue.jobs()
        steps = [one.steps for _, one in run_queue(model.backbone, jobs, queue.read, options, 3, engine=engine)]
        assert (min(steps) < options.steps) is late
        states.append([job.generator.get_state().tolist() for job in jobs])
    assert states[0] == states[1]


def test_whole_clips_are_written_alike(model: DiffusionGemmaASR, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full canvases too, after which a clip goes on on another one."""
    audio: list[np.ndarray] = clips(SAMPLES)
    options = DecodeOptions(language="en", steps=3, entropy_bound=2.0, canvas_length=4)
    expected = decode_clips(model, audio, options, batch_size=3)
    assert any(one.steps > 3 for one in expected)
    monkeypatch.setattr(queue_module, "engine_for", StaticEngine)
    written = decode_clips(model, audio, options, batch_size=3)
    assert [one.tokens for one in written] == [one.tokens for one in expected]
    assert [one.steps for one in written] == [one.steps for one in expected]


def test_what_was_recorded_serves_the_next_engine(model: DiffusionGemmaASR, queue: Queue) -> None:
    """And never two engines at once."""
    model.backbone.recorded.clear()
    expected = queue.plain(TO_THE_END)
    for _ in range(2):
        first, second = StaticEngine(model.backbone), StaticEngine(model.backbone)
        finished: list[dict[int, Any]] = [{}, {}]
        jobs = [queue.jobs(), queue.jobs()]
        runs = [
            run_queue(model.backbone, jobs[i], queue.read, TO_THE_END, 8, engine=e) for i, e in enumerate((first, second))
        ]
        for one, other in zip(*runs, strict=True):
            finished[0] |= [one]
            finished[1] |= [other]
        for found in finished:
            assert_same([found[number] for number in range(len(LENGTHS))], expected)
        assert model.backbone.recorded
    kept = dict(model.backbone.recorded)
    engine = StaticEngine(model.backbone)
    list(run_queue(model.backbone, queue.jobs(), queue.read, TO_THE_END, 8, engine=engine))
    assert all(model.backbone.recorded[bucket] is held for bucket, held in kept.items())
