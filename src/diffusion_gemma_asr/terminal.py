"""What the command line shows on standard error while it works: a progress bar, lines of progress, the canvas, live text."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

if TYPE_CHECKING:
    from .decoding import Shown
    from .transcribe import Progress as Heard

FRAME_S = 0.15  # how long a canvas stays on the screen: a small model denoises faster than one can read
LINE_EVERY = 5.0  # percent between lines of progress
COLOURS = ((0.9, "bright_white"), (0.6, "yellow"), (0.3, "orange3"), (0.0, "red"))  # from this confidence on


def complain(message: str) -> None:
    """One line about what went wrong."""
    print(f"error: {message}", file=sys.stderr, flush=True)


def shows_progress(lines: bool) -> bool:
    """Whether a `Bar` has anything to show."""
    return lines or Console(stderr=True).is_terminal


class Bar:
    """Shows how many seconds of sound are done, how fast that went, and how long it will take.

    Args:
        total_s: seconds of sound in all, None where that is not known.
        lines: print lines, which also a log file can hold, in place of a bar; without them nothing is shown where standard
            error is no terminal.
    """

    def __init__(self, total_s: float | None, lines: bool):
        console = Console(stderr=True)
        self._total_s, self._lines, self._began, self._shown = total_s, lines, time.perf_counter(), -LINE_EVERY
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

    def update(self, heard: Heard) -> None:
        """Shows how far the run is."""
        total_s = max(self._total_s or 0.0, heard.read_s)
        took_s = time.perf_counter() - self._began
        if self._display is not None:
            self._display.update(self._task, completed=heard.done_s, total=total_s, speed=heard.done_s / took_s)
        percent = 100 * heard.done_s / total_s
        if self._lines and percent >= self._shown + LINE_EVERY:
            self._shown = percent
            left = f", {took_s * (100 / percent - 1):.0f} s left" if self._total_s and percent else ""
            speed = heard.done_s / took_s
            print(f"progress: {percent:.1f} %, {speed:.1f} times real time{left}", file=sys.stderr, flush=True)

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

    def __call__(self, step: int, rows: Sequence[Sequence[Shown]]) -> None:
        line = Text(f"{step:2}  ", style="dim")
        for row in rows:
            for piece in row:
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
    """A line of text that changes in place, its unsure end dimmed; nothing where standard error is no terminal.

    Attributes:
        shown: whether it is seen at all.
    """

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
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
