"""For transformers: importing this lets its Auto classes and its speech recognition pipeline take our checkpoints.

import diffusion_gemma_asr.hf as hf
from transformers import pipeline

pipe = pipeline("automatic-speech-recognition", model=hf.MINI)
print(pipe("talk.mp3", return_timestamps=True))

It stands apart from `import diffusion_gemma_asr`, which loads neither torch nor transformers. What other models do is
not changed.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForSpeechSeq2Seq, AutoProcessor, AutoTokenizer
from transformers.pipelines import PIPELINE_REGISTRY, AutomaticSpeechRecognitionPipeline

from ..checkpoint import PRESETS
from ..results import DEFAULT_MODEL
from .model import DiffusionGemmaASRConfig, DiffusionGemmaASRForSpeechSeq2Seq
from .pipeline import TASK, DiffusionGemmaASRPipeline, beside
from .processor import BackboneTokenizer, DiffusionGemmaASRProcessor

MINI = str(PRESETS / DEFAULT_MODEL)  # the folder of the bundled model

__all__ = [
    "MINI",
    "DiffusionGemmaASRConfig",
    "DiffusionGemmaASRForSpeechSeq2Seq",
    "DiffusionGemmaASRPipeline",
    "DiffusionGemmaASRProcessor",
]


def _register() -> None:
    """Tell transformers' registries of our classes; feature extractors need none, a checkpoint's file names its own."""
    config = DiffusionGemmaASRConfig
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoProcessor.register(config, DiffusionGemmaASRProcessor, exist_ok=True)
    AutoTokenizer.register(config, BackboneTokenizer, exist_ok=True)
    for auto_class in (AutoModel, AutoModelForSpeechSeq2Seq):
        auto_class.register(config, DiffusionGemmaASRForSpeechSeq2Seq, exist_ok=True)
    entry = PIPELINE_REGISTRY.supported_tasks[TASK]
    # an entry is the class, or its name where nobody has replaced the library's own
    other = entry["impl"] if isinstance(entry["impl"], type) else AutomaticSpeechRecognitionPipeline
    PIPELINE_REGISTRY.supported_tasks[TASK] = {**entry, "impl": beside(other)}


_register()
