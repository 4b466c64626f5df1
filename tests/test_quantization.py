"""Packed experts: shared between the stacks, small, close to the original; a missing library is named."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_shard import changed, write_recipe
from tiny_model import lively_lora, tiny_backbone
from torch import Tensor, nn

from diffusion_gemma_asr.checkpoint import quantization
from diffusion_gemma_asr.checkpoint.parts import load_backbone
from diffusion_gemma_asr.checkpoint.quantization import QUANTIZATIONS, Quantizer, find_quantizer, quantize_experts
from diffusion_gemma_asr.errors import CheckpointError
from diffusion_gemma_asr.model.backbone import Backbone
from diffusion_gemma_asr.model.config import BackboneConfig
from diffusion_gemma_asr.train.adapter import build_model
from diffusion_gemma_asr.train.recipe import load_recipe
from diffusion_gemma_asr.train.run import train_from_recipe


class Halves(nn.Module):
    """Unpacks what `halve` packed: a quantizer that needs no library."""

    def forward(self, packed: Tensor) -> Tensor:
        return packed.float()


def halve(weight: Tensor) -> tuple[Tensor, nn.Module]:
    return weight.half(), Halves()


def logits(backbone: Backbone) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(backbone.vocab_size, (2, 6), generator=generator)
    canvas = torch.randint(backbone.vocab_size, (2, 8), generator=generator)
    with torch.no_grad():
        prefill, _ = backbone.prefill(backbone.embed(ids), torch.ones_like(ids, dtype=torch.bool))
        return backbone.denoise_logits(canvas, prefill)


def test_only_the_experts_are_packed_and_the_stacks_share_them(backbone_folder: Path) -> None:
    backbone = tiny_backbone(backbone_folder)
    before = logits(backbone)
    quantize_experts(backbone.model, Quantizer("halves", halve), "cpu")
    assert torch.allclose(logits(backbone), before, atol=0.05)
    assert not torch.equal(logits(backbone), before)
    parameters = dict(backbone.model.named_parameters(remove_duplicate=False))
    packed = [name for name, parameter in parameters.items() if parameter.dtype == torch.half]
    assert len(packed) == 2 * 2 * backbone.config.num_hidden_layers  # two stacks, two matrices a layer
    assert all(".experts." in name for name in packed)
    for name in packed:
        if ".decoder." in name:
            assert parameters[name] is parameters[name.replace(".decoder.", ".encoder.language_model.")]


def test_lora_trains_on_packed_experts(backbone_folder: Path) -> None:
    backbone = tiny_backbone(backbone_folder)
    quantize_experts(backbone.model, Quantizer("halves", halve), "cpu")
    backbone.add_lora(rank=2)
    ids = torch.arange(8)[None]
    prefill, _ = backbone.prefill(backbone.embed(ids), torch.ones_like(ids, dtype=torch.bool))
    backbone.denoise_logits(ids, prefill).sum().backward()
    gradients = [parameter.grad for name, parameter in backbone.named_parameters() if "lora_B" in name]
    assert gradients and any(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)


def lora_gradients(backbone: Backbone) -> tuple[dict[str, Tensor], int]:
    """Gradients of LoRA, and how many of the tensors that the backward pass holds are as large as a layer's experts."""
    large = min(p.numel() for experts in backbone.experts for p in experts.parameters())
    held: set[int] = set()

    def keep(saved: Tensor) -> Tensor:
        held.update([saved.untyped_storage().data_ptr()] if saved.numel() >= large else [])
        return saved

    ids = torch.arange(8)[None]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        prefill, _ = backbone.prefill(backbone.embed(ids), torch.ones_like(ids, dtype=torch.bool))
        loss = backbone.denoise_logits(ids, prefill).square().mean()
    loss.backward()
    return {name: p.grad for name, p in backbone.named_parameters() if p.grad is not None}, len(held)


def test_the_backward_pass_unpacks_a_layer_at_a_time(backbone_folder: Path) -> None:
    """The head's weight is as large as a layer's experts, and held either way."""
    results = []
    for recompute in (False, True):
        backbone = tiny_backbone(backbone_folder)
        quantize_experts(backbone.model, Quantizer("halves", halve), "cpu")
        backbone.add_lora(rank=2)
        lively_lora(backbone)
        if recompute:
            backbone.recompute_experts()
        results.append(lora_gradients(backbone))
    (plain, all_layers), (anew, few) = results
    assert plain.keys() == anew.keys() and len(plain) > 40
    assert all(torch.equal(anew[name], gradient) for name, gradient in plain.items())
    layers = backbone.config.num_hidden_layers
    assert all_layers >= 2 * 2 * layers - 2  # two stacks, two matrices; nothing asks for the last output of the encoder
    assert few <= all_layers - (2 * 2 * layers - 2)


