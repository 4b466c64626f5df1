"""What the command `transcribe` has to do: recordings, where their results go, and what was done before."""

from __future__ import annotations

import functools
import itertools
import math
import os
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import typer

from ..audio.read import AudioSource, duration_of
from ..denoise.decode import OnStep
from ..errors import AsrError, AudioError
from ..files import Place, exists, folder_of, names_in, place_of, stem_of, write_whole
from ..model.model import DiffusionGemmaASR
from ..strict import option
from ..transcribe.recordings import End, Part, ProgressCallback, TranscribeOptions, stream_many
from ..transcribe.results import Segment, Transcript, language_of
from ..transcribe.subtitles import SubtitleOptions
from ..transcribe.writers import FORMATS, Format, render
from .inputs import STDIN, InputOptions, Recording
from .partial import Partial, rest

NAMED = 20  # outputs that are there already are named one by one up to here


@dataclass(frozen=True)
class OutputOptions:
    """What is written, and where."""

    task: str = option("transcribe", "As openai/whisper has it; speech is not translated.", metavar="transcribe")
    output_dir: str | None = option(
        None, "Write NAME.txt, NAME.srt, ... here.", names=["-o"], show_default="print", metavar="PATH"
    )
    output_format: Literal[Format, "all"] = option("txt", "Text, subtitles, a table, a line of JSON, or all.", names=["-f"])
    keep_folders: bool = option(
        False, "Write into the recordings' own folders below --output_dir, counted from the one that all are in."
    )
    overwrite: bool = option(False, "Replace files in --output_dir; else those are left, and not done again.")
    subtitles: SubtitleOptions = field(default_factory=SubtitleOptions)

    def __post_init__(self) -> None:
        if self.task != "transcribe":
            raise AsrError(f"task is {self.task!r}: speech is written in its own language, not translated; leave --task out")

    @property
    def folder(self) -> Place | None:
        """Where files are written."""
        return None if self.output_dir is None else place_of(self.output_dir)

    @property
    def formats(self) -> tuple[str, ...]:
        """The formats to write."""
        return FORMATS if self.output_format == "all" else (self.output_format,)


@dataclass
class Job:
    """A recording on its way to its outputs.

    Attributes:
        file: the recording; STDIN is standard input.
        outputs: where it goes by format; None is standard output.
        options: how to transcribe what is left of it.
        segments: of it so far.
        partial: where they are kept until it is done; None where nothing is written, or it cannot be read again.
        done_s: seconds at its beginning that an earlier run has transcribed.
    """

    file: Place
    outputs: dict[str, Place | None]
    options: TranscribeOptions
    segments: list[Segment] = field(default_factory=list)
    partial: Partial | None = None
    done_s: float = 0.0

    @property
    def name(self) -> str:
        """Of the recording, as valid text."""
        return os.fsencode(self.file).decode("utf-8", "replace")

    @property
    def source(self) -> AudioSource:
        """What to read it from."""
        return sys.stdin.buffer if self.file == STDIN else self.file

    def continue_from(self, partial: Partial) -> None:
        """Takes what an earlier run has left, and keeps there what comes."""
        self.partial = partial
        before = partial.read()
        self.options, self.segments = rest(self.options, before)
        if len(self.segments) < len(before):
            partial.keep(self.segments)
        self.done_s = max((segment.end for segment in self.segments), default=0.0)

    def sound_s(self, duration: float) -> float:
        """Seconds of a recording of this duration that are to be transcribed."""
        clips = self.options.clips() or ((0.0, math.inf),)
        return sum(max(0.0, min(end, duration) - start) for start, end in clips)

    def add(self, segment: Segment) -> Segment:
        """Takes the next segment; returns it with its number in the recording."""
        numbered = replace(segment, id=len(self.segments))
        self.segments.append(numbered)
        if self.partial is not None:
            self.partial.add(numbered)
        return numbered

    def transcript(self, duration: float) -> Transcript:
        """Of all segments; `duration` is the recording's, in seconds."""
        segments = tuple(self.segments)
        return Transcript.from_segments(segments, language_of(segments, self.options.decode.codes[0]), duration)

    def write(self, duration: float, subtitles: SubtitleOptions) -> list[AsrError]:
        """Writes its transcript to the outputs that are files.

        Args:
            duration: of the recording, in seconds.
            subtitles: how words are laid out.

        Returns:
            what could not be written.
        """
        failures, transcript = [], self.transcript(duration)
        for form, output in self.outputs.items():
            if output is not None:
                try:
                    write_whole(output, render(transcript, form, self.name, subtitles))
                except AsrError as error:
                    failures.append(error)
        return failures

    def close(self) -> None:
        """Nothing more will come of it."""
        self.segments.clear()
        if self.partial is not None:
            self.partial.remove()


