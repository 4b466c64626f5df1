"""The stage `bundle`: writes a trained model into one folder, with adapter, backbone and, unless published, encoder."""

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
from ...errors import CheckpointError
from ...model.packing import pack_file
from ..workers import rank, wait_for_all


@dataclass(frozen=True)
class CardRecipe:
    """Texts for the model card; see `ModelCard`."""

    training_data: str
    limits: str
    results: dict[str, str] = field(default_factory=dict)  # test set → figure with its unit
    licence: str = "apache-2.0"


@dataclass(frozen=True)
class BundleRecipe:
    """The stage `bundle`."""

    stage: Literal["bundle"]
    name: str  # of the run's folder
    checkpoint: Path  # folder written by the stage `adapter`
    card: CardRecipe
    encoder: str | None = None  # hub repository of the encoder; None copies the encoder into the bundle


def bundle(recipe: BundleRecipe, folder: Path, device: torch.device) -> Path:
    """Copies a checkpoint's frozen parts into `folder`, and writes its adapter beside them.

    Weights are float16, large matrices 8-bit.

    Args:
        recipe: of the stage.
        folder: gets the bundle, which is complete but for an encoder on the hub.
        device: ignored.

    Returns:
        `folder`, an argument for `load()`.

    Raises:
        CheckpointError: the checkpoint cannot be read, or `folder` cannot be written.
    """
    if rank() == 0:
        model = load_checkpoint(recipe.checkpoint, device="cpu", merge_lora=False)
        config = model.config
        copied = {"backbone": config.backbone.name} | ({} if recipe.encoder else {"encoder": config.encoder.name})
        for part, source in copied.items():
            if not Path(source).is_dir():
                raise CheckpointError(f"the {part} is {source}, which is no folder: only what lies in one can be bundled")
            if Path(source).resolve() == (folder / part).resolve():
                raise CheckpointError(
                    f"the {part} of {recipe.checkpoint} lies in {folder}, which gets the bundle; name another"
                )
        for part, source in copied.items():
            shutil.rmtree(folder / part, ignore_errors=True)
            shutil.copytree(source, folder / part)
            if (weights := folder / part / WEIGHTS).is_file():  # sharded weights are not packed
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