@pytest.mark.parametrize(("name", "error_bound", "bound_of_logits"), [("4", 0.12, 0.6), ("8", 0.02, 0.2)])
@pytest.mark.parametrize("library", ["bitsandbytes", "torchao"])
def test_packing_loses_little(
    backbone_folder: Path, library: str, name: str, error_bound: float, bound_of_logits: float
) -> None:
    pytest.importorskip(library)
    quantizer = find_quantizer(next(q for q in QUANTIZATIONS if q[0] == library[0] and name in q))
    weight = torch.randn(4, 64, 96, generator=torch.Generator().manual_seed(0))
    packed, unpack = quantizer.pack(weight)
    assert packed.dtype == torch.uint8 and packed.numel() == weight.numel() * int(name) // 8
    error = (unpack(packed) - weight).pow(2).mean() / weight.pow(2).mean()
    assert error.sqrt() < error_bound
    backbone = tiny_backbone(backbone_folder)
    before = logits(backbone)
    quantize_experts(backbone.model, quantizer, "cpu")
    after = logits(backbone)
    assert ((after - before).pow(2).mean() / before.var()).sqrt() < bound_of_logits


@pytest.mark.parametrize("name", ["bnb-4bit", "torchao-int8"])
def test_a_backbone_loads_packed_and_takes_lora_and_its_merge(backbone_folder: Path, name: str) -> None:
    pytest.importorskip("bitsandbytes" if name.startswith("bnb") else "torchao")
    backbone = load_backbone(BackboneConfig(str(backbone_folder)), quantization=name)
    assert not backbone.training
    assert torch.uint8 in {parameter.dtype for parameter in backbone.parameters()}
    backbone.add_lora(rank=2)
    for matrix in backbone.lora_state_dict().values():
        torch.nn.init.normal_(matrix, std=0.2)
    before = logits(backbone)
    backbone.merge_lora()
    assert torch.allclose(logits(backbone), before, atol=1e-3)


def test_a_recipe_trains_beside_packed_experts(
    backbone_folder: Path, whisper_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(quantization._PACKERS, "bnb-4bit", ("torch", "torch", lambda _, weight, bits: halve(weight), 4))
    recipe = changed(write_recipe(tmp_path, whisper_folder, backbone_folder), shard=None, quantization="bnb-4bit")
    assert torch.half in {
        p.dtype for experts in build_model(load_recipe(recipe)).backbone.experts for p in experts.parameters()
    }
    checkpoint = train_from_recipe(recipe, tmp_path / "run", "cpu")
    matrices = {name: m for name, m in load_file(checkpoint / "adapter.safetensors").items() if "lora_B" in name}
    assert matrices and all(bool(m.any()) for m in matrices.values())  # all began as zeros
    assert not any("experts" in name for name in load_file(checkpoint / "adapter.safetensors"))
    with pytest.raises(CheckpointError, match=r"other settings .*train\.quantization was bnb-4bit, is absent"):
        train_from_recipe(changed(recipe, quantization=None), tmp_path / "run", "cpu")


@pytest.mark.parametrize("name", [name for name in QUANTIZATIONS if name != "fp8"])
def test_a_missing_library_is_named_with_its_remedy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    library = "bitsandbytes" if name.startswith("bnb") else "torchao"
    for module in [key for key in sys.modules if key.split(".")[0] == library]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, library, None)
    remedy = r"pip install 'diffusion-gemma-asr\[quantization\]'"
    with pytest.raises(CheckpointError, match=rf"'{name}' needs {library}.*{remedy}"):
        find_quantizer(name)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(CheckpointError, match="'int3' is unknown; choose one of bnb-4bit, bnb-8bit, "):
        find_quantizer("int3")


def test_torchao_refuses_rows_that_groups_do_not_divide() -> None:
    pytest.importorskip("torchao")
    with pytest.raises(CheckpointError, match="groups of 32 weights, but an expert has rows of 40"):
        find_quantizer("torchao-int4").pack(torch.zeros(2, 8, 40))
