"""For transformers: importing this lets its Auto classes and its speech recognition pipeline take our checkpoints.

import diffusion_gemma_asr.hf as hf
from transformers import pipeline

pipe = pipeline("automatic-speech-recognition", model=hf.bundled())
print(pipe("talk.mp3", return_timestamps=True))

It stands apart from `import diffusion_gemma_asr`, which loads neither torch nor transformers. What other models do is
not changed.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForSpeechSeq2Seq, AutoProcessor, AutoTokenizer
from transformers.pipelines import PIPELINE_REGISTRY, AutomaticSpeechRecognitionPipeline
from transformers.utils import logging

from ..checkpoint.load import BUNDLED, DEFAULT_MODEL, find_checkpoint
from ..errors import AsrError
from .model import DiffusionGemmaASRConfig, DiffusionGemmaASRForSpeechSeq2Seq
from .pipeline import TASK, DiffusionGemmaASRPipeline, beside
from .processor import BackboneTokenizer, DiffusionGemmaASRProcessor

__all__ = [
    "DiffusionGemmaASRConfig",
    "DiffusionGemmaASRForSpeechSeq2Seq",
    "DiffusionGemmaASRPipeline",
    "DiffusionGemmaASRProcessor",
    "bundled",
]


def bundled(name: str = DEFAULT_MODEL) -> str:
    """The folder of a model that travels inside the package, as transformers' classes want it.

    Raises:
        AsrError: there is no such model.
    """
    if name not in BUNDLED:
        raise AsrError(f"{name} is no bundled model; give one of {', '.join(BUNDLED)}")
    return str(find_checkpoint(name))


def _register() -> None:
    """Tell transformers' registries of our classes; feature extractors need none, a checkpoint's file names its own."""
    config = DiffusionGemmaASRConfig
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoProcessor.register(config, DiffusionGemmaASRProcessor, exist_ok=True)
    AutoTokenizer.register(config, BackboneTokenizer, exist_ok=True)
    for auto_class in (AutoModel, AutoModelForSpeechSeq2Seq):
        auto_class.register(config, DiffusionGemmaASRForSpeechSeq2Seq, exist_ok=True)
    _, entry, _ = PIPELINE_REGISTRY.check_task(TASK)
    # an entry is the class, or its name where nobody has replaced the library's own
    other = entry["impl"] if isinstance(entry["impl"], type) else AutomaticSpeechRecognitionPipeline
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # without the warning that the task has a pipeline: other models still get that
    try:
        PIPELINE_REGISTRY.register_pipeline(TASK, beside(other), entry["pt"], entry.get("default"), entry.get("type"))
    finally:
        logging.set_verbosity(verbosity)


_register()
