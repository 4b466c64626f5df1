"""Experts: asking all of them gives what asking the chosen ones does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_model import tiny_backbone

from diffusion_gemma_asr.model.experts import ALL_EXPERTS, implementation


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
