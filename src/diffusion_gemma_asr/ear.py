"""What a model hears with, by name: a Whisper encoder, or plain frames of samples."""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

import torch

from .encoder import AcousticEncoder
from .waveform import WaveformFrames

WAVEFORM = "waveform"  # the name, in recipes and checkpoints, of having no acoustic encoder
Ear: TypeAlias = AcousticEncoder | WaveformFrames


def load_encoder(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    local_files_only: bool = False,
) -> Ear:
    """The frozen encoder of that name; see `AcousticEncoder.from_pretrained`.

    Raises:
        CheckpointError: the checkpoint cannot be found or read.
    """
    if str(name_or_path) == WAVEFORM:
        return WaveformFrames()
    return AcousticEncoder.from_pretrained(
        name_or_path, revision=revision, dtype=dtype, device=device, local_files_only=local_files_only
    )
