"""Writing checkpoints into folders; what they hold is said in load.py."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import FeatureExtractionMixin

from ..errors import CheckpointError
from ..files import whole_file
from ..model.config import BackboneConfig, EncoderConfig, ModelConfig
from ..model.encoder import AcousticEncoder
from ..model.model import DiffusionGemmaASR
from ..model.packing import pack
from ..model.projector import AudioProjector
from .card import ModelCard, render_card
from .config_file import write_config
from .load import ADAPTER

CARD, EXTRACTOR = "README.md", "preprocessor_config.json"

Part = TypeVar("Part", EncoderConfig, BackboneConfig)


def save_checkpoint(
    model: DiffusionGemmaASR, folder: str | Path, card: ModelCard | None = None, packed: bool = False
) -> Path:
    """Writes a model's adapter, config.json, preprocessor_config.json and model card.

    Everything is written to a folder beside the target first. A new target then appears at once and whole; in an
    existing one each file is replaced whole, and other files stay. A frozen part inside the target is named relative to
    it.

    Args:
        model: with LoRA not merged.
        folder: where to write; made if missing.
        card: text for README.md beyond the settings.
        packed: write the adapter's large matrices in 8 bits (model/packing.py).

    Returns:
        the folder, absolute.

    Raises:
        CheckpointError: LoRA was merged, so that there is no adapter to save; or the folder is not writable.
    """
    lora = model.backbone.lora_state_dict()
    if not lora:
        raise CheckpointError("the model has no LoRA matrices (merged?); save the checkpoint before merging")
    tensors = {f"projector.{key}": value for key, value in model.projector.state_dict().items()}
    tensors |= {f"lora.{key}": value for key, value in lora.items()}
    return write_checkpoint(
        folder,
        with_shapes(model),
        {key: value.detach().cpu().contiguous() for key, value in tensors.items()},
        model.encoder.extractor,
        card or ModelCard(),
        packed,
    )


def write_checkpoint(
    folder: str | Path,
    config: ModelConfig,
    tensors: dict[str, Tensor],
    extractor: FeatureExtractionMixin,
    card: ModelCard,
    packed: bool = False,
) -> Path:
    """Writes the files of a checkpoint, as `save_checkpoint` says.

    Args:
        folder: where to write; made if missing.
        config: of the model, with the shapes of its frozen parts.
        tensors: of adapter.safetensors, on the CPU.
        extractor: of the encoder.
        card: text for README.md beyond the settings.
        packed: write large matrices in 8 bits.

    Returns:
        the folder, absolute.

    Raises:
        CheckpointError: the folder is not writable.
    """
    folder = Path(folder).resolve()
    config = _relative_to(config, folder)
    trained = sum(tensor.numel() for name, tensor in tensors.items() if name != "projector.scale")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
        try:
            with whole_file(partial / ADAPTER) as part:
                save_file(pack(tensors) if packed else tensors, part, metadata={"format": "pt"})
            (partial / CARD).write_text(render_card(config, card, trained), encoding="utf-8")
            write_config(config, partial)
            extractor.save_pretrained(partial)
            _move_into_place(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(f"cannot write the checkpoint {folder}: {error}") from error
    return folder


def with_shapes(model: DiffusionGemmaASR) -> ModelConfig:
    """A model's config with the shapes and the dtype that its frozen parts really have."""
    backbone, encoder = model.backbone, model.encoder
    return replace(
        model.config,
        encoder=replace(model.config.encoder, width=encoder.hidden_size, mel_bins=encoder.input_size),
        backbone=replace(
            model.config.backbone,
            width=backbone.hidden_size,
            vocab_size=backbone.vocab_size,
            layers=backbone.config.num_hidden_layers,
        ),
        dtype=str(backbone.lm_head_weight.dtype).removeprefix("torch."),  # type: ignore[arg-type]
    )


def save_projector(projector: AudioProjector, folder: str | Path) -> None:
    """Writes a projector alone, as an adapter without LoRA that `load_adapter` takes; makes the folder if missing."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with whole_file(Path(folder) / ADAPTER) as part:
        save_file({f"projector.{name}": value for name, value in projector.state_dict().items()}, part)


def save_encoder(encoder: AcousticEncoder, folder: str | Path) -> None:
    """Writes an encoder and its feature extractor in transformers' layout, as `load_encoder` takes it; makes the folder."""
    module = encoder.encoder
    with torch.device("meta"):
        shell = type(module)(module.config)  # what was loaded would be saved under the names of a whole Whisper
    shell.load_state_dict(module.state_dict(), assign=True)
    shell.save_pretrained(folder)
    encoder.extractor.save_pretrained(folder)


def _relative_to(config: ModelConfig, folder: Path) -> ModelConfig:
    """Frozen parts inside `folder` named from there, so that the folder can move; other names as they are."""

    def named(source: Part) -> Part:
        path = Path(source.name)
        inside = path.is_absolute() and path.is_relative_to(folder)
        return replace(source, name=path.relative_to(folder).as_posix()) if inside else source

    return replace(config, encoder=named(config.encoder), backbone=named(config.backbone))


def _move_into_place(partial: Path, folder: Path) -> None:
    if not folder.exists():
        os.chmod(partial, 0o755)  # mkdtemp makes it private
        partial.rename(folder)
        return
    for path in sorted(partial.iterdir()):
        os.replace(path, folder / path.name)
