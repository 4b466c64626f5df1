"""Speech recognition whose decoder is a diffusion language model.

import diffusion_gemma_asr as asr

model = asr.load()
print(asr.transcribe("talk.mp3", model).text)
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_gemma_asr.errors import (
    AsrError,
    AudioError,
    CheckpointError,
    DataError,
    RecipeError,
    SynthesisError,
)
from diffusion_gemma_asr.live import LiveUpdate, transcribe_live
from diffusion_gemma_asr.results import DEFAULT_MODEL, Segment, Transcript, Word

# `transcribe` is a module and its chief function: importing both here leaves the function under the name.
from diffusion_gemma_asr.transcribe import Progress, TranscribeOptions, stream, transcribe, transcribe_many

if TYPE_CHECKING:
    import torch

    from diffusion_gemma_asr.model import DiffusionGemmaASR

__version__ = "0.1.0"

__all__ = [
    "DEFAULT_MODEL",
    "AsrError",
    "AudioError",
    "CheckpointError",
    "DataError",
    "LiveUpdate",
    "Progress",
    "RecipeError",
    "Segment",
    "SynthesisError",
    "TranscribeOptions",
    "Transcript",
    "Word",
    "__version__",
    "load",
    "stream",
    "transcribe",
    "transcribe_live",
    "transcribe_many",
]

DTYPES = ("float32", "bfloat16", "float16")


def load(
    name_or_path: str | Path = DEFAULT_MODEL,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
    **others: Any,
) -> DiffusionGemmaASR:
    """Load a model that transcribes.

    Args:
        name_or_path: a model that travels inside the package: "mini6" (six languages), "mini" (English, half the size, twice
            as fast) or "mini-whisper-base" (six languages, its encoder is openai/whisper-base); a checkpoint folder; or a
            hub repository. A folder that is called mini itself is "./mini".
        device: of torch; "auto" is the first CUDA device, else Apple's GPU, else the processor.
        dtype: "float32", "bfloat16", "float16" or torch's own name for one; None leaves it to the checkpoint.
        **others: what else `checkpoint.load_checkpoint` takes, for instance `quantization="bnb-4bit"`.

    Raises:
        CheckpointError: the model is missing, incomplete, or its parts do not fit each other.
        AsrError: there is no such device or dtype.
    """
    _check_device(device)  # before the weights are read
    chosen_dtype = _dtype(dtype)
    from diffusion_gemma_asr.checkpoint import load_checkpoint

    return load_checkpoint(name_or_path, device=device, dtype=chosen_dtype, **others)


def _check_device(device: str | torch.device) -> None:
    import torch

    if device == "auto":
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # an assertion where torch was built without CUDA
        reason = str(error).splitlines()[0]
        raise AsrError(f"device {device} cannot be used ({reason}); give auto, cpu, cuda, cuda:1 or mps") from None


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    import torch

    if not isinstance(dtype, str):
        return dtype
    if dtype not in DTYPES:
        raise AsrError(f"dtype {dtype} is not known; give one of {', '.join(DTYPES)}")
    chosen: torch.dtype = getattr(torch, dtype)
    return chosen
