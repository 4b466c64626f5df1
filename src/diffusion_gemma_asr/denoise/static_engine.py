"""The engine for GPUs: as `engine.Engine`, on rows of fixed shapes that a recorded step denoises without the host.

Canvases under way lie in the smallest bucket that holds them (`device_step.Bucket`); each bucket's step is recorded once.
The host only fills in random numbers, and reads which rows have stopped one step late, while the next step already runs:
a row that stops early costs one pass more that nobody reads. Where all rows have used up their steps nothing is started.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..model.backbone import Backbone
from ..model.prefill import Prefill
from .device_step import Bucket, Rows, device_step
from .engine import Finished, Job, OnCanvas
from .steps import DenoiseOptions

CANVASES = (16, 32, 48, 64, 96, 128, 192, 256)  # positions of a bucket's canvas; longer ones are multiples of the last
PROMPTS = 64  # positions of a bucket's prompt are a multiple of this
KEPT = 8  # buckets whose memory is kept
WARM_UPS = 2  # steps that run before one is recorded, so that libraries have chosen their kernels

Record = Callable[[Callable[[], None]], Callable[[], None]]
"""Takes a step and gives one that does the same, again and again, on the same tensors."""


def recorded(step: Callable[[], None], pool: Any) -> Callable[[], None]:
    """A step as a CUDA graph, whose temporaries lie in a memory pool that other steps may share, one running at a time."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        step()
    return graph.replay


