"""No encoder at all: the projector hears the log-mel spectrogram itself, and is the ears of a model that has no others."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, WhisperFeatureExtractor

from .encoder import AcousticEncoder
from .lengths import length_mask

LOG_MEL = "log-mel"
"""The name by which recipes and checkpoints ask for `LogMel`."""


class LogMelConfig(PreTrainedConfig):
    """The shape of `LogMel`, as the configurations of encoders have it."""

    model_type = "log_mel"

    num_mel_bins = 80
    d_model = 80


class LogMel(AcousticEncoder):
    """Whisper's log-mel spectrogram as frames (B, T, 80), one in 10 ms; there is nothing to train or to load.

    Args:
        extractor: makes the log-mel spectrograms.
        silence_s: seconds of silence behind each clip, up to 30 s in all.
    """

    frame_s = 0.01
    place: Tensor

    def __init__(self, extractor: WhisperFeatureExtractor, silence_s: float = 0.0):
        nn.Module.__init__(self)
        self.extractor, self.silence_s = extractor, silence_s
        self.register_buffer("place", torch.zeros(0), persistent=False)  # tells the device

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.place.device

    @property
    def hidden_size(self) -> int:
        """Width of a frame: the mel bins."""
        return self.extractor.feature_size

    @property
    def input_size(self) -> int:
        """Mel bins."""
        return self.extractor.feature_size

    @property
    def max_samples(self) -> int:
        """Samples of 30 s."""
        return self.extractor.n_samples

    @property
    def max_frames(self) -> int:
        """Frames of 30 s."""
        return self.max_mel_frames

    def _encode(self, mel: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """See `AcousticEncoder.forward`; frames (B, T, bins)."""
        frames = mel.transpose(1, 2)
        return frames * length_mask(lengths, frames.shape[1])[..., None].to(frames.dtype), lengths
