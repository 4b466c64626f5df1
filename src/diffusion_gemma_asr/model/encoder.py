"""Frozen acoustic encoders: Whisper of any size, run over the frames that hold sound instead of a padded 30 s.

Another encoder is a class like the one here (qwen_encoder.py)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import WhisperConfig, WhisperFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from ..audio.read import SAMPLE_RATE
from ..errors import AudioError, CheckpointError
from .lengths import each_alone, length_mask

HOP = 160  # samples a mel frame: 10 ms; the encoder's second convolution halves that to 20 ms frames


class AcousticEncoder(nn.Module):
    """A Whisper encoder over sound of any length up to 30 s.

    Whisper was trained on clips padded to 30 s. Here the convolutions and the attention see only a clip's own frames,
    and a batch of clips of different lengths is masked so that each gives what it gives alone. But it may be told
    to hear silence behind each clip, whose frames it then gives as well: Whisper's own way is 30 s.

    Args:
        encoder: Whisper's.
        extractor: makes its log-mel spectrograms.
        silence_s: seconds of silence that it hears behind each clip, up to 30 s in all.
    """

    frame_s = 0.02

    def __init__(self, encoder: WhisperEncoder, extractor: WhisperFeatureExtractor, silence_s: float = 0.0):
        super().__init__()
        if encoder.config.num_mel_bins != extractor.feature_size:
            raise CheckpointError(
                f"the encoder takes {encoder.config.num_mel_bins} mel bins, but its preprocessor_config.json makes "
                f"{extractor.feature_size}; take both from the same checkpoint"
            )
        self.encoder = encoder
        self.extractor = extractor
        self.silence_s = silence_s

    @classmethod
    def from_config(cls, config: WhisperConfig) -> AcousticEncoder:
        """An encoder with random weights."""
        return cls(WhisperEncoder(config), WhisperFeatureExtractor(feature_size=config.num_mel_bins))

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.encoder.device

    @property
    def hidden_size(self) -> int:
        """Width of a frame."""
        return self.encoder.config.d_model

    @property
    def input_size(self) -> int:
        """Mel bins."""
        return self.encoder.config.num_mel_bins

    @property
    def max_frames(self) -> int:
        """The most 20 ms frames that the encoder's positions allow (1500 in every Whisper: 30 s)."""
        return self.encoder.config.max_source_positions

    @property
    def max_samples(self) -> int:
        """The longest clip, in samples at 16 kHz."""
        return self.max_frames * 2 * HOP

    @property
    def max_mel_frames(self) -> int:
        """Mel frames of the longest clip."""
        return self.max_samples // HOP

    def features(self, audio: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Whisper's log-mel spectrogram of each clip, with the silence that the encoder hears behind it.

        Args:
            audio: float32 arrays (n,), 16 kHz, at most 30 s each.

        Returns:
            mel (B, bins, T) float32, padded with zeros; lengths (B,) long in mel frames of 10 ms.

        Raises:
            AudioError: a clip is longer than the encoder's positions or too short for one frame.
        """
        spectra = []
        for clip in audio:
            if len(clip) < 2 * HOP or len(clip) > self.max_samples:
                raise AudioError(
                    f"a clip of {len(clip) / SAMPLE_RATE:.2f} s; the encoder takes 0.02 s to "
                    f"{self.max_samples / SAMPLE_RATE:.0f} s: cut long sound into chunks first"
                )
            spectra.append(log_mel(self.extractor, clip, self.silence_s))
        lengths = torch.tensor([s.shape[1] for s in spectra])
        mel = nn.utils.rnn.pad_sequence([s.T for s in spectra], batch_first=True)  # (B, T, bins)
        return mel.transpose(1, 2).contiguous(), lengths

    def forward(self, mel: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Encodes log-mel spectrograms.

        Args:
            mel: (B, bins, T), zeros behind each clip's end.
            lengths: (B,) mel frames that hold sound.

        Returns:
            frames (B, ceil(T/2), hidden), zeros behind each end; frame_lengths (B,), frames of 20 ms.

        Raises:
            AudioError: a spectrogram is shorter than the silence that belongs behind it.
        """
        if int(lengths.min()) < min(int(self.silence_s * SAMPLE_RATE) // HOP, self.max_mel_frames):
            raise AudioError(
                f"a spectrogram of {int(lengths.min())} frames, but this model's encoder hears {self.silence_s:g} s of "
                "silence behind each clip; take the features from the same checkpoint"
            )
        if len(mel) == 1 or mel.device.type != "cpu":
            return self._encode(mel, lengths)
        # One clip at a time keeps the processor as busy as a batch, without padding and masks: 1.5 times as fast over 25 s.
        return each_alone(self._encode, (clip[:, :n] for clip, n in zip(mel, lengths, strict=True)), lengths)

    def _encode(self, mel: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """See `forward`."""
        enc = self.encoder
        mel = mel.to(enc.conv1.weight.dtype)
        frame_lengths = (lengths + 1) // 2
        # A lone clip meets the convolutions' zero padding at its end: give every clip of the batch the same.
        x = F.gelu(enc.conv1(mel)) * length_mask(lengths, mel.shape[2])[:, None].to(mel.dtype)  # (B, D, T)
        x = F.gelu(enc.conv2(x)).transpose(1, 2)  # (B, F, D)
        x = x + enc.embed_positions.weight[: x.shape[1]]
        x = F.dropout(x, p=enc.dropout, training=self.training)
        mask = length_mask(frame_lengths, x.shape[1])  # (B, F)
        attention_mask = None if bool(mask.all()) else self._attention_mask(mask)
        for layer in enc.layers:
            x = layer(x, attention_mask)
        return enc.layer_norm(x) * mask[..., None].to(x.dtype), frame_lengths

    def _attention_mask(self, mask: Tensor) -> Tensor:
        """(B, F) True where sound is → (B, 1, F, F) for fused attention, or (B, 1, 1, F) to add for the plain one."""
        if self.encoder.config._attn_implementation == "eager":
            return torch.zeros_like(mask, dtype=torch.float32).masked_fill_(~mask, -1e4)[:, None, None, :]
        return mask[:, None, None, :].expand(-1, 1, mask.shape[1], -1)


def log_mel(extractor: WhisperFeatureExtractor, clip: np.ndarray, silence_s: float) -> Tensor:
    """The log-mel spectrogram (bins, T) of one clip (n,) at 16 kHz with silence behind it, up to 30 s in all."""
    silence = max(0, min(round(silence_s * SAMPLE_RATE), extractor.n_samples - len(clip)))
    clip = np.pad(clip, (0, silence))
    out = extractor(clip, sampling_rate=SAMPLE_RATE, padding=False, truncation=False, return_tensors="pt")
    return out["input_features"][0]
