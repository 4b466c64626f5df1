"""The parts of a model and their parameters, counted on the meta device: without weights or a download."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import nn
from transformers import DiffusionGemmaConfig

from ..checkpoint.parts import new_encoder, source_config
from ..errors import CheckpointError
from ..model.backbone import Backbone
from ..model.config import ModelConfig
from ..model.projector import AudioProjector


@dataclass(frozen=True)
class Part:
    """One row of the table: a part of the model, where it comes from, and its size."""

    name: str
    source: str
    parameters: int
    trained: bool


def count_parts(model: ModelConfig) -> list[Part]:
    """Builds a model on the meta device, where tensors have shapes and no content, and counts it.

    Returns:
        encoder, backbone, projector, LoRA; tied weights are counted once.

    Raises:
        CheckpointError: the configuration of a frozen part is neither known nor found, or is of another kind.
    """
    encoder_config, backbone_config = source_config(model.encoder), source_config(model.backbone)
    if not isinstance(backbone_config, DiffusionGemmaConfig):
        kind = backbone_config.model_type
        raise CheckpointError(f"{model.backbone.name} is a {kind}; the backbone must be a DiffusionGemma")
    with torch.device("meta"):
        encoder = new_encoder(encoder_config, model.encoder.name)
        backbone = Backbone.from_config(backbone_config)
        projector = AudioProjector(model.projector, encoder.hidden_size, backbone.hidden_size)
        frozen = _count(backbone)
        backbone.add_lora(**asdict(model.lora))
    lora = sum(matrix.numel() for matrix in backbone.lora_state_dict().values())
    stacks = "both stacks, shared" if model.lora.shared else "both stacks"
    return [
        Part("encoder", model.encoder.name, _count(encoder), False),
        Part("backbone", model.backbone.name, frozen, False),
        Part("projector", model.projector.described, _count(projector), True),
        Part("LoRA", f"rank {model.lora.rank} on q, k, v, o of {stacks}", lora, True),
    ]


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
