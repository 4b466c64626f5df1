"""The command `diffusion-gemma-asr train RECIPE`: runs the stage that the recipe's key `stage` names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.load import choose_device
from ..errors import RecipeError
from ..strict import suggest
from .adapter import train_adapter
from .mini.bundle import BundleRecipe, bundle
from .mini.decoder_text import DecoderRecipe, train_decoder
from .mini.ears import EarsRecipe, train_ears
from .mini.hearing import HearingRecipe, train_hearing
from .mini.reading import ReadingRecipe, train_reading
from .mini.text import BackboneRecipe, train_backbone
from .mini.tokenizer import TokenizerRecipe, train_tokenizer_stage
from .recipe import Recipe
from .recipe_files import find_recipe, load_recipe_as, read_mapping
from .workers import join_workers

Stage = tuple[type[Any], Callable[[Any, Path, torch.device], Path]]
"""The dataclass of a stage's recipe, and its function: (recipe, run folder, device) → folder of the result."""

STAGES: dict[str, Stage] = {
    "adapter": (Recipe, train_adapter),
    "tokenizer": (TokenizerRecipe, train_tokenizer_stage),
    "decoder": (DecoderRecipe, train_decoder),
    "backbone": (BackboneRecipe, train_backbone),
    "hearing": (HearingRecipe, train_hearing),
    "reading": (ReadingRecipe, train_reading),
    "ears": (EarsRecipe, train_ears),
    "bundle": (BundleRecipe, bundle),
}


def train_from_recipe(path: str | Path, folder: str | Path | None = None, device: str = "auto") -> Path:
    """Runs the stage of a recipe, resuming an interrupted run.

    Under torchrun every process calls this, and they share the work.

    Args:
        path: recipe file, or the name of a recipe that ships with the package.
        folder: of the run; None is runs/NAME in the working directory.
        device: name of a torch device; "auto" is a GPU if available, else the CPU.

    Returns:
        the folder of the result: a checkpoint, backbone, encoder or tokenizer.

    Raises:
        AsrError: recipe, data, model parts, device or a saved state cannot be used.
    """
    stage = read_mapping(find_recipe(path)).get("stage", "adapter")
    if stage not in STAGES:
        hint = suggest(str(stage), list(STAGES)) or f"; give one of {', '.join(STAGES)}"
        raise RecipeError(f"{path}: no stage is called '{stage}'{hint}")
    recipe_class, train = STAGES[stage]
    recipe = load_recipe_as(recipe_class, path)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return train(recipe, Path(folder or Path("runs") / recipe.name), join_workers(choose_device(device)))
