"""A model without an encoder: its projector hears the spectrogram, and may learn from another model's audio tokens."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from sounds import tone, write
from tiny_model import clips, speech_batch, tiny_model

import diffusion_gemma_asr
from diffusion_gemma_asr.app.memory import downloads
from diffusion_gemma_asr.app.parts import count_parts
from diffusion_gemma_asr.checkpoint.config_file import read_config_file
from diffusion_gemma_asr.checkpoint.export import export_checkpoint, load_audio_parts
from diffusion_gemma_asr.checkpoint.load import load_checkpoint
from diffusion_gemma_asr.checkpoint.parts import load_encoder
from diffusion_gemma_asr.checkpoint.save import save_checkpoint
from diffusion_gemma_asr.data.manifest import Utterance, write_manifest
from diffusion_gemma_asr.errors import AudioError, CheckpointError, DataError, RecipeError
from diffusion_gemma_asr.model.config import EncoderConfig, LoraConfig, ProjectorConfig
from diffusion_gemma_asr.model.encoder import log_mel
from diffusion_gemma_asr.model.mel_encoder import LOG_MEL
from diffusion_gemma_asr.model.projector import AudioProjector
from diffusion_gemma_asr.train.objective import imitation_loss, trust_in
from diffusion_gemma_asr.train.run import train_from_recipe
from diffusion_gemma_asr.train.teacher import Teacher

EIGHT = ProjectorConfig(24, (2, 2, 2), kernels=(7, 5, 5))


def test_frames_are_the_spectrogram() -> None:
    encoder = load_encoder(EncoderConfig(LOG_MEL))
    audio = clips([16_000, 4_000])
    frames, lengths = encoder(*encoder.features(audio))
    assert lengths.tolist() == [100, 25] and frames.shape == (2, 100, 80) and not frames[1, 25:].any()
    for row, n, clip in zip(frames, lengths.tolist(), audio, strict=True):
        assert torch.equal(row[:n], log_mel(encoder.extractor, clip, 0.0).T)
    assert (encoder.hidden_size, encoder.input_size, encoder.max_frames, encoder.frame_s) == (80, 80, 3000, 0.01)
    with pytest.raises(AudioError, match=r"30\.01 s; the encoder takes 0\.02 s to 30 s"):
        encoder.features(clips([480_160]))


def test_silence_behind_a_clip_is_heard() -> None:
    encoder = load_encoder(EncoderConfig(LOG_MEL, silence_s=0.5))
    assert encoder(*encoder.features(clips([16_000])))[1].tolist() == [150]


@torch.no_grad()
def test_such_a_model_is_saved_loaded_counted_exported_and_transcribes(
    whisper_folder: Path, backbone_folder: Path, tmp_path: Path
) -> None:
    config = tiny.model_config(whisper_folder, backbone_folder, lora=LoraConfig(4, 8, shared=True), projector=EIGHT)
    config = replace(config, encoder=EncoderConfig(LOG_MEL))
    model = tiny.build_model(config)
    assert model.slot_s == pytest.approx(0.08)
    saved = save_checkpoint(model, tmp_path / "checkpoint")
    assert not (saved / "encoder").exists()
    assert json.loads((saved / "config.json").read_text())["encoder"] == {
        "name": LOG_MEL, "revision": None, "width": 80, "mel_bins": 80, "silence_s": 0.0,
    }  # fmt: skip
    loaded = load_checkpoint(saved, device="cpu")
    audio = clips([30_000, 21_000])
    expected = model.encode(audio)
    torch.testing.assert_close(loaded.encode(audio).slots, expected.slots, atol=1e-5, rtol=1e-5)
    assert expected.slot_lengths.tolist() == [24, 17]
    assert count_parts(config)[0].parameters == 0 and len(downloads(config)) == 1
    parts = load_audio_parts(export_checkpoint(loaded, tmp_path / "exported"))
    torch.testing.assert_close(parts.projector(*parts.encoder(*parts.encoder.features(audio)))[0], expected.slots)
    assert diffusion_gemma_asr.load(saved, device="cpu").transcribe(tone(440, 1.0), language="en").duration == 1.0


# -- a teacher -------------------------------------------------------------------------------------------------


def test_the_loss_of_imitation_is_the_angle() -> None:
    wanted = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]], [[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]])
    lengths, trust = torch.tensor([3, 1]), torch.ones(2)
    assert float(imitation_loss(5 * wanted, lengths, wanted, trust)) == pytest.approx(0, abs=1e-6)
    turned = wanted.clone()
    turned[0, 1] = torch.tensor([1.0, 0.0])  # by 90 degrees: one of four
    assert float(imitation_loss(turned, lengths, wanted, trust)) == pytest.approx(0.25)
    assert float(imitation_loss(turned, lengths, wanted, torch.tensor([0.2, 1.0]))) == pytest.approx(0.05)
    assert float(imitation_loss(turned[:, :1], lengths, wanted, trust)) == pytest.approx(0, abs=1e-6)  # rounded otherwise
    longer = torch.cat([turned, torch.ones(2, 1, 2)], 1)
    assert float(imitation_loss(longer, lengths + 1, wanted, trust)) == pytest.approx(0.25)


def test_a_new_projector_begins_with_the_teachers_upper_part(whisper_folder: Path, backbone_folder: Path) -> None:
    model = tiny_model(whisper_folder, backbone_folder)
    width = model.backbone.hidden_size
    torch.manual_seed(0)
    deep = {"layers": 2, "layer_width": 64}
    projector = AudioProjector(replace(EIGHT, **deep), 80, width)
    teacher = Teacher.__new__(Teacher)
    teacher.projector = AudioProjector(ProjectorConfig(24, (2, 2), layers=1, layer_width=64), 16, width, 2.0)
    before = {name: value.clone() for name, value in projector.state_dict().items()}
    theirs = teacher.projector.state_dict()
    teacher.lend(projector)
    after = projector.state_dict()
    lent = {name for name in after if not torch.equal(after[name], before[name])}
    assert not any(name.startswith(("conv", "deep.layers.0.")) for name in lent) and "scale" not in lent
    assert torch.equal(after["linear.weight"], theirs["linear.weight"])
    assert torch.equal(after["deep.in_proj.weight"], theirs["deep.in_proj.weight"])
    assert torch.equal(after["deep.layers.1.qkv.weight"], theirs["deep.layers.0.qkv.weight"])
    other = AudioProjector(ProjectorConfig(16, (2, 2, 2), kernels=(7, 5, 5)), 80, width)  # narrower, and without layers
    kept = other.linear.weight.clone()
    teacher.lend(other)
    assert torch.equal(other.linear.weight, kept)


def test_a_teacher_is_trusted_as_far_as_it_spells_what_was_said(whisper_folder: Path, backbone_folder: Path) -> None:
    model = tiny_model(whisper_folder, backbone_folder)
    batch = speech_batch(model, ["the fox", "the fox"], [150, 150])
    right = [model.blank, *batch.text.transcripts()[0], model.blank]
    wanted = torch.zeros(2, len(right) + 3, model.backbone.hidden_size)  # the second row: nothing was heard
    wanted[0, : len(right)] = 100 * model.head.weight[right]
    wanted[1, : len(right)] = 100 * model.head.weight[model.blank]
    trust = trust_in(model, wanted, batch.text)
    assert float(trust[0]) > 10 * float(trust[1]) > 0


@pytest.fixture
def lesson(tmp_path: Path, whisper_folder: Path, backbone_folder: Path) -> dict[str, Any]:
    """A recipe whose teacher, frames and all, is in `teacher`, and knows its three sentences by heart."""
    rows = []
    for i, text in enumerate(("the quick fox", "she sells", "by the sea")):
        sound = write(tmp_path / f"{i}.wav", tone(300 + 100 * i, 1.5 + 0.4 * i))
        rows.append(Utterance(str(sound), text, "en", 1.5 + 0.4 * i))
    write_manifest(tmp_path / "speech.jsonl", rows)
    content: dict[str, Any] = {
        "model": {
            "name": "teacher",
            "encoder": {"name": str(whisper_folder)},
            "backbone": {"name": str(backbone_folder)},
            "projector": {"hidden_size": 24, "strides": [2, 2]},
        },
        "losses": {"diffusion": 0.0, "autoregressive": 0.0},
        "train": {"steps": 60, "batch_size": 3, "lr": 0.01, "dtype": "float32", "monitor_samples": 1},
        "data": {"train": [{"manifest": "speech.jsonl"}], "dev": ["speech.jsonl"], "transcript": "plain"},
    }
    (tmp_path / "teacher.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    train_from_recipe(tmp_path / "teacher.yaml", tmp_path / "teacher", "cpu")
    content["model"] |= {"name": "pupil", "encoder": {"name": LOG_MEL}}
    content["model"]["projector"] = {"hidden_size": 24, "strides": [2, 2, 2], "kernels": [7, 5, 5]}
    content["losses"] |= {"ctc": 0.01, "imitation": 1.0}
    content["train"] |= {"steps": 12, "teacher": "teacher/checkpoint", "teacher_frames": "teacher/frames"}
    return content


def learnt(folder: Path, content: dict[str, Any]) -> list[dict[str, Any]]:
    path = folder / "pupil.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    train_from_recipe(path, folder / "pupil", "cpu")
    return [json.loads(line) for line in (folder / "pupil/log.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_pupil_comes_nearer_to_its_teacher(tmp_path: Path, lesson: dict[str, Any]) -> None:
    losses = [record["imitation"] for record in learnt(tmp_path, lesson)]
    assert min(losses[-3:]) < 0.8 * losses[0]
    assert read_config_file(tmp_path / "pupil/checkpoint").encoder.name == LOG_MEL


def test_a_teacher_that_does_not_fit_is_refused(tmp_path: Path, lesson: dict[str, Any]) -> None:
    train = lesson["train"]
    for name in ("teacher", "teacher_frames"):
        with pytest.raises(RecipeError, match="go together; give all or none"):
            learnt(tmp_path, lesson | {"train": {key: value for key, value in train.items() if key != name}})
    projector = {"hidden_size": 24, "strides": [4, 4], "kernels": [7, 5]}
    with pytest.raises(CheckpointError, match=r"makes 1\d\.\d audio tokens a second, this model 6\.2"):
        learnt(tmp_path, lesson | {"model": lesson["model"] | {"projector": projector}})
    with pytest.raises(DataError, match="no frames there"):
        learnt(tmp_path, lesson | {"train": train | {"teacher_frames": "nowhere"}})
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        learnt(tmp_path, lesson | {"train": train | {"teacher": "nowhere"}})
