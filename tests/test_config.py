"""The one description of a model: what is possible, and config.json."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from diffusion_gemma_asr.checkpoint.config_file import read_config_file, write_config
from diffusion_gemma_asr.errors import CheckpointError, RecipeError
from diffusion_gemma_asr.model.config import BackboneConfig, EncoderConfig, LoraConfig, ModelConfig, ProjectorConfig
from diffusion_gemma_asr.strict import from_mapping

ENCODER, BACKBONE = EncoderConfig("encoder", None, 192, 80), BackboneConfig("backbone", None, 192, 6144, 4)


@pytest.mark.parametrize(
    ("section", "content", "message"),
    [
        (ModelConfig, {"languages": []}, "'languages' must be a list of at least one"),
        (ModelConfig, {"start": "draft", "ctc": False}, "without CTC there is no draft"),
        (ModelConfig, {"start": "middle"}, "'start' must be one of noise, draft, ctc"),
        (ModelConfig, {"dtype": "int8"}, "'dtype' must be one of float32, bfloat16, float16"),
        (ModelConfig, {"canvas_share": 0.0}, "'canvas_share' must be above 0 and at most 1"),
        (ModelConfig, {"draft_conditioning": True}, "'draft_conditioning' wants 'canvas: aligned'"),
        (ModelConfig, {"causal_share": 0.1}, "'causal_share' wants 'draft_conditioning'"),
        (ModelConfig, {"causal_share": 1.1}, "'causal_share' must be from 0 to 1"),
        (ModelConfig, {"silent_drafts": True}, "'silent_drafts' wants 'draft_conditioning'"),
        (ModelConfig, {"drafts": True}, "unknown key 'drafts' at the top level"),
        (ProjectorConfig, {"hidden_size": 0}, "'projector.hidden_size' must be at least 1, found 0"),
        (ProjectorConfig, {"strides": [2, 0]}, "'projector.strides' must be at least 1 each"),
        (ProjectorConfig, {"strides": []}, "'projector.strides' must be a list of at least one"),
        (ProjectorConfig, {"kernels": [7, 0]}, "'projector.kernels' must be at least 1 each"),
        (ProjectorConfig, {"kernels": [16]}, "'projector.kernels' must be 2 numbers, one for each stride"),
        (ProjectorConfig, {"decoder_layers": -1}, "'projector.decoder_layers' must be at least 0"),
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
                    ProjectorConfig(8, (8,), False, (16,), 0.9, 2, 0.1, True), LoraConfig(2, 3, 0.5, True),
                     ("hi", "zh"), True, True, True, "aligned", True, True, 0.5, 0.2, "draft", 8, "bfloat16"),
    ]  # fmt: skip
    for config in configs:
        write_config(config, tmp_path)
        assert read_config_file(tmp_path) == config
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["format"] == 2 and content["model_type"] == "diffusion_gemma_asr"


def test_configs_of_other_versions_are_refused(tmp_path: Path) -> None:
    write_config(ModelConfig("plain", ENCODER, BACKBONE), tmp_path)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    older = content["projector"] | {"layers": 0, "layer_width": 384, "layer_stride": 1, "rotary": False}
    path.write_text(json.dumps(content | {"drafter": None, "projector": older}))  # as version 0.2.0 wrote it
    assert read_config_file(tmp_path) == ModelConfig("plain", ENCODER, BACKBONE)
    path.write_text(json.dumps(content | {"projector": older | {"layers": 6}}))
    with pytest.raises(CheckpointError, match="projector has layers of a kind that was given up"):
        read_config_file(tmp_path)
    path.write_text(json.dumps(content | {"drafter": {"kind": "beam", "ngram": "ngram.npz"}}))
    with pytest.raises(CheckpointError, match="searched with language models beside"):
        read_config_file(tmp_path)
    for number in (1, 3):
        path.write_text(json.dumps(content | {"format": number}))
        with pytest.raises(CheckpointError, match=f"has format {number} of version .*use the version that wrote it"):
            read_config_file(tmp_path)
