"""The commands `evaluate` and `compare`: load, run with a progress bar, print a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..data.manifest import Utterance
from ..data.sources import read_source
from .compare import compare
from .metrics import Edits, percent
from .normalise import NORMALISER
from .options import EvaluateOptions
from .protocol import System
from .report import write_report
from .run import evaluate
from .summary import cells, parts
from .systems import load_systems

TITLE = f"error rates after {NORMALISER}"
WRAPPED = {"data": 10, "error rate": 11, "written by": 9}  # columns that may wrap, and their smallest widths
PIPE_WIDTH = 160  # of tables if the output is not a terminal

__all__ = ["EvaluateOptions", "compare_command", "evaluate_command"]


def evaluate_command(sources: Sequence[str], out: Path, options: EvaluateOptions) -> None:
    """Evaluates a model on manifests, folders or corpora (see data/sources.py), and writes a report.

    Args:
        sources: of utterances with their references.
        out: folder of the run; a sweep over numbers of steps has a run in each subfolder `steps-N`.
        options: model, system and decoding options.

    Raises:
        AsrError: the model cannot be loaded, the data cannot be read, or `out` has another run.
    """
    skipped: list[str] = []
    utterances: list[Utterance] = []
    data_sets: dict[str, str] = {}  # by key
    for source in sources:
        for u in read_source(source, (), math.inf, skipped, options.language):
            if u.key not in data_sets:  # a list may have a line twice
                utterances.append(u)
                data_sets[u.key] = source
    systems = load_systems(options, out)
    evaluate_systems(systems, utterances, data_sets, skipped, options.transcribe.batch_size)
    print(write_report(list(systems), out / "report.html"))


def evaluate_systems(
    systems: dict[Path, System],
    utterances: Sequence[Utterance],
    data_sets: dict[str, str],
    skipped: Sequence[str] = (),
    batch_size: int = 16,
) -> None:
    """Evaluates systems one after the other, and prints their error rates.

    Args:
        systems: by the folders of their runs.
        utterances: with their references.
        data_sets: name of the data set of each utterance, by its key.
        skipped: messages about utterances that could not be listed.
        batch_size: utterances in one call of a system.
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    table, shares = Table(title=TITLE), []
    for folder, system in systems.items():
        rows, unsupported = _supported(utterances, system)
        with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
            task = bar.add_task(folder.name, total=len(rows))

            def show(done: int, edits: Edits, bar: Progress = bar, task: int = task, name: str = folder.name) -> None:
                bar.update(task, completed=done, description=f"{name} {percent(edits.rate)}")  # type: ignore[arg-type]

            summary = evaluate(system, rows, folder, batch_size, [*skipped, *unsupported], show, data_sets)
        for data, language, figures in parts(summary):
            row = {"run": folder.name, "data": data, "language": language} | cells(summary, figures)
            if not table.columns:
                for name in row:
                    table.add_column(name, no_wrap=name not in WRAPPED, min_width=WRAPPED.get(name), overflow="fold")
            table.add_row(*row.values())
        shares += [
            f"{folder.name}: {code} found rightly in {percent(figures['language_found_over_2_s'])} of "
            f"{figures['over_2_s']} clips of over 2 s"
            for code, figures in summary["languages"].items()
            if figures.get("language_found_over_2_s") is not None
        ]
    for why in summary["skipped_why"]:
        console.print(f"skipped: {why}", markup=False, highlight=False, soft_wrap=True)
    if summary["skipped"] > len(summary["skipped_why"]):
        console.print(f"skipped: {summary['skipped'] - len(summary['skipped_why'])} more")
    _print(table)
    for line in shares:
        print(line)


def _supported(utterances: Sequence[Utterance], system: System) -> tuple[list[Utterance], list[str]]:
    """The utterances in a language that the system supports, and a message for each of the others."""
    known = ", ".join(system.languages)
    return [u for u in utterances if u.language in system.languages], [
        f"{u.audio_filepath}: language {u.language!r} is none of {known}"
        for u in utterances
        if u.language not in system.languages
    ]


def compare_command(runs: Sequence[Path]) -> None:
    """Prints the error rates of runs, with a paired test of each against the first.

    Args:
        runs: folders of finished runs.

    Raises:
        DataError: see `compare`.
    """
    table = Table("run", "language", "utterances", "error rate", "against the first", "p", title=TITLE)
    for row in compare(runs):
        test = row.get("against_first")
        difference = f"{test['difference']:+.2%} ({test['low']:+.2%} to {test['high']:+.2%})" if test else ""
        rate = percent(row["error_rate"], 2)
        p_value = f"{test['p_value']:.3f}" if test else ""
        table.add_row(row["run"], row["language"], str(row["utterances"]), rate, difference, p_value)
    _print(table)


def _print(table: Table) -> None:
    """Prints a table, of width PIPE_WIDTH if the output is not a terminal."""
    console = Console()
    (console if console.is_terminal else Console(width=PIPE_WIDTH)).print(table)
