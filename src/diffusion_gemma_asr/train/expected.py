"""What language expects at the places of canvases, in training: `denoise/expected.py` for a batch, with gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..denoise.expected import text_before
from ..model.head import Head
from ..model.model import DiffusionGemmaASR
from ..model.prefill import Prefill

BatchExpectation = Callable[[Tensor, Tensor], Tensor]
"""Takes aligned canvases (B, C) and which of their places hold audio tokens (B, C) bool; gives hidden states (B, C, H), the
share of them that is added, zeros at other places."""


class Under(NamedTuple):
    """What stands under aligned canvases, and is added to their own hidden states.

    Attributes:
        slots: (B, S, H) audio tokens, which canvases that begin with drafts are conditioned on too; counts: (B,) how many.
        share: of the canvas's own hidden states that counts beside these.
        expected: of the prompts' cache and hidden states, what is expected at the places of canvases; None: nothing.
    """

    slots: Tensor
    counts: Tensor
    share: float
    expected: Callable[[Prefill, Tensor], BatchExpectation] | None = None


@torch.no_grad()
def conditions(head: Head, slots: Tensor, used: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """What CTC hears at the places of aligned canvases, as the denoiser takes it.

    Args:
        head: of the backbone.
        slots: (B, S, H) audio tokens, in the order of the canvas.
        used: (B, S) bool, those that count.
        length: positions of a canvas, C >= S.

    Returns:
        (B, C, H) mean rows of the head, and (B, C, H) the audio tokens themselves; zeros elsewhere.
    """
    heard = slots[used]  # (N, H)
    soft, under = (slots.new_zeros(len(slots), length, slots.shape[2]) for _ in range(2))
    soft[:, : slots.shape[1]][used] = head.mean_rows(heard).to(soft.dtype)
    under[:, : slots.shape[1]][used] = heard
    return soft, under


def batch_expectation(model: DiffusionGemmaASR, prefill: Prefill, hidden: Tensor) -> BatchExpectation:
    """Of the transcripts of a batch.

    Args:
        model: with the backbone.
        prefill: of the prompts; hidden: (B, P, H), the encoder's last hidden states, see `Backbone.prefill`.
    """
    backbone = model.backbone
    states = hidden[torch.arange(len(hidden), device=hidden.device), prefill.lengths - 1][:, None]  # (B, 1, H)

    def expected(canvases: Tensor, used: Tensor) -> Tensor:
        rows = [
            text_before(row[mask].tolist(), model.blank, model.prompts.end_ids)
            for row, mask in zip(canvases, used, strict=True)
        ]
        ids = pad_sequence([torch.tensor(tokens, dtype=torch.long) for tokens, _ in rows], batch_first=True)  # (B, N)
        known = states
        if ids.shape[1]:
            _, behind = backbone.extend(backbone.embed(ids.to(hidden.device)), prefill)
            known = torch.cat([states, behind], 1)
        out = known.new_zeros(*canvases.shape, known.shape[-1])
        for row, (_, before) in enumerate(rows):
            out[row, used[row]] = known[row, torch.tensor(before, dtype=torch.long, device=hidden.device)]
        return model.config.causal_share * out

    return expected
