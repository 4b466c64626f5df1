"""train/compiled.py: the layers that are compiled for training compute what the others do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import speech_batch, tiny_backbone, tiny_model

from diffusion_gemma_asr.model.config import ProjectorConfig
from diffusion_gemma_asr.model.projector import AudioProjector
from diffusion_gemma_asr.train.compiled import Compiler, compile_layers, compile_projector
from diffusion_gemma_asr.train.objective import backbone_losses
from diffusion_gemma_asr.train.recipe import LossRecipe


def plain(function: Any) -> Any:
    return function


@pytest.mark.parametrize("compiler", [plain, pytest.param(None, marks=pytest.mark.slow)])
def test_losses_and_gradients_are_the_same(whisper_folder: Path, backbone_folder: Path, compiler: Compiler | None) -> None:
    batches = [
        speech_batch(tiny_model(whisper_folder, backbone_folder), texts, frames).text
        for texts, frames in ((["the quick fox", "she sells"], [150, 90]), (["by the sea", "it", "lazy dog"], [80, 60, 70]))
    ]
    options = LossRecipe(ctc=0.0, self_conditioning=1.0, unroll=0.5)
    found = []
    for compiled in (False, True):
        backbone = tiny_backbone(backbone_folder).requires_grad_(True)
        if compiled:
            compile_layers(backbone, compiler)
        values = []
        for seed, batch in enumerate(batches):
            torch.manual_seed(seed)
            generator = torch.Generator().manual_seed(seed)
            parts = backbone_losses(backbone, backbone.embed(batch.ids), batch, options, None, generator)
            parts.total(options).backward()
            values.append(parts.figures())
        found.append((values, {name: p.grad for name, p in backbone.named_parameters() if p.grad is not None}))
    (expected, gradients), (got, others) = found
    for one, other in zip(expected, got, strict=True):
        assert one == pytest.approx(other, abs=1e-4)
    assert gradients.keys() == others.keys() and len(gradients) > 40
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, atol=1e-4, rtol=1e-2, msg=name)


@pytest.mark.parametrize("compiler", [plain, pytest.param(None, marks=pytest.mark.slow)])
def test_a_projector_writes_the_same(compiler: Compiler | None) -> None:
    torch.manual_seed(0)
    projector = AudioProjector(ProjectorConfig(layers=2, layer_width=64, rotary=True), 16, 24)
    torch.nn.init.normal_(projector.deep.out_proj.weight)
    inputs = [(torch.randn(2, size, 16), torch.tensor([size, size // 2])) for size in (64, 96, 40)]
    expected = [projector(*given)[0] for given in inputs]
    sum(slots.sum() for slots in expected).backward()
    gradients = {name: p.grad.clone() for name, p in projector.named_parameters()}
    projector.zero_grad()
    compile_projector(projector, compiler)
    got = [projector(*given)[0] for given in inputs]
    sum(slots.sum() for slots in got).backward()
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    for name, parameter in projector.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-3, rtol=1e-3, msg=name)


def test_a_projector_without_layers_is_left_as_it_is() -> None:
    projector = AudioProjector(ProjectorConfig(), 16, 24)
    compile_projector(projector)
    assert projector(torch.randn(1, 64, 16), torch.tensor([64]))[0].shape == (1, 8, 24)


def test_a_prompt_beyond_the_window_is_refused(backbone_folder: Path) -> None:
    backbone = tiny_backbone(backbone_folder)
    compile_layers(backbone, plain)
    size = backbone.config.sliding_window
    with pytest.raises(ValueError, match=f"the backbone's window is {size}"):
        backbone.prefill(torch.zeros(1, size, backbone.hidden_size), torch.ones(1, size, dtype=torch.bool))
