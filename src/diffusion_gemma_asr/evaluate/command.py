"""The commands `evaluate` and `compare`: load, run with a progress bar, print a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .. import load
from ..baselines.autoregressive import Autoregressive
from ..baselines.trained import TrainedBaseline
from ..baselines.whisper import Whisper
from ..checkpoint import choose_device
from ..data.manifest import Utterance
from ..data.sources import read_source
from ..decoding import EngineName, Start
from ..prompt import LANGUAGES
from .compare import compare
from .metrics import Edits
from .report import parts, write_report
from .run import MAX_CLIP_S, evaluate
from .systems import CtcGreedy, Diffusion, System


def evaluate_command(
    sources: Sequence[str],
    out: Path,
    model: str,
    system: str,
    steps: Sequence[int],
    start: Start | None,
    seed: int,
    batch_size: int,
    device: str,
    folder_language: str,
    engine: EngineName,
    auto: bool = False,
) -> None:
    """Evaluates a model on manifests, folders or corpora (see data/sources.py): once, or once for each number of steps in
    folders `steps-N` of `out`; with `auto` it is not told the language."""
    skipped: list[str] = []
    utterances: list[Utterance] = []
    data_sets: dict[str, str] = {}  # by sound file
    for source in sources:
        rows = usable(read_source(source, (), MAX_CLIP_S, skipped, folder_language), skipped)
        utterances += [u for u in rows if u.audio_filepath not in data_sets]
        data_sets = {u.audio_filepath: source for u in rows} | data_sets
    systems = load_systems(system, model, device, out, steps, start, seed, engine, auto)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    table = Table("run", "data", "language", "error rate", "95 % interval", "passes", "RTFx", "skipped")
    told_apart: list[tuple[str, str, float, int]] = []
    for folder, chosen in systems.items():
        with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
            task = bar.add_task(folder.name, total=len(utterances))

            def show(done: int, edits: Edits, bar: Progress = bar, task: int = task, name: str = folder.name) -> None:
                bar.update(task, completed=done, description=f"{name} {edits.rate:.1%}")  # type: ignore[arg-type]

            summary = evaluate(chosen, utterances, folder, batch_size, skipped, show, data_sets)
        told_apart += [
            (folder.name, code, found["language_found_over_2_s"], found["over_2_s"])
            for code, found in summary["languages"].items()
            if found.get("language_found_over_2_s") is not None
        ]
        for data, language, found in parts(summary):
            table.add_row(
                folder.name, data, language, f"{found['error_rate']:.2%}", f"{found['low']:.2%} – {found['high']:.2%}",
                str(summary["passes"]), str(summary["speed"]["rtfx"]), str(summary["skipped"]),
            )  # fmt: skip
    for why in summary["skipped_why"]:
        console.print(f"skipped: {why}", markup=False, highlight=False, soft_wrap=True)
    if summary["skipped"] > len(summary["skipped_why"]):
        console.print(f"skipped: {summary['skipped'] - len(summary['skipped_why'])} more")
    Console().print(table)
    for name, language, share, count in told_apart:
        print(f"{name}: {language} found rightly in {share:.1%} of {count} clips of over 2 s")
    print(write_report(list(systems), out / "report.html"))


def load_systems(
    system: str, model: str, device: str, out: Path, steps: Sequence[int], start: Start | None, seed: int,
    engine: EngineName = "fast", auto: bool = False,
) -> dict[Path, System]:  # fmt: skip
    """The systems to evaluate, by the folders of their runs: one, or one for each number of steps."""
    if system == "whisper":
        return {out: Whisper(model, choose_device(device))}
    if system == "baseline":
        return {out: TrainedBaseline.load(model, seed)}
    loaded = load(model, device=device)
    if system == "ctc":
        return {out: CtcGreedy(loaded, model)}
    if system == "autoregressive":
        return {out: Autoregressive(loaded, model)}
    folders = [out] if len(steps) == 1 else [out / f"steps-{n}" for n in steps]
    options = [loaded.backbone.denoise_options(n) for n in steps]
    return {f: Diffusion(loaded, model, o, start, seed, engine, None, auto) for f, o in zip(folders, options, strict=True)}


def usable(rows: Sequence[Utterance], skipped: list[str]) -> list[Utterance]:
    """The utterances in a language that the system knows; `skipped` takes a message for each other one."""
    kept = [u for u in rows if u.language in LANGUAGES]
    known = ", ".join(LANGUAGES)
    skipped += [
        f"{u.audio_filepath}: language {u.language!r} is none of {known}" for u in rows if u.language not in LANGUAGES
    ]
    return kept


def compare_command(runs: Sequence[Path]) -> None:
    """Prints the comparison as a table."""
    table = Table("run", "language", "utterances", "error rate", "against the first", "p")
    for row in compare(runs):
        test = row.get("against_first")
        shown = f"{test['difference']:+.2%} ({test['low']:+.2%} to {test['high']:+.2%})" if test else ""
        table.add_row(
            row["run"], row["language"], str(row["utterances"]), f"{row['error_rate']:.2%}", shown,
            f"{test['p_value']:.3f}" if test else "",
        )  # fmt: skip
    Console().print(table)
