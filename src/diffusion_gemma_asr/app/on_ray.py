"""`transcribe --ray`: the same work on the machines of a Ray cluster, with a model in each worker.

Ray Data hands tasks of some files to a pool of actors and gives those of a machine that is lost to another one. So a file
may be begun twice; its outputs are files that are whole or not there, and what is there is not done again.
"""

from __future__ import annotations

import logging
import math
import os
import pickle
import re
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import typer

from ..errors import AsrError, first_line
from ..files import Place, exists
from ..strict import option
from ..transcribe.recognizer import Recognizer
from ..transcribe.recordings import End, Progress
from ..transcribe.results import Segment
from .jobs import Job, OutputOptions, events, without_existing
from .loading import LoadOptions, load_recognizer
from .terminal import Bar, complain, shows_progress, summarize

FILES = 16  # of a task, at most: they share batches, and are done again where a machine is lost
HOST_AND_PORT = re.compile(r"(?:ray://)?([\w.-]+):(\d+)")
CONNECT_S = 10.0
ROUNDS = 4  # tasks for each worker, at least, where there are files enough: none waits long for the last


@dataclass(frozen=True)
class RayOptions:
    """Where on a Ray cluster to work. Raises AsrError on options that do not go together."""

    ray: str | None = option(
        None,
        "On the machines of a Ray cluster: its HOST:PORT; nothing or auto: the one that runs here, or this machine alone.",
        metavar="[ADDRESS]",
    )
    workers: int | None = option(None, "With --ray: models at work, at most.", min=1, show_default="as many as fit")
    gpus_per_worker: float | None = option(
        None, "With --ray: GPUs of a worker; 0.5: two share one.", min=0, show_default="1 where there are any"
    )

    def __post_init__(self) -> None:
        if self.ray is None and (self.workers is not None or self.gpus_per_worker is not None):
            raise AsrError("workers and gpus_per_worker are options of --ray; give it too")


@dataclass(frozen=True)
class Plan:
    """What every worker has to know.

    Attributes:
        loading: its model.
        output: what it writes.
        folder: from which relative paths start.
        load: what loads the model, see `cli.main`; None is `diffusion_gemma_asr.load`.
    """

    loading: LoadOptions
    output: OutputOptions
    folder: str
    load: Callable[..., Recognizer] | None = None


@dataclass(frozen=True)
class Result:
    """What became of a file.

    Attributes:
        file: the recording.
        sound_s: seconds of it that were transcribed.
        errors: what went wrong, in a line each.
        fatal: they concern every file.
    """

    file: Place
    sound_s: float = 0.0
    errors: tuple[str, ...] = ()
    fatal: bool = False


class Transcriber:
    """A model, and what Ray's actor does with it: jobs to results, each pickled, since Arrow knows no paths."""

    def __init__(self, plan: Plan):
        self._plan, self._broken = plan, ""
        with suppress(OSError):  # not every machine needs to have it: addresses and absolute paths do without
            os.chdir(plan.folder)
        try:
            self._model = load_recognizer(plan.loading, plan.load).model
        except AsrError as error:
            self._broken = str(error)

    def __call__(self, batch: Any) -> Any:
        """A table with a column of jobs to one of results."""
        import pyarrow

        jobs: list[Job] = [pickle.loads(job) for job in batch["job"].to_pylist()]
        results = [pickle.dumps(result) for result in self.results(jobs)]
        return pyarrow.table({"result": pyarrow.array(results, pyarrow.binary())})

    def results(self, jobs: Sequence[Job]) -> Iterator[Result]:
        """Does jobs, but for outputs that are there: another worker may have been lost when it had made them."""
        if self._broken:
            yield Result(jobs[0].file, errors=(self._broken,), fatal=True)
            return
        left: list[Job] = []
        for job in jobs:
            rest = [job] if self._plan.output.overwrite else without_existing([job], exists)
            left += rest
            if not rest:
                yield Result(job.file)
        yield from self._done(left)

    def _done(self, jobs: Sequence[Job]) -> Iterator[Result]:
        left = list(jobs)
        try:
            for job, event in events(self._model, jobs):
                if isinstance(event, Segment):
                    job.add(event)
                    continue
                left.pop(0)
                if isinstance(event, End):
                    errors = job.write(event.duration, self._plan.output.subtitles)
                    yield Result(job.file, job.sound_s(event.duration), tuple(map(str, errors)))
                else:
                    yield Result(job.file, errors=(str(event),))
                job.close()
        except AsrError as error:
            yield Result(left[0].file, errors=(str(error),), fatal=True)
        except Exception as error:  # not one of ours: each of those left by itself, to find the one that it comes from
            if len(left) == 1:
                why = f"{left[0].file}: failed ({type(error).__name__}: {first_line(error)})"
                yield Result(left[0].file, errors=(why,))
                return
            for job in left:
                job.close()
                yield from self._done([job])


