"""The command `diffusion-gemma-asr info`: the parameter count of every part of a model, without weights or a download."""

from __future__ import annotations

from typing import Annotated

import typer

from ..model.config import ModelConfig
from ..train.recipe import load_recipe
from .memory import render_memory
from .parts import count_parts
from .terminal import print_out


def info(
    recipe: Annotated[
        str, typer.Option("--recipe", help="Name of a recipe of the package, or a YAML file.", show_default=False)
    ],
    memory: Annotated[
        bool, typer.Option("--memory", help="Also estimate memory for inference and training, and what is to be fetched.")
    ] = False,
) -> None:
    """Prints the table of a recipe's model."""
    loaded = load_recipe(recipe)
    print_out(f"recipe {recipe}\n{render(loaded.model)}\n")
    if memory:
        print_out(f"\n{render_memory(loaded)}\n")


def render(model: ModelConfig) -> str:
    """The table of a model's parts as text.

    Raises:
        CheckpointError: as `count_parts`.
    """
    parts = count_parts(model)
    total = sum(part.parameters for part in parts)
    trained = sum(part.parameters for part in parts if part.trained)
    rows = [("part", "parameters", "share", "", "source")]
    for part in parts:
        state = "trained" if part.trained else "frozen"
        rows.append((part.name, f"{part.parameters:,}", f"{part.parameters / total:.2%}", state, part.source))
    rows.append(("total", f"{total:,}", f"{1:.2%}", "", ""))
    rows.append(("trained", f"{trained:,}", f"{trained / total:.2%}", "", ""))
    w = [max(len(row[column]) for row in rows) for column in range(5)]
    return "\n".join(
        f"{name:<{w[0]}}  {count:>{w[1]}}  {share:>{w[2]}}  {state:<{w[3]}}  {source}".rstrip()
        for name, count, share, state, source in rows
    )
