"""The command `diffusion-gemma-asr`: transcribe, train, evaluate, compare, info.

Option names are those of openai/whisper and whisperX, with underscores; dashes are understood too. Results go
to standard output, everything else to standard error. Exit status: 0 all went well, 1 something failed (named
in one line on standard error), 2 the command was not understood.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar

import diffusion_gemma_asr as asr
from diffusion_gemma_asr.writers import FORMATS, render, timestamp, write_whole

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda name: name.replace("-", "_"),  # --batch-size is --batch_size
    },
    help="Speech recognition whose decoder is a diffusion language model.",
)


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


class SystemName(str, Enum):
    diffusion = "diffusion"
    ctc = "ctc"
    autoregressive = "autoregressive"
    whisper = "whisper"
    baseline = "baseline"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command with `arguments` (None is those of the process) and leave with its exit status."""
    try:
        app(args=None if arguments is None else list(arguments), prog_name="diffusion-gemma-asr")
    except asr.AsrError as error:
        _complain(str(error))
        sys.exit(1)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"diffusion-gemma-asr {asr.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", "-V", callback=_print_version, is_eager=True, help="Print it and exit."),
    ] = False,
) -> None:
    pass


@app.command()
def transcribe(
    files: Annotated[list[Path], typer.Argument(help="Sound or video files.", show_default=False)],
    model: Annotated[str, typer.Option(help="mini (bundled), a checkpoint folder or a hub repository.")] = "mini",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    dtype: Annotated[
        str,
        typer.Option("--dtype", "--compute_type", help=f"auto (the model's own), {', '.join(asr.DTYPES)}."),
    ] = "auto",
    quantization: Annotated[
        str | None,
        typer.Option(help="Of the backbone, for instance bnb-4bit.", show_default="none"),
    ] = None,
    language: Annotated[str, typer.Option(help="Code of the language spoken.")] = asr.TranscribeOptions.language,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps at most.")] = 8,
    start: Annotated[
        Start | None,
        typer.Option(help="First canvas: random tokens, or the CTC draft.", show_default="the checkpoint's own"),
    ] = None,
    engine: Annotated[Engine, typer.Option(help="The same transcripts, fast or by the plain loop.")] = Engine.fast,
    seed: Annotated[int, typer.Option(help="The same seed gives the same transcript.")] = asr.TranscribeOptions.seed,
    batch_size: Annotated[
        int, typer.Option("--batch_size", min=1, help="Chunks of at most 30 s taken at once.")
    ] = asr.TranscribeOptions.batch_size,
    threads: Annotated[int | None, typer.Option(min=1, help="Processor threads.", show_default="torch's choice")] = None,
    output_format: Annotated[
        OutputFormat, typer.Option("--output_format", "-f", help="Text, subtitles, a table, a line of JSON, or all.")
    ] = OutputFormat.txt,
    output_dir: Annotated[
        Path | None,
        typer.Option("--output_dir", "-o", help="Write NAME.txt, NAME.srt, ... here.", show_default="print"),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace files in --output_dir; else those are left, and not done again.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show segments with times and scores.")] = False,
) -> None:
    """Transcribe sound files: the text of one, or path, tab and text of each of several."""
    outputs = _output_files(files, output_dir, output_format)
    if not overwrite:
        outputs = _without_existing(outputs)
    if not outputs:
        return
    if threads is not None:
        _set_threads(threads)
    wanted_dtype = None if dtype == "auto" else dtype
    loaded = asr.load(model, device=device, dtype=wanted_dtype, quantization=quantization)
    chosen = asr.TranscribeOptions(language, steps, seed, batch_size, start=_first_canvas(start), engine=_way(engine))

    began, heard_s, failed = time.perf_counter(), 0.0, 0
    with _progress_bar() as bar:
        results = asr.transcribe_many(loaded, [file for file, _ in outputs], chosen, on_progress=bar.update)
        for (file, wanted), result in zip(outputs, results, strict=True):
            with bar.aside():
                if isinstance(result, asr.AsrError):
                    _complain(str(result))
                    failed += 1
                    continue
                heard_s += result.duration
                if verbose:
                    _show_segments(file, result)
                for form, output in wanted.items():
                    text = render(result, form, str(file))
                    if output is not None:
                        write_whole(output, text)
                    else:
                        print(f"{file}\t{text}" if form == "txt" and len(files) > 1 else text, end="", flush=True)
    _report_speed(heard_s, time.perf_counter() - began)
    if failed:
        raise typer.Exit(1)


@app.command()
def info(
    recipe: Annotated[str, typer.Option(help="Name of a recipe of the package, or a YAML file.", show_default=False)],
) -> None:
    """Count the parameters of a recipe's model: what is frozen, what is trained."""
    from diffusion_gemma_asr.info import render

    print(render(recipe))


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="The run to do.", show_default=False)],
) -> None:
    """Train an adapter, or a baseline, by a recipe; a run that was interrupted goes on where it stood."""
    from diffusion_gemma_asr.train.adapter import train_from_recipe
    from diffusion_gemma_asr.train.baseline import is_baseline, train_baseline_from_recipe

    (train_baseline_from_recipe if is_baseline(recipe) else train_from_recipe)(recipe)


