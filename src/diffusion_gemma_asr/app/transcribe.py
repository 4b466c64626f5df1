"""The command `diffusion-gemma-asr transcribe`."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer

import diffusion_gemma_asr as asr

from ..checkpoint.load import BUNDLED, DEFAULT_MODEL, DTYPES, choose_device, choose_dtype
from ..checkpoint.quantization import QUANTIZATIONS
from ..errors import AsrError, AudioError
from ..files import write_whole
from ..model.model import DiffusionGemmaASR
from ..strict import option
from ..transcribe.live import check_live
from ..transcribe.memory import steady_memory
from ..transcribe.recognizer import Recognizer
from ..transcribe.recordings import End, TranscribeOptions, stream_many
from ..transcribe.results import Segment, Transcript
from ..transcribe.subtitles import SubtitleOptions, timestamp
from ..transcribe.writers import render
from .jobs import Job, OutputOptions, is_regular, make_jobs, total_s
from .microphone import Microphone, Notes, listen
from .options import with_options
from .partial import Partial
from .terminal import Bar, Line, Watch, complain, print_out, shows_progress

MICROPHONE_NAME = "microphone-%Y-%m-%d-%H%M%S"  # of files with its transcript, after when it began


@dataclass(frozen=True)
class LiveOptions:
    """Where sound comes from, if not from files."""

    microphone: bool = option(False, "Live, from the default input device, until Ctrl-C.")
    every: float = option(1.0, "Seconds of sound between updates of the text from a microphone.", min=0.1)


@dataclass(frozen=True)
class LoadOptions:
    """Which model, and where it runs. Raises AsrError on impossible values."""

    model: str = option(DEFAULT_MODEL, f"{', '.join(BUNDLED)} (bundled); a checkpoint folder; a hub repository.")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps.")
    dtype: str = option("auto", f"auto (the model's own), {', '.join(DTYPES)}.", names=["--compute_type"])
    quantization: str | None = option(None, f"Of the backbone: {', '.join(QUANTIZATIONS)}.", show_default="none")
    threads: int | None = option(None, "Processor threads.", min=1, show_default="torch's choice")

    def __post_init__(self) -> None:
        choose_device(self.device)
        choose_dtype(self.dtype)
        if self.quantization not in (None, *QUANTIZATIONS):
            raise AsrError(f"quantization is {self.quantization!r}; choose one of {', '.join(QUANTIZATIONS)}")


@dataclass(frozen=True)
class ShowOptions:
    """What is shown on standard error while it works."""

    verbose: bool = option(False, "Show segments with times and scores as they come.")
    print_progress: bool = option(False, "Lines of progress in place of the bar.")
    watch: bool = option(False, "Show the canvas settle, coloured by confidence.")


@with_options
def transcribe(
    context: typer.Context,
    files: Annotated[
        list[Path] | None, typer.Argument(help="Sound or video files; - is standard input.", show_default=False)
    ] = None,
    *,
    live: LiveOptions,
    loading: LoadOptions,
    options: TranscribeOptions,
    output: OutputOptions,
    subtitles: SubtitleOptions,
    shown: ShowOptions,
) -> None:
    """Transcribes files, or what is said in front of a microphone."""
    others = files or options.clip_timestamps or shown != ShowOptions()
    if live.microphone and others:
        raise typer.BadParameter(
            "--microphone goes without files, --clip_timestamps, --verbose, --print_progress and --watch"
        )
    if not files and not live.microphone:
        raise typer.BadParameter("nothing to transcribe; name sound files, - for standard input, or --microphone")
    try:
        subtitles.check_words(options.word_timestamps)
        if live.microphone:
            check_live(options, live.every)
    except AsrError as error:
        raise typer.BadParameter(str(error)) from None
    microphone = Microphone() if live.microphone else None  # before the model is loaded: there may be none
    jobs = make_jobs(files or [Path(time.strftime(MICROPHONE_NAME))], output, options)
    if not jobs:
        return
    recognizer = _load(context, loading)
    report = _Report(jobs, subtitles, shown.verbose, several=files is not None and len(files) > 1)
    if microphone is not None:
        _listen(microphone, recognizer, jobs[0], live.every, report)
        return
    if output.output_dir is not None:
        _continue(jobs, output.output_dir, loading)
    if _run(recognizer.model, jobs, report, shown):
        raise typer.Exit(1)


def _load(context: typer.Context, loading: LoadOptions) -> Recognizer:
    """The model; the context holds what loads it, see `cli.main`."""
    if loading.threads is not None:
        torch.set_num_threads(loading.threads)
    steady_memory()
    load = context.obj or asr.load
    recognizer: Recognizer = load(
        loading.model, device=loading.device, dtype=loading.dtype, quantization=loading.quantization
    )
    return recognizer


def _continue(jobs: Sequence[Job], folder: Path, loading: LoadOptions) -> None:
    """Takes up what interrupted runs have left, and says so."""
    for job in jobs:
        if is_regular(job.file):
            job.continue_from(Partial(folder, job.file, job.options, (loading.model, loading.dtype, loading.quantization)))
        if job.segments:
            print(f"{job.file}: goes on at {timestamp(job.done_s)}", file=sys.stderr)


class _Report:
    """Prints and writes results."""

    def __init__(self, jobs: Sequence[Job], subtitles: SubtitleOptions, verbose: bool, several: bool):
        self._subtitles, self._verbose, self._several = subtitles, verbose, several
        # A single text is printed as it comes.
        self._at_once = not several and list(jobs[0].outputs.items()) == [("txt", None)]

    def segment(self, job: Job, segment: Segment) -> None:
        if self._verbose:
            if not segment.id:
                print(f"{job.file}:", file=sys.stderr)
            times = f"[{timestamp(segment.start)} --> {timestamp(segment.end)}]"
            score = f"mean log-probability {segment.avg_logprob:.2f}, speech {1 - segment.no_speech_prob:.2f}"
            fallback = f", decoded again: {segment.fallback}" if segment.fallback else ""
            print(f"{times} {segment.text} ({score}{fallback})", file=sys.stderr, flush=True)
        if self._at_once:
            print_out(f"{segment.text}\n")

    def end(self, job: Job, transcript: Transcript) -> list[AsrError]:
        """Returns what could not be written."""
        failures = []
        for form, output in job.outputs.items():
            if output is not None:
                try:
                    write_whole(output, render(transcript, form, job.name, self._subtitles))
                except AsrError as error:
                    failures.append(error)
            elif form == "txt" and self._several:
                print_out(f"{job.file}\t{transcript.text}\n")
            elif not self._at_once:
                print_out(render(transcript, form, job.name, self._subtitles))
        return failures


def _run(model: DiffusionGemmaASR, jobs: Sequence[Job], report: _Report, shown: ShowOptions) -> bool:
    """Transcribes; says how fast it went and which files failed, and whether there are any."""
    began, transcribed_s, done = time.perf_counter(), 0.0, 0
    failed: list[Path] = []
    watch = Watch() if shown.watch else None
    lines = shown.print_progress
    bar = Bar(total_s(jobs), lines) if watch is None and shows_progress(lines) else None
    current = jobs[0]
    try:
        for current, event in _events(model, jobs, bar, watch):
            with bar.aside() if bar is not None else nullcontext():
                if watch is not None:
                    watch.close()
                if isinstance(event, Segment):
                    report.segment(current, current.add(event))
                    continue
                errors: Sequence[AsrError] = [event] if isinstance(event, AudioError) else []
                if isinstance(event, End):
                    transcribed_s += event.duration - current.done_s
                    errors = report.end(current, current.transcript(event.duration))
                for error in errors:
                    complain(str(error))
                if errors:
                    failed.append(current.file)
                current.close()
                done += 1
    except KeyboardInterrupt:
        complain(_interrupted(current, done, len(jobs)))
        raise typer.Exit(130) from None
    finally:
        if bar is not None:
            bar.close()
        if watch is not None:
            watch.close()
    if transcribed_s:
        took_s = time.perf_counter() - began
        speed = f"{transcribed_s / took_s:.1f} times real time"
        print(f"{transcribed_s:.1f} s of sound in {took_s:.1f} s: {speed}", file=sys.stderr)
    if failed and len(jobs) > 1:
        complain(f"{len(failed)} of {len(jobs)} files failed: {', '.join(map(str, failed))}")
    return bool(failed)


def _events(
    model: DiffusionGemmaASR, jobs: Sequence[Job], bar: Bar | None, watch: Watch | None
) -> Iterator[tuple[Job, Segment | End | AudioError]]:
    """What comes of recordings, in their order; neighbours that have the same options share batches."""
    for options, group in itertools.groupby(jobs, key=lambda job: job.options):
        run = list(group)
        on_progress = None if bar is None else bar.update
        sources = (job.source for job in run)
        for number, event in stream_many(model, sources, options, on_progress=on_progress, on_step=watch):
            yield run[number], event
        if bar is not None:
            bar.next_run()


def _interrupted(job: Job, done: int, count: int) -> str:
    """What is done, and how to go on."""
    whole = f"interrupted; {done} of {count} files are done"
    if job.partial is None:
        return f"{whole}: the same command with --output_dir goes on"
    if not job.segments:
        return f"{whole}: the same command goes on"
    return f"{whole}, and {job.file} up to {timestamp(job.segments[-1].end)}: the same command goes on there"


def _listen(microphone: Microphone, recognizer: Recognizer, job: Job, every: float, report: _Report) -> None:
    """Transcribes what is said in front of a microphone; what was said is written however the recording ends."""
    text_is_shown = None not in job.outputs.values() or "txt" in job.outputs
    notes = Notes(sys.stdout if text_is_shown else None, Line())
    try:
        listen(microphone, recognizer, job.options, every, notes)
    finally:
        job.segments = notes.segments
        if failures := report.end(job, job.transcript(microphone.duration)):
            raise failures[0]
