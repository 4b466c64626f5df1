"""The stage `reading`: trains a small backbone together with the projector, so that it learns to read audio tokens.

LoRA is enough to teach DiffusionGemma audio tokens, but not a backbone of a few million parameters that has only been
trained on imitated ones (figures in docs/training.md). Here all weights of the backbone, including its head, are trained by
the adapter's three losses on the frozen encoder's frames; later stages freeze it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ...checkpoint.load import load_adapter
from ...checkpoint.save import save_projector
from ...model.model import DiffusionGemmaASR
from ..adapter import AdapterTrainer, build_model
from ..loop import compute_dtype, run
from ..recipe import Recipe
from ..workers import rank
from .text import save_backbone


def readers(model: DiffusionGemmaASR) -> dict[str, nn.Parameter]:
    """Unfreezes projector and backbone, without its vision tower; returns their parameters by name."""
    parameters = {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.startswith(("projector.", "backbone.")) and "vision" not in name
    }
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    return parameters


def train_reading(recipe: Recipe, folder: Path, device: torch.device) -> Path:
    """Trains backbone and projector, resuming an interrupted run.

    Args:
        recipe: its LoRA settings are ignored.
        folder: of the run; gets log.jsonl, state.pt, frames/, backbone/ in DiffusionGemma's layout, and projector/, an
            adapter without LoRA.
        device: to compute on.

    Returns:
        the backbone's folder.

    Raises:
        AsrError: a model part, a data list or a saved state cannot be used.
    """
    model = build_model(recipe, device, compute_dtype(recipe.train.dtype, device), lora=False)
    model.backbone.float()  # trained weights are float32
    if recipe.train.start_from is not None:
        load_adapter(model, recipe.train.start_from, projector_alone=True)
    trainer = AdapterTrainer(recipe, model, folder)
    run(readers(model), trainer.loss_of, folder, recipe.train, trainer.evaluate, trainer.settings)
    if rank() == 0:
        save_backbone(model.backbone, model.prompts, folder / "backbone")
        save_projector(model.projector, folder / "projector")
    return folder / "backbone"
