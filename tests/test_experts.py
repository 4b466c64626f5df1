"""Experts: asking all of them gives what asking the chosen ones does, and 8-bit floats nearly the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_model import lively_lora, tiny_backbone
from torch import Tensor

from diffusion_gemma_asr.checkpoint.quantization import find_quantizer, quantize_experts
from diffusion_gemma_asr.errors import CheckpointError
from diffusion_gemma_asr.model.backbone import Backbone
from diffusion_gemma_asr.model.experts import ALL_EXPERTS, FP8, FP8_EXPERTS, implementation, multiplies_fp8, to_fp8


@pytest.mark.parametrize(
    ("experts", "top_k", "expected"),
    [(4, 2, ALL_EXPERTS), (2, 2, ALL_EXPERTS), (5, 2, "grouped_mm"), (128, 8, "grouped_mm")],
)
def test_all_are_asked_where_half_of_them_answer(experts: int, top_k: int, expected: str) -> None:
    assert implementation(experts, top_k) == expected


def test_both_ways_give_the_same_answer_and_gradient(backbone_folder: Path) -> None:
    backbone = tiny_backbone(backbone_folder).requires_grad_(True)
    assert backbone.model.config.text_config._experts_implementation == "grouped_mm"
    ids = torch.arange(40, 58).view(2, 9)
    found = []
    for name in ("grouped_mm", ALL_EXPERTS):
        backbone.model.set_experts_implementation(name)
        backbone.zero_grad()
        hidden = backbone.prefill(backbone.embed(ids), torch.ones_like(ids, dtype=torch.bool))[1]
        hidden.square().sum().backward()
        gradients = {n: p.grad.clone() for n, p in backbone.named_parameters() if p.grad is not None}
        assert any("experts.down_proj" in n for n in gradients) and any("router" in n for n in gradients)
        found.append((hidden.detach(), gradients))
    (chosen, of_chosen), (every, of_every) = found
    torch.testing.assert_close(every, chosen, atol=1e-5, rtol=1e-4)
    assert of_every.keys() == of_chosen.keys()
    for name, gradient in of_chosen.items():
        torch.testing.assert_close(of_every[name], gradient, atol=1e-4, rtol=1e-3, msg=name)


def hidden_states(backbone: Backbone) -> Tensor:
    ids = torch.arange(40, 58).view(2, 9)
    return backbone.prefill(backbone.embed(ids), torch.ones_like(ids, dtype=torch.bool))[1]


def packed_in_fp8(folder: Path) -> Backbone:
    backbone = tiny_backbone(folder)
    quantize_experts(backbone.model, find_quantizer("fp8"), "cpu")
    return backbone


def test_rows_in_fp8_come_back_within_a_sixteenth() -> None:
    rows = torch.randn(5, 48, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 5)[:, None]
    small, scale = to_fp8(rows)
    assert small.dtype == FP8 and scale.shape == (5,)
    back = small.float() * scale[:, None]
    least = rows.abs().amax(1, keepdim=True) / 2**14  # below the smallest normal number steps are even
    assert torch.all((back - rows).abs() <= (rows.abs() / 16).maximum(least))
    zeros, of_zeros = to_fp8(torch.zeros(2, 16))
    assert torch.equal(zeros.float() * of_zeros[:, None], torch.zeros(2, 16))


@torch.no_grad()
def test_experts_in_fp8_answer_as_rounded_weights_and_tokens_do(backbone_folder: Path) -> None:
    """Against the formula, expert by expert and token by token."""
    experts = packed_in_fp8(backbone_folder).experts[0]
    assert experts.config._experts_implementation == FP8_EXPERTS
    tokens = torch.randn(7, experts.gate_up_proj.shape[-1], generator=torch.Generator().manual_seed(1))
    chosen, weights = torch.tensor([[0, 3], [5, 1], [3, 0], [2, 4], [3, 5], [3, 1], [3, 4]]), torch.rand(7, 2)

    def rounded(row: Tensor) -> Tensor:
        small, scale = to_fp8(row)
        return small.float() * scale

    expected = torch.zeros_like(tokens)
    for at, token in enumerate(tokens):
        for expert, weight in zip(chosen[at].tolist(), weights[at], strict=True):
            gate, up = (experts.gate_up_proj[expert] @ rounded(token)).chunk(2)
            expected[at] += weight * (experts.down_proj[expert] @ rounded(experts.act_fn(gate) * up))
    torch.testing.assert_close(experts(tokens, chosen, weights), expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_fp8_is_a_byte_a_weight_and_changes_answers_little(backbone_folder: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    plain, small = tiny_backbone(backbone_folder).experts[0], packed_in_fp8(backbone_folder).experts[0]
    assert {p.dtype for p in small.parameters()} == {FP8}
    tokens = torch.randn(20, small.gate_up_proj.shape[-1], generator=generator)
    asked = tokens, torch.rand(20, 6, generator=generator).topk(2).indices, torch.rand(20, 2, generator=generator)
    before = plain(*asked)
    assert 0 < (small(*asked) - before).norm() < 0.1 * before.norm()


def test_lora_learns_beside_fp8_as_beside_the_unpacked_weights(backbone_folder: Path) -> None:
    backbone, plain = packed_in_fp8(backbone_folder), tiny_backbone(backbone_folder)
    for own, packed in zip(plain.share_experts(), backbone.experts, strict=True):
        own.gate_up_proj.data.copy_(packed.gate_up_proj)  # type: ignore[operator, union-attr]
        own.down_proj.data.copy_(packed.down_proj)  # type: ignore[operator, union-attr]
    gradients = []
    for one in (backbone, plain):
        one.add_lora(rank=2)
        lively_lora(one)
        hidden_states(one).square().mean().backward()
        gradients.append({name: p.grad for name, p in one.named_parameters() if p.grad is not None})
    assert len(gradients[0]) > 10 and gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-6, rtol=1e-4, msg=name)


def test_the_product_of_fp8_is_asked_for_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not multiplies_fp8(torch.device("cpu"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for capability, expected in (((8, 9), False), ((9, 0), True), ((10, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert multiplies_fp8(torch.device("cuda")) is expected


def test_experts_are_packed_once(backbone_folder: Path) -> None:
    backbone = packed_in_fp8(backbone_folder)
    with pytest.raises(CheckpointError, match="packed already"):
        quantize_experts(backbone.model, find_quantizer("fp8"), "cpu")
