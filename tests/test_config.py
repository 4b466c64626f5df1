"""The one description of a model: what is possible, and config.json of this format and the one before."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny_model import clips

from diffusion_gemma_asr.checkpoint.config_file import read_config_file, upgraded, write_config
from diffusion_gemma_asr.checkpoint.load import load_checkpoint
from diffusion_gemma_asr.checkpoint.save import save_checkpoint, with_shapes
from diffusion_gemma_asr.drafts import read_search_config
from diffusion_gemma_asr.errors import CheckpointError, RecipeError
from diffusion_gemma_asr.model.config import BackboneConfig, EncoderConfig, LoraConfig, ModelConfig, ProjectorConfig
from diffusion_gemma_asr.strict import from_mapping

ENCODER, BACKBONE = EncoderConfig("encoder", None, 192, 80), BackboneConfig("backbone", None, 192, 6144, 4)


@pytest.mark.parametrize(
    ("section", "content", "message"),
    [
        (ModelConfig, {"languages": []}, "'languages' must be a list of at least one"),
        (ModelConfig, {"start": "draft", "ctc": False}, "without CTC there is no draft to start from"),
        (ModelConfig, {"start": "middle"}, "'start' must be one of noise, draft"),
        (ModelConfig, {"dtype": "int8"}, "'dtype' must be one of float32, bfloat16, float16"),
        (ModelConfig, {"drafts": True}, "unknown key 'drafts' at the top level"),
        (ProjectorConfig, {"hidden_size": 0}, "'projector.hidden_size' must be at least 1, found 0"),
        (ProjectorConfig, {"strides": [2, 0]}, "'projector.strides' must be at least 1 each"),
        (ProjectorConfig, {"strides": []}, "'projector.strides' must be a list of at least one"),
        (ProjectorConfig, {"kernels": [7, 0]}, "'projector.kernels' must be at least 1 each"),
        (ProjectorConfig, {"kernels": [16]}, "'projector.kernels' must be 2 numbers, one for each stride"),
        (ProjectorConfig, {"layer_width": 100}, "'projector.layer_width' must be a multiple of 64, found 100"),
        (ProjectorConfig, {"layers": -1}, "'projector.layers' must be at least 0"),
        (ProjectorConfig, {"layer_stride": 0}, "'projector.layer_stride' must be at least 1"),
        (LoraConfig, {"rank": 0}, "'lora.rank' must be at least 1"),
        (LoraConfig, {"alpha": 0}, "'lora.alpha' must be at least 1"),
        (LoraConfig, {"dropout": 1.0}, "'lora.dropout' must be at least 0 and below 1"),
    ],
)
def test_impossible_values_are_refused(section: type, content: dict[str, Any], message: str) -> None:
    parts = {"name": "x", "encoder": {"name": "e"}, "backbone": {"name": "b"}} if section is ModelConfig else {}
    from_mapping(section, parts)  # as it is it is possible
    with pytest.raises(RecipeError, match=message):
        from_mapping(section, parts | content)


def test_a_config_is_read_as_it_was_written(tmp_path: Path) -> None:
    configs = [
        ModelConfig("plain", ENCODER, BACKBONE),
        ModelConfig("other", replace(ENCODER, revision="v1", silence_s=0.5), BACKBONE,
                    ProjectorConfig(8, (8,), False, 2, 64, 2, True, (16,)), LoraConfig(2, 3, 0.5, True),
                    ("hi", "zh"), True, True, True, "aligned", "draft", "bfloat16", {"kind": "beam", "x": [1]}),
    ]  # fmt: skip
    for config in configs:
        write_config(config, tmp_path)
        assert read_config_file(tmp_path) == config
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["format"] == 2 and content["model_type"] == "diffusion_gemma_asr"


# -- the format before ------------------------------------------------------------------------------------------

# What version 0.1.0 wrote into the config.json of its three models
OLD = {
    "mini6": {
        "format": 1, "package_version": "0.1.0", "recipe": "mini6",
        "encoder": {"name": "encoder", "revision": None, "width": 192, "mel_bins": 80},
        "backbone": {"name": "backbone", "revision": None, "width": 192, "vocab_size": 6144, "layers": 4},
        "projector": {
            "kind": "convolutions", "hidden_size": 512, "strides": [2, 1], "scaled": True, "layers": 6,
            "layer_width": 384, "layer_stride": 2, "spelling_layers": 4, "spelling_width": 256,
        },
        "lora": {"rank": 16, "alpha": 32, "dropout": 0.0}, "languages": ["en", "de", "fr", "es", "hi", "zh"],
        "drafts": True, "dtype": "float32", "start": "draft", "finds_language": True, "reads_context": False,
        "draft_weight": 1.0,
        "lm": {
            "file": "ngram.npz", "weight": 0.7, "bonus": 2.5, "classes": "classes.npz",
            "recurrent": "recurrent.safetensors", "lexicon": "lexicon.npz",
        },
        "model_type": "diffusion_gemma_asr",
    },
    "mini": {
        "format": 1, "package_version": "0.1.0", "recipe": "mini",
        "encoder": {"name": "encoder", "revision": None, "width": 192, "mel_bins": 80},
        "backbone": {"name": "backbone", "revision": None, "width": 192, "vocab_size": 3072, "layers": 4},
        "projector": {"kind": "convolutions", "hidden_size": 384, "scaled": True},
        "lora": {"rank": 16, "alpha": 32, "dropout": 0.0}, "languages": ["en"], "drafts": True, "dtype": "float32",
        "start": "draft", "draft_weight": 1.0, "lm": {"file": "ngram.npz", "weight": 0.5, "bonus": 3.5},
        "model_type": "diffusion_gemma_asr",
    },
    "mini-whisper-base": {
        "format": 1, "package_version": "0.1.0", "recipe": "mini-whisper-base",
        "encoder": {"name": "openai/whisper-base", "revision": None, "width": 512, "mel_bins": 80},
        "backbone": {"name": "backbone", "revision": None, "width": 192, "vocab_size": 6144, "layers": 4},
        "projector": {
            "kind": "convolutions", "hidden_size": 512, "strides": [2, 2], "scaled": True, "layers": 0,
            "layer_width": 384, "layer_stride": 1,
        },
        "lora": {"rank": 16, "alpha": 32, "dropout": 0.0}, "languages": ["en", "de", "fr", "es", "hi", "zh"],
        "drafts": True, "dtype": "float32", "start": "draft", "finds_language": True, "reads_context": False,
        "draft_weight": 1.0, "lm": {"file": "../mini6/ngram.npz", "weight": 0.5, "bonus": 3.5},
        "model_type": "diffusion_gemma_asr",
    },
}  # fmt: skip
SIX = ("en", "de", "fr", "es", "hi", "zh")
LORA = LoraConfig(16, 32, 0.0)
NEW = {
    "mini6": ModelConfig(
        "mini6", EncoderConfig("encoder", None, 192, 80), BackboneConfig("backbone", None, 192, 6144, 4),
        ProjectorConfig(512, (2, 1), True, 6, 384, 2), LORA, SIX, finds_language=True, start="draft",
    ),
    "mini": ModelConfig(
        "mini", EncoderConfig("encoder", None, 192, 80), BackboneConfig("backbone", None, 192, 3072, 4),
        ProjectorConfig(384, (4, 2), True), LORA, ("en",), start="draft",
    ),
    "mini-whisper-base": ModelConfig(
        "mini-whisper-base", EncoderConfig("openai/whisper-base", None, 512, 80),
        BackboneConfig("backbone", None, 192, 6144, 4), ProjectorConfig(512, (2, 2), True), LORA, SIX,
        finds_language=True, start="draft",
    ),
}  # fmt: skip


def written(folder: Path, content: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("name", OLD)
def test_a_config_of_the_format_before_is_read(tmp_path: Path, name: str) -> None:
    config = read_config_file(written(tmp_path, OLD[name]))
    assert replace(config, drafter=None) == NEW[name]
    assert config.drafter is not None
    search = read_search_config(config.drafter)
    lm = OLD[name]["lm"]
    assert (search.ngram, search.weight, search.bonus) == (lm["file"], lm["weight"], lm["bonus"])  # type: ignore[index]
    assert search.kind == ("phonemes" if name == "mini6" else "beam")
    if name == "mini6":
        assert (search.lexicon, search.sentences) == ("lexicon.npz", "recurrent.safetensors")
        assert (search.layers, search.width) == (4, 256)


def test_a_checkpoint_of_the_format_before_loads(tmp_path: Path, whisper_folder: Path, backbone_folder: Path) -> None:
    model = tiny.build_model(tiny.model_config(whisper_folder, backbone_folder))
    folder = save_checkpoint(model, tmp_path / "checkpoint")
    content = json.loads((folder / "config.json").read_text())
    for key in ("name", "ctc", "drafter", "reads_context"):
        del content[key]
    content |= {"format": 1, "recipe": "tiny", "drafts": True, "draft_weight": 0.5, "lm": None}
    content["projector"] |= {"kind": "convolutions", "spelling_layers": 0, "spelling_width": 256}
    loaded = load_checkpoint(written(folder, content), device="cpu")
    assert loaded.config == with_shapes(model)
    audio = clips([16_000])
    assert torch.allclose(loaded.encode(audio).slots, model.encode(audio).slots, atol=1e-5)


def test_whether_there_is_ctc_was_called_drafts(tmp_path: Path) -> None:
    silent = OLD["mini"] | {"drafts": False, "start": "noise", "lm": {}}
    config = read_config_file(written(tmp_path, silent))
    assert config == replace(NEW["mini"], ctc=False, start="noise") and config.drafter is None


def test_parts_that_are_no_longer_there_are_named() -> None:
    with pytest.raises(CheckpointError, match="samples without an encoder"):
        upgraded({"recipe": "x", "drafts": True, "projector": {"kind": "waveform"}})