@app.command()
def evaluate(
    data: Annotated[
        list[str] | None,
        typer.Argument(
            help="JSONL manifests, folders of sounds with .txt beside them, or corpora: librispeech:clean, fleurs:de, "
            "voxpopuli, ...",
            show_default=False,
        ),
    ] = None,
    *,
    manifest: Annotated[
        list[str] | None, typer.Option(help="The same as an option; may be given again.", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the run; a killed run goes on.", show_default=False)],
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "--recipe",
            help="mini (bundled), a checkpoint folder or a hub repository; a Whisper or a trained baseline.",
        ),
    ] = "mini",
    system: Annotated[
        SystemName,
        typer.Option(
            help="Denoising decoder; CTC draft alone; the backbone token after token; a Whisper with its decoder; "
            "a baseline that `train` made."
        ),
    ] = SystemName.diffusion,
    steps: Annotated[str, typer.Option(help="Denoising steps at most; 1,2,4,8 measures each.")] = "8",
    start: Annotated[
        Start | None,
        typer.Option(help="First canvas: random tokens, or the CTC draft.", show_default="the checkpoint's own"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the random draws.")] = 0,
    batch_size: Annotated[int, typer.Option("--batch_size", min=1, help="Clips taken at once.")] = 8,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    language: Annotated[str, typer.Option(help="Spoken in folders of sounds; manifests and corpora say it.")] = "en",
    engine: Annotated[Engine, typer.Option(help="The same transcripts, fast or by the plain loop.")] = Engine.fast,
) -> None:
    """Measure error rate and speed; writes predictions.jsonl, summary.json and report.html."""
    from diffusion_gemma_asr.evaluate.command import evaluate_command

    sources = [*(data or ()), *(manifest or ())]
    if not sources:
        raise typer.BadParameter("nothing to evaluate; give a manifest, a folder or a corpus")
    try:
        counts = [int(value) for value in steps.split(",")]
    except ValueError:
        raise typer.BadParameter(f"--steps is {steps!r}; give numbers such as 8 or 1,2,4,8") from None
    evaluate_command(
        sources, out, model, system.value, counts, _first_canvas(start), seed, batch_size, device, language, _way(engine)
    )


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders that `evaluate` wrote.", show_default=False)],
) -> None:
    """Put runs side by side, each tested against the first on the same utterances."""
    from diffusion_gemma_asr.evaluate.command import compare_command

    compare_command(runs)


def _complain(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)


def _set_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


def _first_canvas(start: Start | None) -> Literal["noise", "draft"] | None:
    return None if start is None else ("draft" if start is Start.draft else "noise")


def _way(engine: Engine) -> Literal["fast", "reference"]:
    return "fast" if engine is Engine.fast else "reference"


def _output_files(
    files: list[Path], folder: Path | None, output_format: OutputFormat
) -> list[tuple[Path, dict[str, Path | None]]]:
    """Each file with where its result goes, by format, None being standard output; two inputs never share a file."""
    formats = FORMATS if output_format is OutputFormat.all else (output_format.value,)
    if folder is None:
        if len(formats) > 1 or (len(files) > 1 and formats[0] not in ("txt", "json")):
            raise typer.BadParameter(f"--output_format {output_format.value} makes several files here; give --output_dir")
        return [(file, {formats[0]: None}) for file in files]
    owners: dict[Path, Path] = {}
    for file in files:
        output = folder / f"{file.stem}.{formats[0]}"
        if output in owners:
            raise typer.BadParameter(f"{owners[output]} and {file} would both be written to {output}")
        owners[output] = file
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"{folder}: cannot be made ({error.strerror})") from None
    return [(file, {form: folder / f"{file.stem}.{form}" for form in formats}) for file in files]


def _without_existing(outputs: list[tuple[Path, dict[str, Path | None]]]) -> list[tuple[Path, dict[str, Path | None]]]:
    """What is still to be made; says what is there already."""
    left = []
    for file, wanted in outputs:
        there = [output for output in wanted.values() if output is not None and output.exists()]
        for output in there:
            print(f"{output} exists and is left as it is; --overwrite replaces it", file=sys.stderr)
        if missing := {form: output for form, output in wanted.items() if output not in there}:
            left.append((file, missing))
    return left


def _show_segments(file: Path, result: asr.Transcript) -> None:
    print(f"{file}: {result.duration:.1f} s, {len(result.segments)} segments", file=sys.stderr)
    for segment in result.segments:
        score = "silence" if segment.no_speech_prob == 1.0 else f"mean log-probability {segment.avg_logprob:.2f}"
        times = f"[{timestamp(segment.start)} --> {timestamp(segment.end)}]"
        print(f"{times} {segment.text} ({score})", file=sys.stderr, flush=True)


def _report_speed(heard_s: float, took_s: float) -> None:
    if heard_s:
        speed = f"{heard_s / took_s:.1f} times real time"
        print(f"{heard_s:.1f} s of sound in {took_s:.1f} s: {speed}", file=sys.stderr)


class _Bar:
    """A progress bar over seconds of sound; without a display it shows nothing."""

    def __init__(self, display: ProgressBar | None) -> None:
        self._display = display
        self._task = display.add_task("", total=0.0) if display is not None else None

    def update(self, progress: asr.Progress) -> None:
        if self._display and self._task is not None:
            self._display.update(self._task, completed=progress.done_s, total=progress.read_s)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Take the bar off the screen while something else is printed."""
        if self._display:
            self._display.stop()
        try:
            yield
        finally:
            if self._display:
                self._display.start()


@contextmanager
def _progress_bar() -> Iterator[_Bar]:
    """A bar on standard error where that is a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Bar(None)
        return
    display = ProgressBar(
        TextColumn("transcribing"),
        BarColumn(),
        TextColumn("{task.completed:.0f} of {task.total:.0f} s"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        redirect_stdout=False,  # results are not to end up on standard error
        redirect_stderr=False,
    )
    with display:
        yield _Bar(display)
