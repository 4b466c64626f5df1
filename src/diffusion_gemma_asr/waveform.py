"""No acoustic encoder at all: 40 ms frames of samples, for the baseline whose projector has to hear by itself."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from .audio import SAMPLE_RATE
from .encoder import length_mask
from .errors import AudioError

FRAME = 640  # samples: 40 ms
MAX_FRAMES = 750  # 30 s


class WaveformFrames(nn.Module):
    """Stands where an `AcousticEncoder` stands, and passes on what it is given."""

    hidden_size = FRAME
    frame_s = FRAME / SAMPLE_RATE
    input_size = FRAME
    max_frames = MAX_FRAMES

    def features(self, audio: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Cuts clips into frames, each clip brought to a root mean square of 1, its last frame filled up with zeros.

        Args:
            audio: float32 arrays (n,), 16 kHz, at most 30 s each.

        Returns:
            frames (B, 640, T) float32, padded with zeros; lengths (B,) long.

        Raises:
            AudioError: a clip is longer than 30 s or shorter than one frame.
        """
        rows = []
        for clip in audio:
            if not FRAME <= len(clip) <= MAX_FRAMES * FRAME:
                seconds = len(clip) / SAMPLE_RATE
                raise AudioError(f"a clip of {seconds:.2f} s; give 0.04 s to 30 s: cut long sound into chunks first")
            samples = torch.from_numpy(np.ascontiguousarray(clip, dtype=np.float32))
            samples = samples / samples.square().mean().sqrt().clamp(min=1e-4)
            rows.append(nn.functional.pad(samples, (0, -len(samples) % FRAME)).view(-1, FRAME))
        lengths = torch.tensor([len(row) for row in rows])
        return nn.utils.rnn.pad_sequence(rows, batch_first=True).transpose(1, 2).contiguous(), lengths

    def forward(self, frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 640, T) and (B,) → (B, T, 640), zeros behind each end, and (B,)."""
        frames = frames.transpose(1, 2)
        return frames * length_mask(lengths, frames.shape[1])[..., None].to(frames.dtype), lengths
