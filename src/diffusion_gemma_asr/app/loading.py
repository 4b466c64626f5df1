"""The model that a command works with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

import diffusion_gemma_asr as asr

from ..checkpoint.load import BUNDLED, DEFAULT_MODEL, DTYPE_HELP, choose_device, choose_dtype
from ..checkpoint.quantization import QUANTIZATIONS
from ..errors import AsrError
from ..memory import steady_memory
from ..strict import option
from ..transcribe.recognizer import Recognizer


@dataclass(frozen=True)
class LoadOptions:
    """Which model, and where it runs. Raises AsrError on impossible values."""

    model: str = option(DEFAULT_MODEL, f"{', '.join(BUNDLED)} (bundled); a checkpoint folder; a hub repository.")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps.")
    dtype: str = option("auto", DTYPE_HELP, names=["--compute_type"])
    encoder: str | None = option(
        None, "Whisper's encoder: a folder or a hub name in place of the one that the model names.", show_default="its own"
    )
    quantization: str | None = option(None, f"Of the backbone: {', '.join(QUANTIZATIONS)}.", show_default="none")
    threads: int | None = option(None, "Processor threads.", min=1, show_default="torch's choice")

    def __post_init__(self) -> None:
        choose_device(self.device)
        choose_dtype(self.dtype)
        if self.quantization not in (None, *QUANTIZATIONS):
            raise AsrError(f"quantization is {self.quantization!r}; choose one of {', '.join(QUANTIZATIONS)}")


def load_recognizer(options: LoadOptions, load: Callable[..., Recognizer] | None = None) -> Recognizer:
    """The model, in this process.

    Args:
        options: which one.
        load: what loads it, see `cli.main`; None is `diffusion_gemma_asr.load`.
    """
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    steady_memory()
    return (load or asr.load)(
        options.model,
        device=options.device,
        dtype=options.dtype,
        quantization=options.quantization,
        encoder=options.encoder,
    )
