"""Whisper with its own autoregressive decoder: the yardstick, the same ear with the decoder it was trained with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, WhisperFeatureExtractor, WhisperForConditionalGeneration

from ..audio import SAMPLE_RATE
from ..encoder import AcousticEncoder
from ..errors import CheckpointError
from ..evaluate.systems import Hypothesis
from ..pretrained import first_line, load_pretrained
from .whisper_decoder import write_from_frames


class Whisper:
    """Any Whisper checkpoint, decoded greedily.

    Published checkpoints get what they were trained on, clips padded to 30 s and a language token. A checkpoint without
    language tokens is one of ours (train/whisper.py): it never met padding, and hears the frames that hold sound.

    Args:
        name: hub name or folder.

    Raises:
        CheckpointError: the checkpoint is missing, incomplete or damaged.
    """

    def __init__(self, name: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32):
        self.name = str(name)
        model = load_pretrained(WhisperForConditionalGeneration, name, "Whisper", dtype=dtype)
        self.model: WhisperForConditionalGeneration = model.to(device).eval()
        try:
            self.extractor = WhisperFeatureExtractor.from_pretrained(name)
            self.tokenizer = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot load the Whisper {name}: {first_line(error)}") from error
        self.acoustic = AcousticEncoder(self.model.model.encoder, self.extractor)

    def settings(self) -> dict[str, Any]:
        """The checkpoint."""
        return {"system": "whisper", "model": self.name, "dtype": str(self.model.dtype).removeprefix("torch.")}

    @torch.no_grad()
    def transcribe(self, clips: Sequence[np.ndarray], languages: Sequence[str]) -> list[Hypothesis]:
        """See `System`; the passes are one a token of the batch's longest transcript."""
        multilingual = hasattr(self.model.generation_config, "lang_to_id")
        written = self._padded(clips, languages) if multilingual else self._trimmed(clips)
        texts = self.tokenizer.batch_decode(written, skip_special_tokens=True)
        return [Hypothesis(text.strip(), written.shape[1]) for text in texts]

    def _padded(self, clips: Sequence[np.ndarray], languages: Sequence[str]) -> torch.Tensor:
        features = self.extractor(list(clips), sampling_rate=SAMPLE_RATE, return_tensors="pt")["input_features"]
        features = features.to(self.model.device, self.model.dtype)
        return self.model.generate(features, language=list(languages), task="transcribe", num_beams=1, do_sample=False)

    def _trimmed(self, clips: Sequence[np.ndarray]) -> torch.Tensor:
        mel, lengths = self.acoustic.features(clips)
        frames, _ = self.acoustic(mel.to(self.model.device), lengths.to(self.model.device))
        return write_from_frames(self.model, frames)
