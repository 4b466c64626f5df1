"""The command `diffusion-gemma-asr transcribe`."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

import diffusion_gemma_asr as asr

from .audio import AudioSource, duration_of
from .memory import steady_memory
from .microphone import Microphone, Notes, listen
from .results import language_of
from .subtitles import SubtitleOptions, timestamp
from .terminal import Bar, Line, Watch, complain, shows_progress
from .transcribe import End, stream_many
from .writers import FORMATS, render, write_whole

if TYPE_CHECKING:
    from .model import DiffusionGemmaASR

STDIN = Path("-")
MICROPHONE_NAME = "microphone-%Y-%m-%d-%H%M%S"  # of files with its transcript, after when it began


class OutputFormat(str, Enum):
    txt = "txt"
    vtt = "vtt"
    srt = "srt"
    tsv = "tsv"
    json = "json"
    all = "all"


class Start(str, Enum):
    noise = "noise"
    draft = "draft"


class Engine(str, Enum):
    fast = "fast"
    reference = "reference"


class VadMethod(str, Enum):
    silero = "silero"
    energy = "energy"


Defaults = asr.TranscribeOptions
Model = Annotated[str, typer.Option(help="mini6, mini, mini-whisper-base (bundled); a checkpoint folder; a hub repository.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
FirstCanvas = Annotated[
    Start | None, typer.Option(help="First canvas: random tokens, or the CTC draft.", show_default="the checkpoint's own")
]
Way = Annotated[Engine, typer.Option(help="The same transcripts, fast or by the plain loop.")]


def transcribe(
    files: Annotated[
        list[Path] | None, typer.Argument(help="Sound or video files; - is standard input.", show_default=False)
    ] = None,
    *,
    microphone: Annotated[
        bool, typer.Option("--microphone", help="Live, from the default input device, until Ctrl-C.")
    ] = False,
    every: Annotated[
        float, typer.Option(min=0.1, help="Seconds of sound between updates of the text from a microphone.")
    ] = 1.0,
    model: Model = asr.DEFAULT_MODEL,
    device: Device = "auto",
    dtype: Annotated[
        str, typer.Option("--dtype", "--compute_type", help=f"auto (the model's own), {', '.join(asr.DTYPES)}.")
    ] = "auto",
    quantization: Annotated[
        str | None, typer.Option(help="Of the backbone, for instance bnb-4bit.", show_default="none")
    ] = None,
    language: Annotated[
        str, typer.Option(help="Code of the language spoken; en,de: one of these; auto: one that the model knows.")
    ] = Defaults.language,
    initial_prompt: Annotated[
        str, typer.Option("--initial_prompt", help="Text that came before, for the prompt.", show_default=False)
    ] = Defaults.initial_prompt,
    hotwords: Annotated[
        str, typer.Option(help="Words that may occur, for the prompt.", show_default=False)
    ] = Defaults.hotwords,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps at most.")] = 8,
    start: FirstCanvas = None,
    engine: Way = Engine.fast,
    seed: Annotated[int, typer.Option(help="The same seed gives the same transcript.")] = Defaults.seed,
    batch_size: Annotated[
        int, typer.Option("--batch_size", min=1, help="Stretches of speech taken at once.")
    ] = Defaults.batch_size,
    threads: Annotated[int | None, typer.Option(min=1, help="Processor threads.", show_default="torch's choice")] = None,
    output_dir: Annotated[
        Path | None, typer.Option("--output_dir", "-o", help="Write NAME.txt, NAME.srt, ... here.", show_default="print")
    ] = None,
    output_format: Annotated[
        OutputFormat, typer.Option("--output_format", "-f", help="Text, subtitles, a table, a line of JSON, or all.")
    ] = OutputFormat.txt,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace files in --output_dir; else those are left, and not done again.")
    ] = False,
    word_timestamps: Annotated[
        bool, typer.Option("--word_timestamps", help="Times and probabilities of words, for json and the options below.")
    ] = False,
    max_line_width: Annotated[
        int | None, typer.Option("--max_line_width", help="Columns of a line in srt and vtt.", show_default=False)
    ] = None,
    max_line_count: Annotated[
        int | None, typer.Option("--max_line_count", help="Lines of a cue; needs --max_line_width.", show_default=False)
    ] = None,
    max_words_per_line: Annotated[
        int | None, typer.Option("--max_words_per_line", help="Words of a cue in srt and vtt.", show_default=False)
    ] = None,
    highlight_words: Annotated[
        bool, typer.Option("--highlight_words", help="Underline each word in srt and vtt as it is said.")
    ] = False,
    clip_timestamps: Annotated[
        str, typer.Option("--clip_timestamps", help="start,end,start,end,... in s; only these parts.", show_default="all")
    ] = "",
    chunk_length: Annotated[
        float, typer.Option("--chunk_length", "--chunk_size", help="Seconds of speech taken at once, at most.")
    ] = Defaults.chunk_length,
    vad_method: Annotated[
        VadMethod, typer.Option("--vad_method", help="silero, or energy: all that is not silence is speech.")
    ] = VadMethod.silero,
    vad_onset: Annotated[
        float, typer.Option("--vad_onset", help="Probability from which on sound is speech.")
    ] = Defaults.vad_onset,
    no_speech_threshold: Annotated[
        float, typer.Option("--no_speech_threshold", help="What is likelier no speech is left out, if its text is unsure.")
    ] = Defaults.no_speech_threshold,
    logprob_threshold: Annotated[
        float, typer.Option("--logprob_threshold", help="Mean log-probability under which text is unsure.")
    ] = Defaults.logprob_threshold,
    compression_ratio_threshold: Annotated[
        float, typer.Option("--compression_ratio_threshold", help="Text that compresses better is decoded again.")
    ] = Defaults.compression_ratio_threshold,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show segments with times and scores as they come.")] = False,
    print_progress: Annotated[bool, typer.Option("--print_progress", help="Lines of progress in place of the bar.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Show the canvas settle, coloured by confidence.")] = False,
) -> None:
    """Transcribe sound files: the text of one, or path, tab and text of each of several."""
    if microphone and (files or clip_timestamps or verbose or print_progress or watch):
        raise typer.BadParameter(
            "--microphone goes without files, --clip_timestamps, --verbose, --print_progress and --watch"
        )
    if not files and not microphone:
        raise typer.BadParameter("nothing to transcribe; name sound files, - for standard input, or --microphone")
    try:
        subtitles = SubtitleOptions(max_line_width, max_line_count, max_words_per_line, highlight_words)
        subtitles.check_words(word_timestamps)
        options = asr.TranscribeOptions(
            language=language, initial_prompt=initial_prompt, hotwords=hotwords, denoise=steps, seed=seed,
            batch_size=batch_size, start=first_canvas(start), engine=way(engine), word_timestamps=word_timestamps,
            clip_timestamps=_times(clip_timestamps), vad_method=vad_method.value, vad_onset=vad_onset,
            chunk_length=chunk_length, compression_ratio_threshold=compression_ratio_threshold,
            logprob_threshold=logprob_threshold, no_speech_threshold=no_speech_threshold,
        )  # fmt: skip
    except asr.AsrError as error:
        raise typer.BadParameter(str(error)) from None
    source = Microphone() if microphone else None  # before the model is loaded: there may be none
    jobs = _jobs(files or [Path(time.strftime(MICROPHONE_NAME))], output_dir, output_format)
    jobs = jobs if overwrite else _without_existing(jobs)
    if not jobs:
        return
    if threads is not None:
        _set_threads(threads)
    steady_memory()
    loaded = asr.load(model, device=device, dtype=None if dtype == "auto" else dtype, quantization=quantization)
    report = _Report(jobs, subtitles, verbose, several=files is not None and len(files) > 1)
    if source is not None:
        _listen(source, loaded, jobs[0], options, every, report)
        return
    failed = _run(loaded, jobs, options, report, print_progress, Watch() if watch else None)
    if failed:
        raise typer.Exit(1)


@dataclass
class _Job:
    """A recording, where its results go by format (None is standard output), and its segments so far."""

    file: Path
    outputs: dict[str, Path | None]
    segments: list[asr.Segment] = field(default_factory=list)

    def transcript(self, told: str, duration: float) -> asr.Transcript:
        segments = tuple(self.segments)
        return asr.Transcript.from_segments(segments, language_of(segments, told), duration)

    @property
    def source(self) -> AudioSource:
        return io.BytesIO(sys.stdin.buffer.read()) if self.file == STDIN else self.file


class _Report:
    """Prints and writes results."""

    def __init__(self, jobs: Sequence[_Job], subtitles: SubtitleOptions, verbose: bool, several: bool):
        self._subtitles, self._verbose, self._several = subtitles, verbose, several
        # A single text is printed as it comes.
        self._at_once = not several and list(jobs[0].outputs.items()) == [("txt", None)]

    def segment(self, job: _Job, segment: asr.Segment) -> None:
        if self._verbose:
            if not job.segments:
                print(f"{job.file}:", file=sys.stderr)
            times = f"[{timestamp(segment.start)} --> {timestamp(segment.end)}]"
            score = f"mean log-probability {segment.avg_logprob:.2f}, speech {1 - segment.no_speech_prob:.2f}"
            fallback = f", decoded again: {segment.fallback}" if segment.fallback else ""
            print(f"{times} {segment.text} ({score}{fallback})", file=sys.stderr, flush=True)
        job.segments.append(segment)
        if self._at_once:
            print(segment.text, flush=True)

    def end(self, job: _Job, transcript: asr.Transcript) -> None:
        for form, output in job.outputs.items():
            if output is not None:
                write_whole(output, render(transcript, form, str(job.file), self._subtitles))
            elif form == "txt" and self._several:
                print(f"{job.file}\t{transcript.text}", flush=True)
            elif not self._at_once:
                print(render(transcript, form, str(job.file), self._subtitles), end="", flush=True)


def _run(
    model: DiffusionGemmaASR,
    jobs: Sequence[_Job],
    options: asr.TranscribeOptions,
    report: _Report,
    lines: bool,
    watch: Watch | None,
) -> bool:
    """Transcribes; says how fast it went and which files failed, and whether there are any."""
    began, heard_s, failed, done = time.perf_counter(), 0.0, [], 0
    bar = Bar(_total_s(jobs), lines) if watch is None and shows_progress(lines) else None
    found = stream_many(
        model, (job.source for job in jobs), options, on_progress=None if bar is None else bar.update, on_step=watch
    )
    try:
        for number, what in found:
            job = jobs[number]
            with bar.aside() if bar is not None else nullcontext():
                if watch is not None:
                    watch.close()
                if isinstance(what, asr.Segment):
                    report.segment(job, what)
                    continue
                if isinstance(what, End):
                    heard_s += what.duration
                    report.end(job, job.transcript(options.language, what.duration))
                else:
                    complain(str(what))
                    failed.append(job.file)
                job.segments.clear()
                done += 1
    except KeyboardInterrupt:
        complain(f"interrupted; {done} of {len(jobs)} files are done: the same command with --output_dir goes on")
        raise typer.Exit(130) from None
    finally:
        if bar is not None:
            bar.close()
        if watch is not None:
            watch.close()
    if heard_s:
        took_s = time.perf_counter() - began
        print(f"{heard_s:.1f} s of sound in {took_s:.1f} s: {heard_s / took_s:.1f} times real time", file=sys.stderr)
    if failed and len(jobs) > 1:
        complain(f"{len(failed)} of {len(jobs)} files failed: {', '.join(map(str, failed))}")
    return bool(failed)


def _total_s(jobs: Sequence[_Job]) -> float | None:
    """Seconds of sound in all, None where a file does not say how long it is."""
    durations = [None if job.file == STDIN else duration_of(job.file) for job in jobs]
    known = [duration for duration in durations if duration is not None]
    return sum(known) if len(known) == len(jobs) else None


def _listen(
    microphone: Microphone,
    model: DiffusionGemmaASR,
    job: _Job,
    options: asr.TranscribeOptions,
    every: float,
    report: _Report,
) -> None:
    """Transcribes what is said in front of a microphone; what was said is written however the recording ends."""
    text_is_shown = None not in job.outputs.values() or "txt" in job.outputs
    notes = Notes(sys.stdout if text_is_shown else None, Line())
    try:
        listen(microphone, model, options, every, notes)
    finally:
        job.segments = notes.segments
        report.end(job, job.transcript(options.language, microphone.duration))


def first_canvas(start: Start | None) -> Literal["noise", "draft"] | None:
    """The option's value as the library has it."""
    return None if start is None else ("draft" if start is Start.draft else "noise")


