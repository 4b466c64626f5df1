"""What the command `transcribe` has to do: recordings, where their results go, and what was done before."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import typer

from ..audio.read import AudioSource, duration_of
from ..errors import AsrError
from ..strict import option
from ..transcribe.recordings import TranscribeOptions
from ..transcribe.results import Segment, Transcript, language_of
from ..transcribe.writers import FORMATS, Format
from .partial import Partial, rest

STDIN = Path("-")


@dataclass(frozen=True)
class OutputOptions:
    """What is written, and where."""

    task: str = option("transcribe", "As openai/whisper has it; speech is not translated.", metavar="transcribe")
    output_dir: Path | None = option(None, "Write NAME.txt, NAME.srt, ... here.", names=["-o"], show_default="print")
    output_format: Literal[Format, "all"] = option("txt", "Text, subtitles, a table, a line of JSON, or all.", names=["-f"])
    overwrite: bool = option(False, "Replace files in --output_dir; else those are left, and not done again.")

    def __post_init__(self) -> None:
        if self.task != "transcribe":
            raise AsrError(f"task is {self.task!r}: speech is written in its own language, not translated; leave --task out")

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

    file: Path
    outputs: dict[str, Path | None]
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
        self.options, self.segments = rest(self.options, partial.read())
        self.done_s = self.segments[-1].end if self.segments else 0.0

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

    def close(self) -> None:
        """Nothing more will come of it."""
        self.segments.clear()
        if self.partial is not None:
            self.partial.remove()


def make_jobs(files: Sequence[Path], output: OutputOptions, options: TranscribeOptions) -> list[Job]:
    """Each file with where its results go, but for what is there already; two inputs never share a file.

    Raises:
        typer.BadParameter: the outputs would get in each other's way, or their folder cannot be made.
    """
    formats, folder = output.formats, output.output_dir
    if folder is None:
        if len(formats) > 1 or (len(files) > 1 and formats[0] not in ("txt", "json")):
            raise typer.BadParameter(f"--output_format {output.output_format} makes several files here; give --output_dir")
        return [Job(file, {formats[0]: None}, options) for file in files]
    owners: dict[str, Path] = {}
    for file in files:
        if (stem := "stdin" if file == STDIN else file.stem) in owners:
            raise typer.BadParameter(f"{owners[stem]} and {file} would both be written to {folder / stem}.{formats[0]}")
        owners[stem] = file
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"{folder}: cannot be made ({error.strerror})") from None
    jobs = [Job(file, {form: folder / f"{stem}.{form}" for form in formats}, options) for stem, file in owners.items()]
    return jobs if output.overwrite else _without_existing(jobs)


def _without_existing(jobs: Sequence[Job]) -> list[Job]:
    """What is still to be made; says what is there already."""
    left = []
    for job in jobs:
        existing = [output for output in job.outputs.values() if output is not None and os.path.exists(output)]
        for output in existing:
            print(f"{output} exists and is left as it is; --overwrite replaces it", file=sys.stderr)
        if missing := {form: output for form, output in job.outputs.items() if output not in existing}:
            left.append(replace(job, outputs=missing))
    return left


def total_s(jobs: Sequence[Job]) -> float | None:
    """Seconds of sound in all, None where a recording does not say how long it is, or could not be read a second time."""
    durations = [duration_of(job.file) if is_regular(job.file) else None for job in jobs]
    known = [duration for duration in durations if duration is not None]
    return sum(known) if len(known) == len(jobs) else None


def is_regular(file: Path) -> bool:
    """Whether it is a file that can be read again: no pipe, no terminal, no standard input."""
    try:
        return stat.S_ISREG(file.stat().st_mode)
    except OSError:
        return False
