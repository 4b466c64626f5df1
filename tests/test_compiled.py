"""train/compiled.py: the layers that are compiled for training compute what the others do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import speech_batch, tiny_backbone, tiny_model

from diffusion_gemma_asr.train.compiled import Compiler, compile_layers
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
