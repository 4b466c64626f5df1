"""The stage `reading`: the backbone learns to read what the projector writes, then it is frozen for good.

DiffusionGemma has read so much that LoRA can teach it to read audio tokens. A backbone of a few million parameters that has
only seen imitations of them cannot learn it so (docs/training.md has figures). Here all its weights, the head among
them, learn together with the projector, by the adapter's three losses on the frozen encoder's frames.
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
    """Every weight of the projector and of the backbone, but for its vision tower, by name and ready to train."""
    chosen = {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.startswith(("projector.", "backbone.")) and "vision" not in name
    }
    for parameter in chosen.values():
        parameter.requires_grad_(True)
    return chosen


def train_reading(recipe: Recipe, folder: Path, device: torch.device) -> Path:
    """Trains backbone and projector, resuming what a killed run left.

    Args:
        recipe: its LoRA is left out.
        folder: of the run; gets log.jsonl, state.pt, frames/, the backbone, in the real layout, in backbone/, and the
            projector, as an adapter without LoRA, in projector/.
        device: where to compute.

    Returns:
        the backbone's folder.

    Raises:
        AsrError: a part, a list or a saved state cannot be used.
    """
    model = build_model(recipe, device, compute_dtype(recipe.train.dtype, device), lora=False)
    model.backbone.float()  # it learns
    if recipe.train.start_from is not None:
        load_adapter(model, recipe.train.start_from, projector_alone=True)
    trainer = AdapterTrainer(recipe, model, folder)
    run(readers(model), trainer.loss_of, folder, recipe.train, trainer.evaluate, trainer.settings)
    if rank() == 0:
        save_backbone(model.backbone, model.prompts, folder / "backbone")
        save_projector(model.projector, folder / "projector")
    return folder / "backbone"
