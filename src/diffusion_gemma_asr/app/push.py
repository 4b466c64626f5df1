"""The command `diffusion-gemma-asr push`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..checkpoint.card import Score
from ..checkpoint.load import find_checkpoint
from ..checkpoint.push import push_to_hub
from ..errors import DataError
from .terminal import print_out


def push(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint folder, or a bundled model.", show_default=False)],
    repository: Annotated[str, typer.Argument(help="owner/name on the hub; made if missing.", show_default=False)],
    results: Annotated[
        list[Path] | None,
        typer.Option(
            "--results", help="Folder that `evaluate` wrote, for the card; may be given again.", show_default=False
        ),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="For a repository that is made.")] = False,
    revision: Annotated[
        str | None, typer.Option("--revision", help="Branch, made if missing.", show_default="the main one")
    ] = None,
) -> None:
    """Uploads what loading a checkpoint needs; the token is the one of `hf auth login` or HF_TOKEN."""
    scores = [score for run in results or () for score in scores_of(run)]
    folder = find_checkpoint(checkpoint, local_files_only=True)
    print_out(f"{push_to_hub(folder, repository, private=private, revision=revision, scores=scores)}\n")


def scores_of(run: Path) -> list[Score]:
    """The error rates of a run of `evaluate`, by data set and language.

    Raises:
        DataError: the folder holds no finished run.
    """
    from ..evaluate.summary import parts  # needs an extra

    try:
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        rows = [row for row in parts(summary) if row[0] != "all" and row[2]["error_rate"] is not None]
        return [
            Score(name, code, "wer" if rates["unit"] == "word" else "cer", round(100 * rates["error_rate"], 2))
            for name, code, rates in rows
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"{run} holds no finished run; give a folder that `evaluate --out` wrote") from None
