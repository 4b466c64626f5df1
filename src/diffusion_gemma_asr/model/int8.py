"""Linear layers in 8 bits, for x86 processors that are slow at bfloat16: up to twice as fast as float32, in a quarter of
the memory.

Weights are whole numbers with a scale for each row. What goes in is rounded to 255 steps, each row by its own largest
number, so that no row depends on the others. The products are oneDNN's, as torch's inductor has them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

STEPS = 127  # of weights and inputs, either side of zero
LEAST = 1e-9  # a row of zeros is divided by this


class Int8Linear(nn.Module):
    """What a linear layer computes, in whole numbers; for inference on a processor.

    Processors without VNNI add two neighbouring products in 16 bits, which hold 255 x 128. So weights are scaled by the
    largest sum of two neighbours, where that is more than the largest weight.

    Args:
        linear: to replace; its bias stays in float32.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach().float()
        even, odd = weight[:, 0::2], weight[:, 1::2]
        pairs = (even[:, : odd.shape[1]] + odd).abs().amax(1)
        self.scales = (torch.maximum(weight.abs().amax(1), pairs) / STEPS).clamp_min(LEAST)  # (out,)
        self.zeros = torch.zeros(len(weight), dtype=torch.long)
        whole = (weight / self.scales[:, None]).round().to(torch.int8)
        self.packed = torch.ops.onednn.qlinear_prepack(whole, None)
        self.bias = None if linear.bias is None else linear.bias.detach().float()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) float32 → (..., out) float32."""
        rows = x.reshape(-1, x.shape[-1])
        most = rows.abs().amax(1, keepdim=True).clamp_min_(LEAST)
        whole = (rows / most).mul_(STEPS).add_(STEPS + 1.5).to(torch.uint8)  # rounded: the conversion cuts off
        out: Tensor = torch.ops.onednn.qlinear_pointwise(
            whole, 1 / STEPS, STEPS + 1, self.packed, self.scales, self.zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        out = out.mul_(most) if self.bias is None else torch.addcmul(self.bias, out, most)
        return out.view(*x.shape[:-1], -1) if len(rows) else out.new_zeros(*x.shape[:-1], len(self.scales))


def capabilities() -> dict[str, object]:
    """What this processor can do, by torch's names; an older torch does not tell."""
    told: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return told


def int8_available() -> bool:
    """Whether this processor, and this torch, have such products: x86 since AVX2."""
    there = torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qlinear_pointwise")
    return there and bool(capabilities().get("avx2"))


def use_int8(root: nn.Module, but: frozenset[str] = frozenset()) -> nn.Module:
    """Puts Int8Linear in place of all linear layers inside a module, but those of some names; returns the module."""
    for module in list(root.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and name not in but:
                setattr(module, name, Int8Linear(child))
    return root
