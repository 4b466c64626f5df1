"""Whisper with its own autoregressive decoder: the reference for models that use its encoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, WhisperFeatureExtractor, WhisperForConditionalGeneration

from ...audio.read import SAMPLE_RATE
from ...checkpoint.parts import load_pretrained
from ...errors import CheckpointError, first_line
from ...languages import LANGUAGES
from ..protocol import Hypothesis, fingerprint


class Whisper:
    """A published Whisper with greedy decoding of clips padded to 30 s and a language token, as in its training.

    Args:
        name: hub name or folder.
        device: to compute on.
        dtype: of the weights.

    Raises:
        CheckpointError: the checkpoint is missing, incomplete or damaged.
    """

    longest_s = 30.0

    def __init__(self, name: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32):
        self.name = str(name)
        model = load_pretrained(WhisperForConditionalGeneration, name, "Whisper", dtype=dtype)
        self.model: WhisperForConditionalGeneration = model.to(device).eval()
        try:
            self.extractor = WhisperFeatureExtractor.from_pretrained(name)
            self.tokenizer = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot load the Whisper {name}: {first_line(error)}") from error
        self.multilingual = hasattr(self.model.generation_config, "lang_to_id")
        self.languages = tuple(LANGUAGES) if self.multilingual else ("en",)

    def settings(self) -> dict[str, Any]:
        """The checkpoint, identified by a hash of its files or by the commit of its repository."""
        files = [Path(self.name) / "config.json", *sorted(Path(self.name).glob("*.safetensors"))]
        return {
            "system": "whisper",
            "model": self.name,
            "model_sha256": fingerprint(files) if Path(self.name).is_dir() else self.model.config._commit_hash,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": self.model.device.type,
        }

    @torch.no_grad()
    def transcribe(self, sounds: Sequence[np.ndarray], languages: Sequence[str]) -> list[Hypothesis]:
        """See `System`; `passes` is the number of tokens of the batch's longest transcript."""
        features = self.extractor(list(sounds), sampling_rate=SAMPLE_RATE, return_tensors="pt")["input_features"]
        task = {"language": list(languages), "task": "transcribe"} if self.multilingual else {}
        features = features.to(self.model.device, self.model.dtype)
        ids = self.model.generate(features, num_beams=1, do_sample=False, **task)  # (B, L)
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [Hypothesis(text.strip(), "whisper", ids.shape[1]) for text in texts]
