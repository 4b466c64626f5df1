"""What the command line prints, and what it shows on standard error while it works: progress, the canvas, live text."""

from __future__ import annotations

import codecs
import io
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from ..errors import AsrError

if TYPE_CHECKING:  # they import torch, which takes seconds
    from ..denoise.clip import Shown
    from ..transcribe.recordings import Progress as SecondsDone

FRAME_S = 0.15  # how long a canvas stays on the screen: a small model denoises faster than one can read
LINE_EVERY = 5.0  # percent between lines of progress
COLOURS = ((0.9, "bright_white"), (0.6, "yellow"), (0.3, "orange3"), (0.0, "red"))  # from this confidence on


def complain(message: str) -> None:
    """One line about what went wrong."""
    print(f"error: {message}", file=sys.stderr, flush=True)


def print_out(text: str) -> None:
    """Text as it is, on standard output, at once.

    Raises:
        AsrError: standard output takes no more.
        BrokenPipeError: nobody reads it any more.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        with suppress(OSError):  # else Python tries again when it ends, and complains
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise AsrError(f"standard output: cannot be written ({error.strerror}); send it elsewhere") from None


def replace_unprintable() -> None:
    """Lets standard output take every text: what its encoding lacks becomes a question mark, and that is said once.

    File names that are no text in the system's encoding are printed as the bytes that they are.
    """
    if not isinstance(sys.stdout, io.TextIOWrapper):
        return
    encoding, warned = sys.stdout.encoding, False

    def substitute(error: UnicodeError) -> tuple[str | bytes, int]:
        nonlocal warned
        if not isinstance(error, UnicodeEncodeError):
            raise error
        character = error.object[error.start]
        if "\udc80" <= character <= "\udcff":  # a byte of a file name, see os.fsdecode
            return bytes([ord(character) - 0xDC00]), error.start + 1
        if not warned:
            warned = True
            print(
                f"standard output is {encoding}, which lacks some characters: each is printed as ?; "
                "set PYTHONIOENCODING=utf-8, or give --output_dir",
                file=sys.stderr,
                flush=True,
            )
        return "?", error.start + 1

    codecs.register_error("diffusion_gemma_asr", substitute)
    sys.stdout.reconfigure(errors="diffusion_gemma_asr")


def summarize(sound_s: float, took_s: float, failed: Sequence[object], count: int) -> None:
    """Says how fast recordings were transcribed, and which of `count` failed."""
    if sound_s:
        speed = f"{sound_s / took_s:.1f} times real time"
        print(f"{sound_s:.1f} s of sound in {took_s:.1f} s: {speed}", file=sys.stderr)
    if failed and count > 1:
        complain(f"{len(failed)} of {count} files failed: {', '.join(map(str, failed))}")


def shows_progress(lines: bool) -> bool:
    """Whether a `Bar` has anything to show."""
    return lines or Console(stderr=True).is_terminal


class Bar:
    """Shows how many seconds of sound are done, how fast that went, and how long it will take.

    Args:
        total_s: seconds of sound in all, None where that is not known.
        lines: print lines, which also a log file can hold, in place of a bar; without them nothing is shown where standard
            error is no terminal.
        console: where the bar is; None is standard error.
    """

    def __init__(self, total_s: float | None, lines: bool, console: Console | None = None):
        console = console or Console(stderr=True)
        self._total_s, self._lines, self._began, self._shown = total_s, lines, time.perf_counter(), -LINE_EVERY
        self._before_s = self._read_s = 0.0  # of the runs before this one; of all
        self._display: Progress | None = None
        if console.is_terminal and not lines:
            self._display = Progress(
                TextColumn("transcribing"),
                BarColumn(),
                TextColumn("{task.completed:.0f} of {task.total:.0f} s, {task.fields[speed]:.0f} times real time"),
                TimeRemainingColumn(),
                console=console,
                transient=True,
                redirect_stdout=False,  # results are not to end up on standard error
                redirect_stderr=False,
            )
            self._task = self._display.add_task("", total=total_s or 0.0, speed=0.0)
            self._display.start()

    def update(self, done: SecondsDone) -> None:
        """Shows how far the run is."""
        self._read_s = self._before_s + done.read_s
        done_s, total_s = self._before_s + done.done_s, max(self._total_s or 0.0, self._read_s)
        took_s = time.perf_counter() - self._began
        if self._display is not None:
            self._display.update(self._task, completed=done_s, total=total_s, speed=done_s / took_s)
        percent = 100 * done_s / total_s
        if self._lines and percent >= self._shown + LINE_EVERY:
            self._shown = percent
            left = f", {took_s * max(0.0, 100 / percent - 1):.0f} s left" if self._total_s and percent else ""
            speed = done_s / took_s
            print(f"progress: {percent:.1f} %, {speed:.1f} times real time{left}", file=sys.stderr, flush=True)

    def expect(self, total_s: float) -> None:
        """There will be so many seconds of sound in all, as is known by now."""
        self._total_s = total_s

    def next_run(self) -> None:
        """What is reported from now on counts from 0 again."""
        self._before_s = self._read_s

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Take the bar off the screen while something else is printed."""
        if self._display is not None:
            self._display.stop()
        try:
            yield
        finally:
            if self._display is not None:
                self._display.start()

    def close(self) -> None:
        """Takes it off the screen for good."""
        if self._display is not None:
            self._display.stop()


class Watch:
    """Shows a canvas settle, coloured by confidence; where standard error is no terminal, a line for every step."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._live: Live | None = None

    def __call__(self, clip: int, step: int, pieces: Sequence[Shown]) -> None:
        """Shows a step; see `denoise.decode.OnStep`."""
        line = Text(f"{step:2}  ", style="dim")
        for piece in pieces:
            line.append(piece.text, style=next(colour for least, colour in COLOURS if piece.confidence >= least))
        if not self._console.is_terminal:
            self._console.print(line, soft_wrap=True)
            return
        if self._live is None:
            self._live = Live(console=self._console, transient=True, auto_refresh=False, vertical_overflow="visible")
            self._live.start()
        self._live.update(line, refresh=True)
        time.sleep(FRAME_S)

    def close(self) -> None:
        """Takes the canvas off the screen, where the text is to appear."""
        if self._live is not None:
            self._live.stop()
            self._live = None


class Line:
    """A line of text that changes in place, its unsure end dimmed; nothing where there is no terminal.

    Args:
        console: where it is; None is standard error.

    Attributes:
        shown: whether it is seen at all.
    """

    def __init__(self, console: Console | None = None):
        self._console = console or Console(stderr=True, highlight=False)
        self.shown = self._console.is_terminal
        self._live: Live | None = None

    def show(self, sure: str, unsure: str) -> None:
        """Replaces what is there."""
        if not self.shown:
            return
        if self._live is None:
            self._live = Live(
                console=self._console,
                transient=True,
                auto_refresh=False,
                vertical_overflow="visible",
                redirect_stdout=False,  # results are not to end up on standard error
                redirect_stderr=False,
            )
            self._live.start()
        space = " " if sure and unsure else ""
        self._live.update(Text.assemble(sure + space, (unsure, "dim")), refresh=True)

    def clear(self) -> None:
        """Takes it off the screen."""
        if self._live is not None:
            self._live.stop()
            self._live = None
