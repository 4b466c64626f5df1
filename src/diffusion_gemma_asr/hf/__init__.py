"""Integration with transformers: importing this registers our model with its Auto classes and speech pipeline.

import diffusion_gemma_asr.hf as hf
from transformers import pipeline

pipe = pipeline("automatic-speech-recognition", model=hf.bundled())
print(pipe("talk.mp3", return_timestamps=True))

`import diffusion_gemma_asr` does not import this module, since it loads neither torch nor transformers. The registration
does not affect other models.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForSpeechSeq2Seq, AutoProcessor, AutoTokenizer
from transformers.pipelines import PIPELINE_REGISTRY, AutomaticSpeechRecognitionPipeline
from transformers.utils import logging

from ..checkpoint.load import DEFAULT_MODEL, find_checkpoint
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
    """The folder of a model that ships with the package, an argument for transformers' `from_pretrained`.

    Args:
        name: of the model.

    Raises:
        AsrError: there is no such model.
    """
    if name != DEFAULT_MODEL:
        raise AsrError(f"{name} is no bundled checkpoint; give {DEFAULT_MODEL}")
    return str(find_checkpoint(name))


def _register() -> None:
    """Registers our classes with transformers; a feature extractor is named in the checkpoint and needs no registration."""
    config = DiffusionGemmaASRConfig
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoProcessor.register(config, DiffusionGemmaASRProcessor, exist_ok=True)
    AutoTokenizer.register(config, BackboneTokenizer, exist_ok=True)
    for auto_class in (AutoModel, AutoModelForSpeechSeq2Seq):
        auto_class.register(config, DiffusionGemmaASRForSpeechSeq2Seq, exist_ok=True)
    _, entry, _ = PIPELINE_REGISTRY.check_task(TASK)
    # The library's own pipeline may be registered by its name, a replacement is a class.
    other = entry["impl"] if isinstance(entry["impl"], type) else AutomaticSpeechRecognitionPipeline
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # hides the warning that a pipeline is replaced: other models still get it
    try:
        PIPELINE_REGISTRY.register_pipeline(TASK, beside(other), entry["pt"], entry.get("default"), entry.get("type"))
    finally:
        logging.set_verbosity(verbosity)


_register()