def way(engine: Engine) -> Literal["fast", "reference"]:
    """The option's value as the library has it."""
    return "fast" if engine is Engine.fast else "reference"


def _set_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


def _times(given: str) -> tuple[float, ...]:
    try:
        return tuple(float(value) for value in given.split(",") if value.strip())
    except ValueError:
        raise typer.BadParameter(f"--clip_timestamps is {given!r}; give seconds such as 0,30,60,90") from None


def _jobs(files: Sequence[Path], folder: Path | None, output_format: OutputFormat) -> list[_Job]:
    """Each file with where its results go; two inputs never share a file."""
    formats = FORMATS if output_format is OutputFormat.all else (output_format.value,)
    if folder is None:
        if len(formats) > 1 or (len(files) > 1 and formats[0] not in ("txt", "json")):
            raise typer.BadParameter(f"--output_format {output_format.value} makes several files here; give --output_dir")
        return [_Job(file, {formats[0]: None}) for file in files]
    owners: dict[str, Path] = {}
    for file in files:
        if (stem := _stem(file)) in owners:
            raise typer.BadParameter(f"{owners[stem]} and {file} would both be written to {folder / stem}.{formats[0]}")
        owners[stem] = file
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"{folder}: cannot be made ({error.strerror})") from None
    return [_Job(file, {form: folder / f"{stem}.{form}" for form in formats}) for stem, file in owners.items()]


def _stem(file: Path) -> str:
    return "stdin" if file == STDIN else file.stem


def _without_existing(jobs: Sequence[_Job]) -> list[_Job]:
    """What is still to be made; says what is there already."""
    left = []
    for job in jobs:
        there = [output for output in job.outputs.values() if output is not None and output.exists()]
        for output in there:
            print(f"{output} exists and is left as it is; --overwrite replaces it", file=sys.stderr)
        if missing := {form: output for form, output in job.outputs.items() if output not in there}:
            left.append(_Job(job.file, missing))
    return left
