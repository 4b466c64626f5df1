"""What a run depends on, as short texts: a saved state goes on only where they are the same.

Files are known by their content and not by their place, so that a run can move to another folder or machine with its data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.manifest import Utterance
from ..model.config import BackboneConfig, EncoderConfig

# What may change while a run goes on: how long it takes, and how it is watched.
FREE = {"stage", "name", "steps", "save_every", "eval_every", "monitor_samples", "dev", "dev_count", "cache_dir"}
SAMPLES = 64  # values of each tensor


def of_recipe(recipe: Any) -> dict[str, str]:
    """The settings of a recipe by their dotted names, but for paths and what may change."""
    settings: dict[str, str] = {}
    _collect(recipe, "", settings)
    return settings


def _collect(value: Any, name: str, settings: dict[str, str]) -> None:
    if isinstance(value, (Path, EncoderConfig, BackboneConfig)):
        return
    if is_dataclass(value):
        for item in fields(value):
            if item.name not in FREE:
                _collect(getattr(value, item.name), f"{name}.{item.name}".lstrip("."), settings)
    elif isinstance(value, tuple) and value and is_dataclass(value[0]):
        for index, part in enumerate(value):
            _collect(part, f"{name}[{index}]", settings)
    elif not (isinstance(value, tuple) and value and isinstance(value[0], Path)):
        settings[name] = str(value)


def of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Of names, shapes and some values, as they are in bfloat16; the same on every device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        values = tensor.detach().flatten()
        some = values[:: max(1, len(values) // SAMPLES)][:SAMPLES].to("cpu", torch.float32).to(torch.bfloat16)
        digest.update(f"{name} {tuple(tensor.shape)} {some.tolist()}\n".encode())
    return digest.hexdigest()[:16]


def of_utterances(rows: Iterable[Utterance]) -> str:
    """Of sounds by their file names, texts and lengths, in order."""
    return of_lines(f"{Path(u.audio_filepath).name} {u.offset} {u.duration} {u.language} {u.text}" for u in rows)


def of_lines(lines: Iterable[str]) -> str:
    """Of texts, in order."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(f"{line}\n".encode())
    return digest.hexdigest()[:16]
