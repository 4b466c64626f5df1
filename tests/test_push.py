"""Checkpoints onto a hub: every file that loading opens goes along, and nothing that nobody else has is needed."""

from __future__ import annotations

import fnmatch
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import tiny
from tiny_model import bundled_model, clips

from diffusion_gemma_asr.checkpoint.load import BUNDLED, find_checkpoint, load_checkpoint
from diffusion_gemma_asr.checkpoint.save import checkpoint_files, push_to_hub, save_checkpoint
from diffusion_gemma_asr.denoise.decode import decode_clips
from diffusion_gemma_asr.denoise.options import DecodeOptions
from diffusion_gemma_asr.errors import CheckpointError
from diffusion_gemma_asr.model.config import BackboneConfig, EncoderConfig
from diffusion_gemma_asr.model.model import DiffusionGemmaASR


@pytest.fixture(scope="module")
def model(whisper_folder: Path, backbone_folder: Path) -> DiffusionGemmaASR:
    return tiny.build_model(tiny.model_config(whisper_folder, backbone_folder))


def saved(model: DiffusionGemmaASR, folder: Path, encoder: str, backbone: str) -> Path:
    """A checkpoint of the model that names other frozen parts."""
    config = replace(model.config, encoder=EncoderConfig(encoder), backbone=BackboneConfig(backbone))
    other = DiffusionGemmaASR(config, model.encoder, model.projector, model.backbone, model.tokenizer)
    return save_checkpoint(other, folder)


@pytest.fixture
def bundle(model: DiffusionGemmaASR, tmp_path: Path) -> Path:
    """A checkpoint with its frozen parts inside."""
    folder = tmp_path / "bundle"
    shutil.copytree(model.config.encoder.name, folder / "encoder")
    shutil.copytree(model.config.backbone.name, folder / "backbone")
    return saved(model, folder, str(folder / "encoder"), str(folder / "backbone"))


def change(folder: Path, **content: Any) -> None:
    """Writes keys of config.json anew."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | content))


def copied(folder: Path, target: Path) -> Path:
    """A copy of the files alone that pushing would upload."""
    patterns = checkpoint_files(folder)
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if any(fnmatch.fnmatch(name, pattern) for pattern in patterns):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / name)
    return target


@pytest.mark.parametrize("name", BUNDLED)
def test_a_bundled_model_loads_from_the_files_that_pushing_uploads(tmp_path: Path, name: str) -> None:
    folder = find_checkpoint(name)
    audio, options = clips([30_000, 16_000]), DecodeOptions(language="en")
    texts = []
    for source in (folder, copied(folder, tmp_path / "copy")):
        loaded = bundled_model(name, tmp_path / "whisper", source)
        texts.append([decoded.text for decoded in decode_clips(loaded, audio, options)])
    assert texts[0] == texts[1]


def test_folders_inside_go_along_and_those_outside_are_refused(
    bundle: Path, tmp_path: Path, model: DiffusionGemmaASR
) -> None:
    assert checkpoint_files(bundle)[4:] == ["encoder/*", "backbone/*"]
    config = json.loads((bundle / "config.json").read_text())
    change(bundle, encoder=config["encoder"] | {"name": "./encoder"})
    assert checkpoint_files(bundle)[4:] == ["encoder/*", "backbone/*"]
    (bundle / "encoder").rename(tmp_path / "encoder")
    for name in ("../encoder", str(tmp_path / "encoder")):
        change(bundle, encoder=config["encoder"] | {"name": name})
        load_checkpoint(bundle, device="cpu")
        with pytest.raises(CheckpointError, match=f"names the local folder {name}, which nobody else has"):
            checkpoint_files(bundle)
    search = {"kind": "beam", "ngram": "../ngram.npz", "weight": 0.5, "bonus": 1.0}
    change(bundle, encoder=config["encoder"] | {"name": "o/w"}, drafter=search)
    with pytest.raises(CheckpointError, match=r"needs \.\./ngram\.npz, which lies outside it"):
        checkpoint_files(bundle)


def test_pushing_uploads_the_checkpoints_files(
    tmp_path: Path, model: DiffusionGemmaASR, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads: list[dict[str, Any]] = []

    class Commit:
        commit_url = "https://hub/commit/1"

    def create_repo(hub: object, repository: str, **options: object) -> None:
        if repository == "not/mine":
            raise OSError("403 Forbidden\nmore")

    def upload_folder(hub: object, **options: object) -> Commit:
        uploads.append(options)
        return Commit()

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    with pytest.raises(CheckpointError, match=r"names the local folder .*, which nobody else has"):
        push_to_hub(save_checkpoint(model, tmp_path / "local"), "me/asr")
    folder = saved(model, tmp_path / "published", "o/w", "g/d")
    assert push_to_hub(folder, "me/asr") == "https://hub/commit/1"
    names = ["README.md", "adapter.safetensors", "config.json", "preprocessor_config.json"]
    assert sorted(uploads[0]["allow_patterns"]) == names and len(uploads) == 1
    with pytest.raises(CheckpointError, match=r"cannot upload to not/mine: 403 Forbidden$"):
        push_to_hub(folder, "not/mine")
