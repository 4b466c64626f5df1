"""The stage `bundle`: puts a trained model together as the package carries it: adapter, backbone and, where it is ours,
encoder."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

from ...checkpoint.card import ModelCard
from ...checkpoint.load import load_checkpoint
from ...checkpoint.parts import WEIGHTS
from ...checkpoint.save import save_checkpoint
from ...model.packing import pack_file
from ..workers import rank, wait_for_all


@dataclass(frozen=True)
class CardRecipe:
    """What the model card says beyond the settings; see `ModelCard`."""

    training_data: str
    limits: str
    results: dict[str, str] = field(default_factory=dict)  # test set → figure with its unit
    licence: str = "apache-2.0"


@dataclass(frozen=True)
class BundleRecipe:
    """The stage `bundle`."""

    stage: Literal["bundle"]
    name: str  # of the folder
    checkpoint: Path  # of an adapter
    card: CardRecipe
    encoder: str | None = None  # hub repository that holds the encoder, which then is not copied


def bundle(recipe: BundleRecipe, folder: Path, device: torch.device) -> Path:
    """Copies a checkpoint's frozen parts into `folder` and writes its adapter beside them, in float16 and the large matrices
    of all in 8 bits.

    Args:
        recipe: of the stage.
        folder: gets the bundle, which needs nothing outside it but an encoder on a hub.
        device: does not matter.

    Returns:
        `folder`, as `load()` takes it.

    Raises:
        CheckpointError: the checkpoint cannot be read, or `folder` cannot be written.
    """
    if rank() == 0:
        model = load_checkpoint(recipe.checkpoint, device="cpu", merge_lora=False)
        config = model.config
        copied = {"backbone": config.backbone.name} | ({} if recipe.encoder else {"encoder": config.encoder.name})
        for part, source in copied.items():
            shutil.rmtree(folder / part, ignore_errors=True)
            shutil.copytree(source, folder / part)
            if (weights := folder / part / WEIGHTS).is_file():  # shards stay as they are
                pack_file(weights)
        encoder = recipe.encoder or str((folder / "encoder").resolve())
        model.config = replace(
            config,
            encoder=replace(config.encoder, name=encoder),
            backbone=replace(config.backbone, name=str((folder / "backbone").resolve())),
        )
        for parameter in model.trained().values():
            parameter.data = parameter.data.half()
        save_checkpoint(model, folder, ModelCard(**recipe.card.__dict__), packed=True)
    wait_for_all()
    return folder
