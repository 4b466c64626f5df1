"""The parameter counts of the real compositions, built on the meta device, against the published figures."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import tiny

from diffusion_gemma_asr.app.cli import main
from diffusion_gemma_asr.app.info import render
from diffusion_gemma_asr.app.parts import count_parts
from diffusion_gemma_asr.errors import CheckpointError
from diffusion_gemma_asr.model.config import EncoderConfig
from diffusion_gemma_asr.train.recipe import load_recipe


def test_small_trains_42_million_parameters_of_26_billion() -> None:
    encoder, backbone, projector, lora = count_parts(load_recipe("small").model)
    assert encoder.parameters == pytest.approx(88e6, rel=0.01)
    assert backbone.parameters == pytest.approx(25.8e9, rel=0.01)
    assert lora.parameters == 22_978_560  # rank 16 on q, k, v, o of both stacks
    convolutions = (768 * 7 + 1) * 1280 + (1280 * 5 + 1) * 1280
    assert projector.parameters == convolutions + (1280 + 1) * 2816
    assert projector.parameters == pytest.approx(19e6, abs=1e6)
    trained = projector.parameters + lora.parameters
    assert trained == pytest.approx(42e6, abs=0.5e6)
    assert f"{trained / 26e9:.2%}" == "0.16%"
    assert [part.trained for part in (encoder, backbone, projector, lora)] == [False, False, True, True]


def test_large_v3_differs_in_the_encoder_and_the_projectors_input() -> None:
    small, large = count_parts(load_recipe("small").model), count_parts(load_recipe("large-v3").model)
    assert large[0].parameters == pytest.approx(637e6, rel=0.01)
    assert large[1].parameters == small[1].parameters
    assert large[2].parameters - small[2].parameters == (1280 - 768) * 7 * 1280
    assert large[3].parameters == small[3].parameters


def test_the_command_prints_every_part_with_its_count_and_share(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["info", "--recipe", "small"])
    lines = capsys.readouterr().out.splitlines()
    assert not left.value.code
    assert lines[0] == "recipe small"
    assert re.search(r"LoRA +22,978,560 +0\.09% +trained +rank 16", "\n".join(lines))
    assert re.search(r"^trained +41,661,696 +0\.16%$", lines[-1])
    assert not any(line.endswith(" ") for line in lines)


def test_counts_are_those_of_the_model_that_is_built(backbone_folder: Path, whisper_folder: Path) -> None:
    config = tiny.model_config(whisper_folder, backbone_folder)
    encoder, backbone, projector, lora = count_parts(config)
    model = tiny.build_model(config)
    assert projector.parameters + lora.parameters == sum(p.numel() for p in model.trained().values())
    assert encoder.parameters == sum(p.numel() for p in model.encoder.parameters())
    assert backbone.parameters + lora.parameters == sum(p.numel() for p in model.backbone.parameters())
    assert str(backbone_folder) in render(config)


def test_parts_of_another_kind_or_that_are_not_there(backbone_folder: Path, whisper_folder: Path) -> None:
    config = tiny.model_config(whisper_folder, backbone_folder)
    wrong = replace(config, backbone=replace(config.backbone, name=str(whisper_folder)))
    with pytest.raises(CheckpointError, match="is a whisper; the backbone must be a DiffusionGemma"):
        count_parts(wrong)
    wrong = replace(config, encoder=EncoderConfig(str(backbone_folder)))
    with pytest.raises(CheckpointError, match="the encoder must be a Whisper"):
        count_parts(wrong)
    wrong = replace(config, encoder=EncoderConfig("./not-there"))
    with pytest.raises(CheckpointError, match="not-there: no such folder"):
        count_parts(wrong)
