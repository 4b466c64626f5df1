"""The commands `diffusion-gemma-asr evaluate` and `compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..evaluate.command import compare_command, evaluate_command
from ..evaluate.options import EvaluateOptions
from .options import with_options


@with_options
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
        list[str] | None, typer.Option("--manifest", help="The same as an option; may be given again.", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the run; a killed run goes on.", show_default=False)],
    options: EvaluateOptions,
) -> None:
    """Evaluates a system on data sets."""
    sources = [*(data or ()), *(manifest or ())]
    if not sources:
        raise typer.BadParameter("nothing to evaluate; give a manifest, a folder or a corpus")
    evaluate_command(sources, out, options)


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders that `evaluate` wrote.", show_default=False)],
) -> None:
    """Compares runs."""
    compare_command(runs)
