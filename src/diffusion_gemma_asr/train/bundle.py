"""Puts a trained mini model together as the package carries it: adapter, backbone and, where it is ours, encoder."""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path

import yaml

from ..checkpoint import load_checkpoint, save_checkpoint
from ..checkpoint_config import CONFIG
from ..language_files import LM
from ..model_card import ModelCard
from ..packing import pack_file
from ..pretrained import WEIGHTS
from ..recipe import SourceRecipe, load_recipe


def bundle(
    recipe_path: str | Path, run: Path, target: Path, card: ModelCard | None = None, encoder_name: str | None = None,
    lm: str | None = None,
) -> None:  # fmt: skip
    """Copies the recipe's frozen parts into `target` and writes the adapter of `run/checkpoint` beside them, in float16 and
    the large matrices of all in 8 bits.

    Args:
        encoder_name: hub repository that holds the encoder, which then is not copied.
        lm: file of the language model, from `target`, where another bundled model has it, so that it is not copied.
    """
    model = load_checkpoint(run / "checkpoint", device="cpu", merge_lora=False)
    recipe = load_recipe(recipe_path).model
    copied = {"backbone": recipe.backbone.name} | ({} if encoder_name else {"encoder": recipe.encoder.name})
    for part, source in copied.items():
        shutil.rmtree(target / part, ignore_errors=True)
        shutil.copytree(source, target / part)
        weights = target / part / WEIGHTS  # or shards, which stay as they are
        if weights.is_file():
            pack_file(weights)
    encoder = SourceRecipe(encoder_name or str((target / "encoder").resolve()))
    backbone = SourceRecipe(str((target / "backbone").resolve()))
    for parameter in model.trained().values():
        parameter.data = parameter.data.half()
    save_checkpoint(model, target, replace(recipe, encoder=encoder, backbone=backbone), card, packed=True)
    if lm is not None:
        config = json.loads((target / CONFIG).read_text(encoding="utf-8"))
        config["lm"]["file"] = lm
        (target / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (target / LM).unlink()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Bundle the mini model.")
    parser.add_argument("recipe")
    parser.add_argument("run", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--card", type=Path, help="YAML with training_data and results, for the model card")
    parser.add_argument("--encoder", help="hub repository that holds the encoder, which then is not copied")
    parser.add_argument("--lm", help="language model of another bundled model, from the target, which then is not copied")
    args = parser.parse_args()
    card = ModelCard(**yaml.safe_load(args.card.read_text(encoding="utf-8"))) if args.card else None
    bundle(args.recipe, args.run, args.target, card, args.encoder, args.lm)
