"""Training of the baselines that have a decoder of their own, by the same loop, data and monitors as our adapter."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from ..baselines.trained import BaselineRecipe, TrainedBaseline, load_baseline_recipe
from ..data.augment import mask_bands
from ..recipe_files import find_recipe, read_yaml
from .adapter import SpeechData, compute_dtype, computing_in, loop_options
from .loop import Metrics, run
from .monitor import error_rate
from .workers import rank

EVALUATED_AT_ONCE = 20
SHOWN = 3  # transcripts printed beside their references


def is_baseline(path: str | Path) -> bool:
    """Whether a recipe file (or the recipe of that name) is one of a baseline."""
    content = read_yaml(find_recipe(path))
    return isinstance(content, dict) and "baseline" in content


def train_baseline_from_recipe(path: str | Path) -> Path:
    """Trains a baseline into `runs/NAME`; see `train_baseline`."""
    recipe = load_baseline_recipe(path)
    return train_baseline(recipe, Path("runs") / recipe.name)


def train_baseline(recipe: BaselineRecipe, folder: str | Path) -> Path:
    """Trains a baseline, resuming what a killed run left, and returns the folder that `TrainedBaseline.load` takes."""
    folder = Path(folder)
    torch.manual_seed(recipe.train.seed)
    system = TrainedBaseline(recipe, recipe.name)
    data = SpeechData(recipe.data, recipe.train, system.encoder, folder)
    targets = [system.spell(text) for text in data.texts]
    console = Console(stderr=True)
    dtype = compute_dtype(recipe.train.dtype, torch.device("cpu"))

    def loss_of(step: int, micro: int) -> tuple[Tensor, Metrics]:
        system.net.train()
        chosen = data.mixture.at(step * recipe.train.accumulation + micro)
        frames, lengths = data.cache.batch([data.utterances[i] for i in chosen])
        frames = mask_bands(frames, lengths, recipe.train.spec_augment)
        with computing_in(dtype, torch.device("cpu")):
            return system.net.loss(frames, lengths, [targets[i] for i in chosen]), {}

    def evaluate(step: int) -> Metrics:
        figures = {}
        for name, code, rows in data.dev_by_language():
            written: list[str] = []
            for i in range(0, len(rows), EVALUATED_AT_ONCE):
                written += [found.text for found in system.decode(*data.cache.batch(rows[i : i + EVALUATED_AT_ONCE]))]
            said = [u.text for u in rows]
            figures[f"wer_{name}"] = round(error_rate(said, written, code), 4)
            console.print(f"[bold]step {step} · {name} · errors {figures[f'wer_{name}']:.1%}[/bold]")
            for reference, text in list(zip(said, written, strict=True))[:SHOWN]:
                console.print(f"  said   {reference}\n  wrote  {text}", style="dim", markup=False)
        return figures

    trained = {name: p for name, p in system.net.named_parameters() if p.requires_grad}
    run(trained, loss_of, folder, loop_options(recipe.train), evaluate)
    if rank() == 0:
        system.save(folder / "checkpoint")
    return folder / "checkpoint"
