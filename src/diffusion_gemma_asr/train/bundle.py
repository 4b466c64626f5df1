"""Puts a trained mini model together as the package carries it: adapter, encoder and backbone in one folder."""

from __future__ import annotations

import argparse
import shutil
from dataclasses import replace
from pathlib import Path

import yaml

from ..checkpoint import load_checkpoint, save_checkpoint
from ..model_card import ModelCard
from ..recipe import SourceRecipe, load_recipe


def bundle(recipe_path: str | Path, run: Path, target: Path, card: ModelCard | None = None) -> None:
    """Copies the recipe's frozen parts into `target` and writes the adapter of `run/checkpoint` beside them."""
    model = load_checkpoint(run / "checkpoint", device="cpu", merge_lora=False)
    recipe = load_recipe(recipe_path).model
    for part, source in (("encoder", recipe.encoder.name), ("backbone", recipe.backbone.name)):
        shutil.rmtree(target / part, ignore_errors=True)
        shutil.copytree(source, target / part)
    encoder, backbone = (SourceRecipe(str((target / part).resolve())) for part in ("encoder", "backbone"))
    save_checkpoint(model, target, replace(recipe, encoder=encoder, backbone=backbone), card)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Bundle the mini model.")
    parser.add_argument("recipe")
    parser.add_argument("run", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--card", type=Path, help="YAML with training_data and results, for the model card")
    args = parser.parse_args()
    card = ModelCard(**yaml.safe_load(args.card.read_text(encoding="utf-8"))) if args.card else None
    bundle(args.recipe, args.run, args.target, card)
