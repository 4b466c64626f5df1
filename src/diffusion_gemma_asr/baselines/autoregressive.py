"""Our own backbone as an ordinary language model: its causal encoder writes token after token, greedily.

Same ear, same projector, same LoRA, same prompt: the difference to the denoising decoder is what diffusion costs or buys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..evaluate.systems import Hypothesis, dtype_name
from ..model import DiffusionGemmaASR


class Autoregressive:
    """A model of ours without its denoising decoder."""

    def __init__(self, model: DiffusionGemmaASR, name: str):
        self.model, self.name = model, name

    def settings(self) -> dict[str, Any]:
        """The model."""
        return {"system": "autoregressive", "model": self.name, "dtype": dtype_name(self.model)}

    @torch.no_grad()
    def transcribe(self, clips: Sequence[np.ndarray], languages: Sequence[str]) -> list[Hypothesis]:
        """See `System`; the passes are one a token, the end included."""
        rows = greedy(self.model, *self.model.encode_audio(clips), languages)
        return [Hypothesis(self.model.text(row), len(row) + 1) for row in rows]


@torch.no_grad()
def greedy(model: DiffusionGemmaASR, slots: Tensor, slot_lengths: Tensor, languages: Sequence[str]) -> list[list[int]]:
    """The most probable next token of each row, until each has ended or has as many tokens as slots.

    Args:
        slots: (B, S, H) audio tokens; slot_lengths: (B,).

    Returns:
        token ids of each row, without the end.
    """
    backbone, ends = model.backbone, set(model.prompts.end_ids)
    prefill, hidden = model.read_prompts(slots, slot_lengths, languages)
    last = (prefill.lengths - 1)[:, None, None].expand(-1, 1, hidden.shape[-1])
    hidden = hidden.gather(1, last)  # (B, 1, H): of each prompt's last token
    rows: list[list[int]] = [[] for _ in languages]
    open_rows = set(range(len(rows)))
    while open_rows:
        tokens = backbone.logits(hidden).argmax(-1)  # (B, 1)
        for row in sorted(open_rows):
            token = int(tokens[row])
            if token in ends or len(rows[row]) == int(slot_lengths[row]):
                open_rows.remove(row)
            else:
                rows[row].append(token)
        if open_rows:
            prefill, hidden = backbone.extend(backbone.embed(tokens), prefill)
    return rows
