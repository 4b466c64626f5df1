"""Files of adapters that other programs wrote: safetensors, PyTorch's own without pickled classes, and folders of PEFT."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError, first_line
from ..strict import is_path

PICKLED = (".pt", ".pth", ".bin")
PEFT_CONFIG = "adapter_config.json"
TRAINING = ("training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt")  # of trainers, no weights


@dataclass(frozen=True)
class Foreign:
    """What the files hold.

    Attributes:
        place: as the user named them.
        tensors: all tensors by name, in the order of the files; names of nested mappings are joined by dots.
        settings: plain values beside them, by the last part of their names, and those of a PEFT folder.
    """

    place: str
    tensors: dict[str, Tensor]
    settings: dict[str, Any]


def read_foreign(source: str, revision: str | None = None) -> Foreign:
    """Reads an adapter of another program.

    Args:
        source: a file, a folder, or a hub repository, which is fetched into the hub's cache first.
        revision: of the repository: branch, tag or commit.

    Raises:
        CheckpointError: there is none, it is damaged, needs pickled classes, or says one name twice.
    """
    tensors: dict[str, Tensor] = {}
    settings: dict[str, Any] = {}
    origins: dict[str, Path] = {}
    for path in _files(source, revision):
        for name, value in _entries(path):
            if not isinstance(value, Tensor):
                settings[name.rpartition(".")[2]] = value
                continue
            if name in origins:
                raise CheckpointError(
                    f"{source}: {name} is in {origins[name].name} and in {path.name}; give the one file that is meant"
                )
            tensors[name], origins[name] = value, path
    if not tensors:
        raise CheckpointError(f"{source}: no tensors in it; give the file that holds the projector and the LoRA matrices")
    return Foreign(source, tensors, settings)


def _files(source: str, revision: str | None) -> list[Path]:
    """The weight files, and the configuration of PEFT."""
    place = Path(source).expanduser()
    if place.is_file():
        return [place]
    if not place.is_dir():
        if is_path(source) or len(place.parts) != 2:
            raise CheckpointError(f"{source}: no such file, folder or hub repository (owner/name); check the name")
        try:
            patterns = ["*.safetensors", *(f"*{ending}" for ending in PICKLED), f"*{PEFT_CONFIG}"]
            place = Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{source} is no file here and cannot be fetched from the hub: {first_line(error)}"
            ) from error
    found = [path for path in sorted(place.rglob("*")) if path.is_file()]
    weights = [p for p in found if p.suffix in (".safetensors", *PICKLED) and p.name not in TRAINING]
    if not weights:
        raise CheckpointError(f"{source}: no weights in it ({', '.join(('.safetensors', *PICKLED))}); give the file itself")
    return [*(path for path in found if path.name == PEFT_CONFIG), *weights]


def _entries(path: Path) -> Iterator[tuple[str, Any]]:
    """Tensors and plain values of one file, by name."""
    if path.name == PEFT_CONFIG:
        try:
            yield from json.loads(path.read_text(encoding="utf-8")).items()
        except (OSError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{path} cannot be read: {first_line(error)}; fetch it again") from None
    elif path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118
                    yield name, file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is damaged ({first_line(error)}); fetch it again") from None
    else:
        yield from _flattened("", _unpickled(path))


def _unpickled(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what is no pickle makes the unpickler raise anything
        if isinstance(error, pickle.UnpicklingError) and path.read_bytes()[:1] in (b"P", b"\x80"):  # a ZIP file, or a pickle
            raise CheckpointError(
                f"{path} holds pickled classes, which can run any program when they are read; "
                "ask for its tensors alone, best as .safetensors"
            ) from None
        raise CheckpointError(f"{path} is damaged, or no file of PyTorch; fetch it again") from None


def _flattened(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Tensors and plain values of nested mappings and lists; what trains on (an optimiser's state) is left out."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if not str(key).startswith(("optim", "scheduler")):
                yield from _flattened(f"{name}.{key}".lstrip("."), inner)
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _flattened(f"{name}.{index}".lstrip("."), inner)
    else:
        yield name, value
