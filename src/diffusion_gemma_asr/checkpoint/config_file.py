"""config.json of a checkpoint: a `ModelConfig`, with the format and version that wrote it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from ..errors import CheckpointError, RecipeError, __version__, first_line
from ..model.config import ModelConfig
from ..strict import from_mapping

CONFIG = "config.json"
FORMAT = 2  # of config.json and of the adapter's keys; raised when an older reader would misread them
MODEL_TYPE = "diffusion_gemma_asr"  # for transformers' Auto classes


def write_config(config: ModelConfig, folder: Path) -> None:
    """Writes config.json."""
    content = {"format": FORMAT, "package_version": __version__, "model_type": MODEL_TYPE} | asdict(config)
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder holds a checkpoint of this program, of any version."""
    try:
        content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and "format" in content and "package_version" in content


def read_config_file(folder: Path) -> ModelConfig:
    """A checkpoint's config.json.

    Raises:
        CheckpointError: it is missing, no JSON, of another program or version, or a key is wrong.
    """
    path = folder / CONFIG
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is no checkpoint: it has no {CONFIG}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {first_line(error)}; fetch or save it again") from None
    if not isinstance(content, dict) or "format" not in content:
        raise CheckpointError(f"{path} is not of this program; give a folder that save_checkpoint wrote")
    if content["format"] != FORMAT:
        raise CheckpointError(
            f"{path} has format {content['format']} of version {content.get('package_version')}, "
            f"this is {__version__} with format {FORMAT}; use the version that wrote it, or a checkpoint of this one"
        )
    try:
        settings = {key: value for key, value in content.items() if key not in ("format", "package_version", "model_type")}
        if settings.pop("drafter", None) is not None:
            raise CheckpointError("its drafts were searched with language models beside the backbone, no longer done")
        if isinstance(projector := settings.get("projector"), dict):
            older = {key: projector.pop(key, None) for key in ("layers", "layer_width", "layer_stride", "rotary")}
            if older["layers"]:
                raise CheckpointError("its projector has layers of a kind that was given up for 'decoder_layers'")
        config = from_mapping(ModelConfig, settings)
    except (RecipeError, CheckpointError) as error:
        raise CheckpointError(f"{path}: {error}") from None
    for name, part in (("encoder", config.encoder), ("backbone", config.backbone)):
        for key, value in asdict(part).items():
            if value is None and key != "revision":
                raise CheckpointError(f"{path}: '{name}.{key}' is missing; add it, or save the checkpoint again")
    return config
