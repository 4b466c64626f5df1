"""What language expects at the places of canvases, in training: `denoise/expected.py` for a batch, with gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..denoise.expected import text_before
from ..model.lengths import length_mask
from ..model.model import DiffusionGemmaASR

BatchExpectation = Callable[[Tensor, Tensor], Tensor]
"""Takes aligned canvases (B, C) and which of their places hold audio tokens (B, C) bool; gives hidden states (B, C, H), the
share of them that is added, zeros at other places."""


class Under(NamedTuple):
    """What stands under aligned canvases, and is added to their own hidden states.

    Attributes:
        slots: (B, S, H) audio tokens, which canvases that begin with drafts are conditioned on too; counts: (B,) how many.
        share: of the canvas's own hidden states that counts beside these.
        expected: what language expects at the places of all canvases; None: nothing.
    """

    slots: Tensor
    counts: Tensor
    share: float
    expected: BatchExpectation | None = None


def batch_expectation(model: DiffusionGemmaASR, embeds: Tensor, lengths: Tensor) -> BatchExpectation:
    """Of the transcripts of a batch.

    Args:
        model: with the backbone.
        embeds: (B, P, H) prompts without sound, padding behind each; lengths (B,).
    """
    backbone = model.backbone
    sizes = lengths.tolist()

    def expected(canvases: Tensor, used: Tensor) -> Tensor:
        rows = [
            text_before(row[mask].tolist(), model.blank, model.prompts.end_ids)
            for row, mask in zip(canvases, used, strict=True)
        ]
        read = [
            torch.cat([prompt[:n], backbone.embed(torch.tensor([tokens], dtype=torch.long, device=embeds.device))[0]])
            for prompt, n, (tokens, _) in zip(embeds, sizes, rows, strict=True)
        ]
        whole = torch.tensor([len(row) for row in read], device=embeds.device)
        padded = pad_sequence(read, batch_first=True)
        _, hidden = backbone.prefill(padded, length_mask(whole, padded.shape[1]))
        out = hidden.new_zeros(*canvases.shape, hidden.shape[-1])
        for row, (n, (_, before)) in enumerate(zip(sizes, rows, strict=True)):
            if before:
                places = torch.tensor(before, device=embeds.device) + n - 1
                out[row, used[row]] = hidden[row, places]
        return model.config.causal_share * out

    return expected
