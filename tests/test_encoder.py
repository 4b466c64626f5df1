"""The acoustic encoder: equal to Whisper's on 30 s; on shorter clips, in a batch what it is alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import clips, loud_encoder
from transformers import WhisperConfig, WhisperFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from diffusion_gemma_asr.checkpoint.parts import load_encoder
from diffusion_gemma_asr.errors import AudioError, CheckpointError
from diffusion_gemma_asr.model.config import EncoderConfig
from diffusion_gemma_asr.model.encoder import AcousticEncoder
from diffusion_gemma_asr.model.lengths import length_mask


@pytest.fixture(scope="module")
def encoder(whisper_folder: Path) -> AcousticEncoder:
    return loud_encoder(whisper_folder)


@pytest.fixture(scope="module")
def encoder_128(whisper_128_folder: Path) -> AcousticEncoder:
    return loud_encoder(whisper_128_folder)


def small_whisper(positions: int) -> WhisperConfig:
    return WhisperConfig(
        d_model=8,
        encoder_layers=1,
        encoder_attention_heads=2,
        encoder_ffn_dim=8,
        max_source_positions=positions,
    )


@pytest.mark.parametrize("name", ["encoder", "encoder_128"])
def test_full_clip_is_what_whisper_gives(name: str, request: pytest.FixtureRequest) -> None:
    ours: AcousticEncoder = request.getfixturevalue(name)
    bins = ours.encoder.config.num_mel_bins
    audio = clips([480_000])[0]
    theirs = WhisperFeatureExtractor(feature_size=bins)(audio, sampling_rate=16_000, return_tensors="pt")
    mel, lengths = ours.features([audio])
    with torch.no_grad():
        frames, frame_lengths = ours(mel, lengths)
        expected = ours.encoder(theirs["input_features"]).last_hidden_state
    assert mel.shape == (1, bins, 3000)
    assert frame_lengths.tolist() == [1500] == [ours.max_frames]
    torch.testing.assert_close(frames, expected, atol=1e-5, rtol=0)


def test_the_width_and_the_mel_bins_come_from_the_checkpoint(encoder: AcousticEncoder, encoder_128: AcousticEncoder) -> None:
    audio = clips([4000])
    for module, bins, width in ((encoder, 80, 16), (encoder_128, 128, 24)):
        mel, lengths = module.features(audio)
        frames, _ = module(mel, lengths)
        assert module.hidden_size == width
        assert mel.shape == (1, bins, 25)
        assert frames.shape == (1, 13, width)


@settings(max_examples=12, deadline=None)
@given(lengths=st.lists(st.integers(320, 12_000), min_size=2, max_size=4), seed=st.integers(0, 99))
def test_batch_is_what_single_calls_give(encoder: AcousticEncoder, lengths: list[int], seed: int) -> None:
    audio = clips(lengths, seed)
    with torch.no_grad():
        together, frame_lengths = encoder(*encoder.features(audio))
        for row, clip in enumerate(audio):
            alone, own = encoder(*encoder.features([clip]))
            n = int(frame_lengths[row])
            assert own.tolist() == [n] == [alone.shape[1]]
            torch.testing.assert_close(together[row, :n], alone[0], atol=1e-5, rtol=0)
            assert not together[row, n:].any(), "not zero behind the end"


def test_on_a_processor_a_batch_is_bit_by_bit_what_single_calls_give(whisper_folder: Path) -> None:
    """Also in bfloat16, where a rounding would soon become another word."""
    encoder = loud_encoder(whisper_folder).bfloat16()
    audio = clips([9000, 3000, 12_000, 640])
    with torch.no_grad():
        together, lengths = encoder(*encoder.features(audio))
        for row, n, clip in zip(together, lengths.tolist(), audio, strict=True):
            assert torch.equal(row[:n], encoder(*encoder.features([clip]))[0][0])


@pytest.mark.parametrize("samples, frames", [(320, 1), (479, 1), (480, 2), (640, 2), (641, 2), (16_000, 50), (16_160, 51)])
def test_short_sound_gets_only_its_frames(encoder: AcousticEncoder, samples: int, frames: int) -> None:
    mel, lengths = encoder.features(clips([samples]))
    out, frame_lengths = encoder(mel, lengths)
    assert mel.shape[2] == lengths[0] == samples // 160
    assert out.shape[1] == frame_lengths[0] == frames


def test_every_frame_depends_on_the_sound(encoder: AcousticEncoder) -> None:
    """Else the comparisons of this file would compare constants."""
    mel, lengths = encoder.features(clips([8000]))
    with torch.no_grad():
        change = encoder(mel, lengths)[0] - encoder(mel.flip(2), lengths)[0]
    assert change.abs().amax(-1).min() > 0.05


def test_too_short_and_too_long_clips_are_named() -> None:
    module = AcousticEncoder.from_config(small_whisper(positions=50)).eval()  # at most 1 s
    module.features(clips([320, 16_000]))
    with pytest.raises(AudioError, match=r"0\.02 s.*0\.02 s to 1 s.*cut"):
        module.features(clips([16_000, 319]))
    with pytest.raises(AudioError, match=r"1\.01 s.*0\.02 s to 1 s.*cut"):
        module.features(clips([16_160]))
    with pytest.raises(AudioError):
        module.features([np.zeros(0, np.float32)])


def test_mel_bins_of_another_checkpoint_are_refused() -> None:
    encoder = WhisperEncoder(small_whisper(positions=50))
    extractor = WhisperFeatureExtractor(feature_size=128)
    with pytest.raises(CheckpointError, match=r"80 mel bins.*128"):
        AcousticEncoder(encoder, extractor)


def test_loads_frozen_and_without_a_decoder(whisper_folder: Path, tmp_path: Path) -> None:
    whole = load_encoder(EncoderConfig(str(whisper_folder)))
    bare = load_encoder(EncoderConfig(str(tiny.write_whisper(tmp_path / "bare", encoder_only=True))))
    assert not any(p.requires_grad for p in whole.parameters())
    assert not whole.training
    mel, lengths = whole.features(clips([5000]))
    torch.testing.assert_close(whole(mel, lengths), bare(mel, lengths), atol=0, rtol=0)


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        load_encoder(EncoderConfig(str(tmp_path / "nowhere")), local_files_only=True)


def test_length_mask_marks_each_rows_length() -> None:
    mask = length_mask(torch.tensor([0, 2, 3]), 3)
    assert mask.tolist() == [[False] * 3, [True, True, False], [True] * 3]
