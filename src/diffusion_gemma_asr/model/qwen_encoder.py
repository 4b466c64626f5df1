"""The audio tower of Qwen3-ASR as an acoustic encoder: 13 frames a second, attention within windows of 8 s."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import WhisperFeatureExtractor
from transformers.models.qwen3_asr.configuration_qwen3_asr import Qwen3ASREncoderConfig
from transformers.models.qwen3_asr.modeling_qwen3_asr import Qwen3ASREncoder

from .encoder import AcousticEncoder
from .lengths import length_mask


class QwenEncoder(AcousticEncoder):
    """Qwen3-ASR's encoder over sound of any length up to 30 s; its log-mel spectrogram is Whisper's.

    Its convolutions see a second at a time and make 13 frames of it, so that nothing has to be padded to 30 s; what is
    padded to whole seconds is masked, and a batch gives each clip what it gets alone. (Its own package pads clips under
    0.5 s to 0.5 s; here they stay as they are.)

    Args:
        encoder: Qwen3-ASR's.
        extractor: makes the log-mel spectrograms.
        silence_s: seconds of silence that it hears behind each clip, up to 30 s in all.
    """

    frame_s = 1 / 13
    encoder: Qwen3ASREncoder

    @classmethod
    def from_config(cls, config: Qwen3ASREncoderConfig) -> QwenEncoder:
        """An encoder with random weights."""
        return cls(Qwen3ASREncoder(config), WhisperFeatureExtractor(feature_size=config.num_mel_bins))

    @property
    def max_samples(self) -> int:
        """Samples of 30 s."""
        return self.extractor.n_samples

    @property
    def max_frames(self) -> int:
        """Frames of 30 s."""
        return int(self._frame_lengths(torch.tensor(self.max_mel_frames)))

    def _encode(self, mel: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """See `AcousticEncoder.forward`; frames (B, F, hidden), 13 for every second of sound."""
        second = 2 * self.encoder.n_window  # mel frames
        mel = nn.functional.pad(mel, (0, -mel.shape[2] % second)).to(self.encoder.conv2d1.weight.dtype)
        mask = length_mask(lengths, mel.shape[2])
        packed = self.encoder(mel * mask[:, None].to(mel.dtype), mask.long()).last_hidden_state  # (sum of lengths, D)
        frame_lengths = self._frame_lengths(lengths)
        rows = packed.split(frame_lengths.tolist())
        return nn.utils.rnn.pad_sequence(list(rows), batch_first=True), frame_lengths

    def _frame_lengths(self, lengths: Tensor) -> Tensor:
        """Mel frames → frames: each whole second, and what is left, through three convolutions of stride 2."""
        second = 2 * self.encoder.n_window
        rest = self.encoder._post_cnn_length(lengths % second)
        return lengths // second * self.encoder._post_cnn_length(torch.tensor(second)) + rest
