"""Muon beside AdamW: orthogonalised momentum for the weight matrices, AdamW for everything else.

Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; the factor for sharing AdamW's
learning rate is that of Liu et al. 2025 (arXiv 2502.16982). Unlike torch.optim.Muon this implementation also accepts stacks
of matrices (experts), and computes in float32 by default, since bfloat16 is slow on many CPUs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .workers import shared_rows

# Coefficients of the quintic Newton-Schulz iteration; singular values end in about [0.7, 1.2] (Jordan et al. 2024).
_QUINTIC = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


def orthogonalise(matrices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Brings all singular values near 1, by Newton-Schulz iterations.

    Args:
        matrices: (..., M, N).
        dtype: to compute in.

    Returns:
        (..., M, N), in the dtype of `matrices`.
    """
    a, b, c = _QUINTIC
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = (x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)).to(dtype)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, with decoupled weight decay.

    Args:
        params: matrices, or stacks of matrices with three dimensions.
        lr: learning rate, on AdamW's scale.
        momentum: decay of the momentum.
        weight_decay: decoupled, as AdamW's.
        dtype: to orthogonalise updates in.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Updates every weight that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for shape, same in by_shape.items():
                momenta = torch.stack([self._momentum(p, group["momentum"]) for p in same])
                updates = shared_rows(lambda some: orthogonalise(some, self.dtype), momenta)
                factor = 0.2 * max(shape[-2:]) ** 0.5  # the root mean square of AdamW's updates
                for p, update in zip(same, updates, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * factor)

    def _momentum(self, p: nn.Parameter, momentum: float) -> Tensor:
        """Updates a parameter's momentum buffer; returns the Nesterov momentum."""
        assert p.grad is not None
        buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
        buffer.lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(buffer, momentum)


class MuonWithAdamW:
    """Muon for the weight matrices of layers, AdamW for embeddings, heads, convolutions, gains and biases.

    Muon gets parameters of two or three dimensions whose names contain none of OTHERS. Implements those methods of an
    optimiser that the training loop calls.

    Args:
        trained: parameters by name.
        lr: learning rate of both.
        betas: of AdamW.
        weight_decay: of both.
        dtype: to orthogonalise Muon's updates in.
    """

    OTHERS = ("embed", "head", "proj_out", "conv")

    def __init__(
        self,
        trained: Mapping[str, nn.Parameter],
        lr: float,
        betas: tuple[float, float],
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ):
        matrices = {n for n, p in trained.items() if p.ndim in (2, 3) and not any(part in n for part in self.OTHERS)}
        self.parts: tuple[torch.optim.Optimizer, ...] = (
            Muon([p for n, p in trained.items() if n in matrices], lr, weight_decay=weight_decay, dtype=dtype),
            torch.optim.AdamW(
                [p for n, p in trained.items() if n not in matrices], lr=lr, betas=betas, weight_decay=weight_decay
            ),
        )

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups of both optimisers."""
        return [group for part in self.parts for group in part.param_groups]

    def step(self) -> None:
        """Takes a step of both optimisers."""
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients of all parameters."""
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The states of both optimisers, Muon's first."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the result of `state_dict`."""
        for part, saved in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(saved)
