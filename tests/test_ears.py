"""The stage `ears`: an encoder and the projector over it learn together from spectrograms, and are written apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from sounds import tone, write
from tiny_model import clips

import diffusion_gemma_asr
from diffusion_gemma_asr.checkpoint.config_file import read_config_file
from diffusion_gemma_asr.checkpoint.load import read_adapter
from diffusion_gemma_asr.checkpoint.parts import load_encoder
from diffusion_gemma_asr.data.features import FeatureCache
from diffusion_gemma_asr.data.manifest import Utterance, write_manifest
from diffusion_gemma_asr.errors import CheckpointError, RecipeError
from diffusion_gemma_asr.model.config import EncoderConfig, ProjectorConfig
from diffusion_gemma_asr.model.encoder import log_mel
from diffusion_gemma_asr.model.projector import AudioProjector
from diffusion_gemma_asr.train.mini.ears import Ears, Spectrograms
from diffusion_gemma_asr.train.run import train_from_recipe


@pytest.fixture
def content(tmp_path: Path, whisper_folder: Path, backbone_folder: Path) -> dict[str, Any]:
    """A recipe of the stage, with three sentences to learn by heart."""
    rows = []
    for i, text in enumerate(("the quick fox", "she sells", "by the sea")):
        sound = write(tmp_path / f"{i}.wav", tone(300 + 100 * i, 1.5 + 0.4 * i))
        rows.append(Utterance(str(sound), text, "en", 1.5 + 0.4 * i))
    write_manifest(tmp_path / "speech.jsonl", rows)
    return {
        "stage": "ears",
        "model": {
            "name": "ears",
            "encoder": {"name": str(whisper_folder)},
            "backbone": {"name": str(backbone_folder)},
            "projector": {"hidden_size": 24, "strides": [2, 2]},
        },
        "losses": {"diffusion": 0.0, "autoregressive": 0.0},
        "train": {"steps": 8, "batch_size": 3, "lr": 0.003, "dtype": "float32", "monitor_samples": 1, "warp": [0.9, 1.1]},
        "data": {"train": [{"manifest": "speech.jsonl"}], "dev": ["speech.jsonl"], "transcript": "plain"},
    }


def trained(folder: Path, content: dict[str, Any], name: str = "run") -> Path:
    """Runs the recipe in `folder`/`name`; returns that."""
    path = folder / "ears.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    assert train_from_recipe(path, folder / name, "cpu") == folder / name / "checkpoint"
    return folder / name


def test_encoder_and_projector_learn_and_are_written_apart(
    tmp_path: Path, content: dict[str, Any], whisper_folder: Path
) -> None:
    folder = trained(tmp_path, content)
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert min(record["ctc"] for record in records[-3:]) < 0.9 * records[0]["ctc"]
    assert FeatureCache(folder / "frames").width == 80
    began, ended = (load_encoder(EncoderConfig(str(name))) for name in (whisper_folder, folder / "encoder"))
    changed = {n for n, p in began.named_parameters() if not torch.equal(p, dict(ended.named_parameters())[n])}
    assert {"encoder.conv1.weight", "encoder.layers.0.self_attn.q_proj.weight", "encoder.layer_norm.weight"} <= changed
    assert "encoder.embed_positions.weight" not in changed
    assert not any(name.startswith(("encoder", "projector.encoder")) for name in read_adapter(folder / "checkpoint"))
    assert Path(read_config_file(folder / "checkpoint").encoder.name) == folder / "encoder"
    assert (
        diffusion_gemma_asr.load(folder / "checkpoint", device="cpu").transcribe(tone(440, 1.0), language="en").duration == 1
    )


def test_a_run_goes_on_with_the_encoder_that_it_began_with(tmp_path: Path, content: dict[str, Any]) -> None:
    content["train"] |= {"steps": 2}
    folder = trained(tmp_path, content)
    content["train"] |= {"steps": 3}
    trained(tmp_path, content)
    assert json.loads((folder / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1])["step"] == 3
    content["model"] |= {"encoder": {"name": str(folder / "encoder")}}
    with pytest.raises(CheckpointError, match="encoder"):
        trained(tmp_path, content)


@torch.no_grad()
def test_together_they_write_what_they_write_one_behind_the_other(whisper_folder: Path) -> None:
    encoder = load_encoder(EncoderConfig(str(whisper_folder)))
    projector = AudioProjector(ProjectorConfig(24, (2, 2)), encoder.hidden_size, 32)
    audio = clips([16_000, 9_000])
    spectrograms = Spectrograms(encoder.extractor)
    frames, lengths = spectrograms(*spectrograms.features(audio))
    assert lengths.tolist() == [100, 56] and frames.shape == (2, 100, 80) and not frames[1, 56:].any()
    assert torch.equal(frames[0], log_mel(encoder.extractor, audio[0], 0.0).T)
    ears = Ears(encoder, projector)
    slots, slot_lengths = ears(frames, lengths)
    expected, expected_lengths = projector(*encoder(*encoder.features(audio)))
    torch.testing.assert_close(slots, expected)
    assert slot_lengths.tolist() == expected_lengths.tolist() == [ears.output_length(n) for n in lengths.tolist()]
    assert ears.frames_per_slot * spectrograms.frame_s == pytest.approx(projector.frames_per_slot * encoder.frame_s)


def test_what_does_not_fit_is_refused(tmp_path: Path, content: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="by CTC alone"):
        trained(tmp_path, content | {"losses": {"autoregressive": 0.0, "ctc": 1.0}})
    silent = content["model"] | {"encoder": content["model"]["encoder"] | {"silence_s": 0.5}}
    with pytest.raises(RecipeError, match=r"leave out 'model\.encoder\.silence_s'"):
        trained(tmp_path, content | {"model": silent})
    adapter = {key: value for key, value in content.items() if key != "stage"}
    with pytest.raises(RecipeError, match="in the stage 'ears' alone"):
        trained(tmp_path, adapter)
    narrow = tiny.write_whisper(tmp_path / "narrow", width=16)
    (narrow / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CheckpointError, match="cannot read the configuration"):
        trained(tmp_path, content | {"model": content["model"] | {"encoder": {"name": str(narrow)}}})
