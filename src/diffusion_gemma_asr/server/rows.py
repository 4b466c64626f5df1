"""Canvases under way in the server: those of short recordings go first.

On a processor a step takes the longer the more is in it: short recordings have an engine of their own there, and most turns
belong to it while there is something in it. On a GPU one more row costs little, and there is one engine.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence

from torch import Tensor

from ..denoise.clip import read_prompts
from ..denoise.engine import Finished
from ..denoise.queue import engine_for
from ..model.model import DiffusionGemmaASR
from .requests import Request, Task

QUICK_S = 6.0  # seconds of a short recording, at most
QUICK_TURNS = 8  # turns for short recordings alone between two for all


class Rows:
    """What is being denoised.

    Args:
        model: whose backbone denoises.
    """

    def __init__(self, model: DiffusionGemmaASR):
        self._tasks: dict[int, Task] = {}  # by their numbers in an engine
        self._numbers = itertools.count()
        engines = [engine_for(model.backbone, self._show) for _ in range(2 if model.device.type == "cpu" else 1)]
        self._engine, self._quick = engines[0], engines[-1]
        self._apart = len(engines) == 2
        self._quick_turns = 0

    def __len__(self) -> int:
        return len(self._tasks)

    @property
    def quick(self) -> bool:
        """Whether short recordings are under way, where they have an engine of their own."""
        return self._apart and len(self._quick) > 0

    def quick_turn(self, coming: bool) -> bool:
        """Begins a turn; whether it is one for what is short alone.

        Args:
            coming: something short waits.
        """
        self._quick_turns = self._quick_turns + 1 if self._apart and (coming or self.quick) else 0
        return self._quick_turns % (1 + QUICK_TURNS) != 0

    def add(self, tasks: Sequence[Task]) -> None:
        """Adds drafted chunks: the next canvas of each."""
        quick = [self._apart and _is_quick(task) for task in tasks]
        for engine, chosen in (self._quick, True), (self._engine, False):
            some = [task for task, is_quick in zip(tasks, quick, strict=True) if is_quick is chosen]
            decodings = [task.decoding for task in some if task.decoding is not None]
            if decodings:
                numbers = [next(self._numbers) for _ in some]
                self._tasks.update(zip(numbers, some, strict=True))
                jobs = [decoding.job() for decoding in decodings]
                engine.add(numbers, jobs, [decoding.denoising for decoding in decodings], read_prompts(decodings))

    def step(self, quick: bool) -> Iterator[tuple[Task, Finished]]:
        """One step, of short recordings alone or of all; what has ended leaves."""
        engines = [self._quick] if quick or not self._apart else [self._quick, self._engine]
        for number, finished in itertools.chain(*[engine.step() for engine in engines]):
            yield self._tasks.pop(number), finished

    def keep(self, tasks: Collection[Task]) -> None:
        """Drops all others."""
        gone = {number for number, task in self._tasks.items() if task not in tasks}
        for number in gone:
            del self._tasks[number]
        if gone:
            self._engine.drop(gone)
            self._quick.drop(gone)

    def _show(self, number: int, step: int, canvas: Tensor, entropy: Tensor) -> None:
        task = self._tasks[number]
        assert task.decoding is not None
        task.request.show(task.place, step, task.decoding, (canvas, entropy))


def is_newcomer(request: Request) -> bool:
    """Whether a request waits to begin, with something short."""
    try:
        return _begins_short(request.waiting[0]) and not request.over
    except IndexError:  # nothing waits
        return False


def _is_quick(task: Task) -> bool:
    """Whether it is, as far as is known, all of a short recording."""
    return _begins_short(task) and (task.request.read_all or task.request.read < 2)


def _begins_short(task: Task) -> bool:
    """Whether it is the first chunk of a recording, and short."""
    return task.place == 0 and task.chunk.duration <= QUICK_S
