"""Checkpoints for other programs: the backbone with LoRA merged, in its published layout, and beside it what hears.

An exported folder is

- the backbone in the stock layout of transformers: config.json, generation_config.json, model*.safetensors, the tokenizer's
  and processor's files as the backbone has them;
- `audio/`: config.json (a `ModelConfig`), projector.safetensors, and the frozen encoder in `audio/encoder/`.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..errors import CheckpointError, first_line
from ..model.config import ModelConfig
from ..model.encoder import AcousticEncoder
from ..model.model import DiffusionGemmaASR
from ..model.projector import AudioProjector
from .config_file import CONFIG, read_config_file, write_config
from .load import fill_projector, with_sources
from .parts import load_encoder
from .save import save_encoder, with_shapes

AUDIO, PROJECTOR, ENCODER = "audio", "projector.safetensors", "encoder"
KEPT = (".json", ".jinja", ".model", ".txt")  # of the backbone's files, but for its weights


def check_exportable(config: ModelConfig, untied: bool) -> None:
    """Raises CheckpointError where no other program could decode the model as it was trained, or where merging LoRA leaves
    the stacks different, and nobody said that this is wanted."""
    if config.canvas == "aligned":
        raise CheckpointError(
            f"{config.name} writes on aligned canvases, whose positions are those of the audio tokens; other programs put "
            "canvases behind the prompt; train with canvas: packed to export"
        )
    if not config.lora.shared and not untied:
        raise CheckpointError(
            f"{config.name} has LoRA of its own in each stack: merged, encoder and decoder are no longer one set of "
            "weights, as vLLM, MLX and GGUF have it; train with lora.shared: true, or give --untied for a folder that "
            "transformers alone reads"
        )


def export_checkpoint(model: DiffusionGemmaASR, folder: str | Path, untied: bool = False) -> Path:
    """Writes a model for other programs; the folder appears at once and whole.

    Args:
        model: LoRA is merged, here if it was not yet. It must not be quantised.
        folder: must not exist, or be empty.
        untied: allow stacks that differ, which transformers alone reads.

    Returns:
        the folder, absolute.

    Raises:
        CheckpointError: canvases are aligned, the stacks differ, or the folder is in use or not writable.
    """
    check_exportable(model.config, untied)
    folder = Path(folder).expanduser().resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists; give --out another name, or remove it")
    model.backbone.merge_lora()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
        try:
            _write_backbone(model, partial)
            _write_audio(model, partial / AUDIO)
            os.chmod(partial, 0o755)  # mkdtemp makes it private
            partial.replace(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot write {folder}: {first_line(error)}; free some space, or choose another place"
        ) from error
    return folder


def _write_backbone(model: DiffusionGemmaASR, folder: Path) -> None:
    model.backbone.model.save_pretrained(folder)
    source = Path(model.config.backbone.name)
    if not source.is_dir():
        revision = model.config.backbone.revision
        source = Path(snapshot_download(str(source), revision=revision, local_files_only=True))
    for path in sorted(source.iterdir()):  # as published: other programs read older keys than transformers writes
        if path.is_file() and path.suffix in KEPT and not path.name.endswith(".index.json"):
            shutil.copyfile(path, folder / path.name)
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    dtype = str(model.backbone.lm_head_weight.dtype).removeprefix("torch.")
    changed = {key: dtype for key in ("dtype", "torch_dtype") if key in config} or {"dtype": dtype}
    (folder / CONFIG).write_text(json.dumps(config | changed, indent=2) + "\n", encoding="utf-8")


def _write_audio(model: DiffusionGemmaASR, folder: Path) -> None:
    folder.mkdir()
    write_config(with_shapes(model), folder)
    weights = {name: value.detach().cpu().contiguous() for name, value in model.projector.state_dict().items()}
    save_file(weights, folder / PROJECTOR, metadata={"format": "pt"})
    save_encoder(model.encoder, folder / ENCODER)


class AudioParts(NamedTuple):
    """What turns sound into audio tokens for a stock backbone.

    Attributes:
        config: of the whole model.
        encoder: frozen.
        projector: frozen.
    """

    config: ModelConfig
    encoder: AcousticEncoder
    projector: AudioProjector


def load_audio_parts(folder: str | Path) -> AudioParts:
    """Reads the hearing parts of an exported folder, in float32 on the CPU.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    audio = Path(folder) / AUDIO
    own = (audio / ENCODER).resolve()
    config = with_sources(read_config_file(audio), audio, encoder=own if own.is_dir() else None)
    encoder = load_encoder(config.encoder, local_files_only=True)
    projector = AudioProjector(config.projector, encoder.hidden_size, int(config.backbone.width or 0))
    try:
        fill_projector(projector, load_file(audio / PROJECTOR), audio / PROJECTOR)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{audio / PROJECTOR} is damaged ({first_line(error)}); export again") from error
    return AudioParts(config, encoder, projector.eval().requires_grad_(False))
