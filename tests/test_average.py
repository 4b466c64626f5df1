"""train/average.py: the mean of adapters, tensor by tensor, and what cannot be averaged."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch

from diffusion_gemma_asr.checkpoint.load import ADAPTER, load_checkpoint, read_adapter
from diffusion_gemma_asr.checkpoint.parts import load_backbone, load_encoder
from diffusion_gemma_asr.checkpoint.save import save_checkpoint, save_projector
from diffusion_gemma_asr.errors import CheckpointError
from diffusion_gemma_asr.model.config import BackboneConfig, EncoderConfig, ProjectorConfig
from diffusion_gemma_asr.model.projector import AudioProjector
from diffusion_gemma_asr.train.average import average, average_encoder, main


def projector(seed: int, hidden: int = 8) -> AudioProjector:
    torch.manual_seed(seed)
    return AudioProjector(ProjectorConfig(hidden_size=hidden), 16, 12)


def test_each_tensor_is_the_weighted_mean(tmp_path: Path) -> None:
    for seed in (0, 1):
        save_projector(projector(seed), tmp_path / str(seed))
    mean = average([tmp_path / "0", tmp_path / "1"], [1.0, 3.0])
    first, second = (read_adapter(tmp_path / str(seed)) for seed in (0, 1))
    assert mean.keys() == first.keys()
    for key, value in mean.items():
        torch.testing.assert_close(value, 0.25 * first[key] + 0.75 * second[key])
        assert value.dtype == second[key].dtype


def test_what_does_not_fit_is_told(tmp_path: Path) -> None:
    save_projector(projector(0), tmp_path / "a")
    save_projector(projector(0, hidden=9), tmp_path / "b")
    with pytest.raises(CheckpointError, match=r"b has other tensors than .*a; they cannot be averaged"):
        average([tmp_path / "a", tmp_path / "b"], [1.0, 1.0])
    for shares in ([1.0], [1.0, -0.5], [0.0, 0.0]):
        with pytest.raises(CheckpointError, match="give each a share"):
            average([tmp_path / "a", tmp_path / "a"], shares)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        average([tmp_path / "a", tmp_path / "c"], [1.0, 1.0])


def test_the_command_writes_a_checkpoint_that_loads(
    tmp_path: Path, whisper_folder: Path, backbone_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny.model_config(whisper_folder, backbone_folder)
    for name in ("a", "b"):
        save_checkpoint(tiny.build_model(config), tmp_path / name)
    out = tmp_path / "c" / "checkpoint"
    main([str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(out)])
    assert capsys.readouterr().out.strip() == str(out)
    assert read_adapter(out).keys() == read_adapter(tmp_path / "a").keys() and (out / ADAPTER).is_file()
    assert load_checkpoint(out).config.name == config.name


def test_encoders_are_averaged_beside_the_adapters(tmp_path: Path, whisper_folder: Path, backbone_folder: Path) -> None:
    config = tiny.model_config(whisper_folder, backbone_folder)
    for name in ("a", "b"):
        save_checkpoint(tiny.build_model(config), tmp_path / name)
    other = tiny.write_whisper(tmp_path / "whisper", seed=1)
    encoders = ["--encoders", str(whisper_folder), str(other), "--shares", "1", "3"]
    main([str(tmp_path / "a"), str(tmp_path / "b"), *encoders, "--out", str(tmp_path / "c")])
    first, second, mean = (
        load_encoder(EncoderConfig(str(name))) for name in (whisper_folder, other, tmp_path / "c/encoder")
    )
    for key, value in mean.state_dict().items():
        torch.testing.assert_close(value, 0.25 * first.state_dict()[key] + 0.75 * second.state_dict()[key])
    moved = (tmp_path / "c").rename(tmp_path / "moved")
    assert load_checkpoint(moved).config.encoder.name == str(moved / "encoder")
    with pytest.raises(CheckpointError, match="give each a share"):
        average_encoder([str(whisper_folder)], [1.0, 1.0])


def test_backbones_are_averaged_beside_the_adapters(tmp_path: Path, whisper_folder: Path, backbone_folder: Path) -> None:
    config = tiny.model_config(whisper_folder, backbone_folder)
    save_checkpoint(tiny.build_model(config), tmp_path / "a")
    other = tiny.write_backbone(tmp_path / "backbone", seed=1)
    backbones = ["--backbones", str(backbone_folder), str(other), "--shares", "1", "3"]
    main([str(tmp_path / "a"), str(tmp_path / "a"), *backbones, "--out", str(tmp_path / "c")])
    first, second, mean = (
        load_backbone(BackboneConfig(str(name))).state_dict() for name in (backbone_folder, other, tmp_path / "c/backbone")
    )
    assert any(not torch.equal(first[key], second[key]) for key in mean)
    for key, value in mean.items():
        torch.testing.assert_close(value, 0.25 * first[key] + 0.75 * second[key], atol=1e-3, rtol=1e-3)  # of 16 bits
    moved = (tmp_path / "c").rename(tmp_path / "moved")
    assert load_checkpoint(moved).config.backbone.name == str(moved / "backbone")
