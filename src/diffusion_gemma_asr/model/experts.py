"""How experts answer: all of them in small backbones, and in 8-bit floats on GPUs that multiply these.

Both are implementations in transformers' registry, from which a model chooses one by its name.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.integrations.moe import ExpertsInterface, grouped_mm_experts_forward

ALL_EXPERTS = "all_experts"
"""Name of `all_experts` among the implementations of transformers."""
FP8_EXPERTS = "fp8_experts"
"""Name of `fp8_experts` among them."""
FP8 = torch.float8_e4m3fn
FP8_ALIGNMENT = 16  # the product wants rows of a multiple of so many numbers


def all_experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Every expert's answer for each token, those that were not chosen with a weight of 0, as two plain matrix products.

    Where half of the experts answer for each token, that is cheaper than sorting tokens.

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


def fp8_experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The chosen experts' answers, products of 8-bit floats where nothing is to be learnt: weights with a scale for each row
    of the matrix, tokens with a scale each.

    On GPUs since Hopper the product itself has 8 bits; elsewhere the same rounded numbers are multiplied in their old dtype,
    which shows the effect, and saves nothing. With gradients the weights are unpacked instead, as every packing does it.

    Args:
        self: the experts, packed by `checkpoint.quantization` as "fp8".
        hidden_states, top_k_index, top_k_weights: see `all_experts`.

    Returns:
        (N, H).
    """
    if torch.is_grad_enabled() and hidden_states.requires_grad:
        answer: Tensor = grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
        return answer
    count, chosen = top_k_index.shape
    experts, order = top_k_index.flatten().sort()  # (N K,), by expert
    # As in transformers: histc, unlike bincount, does not wait for the device, and wants floats on processors.
    numbers = experts.int() if experts.is_cuda else experts.float()
    counts = torch.histc(numbers, self.num_experts, 0, self.num_experts - 1)
    ends = counts.cumsum(0, dtype=torch.int32)  # (E,), where each expert's tokens end
    inner = self._apply_gate(_grouped(hidden_states[order // chosen], self, "gate_up_proj", ends))  # (N K, I)
    answers = _grouped(inner, self, "down_proj", ends) * top_k_weights.flatten()[order, None]
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return answers[back].view(count, chosen, -1).sum(1).to(hidden_states.dtype)


def to_fp8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (..., K) as 8-bit floats of the same shape, and the scale (...) in float32 that brings each row back."""
    rows = rows.float()
    scale = rows.abs().amax(-1).clamp(min=1e-12) / torch.finfo(FP8).max
    return (rows / scale[..., None]).to(FP8), scale


def multiplies_fp8(device: torch.device) -> bool:
    """Whether there are products of 8-bit floats by groups on a device: NVIDIA's GPUs since Hopper."""
    return device.type == "cuda" and torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (9, 0)


def _grouped(rows: Tensor, experts: Any, name: str, ends: Tensor) -> Tensor:
    """rows (S, K), sorted by expert, times the weights (E, O, K) of their experts → (S, O)."""
    packed = experts.parametrizations[name]
    weights, weight_scale = packed.original, packed[0].scale
    small, scale = to_fp8(rows)
    if multiplies_fp8(rows.device):
        by_row = F.ScalingType.RowWise
        return F.scaled_grouped_mm(  # type: ignore[attr-defined]
            small, weights.mT, scale, by_row, weight_scale, by_row, offs=ends, output_dtype=torch.bfloat16
        ).to(rows.dtype)
    rounded = small.to(rows.dtype) * scale[:, None].to(rows.dtype)
    return F.grouped_mm(rounded, getattr(experts, name).mT, offs=ends)


ExpertsInterface.register(ALL_EXPERTS, all_experts)
ExpertsInterface.register(FP8_EXPERTS, fp8_experts)


def implementation(experts: int, top_k: int) -> str:
    """The fastest implementation, on GPU and CPU, where `top_k` of so many experts answer for each token."""
    return ALL_EXPERTS if experts <= 2 * top_k else "grouped_mm"
