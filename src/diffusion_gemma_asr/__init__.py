"""Speech recognition whose decoder is a diffusion language model.

import diffusion_gemma_asr as asr

model = asr.load()
print(model.transcribe("talk.mp3").text)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import AsrError, AudioError, CheckpointError, DataError, RecipeError, SynthesisError, __version__

if TYPE_CHECKING:
    from pathlib import Path

    from .denoise.options import DecodeOptions
    from .transcribe.live import LiveUpdate
    from .transcribe.recognizer import Recognizer
    from .transcribe.recordings import Progress, TranscribeOptions
    from .transcribe.results import Segment, Transcript, Word

__all__ = [
    "AsrError",
    "AudioError",
    "CheckpointError",
    "DataError",
    "DecodeOptions",
    "LiveUpdate",
    "Progress",
    "RecipeError",
    "Recognizer",
    "Segment",
    "SynthesisError",
    "TranscribeOptions",
    "Transcript",
    "Word",
    "__version__",
    "load",
]

# Read when they are asked for: torch takes seconds to import, and `--help` does not need it.
_LAZY = {
    "DecodeOptions": "denoise.options",
    "LiveUpdate": "transcribe.live",
    "Progress": "transcribe.recordings",
    "Recognizer": "transcribe.recognizer",
    "Segment": "transcribe.results",
    "TranscribeOptions": "transcribe.recordings",
    "Transcript": "transcribe.results",
    "Word": "transcribe.results",
}


def load(name_or_path: str | Path | None = None, **options: Any) -> Recognizer:
    """Loads a model that transcribes.

    Args:
        name_or_path: "mini" (the default), which travels inside the package, or "base", which is the same but hears with
            openai/whisper-base, from the hub; a checkpoint folder; or a hub repository.
        **options: of `checkpoint.load.load_checkpoint`: device, dtype ("auto" if nothing is said), quantization, encoder,
            backbone, revision, local_files_only.

    Raises:
        CheckpointError: the model is missing, incomplete, or its parts do not fit each other.
        AsrError: there is no such device, dtype or option.
    """
    from .checkpoint.load import DEFAULT_MODEL, load_checkpoint
    from .strict import check_keywords
    from .transcribe.recognizer import Recognizer

    check_keywords(load_checkpoint, options)
    return Recognizer(load_checkpoint(name_or_path or DEFAULT_MODEL, **{"dtype": "auto", **options}))


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_LAZY[name]}", __name__), name)
