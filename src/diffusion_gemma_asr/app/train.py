"""The command `diffusion-gemma-asr train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .terminal import print_out


def train(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a recipe of the package.", show_default=False)],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the run.", show_default="runs/NAME")] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
) -> None:
    """Trains by a recipe, or goes on with a run of it; prints the folder of what was made."""
    from ..train.run import train_from_recipe  # imports torch, which `--help` does not need

    print_out(f"{train_from_recipe(recipe, out, device)}\n")
