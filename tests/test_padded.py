"""Encoders that hear clips padded to 30 s, as foreign adapters want it: Whisper's own frames, always 188 slots."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from sounds import write
from tiny_model import clips, loud_encoder, speech_batch, tiny_model
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor, WhisperFeatureExtractor

from diffusion_gemma_asr import hf  # noqa: F401  registers the classes
from diffusion_gemma_asr.checkpoint.load import load_checkpoint
from diffusion_gemma_asr.checkpoint.save import save_checkpoint
from diffusion_gemma_asr.data.manifest import Utterance
from diffusion_gemma_asr.denoise.decode import decode_clips
from diffusion_gemma_asr.denoise.options import DecodeOptions
from diffusion_gemma_asr.errors import AudioError, DataError
from diffusion_gemma_asr.model.encoder import AcousticEncoder
from diffusion_gemma_asr.train.objective import losses
from diffusion_gemma_asr.train.recipe import LossRecipe
from diffusion_gemma_asr.train.speech import frame_cache


@pytest.fixture(scope="module")
def encoder(whisper_folder: Path) -> AcousticEncoder:
    loud = loud_encoder(whisper_folder)
    return AcousticEncoder(loud.encoder, loud.extractor, silence_s=30.0)


@pytest.fixture(scope="module")
def checkpoint(whisper_folder: Path, backbone_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny.model_config(whisper_folder, backbone_folder)
    config = replace(config, encoder=replace(config.encoder, silence_s=30.0))
    return save_checkpoint(tiny.build_model(config), tmp_path_factory.mktemp("padded") / "checkpoint")


@pytest.mark.parametrize("samples", [320, 16_000, 479_999, 480_000])
@torch.no_grad()
def test_frames_are_those_of_the_stock_encoder_on_30_s(encoder: AcousticEncoder, samples: int) -> None:
    audio = clips([samples])[0]
    mel = WhisperFeatureExtractor(feature_size=80)(audio, sampling_rate=16_000, return_tensors="pt")["input_features"]
    frames, lengths = encoder(*encoder.features([audio]))
    assert lengths.tolist() == [1500]
    torch.testing.assert_close(frames, encoder.encoder(mel).last_hidden_state, atol=1e-5, rtol=0)


@torch.no_grad()
def test_some_silence_is_heard_and_its_frames_go_on(encoder: AcousticEncoder) -> None:
    half = AcousticEncoder(encoder.encoder, encoder.extractor, silence_s=0.5)
    plain = AcousticEncoder(encoder.encoder, encoder.extractor)
    audio = clips([16_000, 5000, 478_400])
    mel, lengths = half.features(audio)
    assert lengths.tolist() == [150, 81, 3000]  # never more than 30 s
    frames, frame_lengths = half(mel, lengths)
    by_hand = plain(*plain.features([np.pad(audio[0], (0, 8000))]))[0]
    torch.testing.assert_close(frames[0, : int(frame_lengths[0])], by_hand[0], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_batch_is_what_single_calls_give_and_each_clip_has_188_slots(checkpoint: Path) -> None:
    model = load_checkpoint(checkpoint, device="cpu")
    assert model.config.encoder.silence_s == model.encoder.silence_s == 30
    audio = clips([3000, 40_000])
    together = model.encode(audio)
    assert together.slot_lengths.tolist() == [188, 188]
    for row, clip in enumerate(audio):
        torch.testing.assert_close(together.slots[row], model.encode([clip]).slots[0], atol=1e-4, rtol=1e-4)
    assert [decoded.text for decoded in decode_clips(model, audio, DecodeOptions(language="en", steps=2))] == [
        decode_clips(model, [clip], DecodeOptions(language="en", steps=2))[0].text for clip in audio
    ]


def test_a_spectrogram_that_is_not_padded_is_refused(encoder: AcousticEncoder) -> None:
    plain = AcousticEncoder(encoder.encoder, encoder.extractor)
    with pytest.raises(
        AudioError, match="a spectrogram of 25 frames, but this model's encoder hears 30 s of silence behind"
    ):
        encoder(*plain.features(clips([4000])))


@torch.no_grad()
def test_the_processor_of_a_padded_checkpoint_pads(checkpoint: Path) -> None:
    processor, model = AutoProcessor.from_pretrained(checkpoint), AutoModelForSpeechSeq2Seq.from_pretrained(checkpoint)
    features = processor(clips([4000, 9000]))
    assert features["input_features"].shape == (2, 80, 3000) and bool(features["attention_mask"].all())
    ids = model.generate(**features, language="en", steps=1)
    assert len(ids) == 2


def test_training_sees_all_frames(whisper_folder: Path, backbone_folder: Path, tmp_path: Path) -> None:
    utterance = Utterance(str(write(tmp_path / "a.wav", clips([8000])[0])), "hello", "en", 0.5)
    plain = loud_encoder(whisper_folder)
    padded = AcousticEncoder(plain.encoder, plain.extractor, silence_s=30.0)
    cache = frame_cache(tmp_path / "frames", padded, [utterance])
    assert cache.length(utterance) == 1500
    with pytest.raises(DataError, match="another encoder"):  # the same weights, but heard otherwise
        frame_cache(tmp_path / "frames", plain, [utterance])
    model = tiny_model(whisper_folder, backbone_folder)
    batch = replace(speech_batch(model, ["hello"], [1500]), frames=cache.batch([utterance])[0].float())
    assert int(batch.text.slot_mask.sum()) == 188
    assert math.isfinite(float(losses(model, batch, LossRecipe()).total(LossRecipe()).detach()))
