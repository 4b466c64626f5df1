"""Processor and tokenizer for transformers' Auto classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin, WhisperFeatureExtractor

from ..audio.read import SAMPLE_RATE
from ..checkpoint.config_file import read_config_file
from ..checkpoint.load import find_checkpoint, with_sources
from ..checkpoint.parts import load_extractor, load_tokenizer
from ..errors import AsrError, AudioError
from ..model.encoder import log_mel
from ..model.lengths import length_mask


class BackboneTokenizer:
    """An entry for AutoTokenizer that loads the tokenizer of a checkpoint's backbone."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        backbone: str | Path | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        **kwargs: Any,
    ) -> PreTrainedTokenizerBase:
        """Loads the tokenizer of the backbone that a checkpoint names.

        Args:
            pretrained_model_name_or_path: checkpoint folder or hub repository.
            backbone: folder or hub name to use instead of the checkpoint's.
            revision: branch, tag or commit of the checkpoint's repository.
            local_files_only: whether to use only downloaded files.
            **kwargs: arguments that the pipeline passes to all parts; ignored.

        Raises:
            CheckpointError: there is no such checkpoint, or its tokenizer cannot be read.
        """
        folder = find_checkpoint(pretrained_model_name_or_path, revision, local_files_only)
        return load_tokenizer(with_sources(read_config_file(folder), folder, None, backbone).backbone, local_files_only)


class DiffusionGemmaASRProcessor(ProcessorMixin):
    """Computes the input features of `generate`, and decodes its token ids.

    Args:
        feature_extractor: of the encoder.
        tokenizer: of the backbone.
        silence_s: seconds of silence that the checkpoint's encoder hears behind each clip.
    """

    def __init__(
        self, feature_extractor: WhisperFeatureExtractor, tokenizer: PreTrainedTokenizerBase, silence_s: float = 0.0
    ):
        super().__init__(feature_extractor, tokenizer)
        self.silence_s = silence_s

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        encoder: str | Path | None = None,
        backbone: str | Path | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        **kwargs: Any,
    ) -> DiffusionGemmaASRProcessor:
        """Loads the processor of the frozen parts that a checkpoint names.

        Args:
            pretrained_model_name_or_path: checkpoint folder or hub repository.
            encoder: folder or hub name to use instead of the checkpoint's.
            backbone: folder or hub name to use instead of the checkpoint's.
            revision: branch, tag or commit of the checkpoint's repository.
            local_files_only: whether to use only downloaded files.
            **kwargs: arguments that the pipeline passes to all parts; ignored.

        Raises:
            CheckpointError: there is no such checkpoint, or its parts cannot be read.
        """
        folder = find_checkpoint(pretrained_model_name_or_path, revision, local_files_only)
        config = with_sources(read_config_file(folder), folder, encoder, backbone)
        extractor = load_extractor(config.encoder, local_files_only)
        return cls(extractor, load_tokenizer(config.backbone, local_files_only), config.encoder.silence_s)

    def __call__(
        self,
        audio: np.ndarray | Sequence[np.ndarray],
        sampling_rate: int = SAMPLE_RATE,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """Log-mel spectrograms of clips.

        Args:
            audio: (n,) floats of one clip, or a list of these; at most 30 s each.
            sampling_rate: must be 16000 Hz.
            return_tensors: must be "pt".

        Returns:
            input_features: (B, bins, T) float32, a frame per 10 ms, padded with zeros;
            attention_mask: (B, T), 0 for padding.

        Raises:
            AudioError: a clip is longer than 30 s or shorter than 0.02 s, or has another sampling rate.
            AsrError: `return_tensors` is not "pt".
        """
        if sampling_rate != SAMPLE_RATE:
            raise AudioError(
                f"the sampling rate is {sampling_rate} Hz; resample to {SAMPLE_RATE}: audio.read.load_audio does"
            )
        if return_tensors != "pt":
            raise AsrError(f"return_tensors is {return_tensors!r}; only 'pt' is made here")
        clips = [audio] if isinstance(audio, np.ndarray) and audio.ndim == 1 else list(audio)
        spectra = [self._spectrum(clip) for clip in clips]  # (T, bins) each
        mel = torch.nn.utils.rnn.pad_sequence(spectra, batch_first=True).transpose(1, 2).contiguous()  # (B, bins, T)
        mask = length_mask(torch.tensor([len(spectrum) for spectrum in spectra]), mel.shape[2]).long()
        return BatchFeature({"input_features": mel, "attention_mask": mask})

    def _spectrum(self, clip: np.ndarray) -> torch.Tensor:
        """The log-mel spectrogram (T, bins) of one clip (n,)."""
        extractor = self.feature_extractor
        if not 2 * extractor.hop_length <= len(clip) <= extractor.n_samples:
            seconds = len(clip) / SAMPLE_RATE
            raise AudioError(f"a clip of {seconds:.2f} s; give 0.02 s to 30 s, or use the pipeline, which cuts long sound")
        return log_mel(extractor, clip, self.silence_s).T
