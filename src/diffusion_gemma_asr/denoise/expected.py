"""What language expects at each place of a canvas, by the backbone's own encoder.

The encoder is an autoregressive model. It reads the text of an aligned canvas behind the clip's prompt, or one without sound
(`ModelConfig.silent_drafts`), all of it in one causal pass, and at each place says what should stand there behind the tokens
before. A share of that (`ModelConfig.causal_share`) is added to what the decoder makes of the canvas and, where that began
with a draft, to what CTC hears: all three are hidden states under one output head. Where a pass changes a token, the next
pass reads on from the changed one, as in Jacobi decoding (Song et al. 2021, arXiv 2002.03629). A canvas of noise has text
from its second pass on.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from ..model.model import DiffusionGemmaASR
from ..model.prefill import Prefill
from .canvas import token_starts, without_ends
from .engine import Expectation


def text_before(canvas: Sequence[int], blank: int, ends: Collection[int]) -> tuple[list[int], list[int]]:
    """The text at the places of an aligned canvas that hold audio tokens, and how many of its tokens come before the one at
    each place.

    At a blank, all that began before it come before what might be written there; at each place of a token, those before that
    token. The text ends behind these places, so that an end at one of them is a blank.
    """
    canvas = without_ends(canvas, blank, ends)
    starts = token_starts(canvas, blank)
    before = [bisect_right(starts, place) - (token != blank) for place, token in enumerate(canvas)]
    return [canvas[place] for place in starts], before


Read = tuple[Prefill, Tensor]
"""A prompt's cache, one row, and the backbone's hidden state (1, H) at its end: what the first token should be."""


def expectation(model: DiffusionGemmaASR, places: int, prompt: Callable[[], Read]) -> Expectation:
    """Of what stands behind a prompt.

    Args:
        model: with the backbone.
        places: of a canvas that hold text, before its end.
        prompt: gives what the backbone has read; asked at the first canvas.
    """

    kept: dict[tuple[int, ...], Tensor] = {}  # for the last canvas: the one before the last pass is often the same

    def expected(canvas: Tensor) -> Tensor:
        shown = tuple(canvas[:places].tolist())
        if shown not in kept:
            kept.clear()
            kept[shown] = _expected(model, shown, *prompt())
        return kept[shown]

    return expected


@torch.no_grad()
def _expected(model: DiffusionGemmaASR, canvas: Sequence[int], prefill: Prefill, states: Tensor) -> Tensor:
    """The same, of a canvas that has not been read."""
    tokens, before = text_before(canvas, model.blank, model.prompts.end_ids)
    if tokens:
        ids = torch.tensor([tokens], device=model.device)
        _, behind = model.backbone.extend(model.backbone.embed(ids), prefill)
        states = torch.cat([states, behind[0]])
    return model.config.causal_share * states[torch.tensor(before, dtype=torch.long, device=model.device)]
