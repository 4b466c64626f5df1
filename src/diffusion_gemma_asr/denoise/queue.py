"""A queue of canvases that never waits: a row that has stopped leaves, and the next one takes its place.

This is continuous batching (Yu et al. 2022, "Orca"), at the grain of a denoising step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence

from ..model.backbone import Backbone
from ..model.prefill import Prefill
from .engine import Engine, Finished, Job, OnCanvas
from .static_engine import StaticEngine
from .steps import DenoiseOptions

REFILL = 0.25  # share of the rows that must be free before others are read in: few prompts at a time are slow to read

AnyEngine = Engine | StaticEngine

ReadPrompts = Callable[[Sequence[int]], Prefill]
"""Reads the prompts of the jobs with these numbers."""


def engine_for(backbone: Backbone, on_canvas: OnCanvas | None = None) -> AnyEngine:
    """The engine that suits the device: on a CPU launching is cheap, and padding to fixed shapes is not."""
    return StaticEngine(backbone, on_canvas) if backbone.device.type == "cuda" else Engine(backbone, on_canvas)


def run_queue(
    backbone: Backbone,
    jobs: Sequence[Job],
    read: ReadPrompts,
    options: DenoiseOptions,
    rows: int,
    on_canvas: OnCanvas | None = None,
    engine: AnyEngine | None = None,
) -> Iterator[tuple[int, Finished]]:
    """Denoises jobs, the longest canvases first, `rows` at once as long as there are so many.

    Args:
        backbone: that denoises them.
        jobs: their numbers are their places. Whoever takes what is yielded may append others, which wait behind all.
        read: reads prompts.
        options: of all jobs.
        rows: canvases under way at once.
        on_canvas: see `Engine`.
        engine: a fresh one; None is the one that suits the device.

    Yields:
        (number of the job, what became of it), as they finish.
    """
    if engine is None:
        engine = engine_for(backbone, on_canvas)
    waiting = deque(sorted(range(len(jobs)), key=lambda number: -len(jobs[number].canvas)))
    known = len(jobs)
    try:
        while waiting or len(engine):
            free = rows - len(engine)
            if waiting and (len(engine) == 0 or free >= REFILL * rows):
                fresh = [waiting.popleft() for _ in range(min(free, len(waiting)))]
                engine.add(fresh, [jobs[number] for number in fresh], [options] * len(fresh), read(fresh))
            yield from engine.step()
            waiting.extend(range(known, len(jobs)))
            known = len(jobs)
    finally:
        engine.close()