def run_on_ray(jobs: Sequence[Job], plan: Plan, options: RayOptions, lines: bool) -> bool:
    """Transcribes; says how fast it went and which files failed.

    Args:
        jobs: with outputs that all machines of the cluster see.
        plan: for the workers.
        options: where.
        lines: progress in lines, see `Bar`.

    Returns:
        whether any failed.

    Raises:
        AsrError: Ray is not installed, there is no such cluster, it has no such GPUs, or the model does not work there.
    """
    began, sound_s, done = time.perf_counter(), 0.0, 0
    failed: list[Place] = []
    bar = Bar(None, lines) if shows_progress(lines) else None
    try:
        with _cluster(options.ray) as ray:
            for result in _results(ray, jobs, plan, options):
                with bar.aside() if bar is not None else nullcontext():
                    for error in () if result.fatal else result.errors:
                        complain(error)
                if result.fatal:
                    raise AsrError(result.errors[0])
                done, sound_s = done + 1, sound_s + result.sound_s
                if result.errors:
                    failed.append(result.file)
                if bar is not None and sound_s:
                    bar.expect(sound_s / done * len(jobs))
                    bar.update(Progress(sound_s, sound_s))
    except KeyboardInterrupt:
        complain(f"interrupted; {done} of {len(jobs)} files are done: the same command goes on")
        raise typer.Exit(130) from None
    finally:
        if bar is not None:
            bar.close()
    summarize(sound_s, time.perf_counter() - began, failed, len(jobs))
    return bool(failed)


@contextmanager
def _cluster(address: str | None) -> Iterator[Any]:
    """Ray, connected."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # it warns of restarts that need what this process holds
    try:
        import ray
        import ray.data
    except ImportError:
        raise AsrError("--ray needs the extra [ray]: pip install 'diffusion-gemma-asr[ray]'") from None
    try:
        if found := HOST_AND_PORT.fullmatch(address or ""):
            socket.create_connection((found[1], int(found[2])), timeout=CONNECT_S).close()  # Ray itself tries for minutes
        where = None if address == "auto" else address
        ray.init(where, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    except Exception as error:  # ConnectionError, ValueError, and its own
        raise AsrError(f"--ray {address}: no Ray cluster can be used there ({first_line(error)})") from None
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # it prints tracebacks of what it raises
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        yield ray
    finally:
        ray.shutdown()


def _results(ray: Any, jobs: Sequence[Job], plan: Plan, options: RayOptions) -> Iterator[Result]:
    """What became of the jobs, as they are done."""
    there = ray.cluster_resources()
    gpus = options.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if there.get("GPU") and plan.loading.device in ("auto", "cuda") else 0.0
    if gpus > there.get("GPU", 0):
        raise AsrError(f"--gpus_per_worker {gpus:g}: the cluster has {there.get('GPU', 0):g} GPUs; give 0 to do without")
    workers = options.workers or max(1, int(there["GPU"] / gpus if gpus else there["CPU"]))
    tasks = max(math.ceil(len(jobs) / FILES), min(len(jobs), ROUNDS * workers))
    rows = ray.data.from_items([{"job": pickle.dumps(job)} for job in jobs], override_num_blocks=tasks)
    results = rows.map_batches(
        Transcriber,
        fn_constructor_args=(plan,),
        batch_size=None,  # a block is a task
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=workers),
        num_cpus=1,
        num_gpus=gpus,
    )
    try:
        for row in results.iter_rows():
            yield pickle.loads(row["result"])
    except ray.exceptions.RayError as error:
        lines = str(error).strip().splitlines()
        raise AsrError(f"Ray gave up ({first_line(error)} ... {lines[-1].strip()}); the same command goes on") from error
