"""Experts of a small backbone: where half of them answer for each token, asking all is cheaper than sorting tokens."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers.integrations.moe import ExpertsInterface

ALL_EXPERTS = "all_experts"
"""Name of `all_experts` among the implementations of transformers."""


def all_experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Every expert's answer for each token, those that were not chosen with a weight of 0, as two plain matrix products.

    Args:
        self: the experts, gate_up_proj (E, 2 I, H) and down_proj (E, H, I).
        hidden_states: (N, H).
        top_k_index: (N, K) long, the chosen experts.
        top_k_weights: (N, K), their weights.

    Returns:
        (N, H).
    """
    count, experts = len(hidden_states), len(self.gate_up_proj)
    gate, up = F.linear(hidden_states, self.gate_up_proj.flatten(0, 1)).view(count, experts, -1).chunk(2, -1)
    weights = top_k_weights.new_zeros(count, experts).scatter(1, top_k_index, top_k_weights)
    inner = self.act_fn(gate) * up  # (N, E, I)
    inner = inner * weights[..., None].to(inner.dtype)
    return F.linear(inner.flatten(1), self.down_proj.transpose(0, 1).flatten(1)).to(hidden_states.dtype)


ExpertsInterface.register(ALL_EXPERTS, all_experts)


def implementation(experts: int, top_k: int) -> str:
    """The fastest implementation, on GPU and CPU, where `top_k` of so many experts answer for each token."""
    return ALL_EXPERTS if experts <= 2 * top_k else "grouped_mm"
