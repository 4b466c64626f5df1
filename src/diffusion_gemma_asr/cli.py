"""The command `diffusion-gemma-asr`: transcribe, train, evaluate, compare, info.

Option names are those of openai/whisper and whisperX, with underscores; dashes are understood too. Results go
to standard output, everything else to standard error. Exit status: 0 all went well, 1 something failed (named
in one line on standard error), 2 the command was not understood.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

import diffusion_gemma_asr as asr

from . import transcribe_command
from .terminal import complain
from .transcribe_command import Device, Engine, FirstCanvas, Way, first_canvas, way

FLAGS = {"word_timestamps", "highlight_words", "verbose", "print_progress", "overwrite", "watch", "microphone"}

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


class SystemName(str, Enum):
    diffusion = "diffusion"
    ctc = "ctc"
    autoregressive = "autoregressive"
    whisper = "whisper"
    baseline = "baseline"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command with `arguments` (None is those of the process) and leave with its exit status."""
    try:
        app(args=_whisper_booleans(sys.argv[1:] if arguments is None else arguments), prog_name="diffusion-gemma-asr")
    except asr.AsrError as error:
        complain(str(error))
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


app.command()(transcribe_command.transcribe)


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
    from diffusion_gemma_asr.train.workers import join_workers

    join_workers()
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
            help="A bundled model (mini6, mini, mini-whisper-base), a checkpoint folder or a hub repository; "
            "a Whisper or a trained baseline.",
        ),
    ] = asr.DEFAULT_MODEL,
    system: Annotated[
        SystemName,
        typer.Option(
            help="Denoising decoder; CTC draft alone; the backbone token after token; a Whisper with its decoder; "
            "a baseline that `train` made."
        ),
    ] = SystemName.diffusion,
    steps: Annotated[str, typer.Option(help="Denoising steps at most; 1,2,4,8 measures each.")] = "8",
    start: FirstCanvas = None,
    seed: Annotated[int, typer.Option(help="Of the random draws.")] = 0,
    batch_size: Annotated[int, typer.Option("--batch_size", min=1, help="Clips taken at once.")] = 8,
    device: Device = "auto",
    language: Annotated[str, typer.Option(help="Spoken in folders of sounds; manifests and corpora say it.")] = "en",
    engine: Way = Engine.fast,
    find_language: Annotated[
        bool, typer.Option("--find_language", help="Do not tell the model the language; measures how often it finds it.")
    ] = False,
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
        sources,
        out,
        model,
        system.value,
        counts,
        first_canvas(start),
        seed,
        batch_size,
        device,
        language,
        way(engine),
        find_language,
    )


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders that `evaluate` wrote.", show_default=False)],
) -> None:
    """Put runs side by side, each tested against the first on the same utterances."""
    from diffusion_gemma_asr.evaluate.command import compare_command

    compare_command(runs)


def _whisper_booleans(arguments: Sequence[str]) -> list[str]:
    """`--word_timestamps True`, as openai/whisper writes it, to `--word_timestamps`; with False the option goes."""
    found: list[str] = []
    for argument in arguments:
        before = found[-1].lstrip("-").replace("-", "_") if found and found[-1].startswith("--") else ""
        if before in FLAGS and argument in ("True", "False"):
            if argument == "False":
                found.pop()
            continue
        found.append(argument)
    return found
