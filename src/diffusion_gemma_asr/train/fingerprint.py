"""Fingerprints of everything that a run depends on: a saved state can be resumed only if they are equal.

Files are fingerprinted by content, not by path, so that a run can move to another folder or machine with its data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..data.manifest import Utterance
from ..model.config import BackboneConfig, EncoderConfig
from .recipe_files import PART

# Settings that may differ when a run is resumed: its length, how it is evaluated, and where weights lie.
FREE = {"stage", "name", "steps", "minutes", "save_every", "eval_every", "monitor_samples", "dev", "dev_count"}
FREE |= {"cache_dir", "shard", "compile", "candidates", "keep"}
# Settings that came later: at their default they are not named, so that older runs go on.
LATER = {
    "kernels",
    "quantization",
    "shared",
    "skip_blanks",
    "frozen_projector",
    "warp",
    "others",
    "known_start",
    "canvas",
    "decoder_layers",
    "acoustic",
    "decoder",
    "lr_shares",
    "unheard",
    "canvas_share",
    "drafts_from",
    "silent_drafts",
    "causal_share",
}
SAMPLES = 64  # hashed values of each tensor, about


def of_recipe(recipe: Any) -> dict[str, str]:
    """The settings of a recipe by dotted names, without paths and FREE ones."""
    settings: dict[str, str] = {}
    _collect(recipe, "", settings)
    return settings


def _collect(value: Any, name: str, settings: dict[str, str]) -> None:
    """Adds a value, or recursively the fields of a dataclass, to `settings` under a dotted name."""
    if isinstance(value, (Path, EncoderConfig, BackboneConfig)):
        return
    if is_dataclass(value):
        for item in fields(value):
            later = item.name in LATER and getattr(value, item.name) == item.default
            if item.name not in FREE and item.metadata != PART and not later:
                _collect(getattr(value, item.name), f"{name}.{item.name}".lstrip("."), settings)
    elif isinstance(value, tuple) and value and is_dataclass(value[0]):
        for index, part in enumerate(value):
            _collect(part, f"{name}[{index}]", settings)
    elif not (isinstance(value, tuple) and value and isinstance(value[0], Path)):
        settings[name] = str(value)


def of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """A hash of names, shapes and sampled values, rounded to bfloat16; the same on every device.

    Returns:
        16 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor  # gathered by all workers at once
        values = whole.detach().flatten()
        sample = values[:: max(1, len(values) // SAMPLES)][:SAMPLES].to("cpu", torch.float32).to(torch.bfloat16)
        digest.update(f"{name} {tuple(tensor.shape)} {sample.tolist()}\n".encode())
    return digest.hexdigest()[:16]


def of_utterances(rows: Iterable[Utterance]) -> str:
    """A hash of utterances, in order: file name without folder, offset, duration, language and text."""
    return of_lines(f"{Path(u.audio_filepath).name} {u.offset} {u.duration} {u.language} {u.text}" for u in rows)


def of_lines(lines: Iterable[str]) -> str:
    """A hash of lines, in order: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(f"{line}\n".encode())
    return digest.hexdigest()[:16]
