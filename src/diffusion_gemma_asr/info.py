"""What a recipe's model is made of: the parameter count of every part, without weights or a download."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import DiffusionGemmaConfig, PreTrainedConfig, WhisperConfig

from .backbone import Backbone
from .checkpoint import load_tokenizer
from .ear import WAVEFORM, Ear
from .encoder import AcousticEncoder
from .errors import CheckpointError
from .known_configs import KNOWN
from .language_files import load_lexicon
from .pretrained import read_config
from .projector import new_projector
from .recipe import Recipe, SourceRecipe, load_recipe
from .speller import alphabet_size
from .waveform import WaveformFrames


@dataclass(frozen=True)
class Part:
    """One row of the table: a part of the model, where it comes from, and its size."""

    name: str
    source: str
    parameters: int
    trained: bool


def count_parts(recipe: Recipe) -> list[Part]:
    """Build the recipe's model on the meta device, where tensors have shapes and no content, and count it.

    Returns:
        encoder, backbone, projector, LoRA; tied weights are counted once.

    Raises:
        CheckpointError: the configuration of a frozen part is neither known nor found, or is of another kind.
    """
    backbone_config = source_config(recipe.backbone)
    if not isinstance(backbone_config, DiffusionGemmaConfig):
        raise CheckpointError(
            f"{recipe.backbone.name} is a {backbone_config.model_type}; the backbone must be a DiffusionGemma"
        )
    bridge = recipe.projector
    characters = alphabet_size(bridge, load_tokenizer(recipe.backbone)) if bridge.spelling_layers else 0
    lexicon = load_lexicon(recipe.lm, Path()) if bridge.spelling_layers else None
    with torch.device("meta"):
        encoder = _new_encoder(recipe.encoder)
        backbone = Backbone.from_config(backbone_config)
        written = characters, 0 if lexicon is None else len(lexicon)
        projector = new_projector(bridge, encoder.hidden_size, backbone.hidden_size, None, *written)
        frozen = _count(backbone)
        backbone.add_lora(recipe.lora.rank, recipe.lora.alpha, recipe.lora.dropout)
    shape = "linear"
    if bridge.kind == "convolutions":
        shape = f"{bridge.hidden_size} channels, {math.prod(bridge.strides)}x in time"
        if bridge.layers:
            shape += f", {bridge.layers} layers of width {bridge.layer_width}"
        if bridge.spelling_layers:
            shape += f", speller of {bridge.spelling_layers} layers"
    lora = sum(matrix.numel() for matrix in backbone.lora_state_dict().values())
    return [
        Part("encoder", recipe.encoder.name, _count(encoder), False),
        Part("backbone", recipe.backbone.name, frozen, False),
        Part("projector", shape, _count(projector), True),
        Part("LoRA", f"rank {recipe.lora.rank} on q, k, v, o of both stacks", lora, True),
    ]


def render(path_or_name: str | Path) -> str:
    """The table of a recipe's parts as text.

    Args:
        path_or_name: as `load_recipe` takes it.

    Raises:
        RecipeError: the recipe cannot be read.
        CheckpointError: as `count_parts`.
    """
    recipe = load_recipe(path_or_name)
    parts = count_parts(recipe)
    total = sum(part.parameters for part in parts)
    trained = sum(part.parameters for part in parts if part.trained)
    rows = [("part", "parameters", "share", "", "source")]
    for part in parts:
        state = "trained" if part.trained else "frozen"
        rows.append((part.name, f"{part.parameters:,}", f"{part.parameters / total:.2%}", state, part.source))
    rows.append(("total", f"{total:,}", f"{1:.2%}", "", ""))
    rows.append(("trained", f"{trained:,}", f"{trained / total:.2%}", "", ""))
    w = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = [
        f"{name:<{w[0]}}  {count:>{w[1]}}  {share:>{w[2]}}  {state:<{w[3]}}  {source}".rstrip()
        for name, count, share, state, source in rows
    ]
    return "\n".join([f"recipe {recipe.name}", *lines])


def _new_encoder(source: SourceRecipe) -> Ear:
    """A recipe's encoder with random weights."""
    if source.name == WAVEFORM:
        return WaveformFrames()
    config = source_config(source)
    if not isinstance(config, WhisperConfig):
        raise CheckpointError(f"{source.name} is a {config.model_type}; the encoder must be a Whisper")
    return AcousticEncoder.from_config(config)


def source_config(source: SourceRecipe) -> PreTrainedConfig:
    """The configuration of a frozen part: as published if known here, else from its folder or the hub."""
    if source.name in KNOWN and source.revision is None:
        return KNOWN[source.name]()
    return read_config(source.name, revision=source.revision)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
