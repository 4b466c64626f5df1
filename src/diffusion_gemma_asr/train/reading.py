"""Stage 3 of the mini model: the backbone learns to read what the projector writes, then it is frozen for good.

DiffusionGemma has read so much that LoRA can teach it to read audio tokens. A backbone of 3M parameters that has only seen
imitations of them cannot learn it so (docs/results/mini.md has the figures). Here all its weights, the lm_head that the
projector writes through among them, learn together with the projector, by the adapter's three losses on the frozen
encoder's frames.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn

from ..checkpoint import load_adapter, save_projector
from ..model import DiffusionGemmaASR
from ..recipe import Recipe, load_recipe
from .adapter import AdapterTrainer, build_model, compute_dtype, loop_options
from .loop import run
from .text import save_backbone
from .workers import join_workers, rank


def readers(model: DiffusionGemmaASR) -> dict[str, nn.Parameter]:
    """Every weight of the projector and of the backbone, but for its unused eyes, by name and ready to train."""
    chosen = {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.startswith(("projector.", "backbone.")) and "vision" not in name
    }
    for parameter in chosen.values():
        parameter.requires_grad_(True)
    return chosen


def train_reading(recipe: Recipe, folder: str | Path) -> None:
    """Trains by a recipe (its LoRA is left out), resuming what a killed run left.

    Writes the backbone, in the real layout, to `folder/backbone` and the projector, as an adapter without LoRA, to
    `folder/projector`.
    """
    folder = Path(folder)
    dtype = compute_dtype(recipe.train.dtype, torch.device("cpu"))
    model = build_model(recipe, dtype=dtype, lora=False)
    model.backbone.float()  # it learns
    if recipe.train.start_from is not None:
        load_adapter(model, recipe.train.start_from, projector_alone=True)
    trainer = AdapterTrainer(recipe, model, folder, dtype)
    run(readers(model), trainer.loss_of, folder, loop_options(recipe.train), trainer.evaluate)
    if rank() > 0:
        return
    save_backbone(model.backbone, model.prompts, folder / "backbone")
    save_projector(model.projector, folder / "projector")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Teach the mini model's backbone to read audio tokens (stage 3).")
    parser.add_argument("recipe", help="recipe, YAML")
    parser.add_argument("folder", help="run folder; gets backbone/ and projector/")
    args = parser.parse_args()
    join_workers()
    train_reading(load_recipe(args.recipe), args.folder)