def make_jobs(
    recordings: Sequence[Recording], inputs: InputOptions, output: OutputOptions, options: TranscribeOptions
) -> list[Job]:
    """Each recording of this process's part with where its results go, but for what is there already.

    Raises:
        typer.BadParameter: two recordings of any part would share an output, or the folder cannot be made.
        AsrError: a remote folder cannot be read.
    """
    formats, folder = output.formats, output.folder
    if folder is None:
        if len(formats) > 1 or (len(recordings) > 1 and formats[0] not in ("txt", "json")):
            raise typer.BadParameter(f"--output_format {output.output_format} makes several files here; give --output_dir")
        return [Job(item.file, {formats[0]: None}, _options(item, options)) for item in inputs.part(recordings)]
    owners: dict[str, Recording] = {}
    for item, own in zip(recordings, _folders(recordings, output.keep_folders), strict=True):
        stem = own + _stem(item)
        if stem in owners:
            both = f"{owners[stem].file} and {item.file}"
            hint = "; name a file once"
            if not output.keep_folders:
                hint += ", --keep_folders keeps files of one name in different folders apart"
            raise typer.BadParameter(f"{both} would both be written to {_inside(folder, stem)}.{formats[0]}{hint}")
        owners[stem] = item
    if isinstance(folder, Path):
        for place in sorted({folder, *((folder / stem).parent for stem, _ in inputs.part(list(owners.items())))}):
            try:
                place.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise typer.BadParameter(f"{place}: cannot be made ({error.strerror})") from None
    jobs = [
        Job(item.file, {form: _inside(folder, f"{stem}.{form}") for form in formats}, _options(item, options))
        for stem, item in inputs.part(list(owners.items()))
    ]
    if output.overwrite:
        return jobs
    if isinstance(folder, Path):
        return without_existing(jobs, exists)
    names = functools.cache(names_in)  # asking for every file would take a request each

    def is_there(output: Place) -> bool:
        place, _, name = str(output).rpartition("/")
        return name in names(place)

    return without_existing(jobs, is_there)


def _folders(recordings: Sequence[Recording], keep: bool) -> list[str]:
    """The folder of each recording, with a slash behind it, below the one that all are in; "" if they are not to be kept."""
    if not keep:
        return [""] * len(recordings)
    files = [item.file for item in recordings if item.file != STDIN]
    parents = {file: folder_of(file) for file in files}
    root = os.path.commonpath(parents.values()) if parents else ""
    own = [os.path.relpath(parents[item.file], root) if item.file != STDIN else "." for item in recordings]
    return ["" if folder == "." else folder.replace(os.sep, "/") + "/" for folder in own]


def _stem(item: Recording) -> str:
    """What the outputs of a recording are called; those of a part say where it begins."""
    stem = "stdin" if item.file == STDIN else stem_of(item.file)
    return f"{stem}-{item.offset:.3f}" if item.offset else stem


def _inside(folder: Place, name: str) -> Place:
    return folder / name if isinstance(folder, Path) else f"{folder.rstrip('/')}/{name}"


def _options(item: Recording, options: TranscribeOptions) -> TranscribeOptions:
    """Of a part of a recording, as its clip."""
    if item.duration is None and not item.offset:
        return options
    if options.clip_timestamps:
        raise typer.BadParameter("--clip_timestamps goes without a manifest whose lines have an offset or a duration")
    end = () if item.duration is None else (item.offset + item.duration,)
    return replace(options, clip_timestamps=(item.offset, *end))


def without_existing(jobs: Sequence[Job], is_there: Callable[[Place], bool]) -> list[Job]:
    """What is still to be made; says what is there already."""
    left, found = [], []
    for job in jobs:
        existing = [output for output in job.outputs.values() if output is not None and is_there(output)]
        found += existing
        if missing := {form: output for form, output in job.outputs.items() if output not in existing}:
            left.append(replace(job, outputs=missing))
    if len(found) > NAMED:
        print(f"{len(found)} outputs exist and are left as they are; --overwrite replaces them", file=sys.stderr)
    else:
        for output in found:
            print(f"{output} exists and is left as it is; --overwrite replaces it", file=sys.stderr)
    return left


def events(
    model: DiffusionGemmaASR,
    jobs: Sequence[Job],
    on_progress: ProgressCallback | None = None,
    on_step: OnStep | None = None,
    on_group: Callable[[], None] = lambda: None,
) -> Iterator[tuple[Job, Segment | End | AudioError]]:
    """What comes of recordings, in their order; neighbours that have the same options, clips aside, share batches.

    Args:
        on_progress, on_step: see `stream_many`.
        on_group: called when progress begins to count anew.
    """
    for options, group in itertools.groupby(jobs, key=lambda job: replace(job.options, clip_timestamps=())):
        run = list(group)
        sources = (Part(job.source, job.options.clip_timestamps) for job in run)
        for number, event in stream_many(model, sources, options, on_progress=on_progress, on_step=on_step):
            yield run[number], event
        on_group()


def total_s(jobs: Sequence[Job]) -> float | None:
    """Seconds of sound in all, None where a recording does not say how long it is, or could not be read a second time."""
    durations = [duration_of(job.file) if is_regular(job.file) else None for job in jobs]
    known = [duration for duration in durations if duration is not None]
    return sum(known) if len(known) == len(jobs) else None


def is_regular(file: Place) -> bool:
    """Whether it is a file here that can be read again: no pipe, no terminal, no standard input, nothing remote."""
    try:
        return isinstance(file, Path) and stat.S_ISREG(file.stat().st_mode)
    except OSError:
        return False
