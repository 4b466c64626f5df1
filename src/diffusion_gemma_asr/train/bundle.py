"""Puts a trained mini model together as the package carries it: adapter, encoder and backbone in one folder."""

from __future__ import annotations

import argparse
import shutil
from dataclasses import replace
from pathlib import Path

from ..checkpoint import load_checkpoint, save_checkpoint
from ..model_card import ModelCard
from ..recipe import SourceRecipe, load_recipe


def bundle(recipe_path: str | Path, run: Path, target: Path, card: ModelCard | None = None) -> None:
    """Copies `run/encoder` and `run/backbone` into `target` and writes the adapter of `run/checkpoint` beside them."""
    model = load_checkpoint(run / "checkpoint", device="cpu")
    for part in ("encoder", "backbone"):
        shutil.rmtree(target / part, ignore_errors=True)
        shutil.copytree(run / part, target / part)
    recipe = load_recipe(recipe_path).model
    sources = {part: SourceRecipe(str((target / part).resolve())) for part in ("encoder", "backbone")}
    save_checkpoint(model, target, replace(recipe, **sources), card)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Bundle the mini model.")
    parser.add_argument("recipe")
    parser.add_argument("run", type=Path)
    parser.add_argument("target", type=Path)
    args = parser.parse_args()
    bundle(args.recipe, args.run, args.target)
