"""Greedy autoregressive decoding with our model: the backbone's causal encoder as an ordinary language model.

Encoder, projector, LoRA and prompt are the same, so the comparison isolates the effect of diffusion decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ...model.drafts import Encoded
from ...model.model import DiffusionGemmaASR
from ..protocol import Hypothesis


class Autoregressive:
    """Our model with autoregressive instead of denoising decoding.

    Args:
        model: to evaluate.
        description: of the model, for the settings; see `systems.describe`.
    """

    longest_s = 30.0

    def __init__(self, model: DiffusionGemmaASR, description: dict[str, Any]):
        self.model, self.description = model, description
        self.languages = model.config.languages

    def settings(self) -> dict[str, Any]:
        """The model."""
        return {"system": "autoregressive"} | self.description

    @torch.no_grad()
    def transcribe(self, sounds: Sequence[np.ndarray], languages: Sequence[str]) -> list[Hypothesis]:
        """See `System`; `passes` is one per token, the end token included."""
        rows = greedy(self.model, self.model.encode(sounds), languages)
        return [Hypothesis(self.model.text(row), "autoregressive", len(row) + 1) for row in rows]


@torch.no_grad()
def greedy(model: DiffusionGemmaASR, encoded: Encoded, languages: Sequence[str]) -> list[list[int]]:
    """Greedy decoding; a row stops at an end token, or at as many tokens as it has audio tokens.

    Args:
        model: in eval mode.
        encoded: clips of a batch.
        languages: code of each clip.

    Returns:
        token ids of each row, without the end token.
    """
    backbone, ends = model.backbone, set(model.prompts.end_ids)
    prefill, hidden = model.read_prompts(encoded.prompted, encoded.slot_lengths, languages)
    last = (prefill.lengths - 1)[:, None, None].expand(-1, 1, hidden.shape[-1])
    hidden = hidden.gather(1, last)  # (B, 1, H), at each prompt's last token
    rows: list[list[int]] = [[] for _ in languages]
    unfinished = set(range(len(rows)))
    while unfinished:
        tokens = model.head.logits(hidden).argmax(-1)  # (B, 1)
        for row in sorted(unfinished):
            token = int(tokens[row])
            if token in ends or len(rows[row]) == int(encoded.slot_lengths[row]):
                unfinished.remove(row)
            else:
                rows[row].append(token)
        if unfinished:
            prefill, hidden = backbone.extend(backbone.embed(tokens), prefill)
    return rows