def bucket_for(rows: int, canvas: int, prompt: int) -> Bucket:
    """The smallest bucket for so many rows, positions of the longest canvas, and of the longest prompt."""
    longest = next((size for size in CANVASES if size >= canvas), -(-canvas // CANVASES[-1]) * CANVASES[-1])
    return Bucket(1 << (rows - 1).bit_length(), longest, -(-prompt // PROMPTS) * PROMPTS)


@dataclass
class _Job:
    """A canvas under way.

    Attributes:
        number: by which the caller knows it.
        job: what it was.
        options: of it.
        prompt: positions of its prompt.
        steps: passes started.
        before: state of its generator before the draws of the last of them.
    """

    number: int
    job: Job
    options: DenoiseOptions
    prompt: int
    steps: int = 0
    before: Tensor | None = None

    def bucket(self) -> tuple[int, int]:
        return len(self.job.canvas), self.prompt


class _Seen(NamedTuple):
    """What a pass left behind, on its way to the host: `Rows.running`, `best`, `logprobs`, `entropy` and `step`, the jobs
    that were under way by row, and what tells that it has arrived."""

    running: Tensor
    best: Tensor
    logprobs: Tensor
    entropy: Tensor
    step: Tensor
    jobs: dict[int, _Job]
    arrived: torch.cuda.Event | None


class StaticEngine:
    """Canvases under way on one backbone; each ends as `engine.Engine` would end it.

    Args:
        backbone: that denoises them.
        on_canvas: see `Engine`; each step then waits for its canvases.
        record: makes a step that is cheap to start; by default CUDA graphs on CUDA, and the step as it is elsewhere, both
            kept for the next engine of this backbone.
    """

    def __init__(self, backbone: Backbone, on_canvas: OnCanvas | None = None, record: Record | None = None):
        self.backbone, self.on_canvas = backbone, on_canvas
        self._shares = record is None
        on_gpu = backbone.device.type == "cuda"
        self._head = backbone.head
        if record is None:
            record = partial(recorded, pool=torch.cuda.graph_pool_handle()) if on_gpu else lambda step: step
        self._record = record
        self._buckets: dict[Bucket, tuple[Rows, Callable[[], None]]] = {}  # the one used last is last
        if self._shares:
            self._buckets, backbone.recorded = backbone.recorded, self._buckets
        self._now: Bucket | None = None
        self._jobs: dict[int, _Job] = {}  # by row
        self._pending: _Seen | None = None

    def __len__(self) -> int:
        """Canvases under way."""
        return len(self._jobs)

    @torch.no_grad()
    def add(self, numbers: Sequence[int], jobs: Sequence[Job], options: Sequence[DenoiseOptions], prefill: Prefill) -> None:
        """Adds jobs between two steps; see `Engine.add`."""
        sizes = prefill.lengths.tolist()
        added = [_Job(*one) for one in zip(numbers, jobs, options, sizes, strict=True)]
        if self.on_canvas is not None:
            for one in added:
                self.on_canvas(one.number, 0, one.job.canvas, torch.full((len(one.job.canvas),), torch.inf))
        rows = self._move(added, prefill.layers())
        free = (row for row in range(len(rows.lengths)) if row not in self._jobs)
        for of, one in enumerate(added):
            row = next(free)
            rows.put(row, one.job, self._head, one.options, prefill, of)
            self._jobs[row] = one

    def _move(self, added: Sequence[_Job], layers: list[tuple[Tensor, Tensor]]) -> Rows:
        """The rows of the smallest bucket for what is under way and what is added; the former are in their places."""
        everything = [*self._jobs.values(), *added]
        canvas, prompt = (max(sizes) for sizes in zip(*(one.bucket() for one in everything), strict=True))
        bucket = bucket_for(len(everything), canvas, prompt)
        old, self._now = self._now, bucket
        if old == bucket:
            return self._buckets[bucket][0]
        held = self._buckets.pop(bucket, None)
        if held is None:
            rows = Rows.empty(bucket, self.backbone, layers)
            step = self._record(lambda: device_step(self.backbone, self._head, rows))
            held = rows, step
        held[0].running.fill_(False)
        if old is not None and self._jobs:
            held[0].copy_rows(self._buckets[old][0], list(zip(self._jobs, range(len(self._jobs)), strict=True)))
            here = {row: new for new, row in enumerate(self._jobs)}
            self._jobs = {here[row]: one for row, one in self._jobs.items()}
        self._buckets[bucket] = held
        for least in list(self._buckets)[: max(0, len(self._buckets) - KEPT)]:
            del self._buckets[least]
        return held[0]

    def drop(self, numbers: Collection[int]) -> None:
        """Jobs that nobody waits for any more leave their rows at once."""
        for row, one in list(self._jobs.items()):
            if one.number in numbers:
                self._rows.running[row] = False
                del self._jobs[row]

    @torch.no_grad()
    def step(self) -> list[tuple[int, Finished]]:
        """Starts a denoising step of all canvases under way; gives those that have stopped in the one before; they leave."""
        before, self._pending = self._pending, self._start()
        finished = [] if before is None else self._settled(before)
        if self.on_canvas is not None and self._pending is not None:
            finished += self._settled(self._pending)
            self._pending = None
        return finished

    def close(self) -> None:
        """Gives up what is under way; what was recorded serves the next engine of this backbone."""
        self._jobs, self._pending, self._now = {}, None, None
        if self._shares:
            self.backbone.recorded, self._buckets = self._buckets, {}

    @property
    def _rows(self) -> Rows:
        assert self._now is not None
        return self._buckets[self._now][0]

    def _start(self) -> _Seen | None:
        """Starts a pass; None where every canvas has used up its steps."""
        going = {row: one for row, one in self._jobs.items() if one.steps < one.options.steps}
        if not going or self._now is None:
            return None
        rows, run = self._buckets[self._now]
        for row, one in going.items():
            generator, n = one.job.generator, len(one.job.canvas)
            one.before = generator.get_state()
            torch.rand(n, generator=generator, out=rows.uniform[row, :n])
            torch.randint(self.backbone.vocab_size, (n,), generator=generator, out=rows.noise[row, :n])
            one.job.write_under(rows.slots[row], rows.best[row] if one.steps else None)
            one.steps += 1
        run()
        left = (rows.running, rows.best, rows.logprobs, rows.entropy, rows.step)
        running, best, logprobs, entropy, step = (x.to("cpu", non_blocking=True, copy=True) for x in left)
        arrived = None
        if rows.running.is_cuda:
            arrived = torch.cuda.Event()
            arrived.record()
        return _Seen(running, best, logprobs, entropy, step, going, arrived)

    def _settled(self, seen: _Seen) -> list[tuple[int, Finished]]:
        """Shows what a pass left behind; gives the canvases that stopped in it."""
        if seen.arrived is not None:
            seen.arrived.synchronize()
        running, steps = seen.running.tolist(), seen.step.tolist()
        finished = []
        places = {id(one): row for row, one in self._jobs.items()}
        for row, one in seen.jobs.items():
            if id(one) not in places:  # dropped, or it had stopped in the pass before
                continue
            n = len(one.job.canvas)
            best = seen.best[row, :n]
            if self.on_canvas is not None:
                self.on_canvas(one.number, steps[row], best, seen.entropy[row, :n])
            if not running[row]:
                finished.append((one.number, Finished(best, seen.logprobs[row, :n], steps[row])))
                del self._jobs[places[id(one)]]
                if one.steps > steps[row] and one.before is not None:  # the draws of a pass that nobody needed
                    one.job.generator.set_state(one.before)
        return finished
