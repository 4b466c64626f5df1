"""One LoRA for both stacks: saved once, learning from both, and merged without untying their weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from tiny_model import RANK, lively_lora, tiny_backbone
from torch import Tensor

from diffusion_gemma_asr.app.info import count_parts
from diffusion_gemma_asr.checkpoint.load import load_checkpoint
from diffusion_gemma_asr.checkpoint.save import save_checkpoint
from diffusion_gemma_asr.errors import CheckpointError
from diffusion_gemma_asr.model.backbone import Backbone
from diffusion_gemma_asr.model.config import LoraConfig
from diffusion_gemma_asr.model.prefill import FilledCache, Prefill

ENCODER, DECODER = "encoder.language_model", "decoder"  # how the stacks' parameters are called
PER_STACK = 2 * (4 * 4 + 2 * 3)  # two matrices; four sliding layers with q, k, v, o, two full ones without v


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(tiny.VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(seed))


def read(backbone: Backbone) -> tuple[Prefill, Tensor]:
    ids = draw(2, 8)
    return backbone.prefill(backbone.embed(ids), torch.ones_like(ids, dtype=torch.bool))


@torch.no_grad()
def outputs(backbone: Backbone) -> tuple[Tensor, Tensor]:
    """The encoder's hidden states, and the decoder's logits."""
    prefill, hidden = read(backbone)
    return hidden, backbone.denoise_logits(draw(2, 7, seed=9), prefill)


@pytest.fixture
def sharing(backbone_folder: Path) -> Backbone:
    model = tiny_backbone(backbone_folder)
    model.add_lora(RANK, 2 * RANK, shared=True)
    lively_lora(model)
    return model


def test_it_is_one_set_of_matrices_that_both_stacks_read(sharing: Backbone, backbone_folder: Path) -> None:
    state = sharing.lora_state_dict()
    assert len(state) == PER_STACK and all(ENCODER in name for name in state)
    separate = tiny_backbone(backbone_folder)  # LoRA for each, of the same numbers
    separate.add_lora(RANK, 2 * RANK)
    separate.load_lora_state_dict(state | {name.replace(ENCODER, DECODER): value for name, value in state.items()})
    torch.testing.assert_close(outputs(sharing), outputs(separate), atol=0, rtol=0)


def test_it_learns_from_both_stacks(sharing: Backbone) -> None:
    def gradients(of_encoder: bool, of_decoder: bool) -> list[Tensor]:
        sharing.zero_grad()
        prefill, hidden = read(sharing)
        cut = FilledCache([(keys.detach(), values.detach()) for keys, values in prefill.layers()])
        seen = sharing.denoise_hidden(draw(2, 7, seed=9), Prefill(cut, prefill.visible, prefill.lengths))
        (of_encoder * hidden.pow(3).sum() + of_decoder * seen.pow(3).sum()).backward()
        return [p.grad.clone() for p in sharing.parameters() if p.requires_grad and p.grad is not None]

    encoder, decoder, both = gradients(True, False), gradients(False, True), gradients(True, True)
    assert len(both) == PER_STACK
    assert max(float(g.abs().max()) for g in encoder) > 0.01 < max(float(g.abs().max()) for g in decoder)
    torch.testing.assert_close(both, [a + b for a, b in zip(encoder, decoder, strict=True)], atol=1e-3, rtol=1e-3)


def test_merged_it_gives_the_same_and_keeps_the_stacks_tied(sharing: Backbone) -> None:
    hidden, logits = outputs(sharing)
    sharing.merge_lora()
    merged_hidden, merged_logits = outputs(sharing)
    torch.testing.assert_close(merged_hidden, hidden, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(merged_logits, logits, atol=1e-4, rtol=1e-5)
    parameters = dict(sharing.model.named_parameters(remove_duplicate=False))
    ours = [name for name in parameters if f"{ENCODER}.layers" in name]
    assert ours and all(parameters[name] is parameters[name.replace(ENCODER, DECODER)] for name in ours)


def test_shared_and_separate_are_not_taken_for_each_other(sharing: Backbone, backbone_folder: Path) -> None:
    separate = tiny_backbone(backbone_folder)
    separate.add_lora(RANK, 2 * RANK)
    for one, other in ((sharing, separate), (separate, sharing)):
        with pytest.raises(CheckpointError, match=f"the LoRA matrices do not fit this backbone: {PER_STACK} names differ"):
            one.load_lora_state_dict(other.lora_state_dict())


def test_a_checkpoint_holds_it_once_and_loads(whisper_folder: Path, backbone_folder: Path, tmp_path: Path) -> None:
    config = tiny.model_config(whisper_folder, backbone_folder, lora=LoraConfig(4, 8, shared=True))
    model = tiny.build_model(config)
    folder = save_checkpoint(model, tmp_path / "checkpoint")
    assert sum("lora_" in name for name in load_file(folder / "adapter.safetensors")) == PER_STACK
    assert "shared by both stacks" in (folder / "README.md").read_text()
    for merge in (True, False):
        loaded = load_checkpoint(folder, device="cpu", merge_lora=merge)
        torch.testing.assert_close(outputs(loaded.backbone), outputs(model.backbone), atol=1e-4, rtol=1e-4)
    trained = sum(matrix.numel() for name, matrix in model.trained().items() if "lora_" in name)
    assert (
        count_parts(config)[3].parameters
        == trained
        == count_parts(tiny.model_config(whisper_folder, backbone_folder))[3].parameters / 2
    )
