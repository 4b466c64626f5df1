"""waveform.py: frames of samples in place of an acoustic encoder."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sounds import tone

from diffusion_gemma_asr.errors import AudioError
from diffusion_gemma_asr.waveform import FRAME, WaveformFrames


def test_frames_are_the_samples_at_one_loudness() -> None:
    loud, soft = tone(300, 1.0, amplitude=0.8), tone(300, 1.0, amplitude=0.05)
    frames, lengths = WaveformFrames()(*WaveformFrames().features([loud, soft, loud[:1000]]))
    assert frames.shape == (3, 25, FRAME) and lengths.tolist() == [25, 25, 2]
    torch.testing.assert_close(frames[0], frames[1], atol=1e-3, rtol=1e-3)
    assert frames[0].square().mean().sqrt().item() == pytest.approx(1.0, abs=1e-4)
    expected = torch.from_numpy(loud / np.sqrt((loud**2).mean()))
    torch.testing.assert_close(frames[0].flatten(), expected, atol=1e-4, rtol=1e-4)
    assert not frames[2, 2:].any() and not frames[2, 1, 1000 - FRAME :].any()


@pytest.mark.parametrize("samples", [100, 16_000 * 30 + 1])
def test_clips_of_the_wrong_length_are_refused(samples: int) -> None:
    with pytest.raises(AudioError, match=r"give 0\.04 s to 30 s"):
        WaveformFrames().features([np.zeros(samples, np.float32)])
