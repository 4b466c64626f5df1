"""The command `diffusion-gemma-asr transcribe`."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ..errors import AsrError, AudioError
from ..files import Place
from ..model.model import DiffusionGemmaASR
from ..strict import option
from ..transcribe.live import check_live
from ..transcribe.recognizer import Recognizer
from ..transcribe.recordings import End, TranscribeOptions
from ..transcribe.results import Segment
from ..transcribe.subtitles import SubtitleOptions, timestamp
from ..transcribe.writers import render
from .inputs import InputOptions, Recording, recordings
from .jobs import Job, OutputOptions, events, is_regular, make_jobs, total_s
from .loading import LoadOptions, load_recognizer
from .microphone import Microphone, Notes, listen
from .on_ray import Plan, RayOptions, run_on_ray
from .options import with_options
from .partial import Partial
from .terminal import Bar, Line, Watch, complain, print_out, shows_progress, summarize

MICROPHONE_NAME = "microphone-%Y-%m-%d-%H%M%S"  # of files with its transcript, after when it began


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
        list[str] | None,
        typer.Argument(
            help="Sound or video files, patterns, addresses such as s3://bucket/a.mp3; - is standard input.",
            metavar="FILES",
            show_default=False,
        ),
    ] = None,
    *,
    inputs: InputOptions,
    loading: LoadOptions,
    options: TranscribeOptions,
    output: OutputOptions,
    ray: RayOptions,
    shown: ShowOptions,
) -> None:
    """Transcribes files, or what is said in front of a microphone."""
    named = bool(files or inputs.files_from)
    if inputs.microphone and (named or inputs.shard or ray.ray or options.clip_timestamps or shown != ShowOptions()):
        raise typer.BadParameter(
            "--microphone goes without files, --shard, --ray, --clip_timestamps, --verbose, --print_progress and --watch"
        )
    if not named and not inputs.microphone:
        raise typer.BadParameter("nothing to transcribe; name sound files, - for standard input, or --microphone")
    if ray.ray is not None and (output.output_dir is None or "-" in (files or ()) or shown.verbose or shown.watch):
        raise typer.BadParameter("--ray needs --output_dir, and goes without standard input, --verbose and --watch")
    try:
        output.subtitles.check_words(options.word_timestamps)
        if inputs.microphone:
            check_live(options, inputs.every)
    except AsrError as error:
        raise typer.BadParameter(str(error)) from None
    microphone = Microphone() if inputs.microphone else None  # before the model is loaded: there may be none
    chosen = recordings(files or (), inputs) if named else [Recording(Path(time.strftime(MICROPHONE_NAME)))]
    jobs = make_jobs(chosen, inputs, output, options)
    if not jobs:
        return
    if ray.ray is not None:
        failed = run_on_ray(jobs, Plan(loading, output, os.getcwd(), context.obj), ray, shown.print_progress)
    else:
        recognizer = load_recognizer(loading, context.obj)
        report = _Report(jobs, output.subtitles, shown.verbose, several=len(chosen) > 1)
        if microphone is not None:
            _listen(microphone, recognizer, jobs[0], inputs.every, report)
            return
        _continue(jobs, loading)
        failed = _run(recognizer.model, jobs, report, shown)
    if failed:
        raise typer.Exit(1)


def _continue(jobs: Sequence[Job], loading: LoadOptions) -> None:
    """Takes up what interrupted runs have left, and says so."""
    for job in jobs:
        output = next(iter(job.outputs.values()))
        if isinstance(output, Path) and isinstance(job.file, Path) and is_regular(job.file):
            loaded = (loading.model, loading.dtype, loading.quantization, loading.encoder)
            job.continue_from(Partial(output, job.file, job.options, loaded))
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

    def end(self, job: Job, duration: float) -> list[AsrError]:
        """Returns what could not be written."""
        transcript = job.transcript(duration)
        for form in (form for form, output in job.outputs.items() if output is None):
            if form == "txt" and self._several:
                print_out(f"{job.file}\t{transcript.text}\n")
            elif not self._at_once:
                print_out(render(transcript, form, job.name, self._subtitles))
        return job.write(duration, self._subtitles)


def _run(model: DiffusionGemmaASR, jobs: Sequence[Job], report: _Report, shown: ShowOptions) -> bool:
    """Transcribes; says how fast it went and which files failed, and whether there are any."""
    began, transcribed_s, done = time.perf_counter(), 0.0, 0
    failed: list[Place] = []
    watch = Watch() if shown.watch else None
    lines = shown.print_progress
    bar = Bar(total_s(jobs), lines) if watch is None and shows_progress(lines) else None
    current = jobs[0]
    try:
        told = (None, watch, lambda: None) if bar is None else (bar.update, watch, bar.next_run)
        for current, event in events(model, jobs, *told):
            with bar.aside() if bar is not None else nullcontext():
                if watch is not None:
                    watch.close()
                if isinstance(event, Segment):
                    report.segment(current, current.add(event))
                    continue
                errors: Sequence[AsrError] = [event] if isinstance(event, AudioError) else []
                if isinstance(event, End):
                    transcribed_s += current.sound_s(event.duration)
                    errors = report.end(current, event.duration)
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
    summarize(transcribed_s, time.perf_counter() - began, failed, len(jobs))
    return bool(failed)


def _interrupted(job: Job, done: int, count: int) -> str:
    """What is done, and how to go on."""
    whole = f"interrupted; {done} of {count} files are done"
    if None in job.outputs.values():
        return f"{whole}: the same command with --output_dir goes on"
    if job.partial is None or not job.segments:
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
        if failures := report.end(job, microphone.duration):
            raise failures[0]
