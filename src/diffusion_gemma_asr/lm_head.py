"""What the loop wants from lm_head, in one pass over slices of positions: no (B, C, V) tensor is ever made.

For each position: a token drawn from the prediction, its most probable token, the prediction's entropy, and the mean
embedding under it, which the next pass is conditioned on. A slice's logits stay in the processor's cache on a CPU, and
on a GPU a vocabulary of 262,144 costs megabytes instead of gigabytes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .denoise import pick
from .draft_prior import Prior

FLOOR = -60.0  # below the peak; what is smaller counts for nothing, and subnormal numbers are slow
SLICE = {"cpu": 1 << 19, "cuda": 1 << 26}  # logits at a time


class Prediction(NamedTuple):
    """Of N positions: drawn (N,) long, best (N,) long, entropy (N,) float32 nats, soft (N, H) the mean row of lm_head."""

    drawn: Tensor
    best: Tensor
    entropy: Tensor
    soft: Tensor


def predict(
    hidden: Tensor, weight: Tensor, softcap: float, temperature: Tensor, uniform: Tensor, prior: Prior | None = None
) -> Prediction:
    """Reads predictions off hidden states.

    Args:
        hidden: (N, H) of the decoder.
        weight: (V, H) of lm_head.
        softcap: logits are `softcap * tanh(x / softcap)`.
        temperature: (N,) that divides the logits.
        uniform: (N,) in [0, 1), which decide the draws.
        prior: (N, K), raises logits; None: none.
    """
    parts = []
    for own, heat, chance, *raised in zip(*_sliced(weight, hidden, temperature, uniform, *(prior or ())), strict=True):
        logits = _logits(own, weight, softcap, *raised)
        peak, best = logits.max(-1, keepdim=True)
        scaled = logits.sub_(peak).div_(heat[:, None]).clamp_(min=FLOOR)  # (n, V), at most 0
        weights = scaled.exp()
        total = weights.sum(-1)
        entropy = total.log() - torch.linalg.vecdot(weights, scaled) / total
        soft = (weights.to(weight.dtype) @ weight) / total[:, None].to(weight.dtype)
        parts.append(Prediction(pick(weights, chance), best[:, 0], entropy, soft))
    return Prediction(*(torch.cat(column) for column in zip(*parts, strict=True)))


def logprobs_of(hidden: Tensor, weight: Tensor, softcap: float, tokens: Tensor, prior: Prior | None = None) -> Tensor:
    """(N,) float32 log-probabilities of tokens (N,) at temperature 1, from hidden states (N, H), with a prior (N, K)."""
    found = []
    for own, token, *raised in zip(*_sliced(weight, hidden, tokens, *(prior or ())), strict=True):
        logits = _logits(own, weight, softcap, *raised)
        found.append(logits.gather(-1, token[:, None])[:, 0] - logits.logsumexp(-1))
    return torch.cat(found)


def _logits(hidden: Tensor, weight: Tensor, softcap: float, *raised: Tensor) -> Tensor:
    logits = (hidden @ weight.T).float().div_(softcap).tanh_().mul_(softcap)
    return logits.scatter_add_(-1, *raised) if raised else logits


def _sliced(weight: Tensor, *values: Tensor) -> list[tuple[Tensor, ...]]:
    """Parts of each: positions whose logits are about SLICE numbers."""
    room = SLICE["cpu" if weight.device.type == "cpu" else "cuda"]
    return [part.split(max(1, room // len(weight))) for part in values]
