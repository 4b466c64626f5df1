"""Strict loading of frozen parts: what transformers only warns about is an error here.

transformers fills weights that a checkpoint lacks with random numbers, and lets a damaged file's exception
through. A frozen part with random weights would transcribe nonsense without a word of explanation.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from .errors import CheckpointError
from .packing import is_packed, unpack

WEIGHTS = "model.safetensors"  # of a folder in the layout of a hub repository


def read_config(
    name_or_path: str | Path, *, revision: str | None = None, local_files_only: bool = False
) -> PreTrainedConfig:
    """The configuration of a frozen part: `config.json` of a folder or a hub repository.

    Raises:
        CheckpointError: there is no such folder or repository, or its config.json cannot be read.
    """
    _check_folder(name_or_path)
    try:
        return AutoConfig.from_pretrained(name_or_path, revision=revision, local_files_only=local_files_only)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"cannot read the configuration of {name_or_path}: {first_line(error)}") from None


def load_pretrained(
    model_class: type[PreTrainedModel], name_or_path: str | Path, part: str, **options: Any
) -> PreTrainedModel:
    """`model_class.from_pretrained(name_or_path, **options)`, but with every weight in its place or an error. A folder may
    hold packed weights (packing.py), as those inside the package do.

    Weights that the class has no place for are left out in silence: a Whisper's decoder, when its encoder
    is loaded.

    Args:
        part: "encoder" or "backbone", for messages.

    Raises:
        CheckpointError: the checkpoint is not found, incomplete, damaged, or of another model; in one line.
    """
    _check_folder(name_or_path)
    try:
        with _quiet():
            weights = Path(name_or_path) / WEIGHTS
            if weights.is_file() and is_packed(weights):
                options |= {"config": model_class.config_class.from_pretrained(name_or_path)}
                options |= {"state_dict": unpack(load_file(weights))}
                model, report = model_class.from_pretrained(None, output_loading_info=True, **options)
                if model.can_generate():
                    model.generation_config = type(model.generation_config).from_pretrained(name_or_path)
            else:
                model, report = model_class.from_pretrained(name_or_path, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"cannot load the {part} {name_or_path}: {first_line(error)}") from error
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(
            f"the {part} {name_or_path} is incomplete: {len(missing)} weights are missing, "
            f"first {missing[0]}; fetch it again, and check that it is a {model_class.__name__}"
        )
    return model


def _check_folder(name_or_path: str | Path) -> None:
    """A better message than transformers' own ("not a valid repository") for what can only be a folder."""
    folder = Path(name_or_path)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{folder}: no config.json; give a folder in the layout of a hub repository")
    elif folder.is_absolute() or str(name_or_path).startswith((".", "~")):
        raise CheckpointError(f"{folder}: no such folder; check the name, or make this part first")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' report of left-out weights; what matters in it becomes an error. And without its progress bar,
    which a small model shows for a blink; a large one is waited for at the download."""
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def first_line(error: Exception) -> str:
    """The first line of an exception's message; other libraries write paragraphs."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
