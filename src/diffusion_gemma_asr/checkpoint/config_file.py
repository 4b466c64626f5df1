"""config.json of a checkpoint: a `ModelConfig`, with the format and version that wrote it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, RecipeError, __version__, first_line
from ..model.config import ModelConfig
from ..strict import from_mapping

CONFIG = "config.json"
FORMAT = 2  # of config.json and of the adapter's keys; raised when an older reader would misread them
# what format 1 left to the code
RANKING = {"phonemes": 0.7, "characters": 0.5, "ngram": 1.0, "unknown": 4.0}
RESCORING = {"phonemes": 1.0, "characters": 0.2, "ngram": 0.2, "sentences": 1.0, "unknown": 6.0}
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
    """A checkpoint's config.json, of this format or the one before.

    Raises:
        CheckpointError: it is missing, no JSON, of another program or a newer version, or a key is wrong.
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
    if content["format"] not in (1, FORMAT):
        raise CheckpointError(
            f"{path} has format {content['format']} of version {content.get('package_version')}, "
            f"this is {__version__} with format {FORMAT}; update diffusion-gemma-asr"
        )
    try:
        if content["format"] == 1:
            content = upgraded(content)
        settings = {key: value for key, value in content.items() if key not in ("format", "package_version", "model_type")}
        config = from_mapping(ModelConfig, settings)
    except (RecipeError, CheckpointError) as error:
        raise CheckpointError(f"{path}: {error}") from None
    for name, part in (("encoder", config.encoder), ("backbone", config.backbone)):
        for key, value in asdict(part).items():
            if value is None and key != "revision":
                raise CheckpointError(f"{path}: '{name}.{key}' is missing; add it, or save the checkpoint again")
    return config


def upgraded(old: dict[str, Any]) -> dict[str, Any]:
    """A config.json of format 1 in today's keys.

    Raises:
        CheckpointError: it asks for parts that are no longer there.
    """
    projector, lm = dict(old.get("projector") or {}), dict(old.get("lm") or {})
    spelling = {key: projector.pop(f"spelling_{key}", 0) for key in ("layers", "width")}
    if projector.pop("kind", "convolutions") != "convolutions":
        raise CheckpointError("its projector hears samples without an encoder, which version 0.1.0 was the last to do")
    drafter: dict[str, Any] | None = None
    if lm.get("file") is not None:
        drafter = {"kind": "beam", "ngram": lm["file"], "weight": lm.get("weight", 0.5), "bonus": lm.get("bonus", 3.5)}
        if spelling["layers"] and lm.get("lexicon") and lm.get("recurrent"):
            drafter |= {"kind": "phonemes", "lexicon": lm["lexicon"], "sentences": lm["recurrent"]} | spelling
            drafter |= {"ranking": RANKING, "rescoring": RESCORING}
    if missing := [key for key in ("recipe", "drafts") if key not in old]:
        raise CheckpointError(f"'{missing[0]}' is missing; add it")
    kept = ("encoder", "backbone", "lora", "languages", "dtype", "start", "finds_language", "reads_context")
    new = {key: old[key] for key in kept if key in old}
    return new | {"name": old["recipe"], "projector": projector, "ctc": old["drafts"], "drafter": drafter}
