"""app/memory.py: the estimate is what the model really holds, and loading keeps to its bound."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_shard import write_recipe
from tiny_model import tiny_model

from diffusion_gemma_asr.app import memory
from diffusion_gemma_asr.app.memory import Estimate, Load, loads, render_memory
from diffusion_gemma_asr.train.losses import cross_entropy
from diffusion_gemma_asr.train.mini.backbone_config import BackboneShape
from diffusion_gemma_asr.train.recipe import load_recipe

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
LOAD = Load(3, 40, 24)


@pytest.fixture(scope="module")
def estimate(backbone_folder: Path, whisper_folder: Path) -> Estimate:
    return Estimate(tiny.model_config(whisper_folder, backbone_folder))


def test_weights_are_those_of_the_model(estimate: Estimate, backbone_folder: Path, whisper_folder: Path) -> None:
    model = tiny_model(whisper_folder, backbone_folder, lora=False)
    experts = {id(p): p.numel() for layer in model.backbone.experts for p in layer.parameters()}
    assert estimate.experts == sum(experts.values())
    assert estimate.layer * len(model.backbone.experts) == estimate.experts
    assert estimate.others + estimate.experts == sum(p.numel() for p in model.backbone.parameters())
    frozen = estimate.need("training", "bfloat16", LOAD).frozen
    encoder = sum(p.numel() for p in model.encoder.parameters())
    assert frozen == 2 * (encoder + sum(p.numel() for p in model.backbone.parameters()))
    model.backbone.add_lora(4)
    unmerged = sum(p.numel() for name, p in model.backbone.named_parameters() if "lora_" not in name)
    model.backbone.merge_lora()
    assert estimate.attention == sum(p.numel() for p in model.backbone.parameters()) - unmerged


def test_packed_and_shared_experts_take_less(estimate: Estimate) -> None:
    whole, four = (estimate.need("training", packing, LOAD) for packing in ("bfloat16", "bnb-4bit"))
    assert whole.frozen - four.frozen == pytest.approx(estimate.experts * (2 - 0.5 - 4 / 64), abs=2)
    assert whole.trained == four.trained == 16 * estimate.trained
    shared = estimate.need("training", "bfloat16", LOAD, workers=4)
    assert whole.frozen - shared.frozen == 2 * estimate.experts * 3 // 4
    assert shared.passes == whole.passes + 4 * estimate.layer


def test_passes_are_what_tensors_with_content_take(estimate: Estimate, backbone_folder: Path, whisper_folder: Path) -> None:
    """The same step on the model itself, all of whose tensors the autograd graph holds."""
    backbone = tiny_model(whisper_folder, backbone_folder).backbone.bfloat16()
    for name, p in backbone.named_parameters():
        p.requires_grad_("lora_" in name)
        p.data = p.data.float() if "lora_" in name else p.data
    held: dict[int, tuple[int, Any]] = {p.untyped_storage().data_ptr(): (0, None) for p in backbone.parameters()}

    def keep(saved: torch.Tensor) -> torch.Tensor:
        storage = saved.untyped_storage()
        held.setdefault(storage.data_ptr(), (storage.nbytes(), storage))
        return saved

    embeds = torch.randn(LOAD.batch, LOAD.prompt, backbone.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    canvas = torch.randint(backbone.vocab_size, (LOAD.batch, LOAD.canvas))
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved),
        torch.autocast("cpu", torch.bfloat16),
    ):
        prefill, hidden = backbone.prefill(embeds, torch.ones(LOAD.batch, LOAD.prompt, dtype=torch.bool))
        with torch.no_grad():
            signal = backbone.denoise_logits(canvas, prefill)
        losses = [cross_entropy(backbone.head, backbone.denoise_hidden(canvas, prefill, signal), canvas)[0]]
        losses.append(cross_entropy(backbone.head, hidden[:, -LOAD.canvas :], canvas)[0])
    saved = sum(size for size, _ in held.values())
    passes = estimate.passes(LOAD, training=True, packed=False)
    assert saved < passes < 1.3 * saved  # gradients, and what a layer needs for itself
    assert estimate.passes(LOAD._replace(batch=6), training=True, packed=False) > 1.8 * passes
    assert estimate.passes(LOAD, training=True, packed=True) < passes


def test_the_command_says_what_is_fetched(tmp_path: Path, backbone_folder: Path, whisper_folder: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, whisper_folder, backbone_folder))
    text = render_memory(recipe)
    assert "inference, bnb-4bit" in text and "training, bfloat16, experts shared by 8" in text
    assert f"{backbone_folder}: a folder here, " in text
    small = load_recipe("small").model
    assert memory.downloads(small) == [
        "openai/whisper-small: to be fetched, at least 1.0 GB (float32)",
        "google/diffusiongemma-26B-A4B-it: to be fetched, at least 51.6 GB (bfloat16)",
    ]
    bounded = replace(recipe, train=replace(recipe.train, batch_size=8, batch_frames=4500))
    assert loads(bounded, 32)["training"].batch == 3  # of 30 s
    assert loads(recipe, 32)["inference"] == Load(16, 20 + 188, 32)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak from Linux's /proc")
def test_loading_holds_little_more_than_the_checkpoint(tmp_path: Path) -> None:
    import loading
    from transformers import WhisperConfig

    shape = BackboneShape(
        hidden=256, layers=6, heads=8, head_dim=16, intermediate=256, experts=48, top_k=2, expert_intermediate=256
    )
    whisper = WhisperConfig(d_model=64, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=64)
    size = loading.write_checkpoint(tmp_path / "random", shape, whisper, "20MB")
    assert size > 60e6 and len(list((tmp_path / "random/backbone").glob("*.safetensors"))) > 3
    taken = loading.measure_apart(tmp_path / "random")
    assert 0.8 * size < taken["peak"] <= loading.BOUND * size  # all was read, and nothing was copied
