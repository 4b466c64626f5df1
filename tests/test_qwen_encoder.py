"""The audio tower of Qwen3-ASR as an encoder: loaded from the real layout, equal to the stock model, batch as single."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from tiny_model import clips

from diffusion_gemma_asr.app.info import count_parts
from diffusion_gemma_asr.checkpoint.export import export_checkpoint, load_audio_parts
from diffusion_gemma_asr.checkpoint.load import load_checkpoint
from diffusion_gemma_asr.checkpoint.parts import load_encoder
from diffusion_gemma_asr.checkpoint.save import save_checkpoint
from diffusion_gemma_asr.errors import AudioError, CheckpointError
from diffusion_gemma_asr.hf import DiffusionGemmaASRProcessor
from diffusion_gemma_asr.model.config import EncoderConfig, LoraConfig, ProjectorConfig
from diffusion_gemma_asr.model.encoder import AcousticEncoder
from diffusion_gemma_asr.train.recipe import load_recipe

qwen3_asr = pytest.importorskip("transformers.models.qwen3_asr", reason="transformers has no Qwen3-ASR")
from transformers import Qwen3ASRConfig, Qwen3ASRFeatureExtractor, Qwen3ASRForConditionalGeneration  # noqa: E402

WIDTH = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole tiny Qwen3-ASR as transformers writes it: audio tower, projector and language model."""
    audio = {
        "num_mel_bins": 128, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "d_model": WIDTH,
        "output_dim": 24, "downsample_hidden_size": 4,
    }  # fmt: skip
    text = {
        "vocab_size": 50, "hidden_size": 24, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8,
    }  # fmt: skip
    place = tmp_path_factory.mktemp("qwen") / "qwen3-asr"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = Qwen3ASRConfig(audio_config=audio, text_config=text, audio_token_id=3, pad_token_id=0, eos_token_id=1)
        model = Qwen3ASRForConditionalGeneration(config)
        for parameter in model.model.audio_tower.parameters():
            if parameter.dim() >= 2:
                torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    model.save_pretrained(place)
    Qwen3ASRFeatureExtractor().save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def encoder(folder: Path) -> AcousticEncoder:
    return load_encoder(EncoderConfig(str(folder)))


@pytest.mark.parametrize("samples", [8_000, 16_000, 40_000, 208_320, 480_000])
@torch.no_grad()
def test_frames_are_those_of_the_stock_tower(encoder: AcousticEncoder, folder: Path, samples: int) -> None:
    audio = clips([samples])[0]
    whole = Qwen3ASRForConditionalGeneration.from_pretrained(folder).eval()
    extractor = Qwen3ASRFeatureExtractor.from_pretrained(folder)
    theirs = extractor(audio, sampling_rate=16_000, padding=False, return_attention_mask=True)
    expected = whole.model.audio_tower(theirs["input_features"], theirs["attention_mask"]).last_hidden_state
    frames, lengths = encoder(*encoder.features([audio]))
    assert lengths.tolist() == [len(expected)] and frames.shape == (1, len(expected), WIDTH)
    torch.testing.assert_close(frames[0], expected, atol=1e-4, rtol=1e-4)
    assert (frames - frames.mean(1, keepdim=True)).abs().max() > 0.1  # no constants are compared


@torch.no_grad()
def test_a_batch_is_what_single_calls_give(encoder: AcousticEncoder) -> None:
    audio = clips([40_000, 3_000, 160_000, 17_000])
    together, lengths = encoder(*encoder.features(audio))
    for row, clip in enumerate(audio):
        alone, own = encoder(*encoder.features([clip]))
        n = int(lengths[row])
        assert own.tolist() == [n] == [alone.shape[1]]
        torch.testing.assert_close(together[row, :n], alone[0], atol=1e-5, rtol=1e-5)
        assert not together[row, n:].any()


def test_sizes_and_bounds(encoder: AcousticEncoder) -> None:
    assert (encoder.hidden_size, encoder.input_size, encoder.max_frames) == (WIDTH, 128, 390)
    assert encoder.frame_s * 390 == pytest.approx(30)
    with pytest.raises(AudioError, match=r"30\.01 s; the encoder takes 0\.02 s to 30 s"):
        encoder.features(clips([480_160]))


@torch.no_grad()
def test_a_model_with_this_ear_is_saved_loaded_counted_and_exported(
    folder: Path, backbone_folder: Path, tmp_path: Path
) -> None:
    config = tiny.model_config(folder, backbone_folder, lora=LoraConfig(4, 8, shared=True))
    model = tiny.build_model(replace(config, projector=ProjectorConfig(24, (2, 1), kernels=(5, 3))))
    saved = save_checkpoint(model, tmp_path / "checkpoint")
    loaded = load_checkpoint(saved, device="cpu")
    assert (loaded.config.encoder.width, loaded.config.encoder.mel_bins) == (WIDTH, 128)
    audio = clips([30_000])
    expected = model.encode(audio)
    assert expected.slot_lengths.tolist() == [12]  # 13 frames of the first second, 11 of 0.875 s, in pairs
    torch.testing.assert_close(loaded.encode(audio).slots, expected.slots, atol=1e-5, rtol=1e-5)
    assert model.slot_s == pytest.approx(2 / 13)
    processor = DiffusionGemmaASRProcessor.from_pretrained(saved)
    torch.testing.assert_close(processor(audio)["input_features"], model.encoder.features(audio)[0])
    assert count_parts(config)[0].parameters == sum(p.numel() for p in model.encoder.parameters())
    parts = load_audio_parts(export_checkpoint(loaded, tmp_path / "exported"))
    torch.testing.assert_close(
        parts.encoder(*parts.encoder.features(audio)), model.encoder(*model.encoder.features(audio)), atol=1e-5, rtol=1e-5
    )


def test_another_tower_and_another_layout_are_refused(
    folder: Path, backbone_folder: Path, whisper_folder: Path, tmp_path: Path
) -> None:
    model = tiny.build_model(tiny.model_config(whisper_folder, backbone_folder))
    saved = save_checkpoint(model, tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match=r"16 wide with 80 mel bins .*is 16 wide with 128"):
        load_checkpoint(saved, device="cpu", encoder=folder)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "config.json").write_text('{"model_type": "qwen3_asr", "thinker_config": {"audio_config": {"d_model": 896}}}')
    with pytest.raises(
        CheckpointError, match="is in the layout of Qwen's own package; give the repository whose name ends in -hf"
    ):
        load_encoder(EncoderConfig(str(theirs)))


def test_the_recipe_is_read() -> None:
    model = load_recipe("qwen3-asr").model
    assert model.encoder.name.startswith("Qwen/") and model.lora.shared
