"""Several transcripts of a clip, of which the backbone chooses one: n-best rescoring by the system itself.

The backbone's encoder is an autoregressive language model: behind a prompt without sound it says how likely anybody is to
say a transcript. CTC says how likely the transcript is by the sound alone. The one with the largest weighted sum of both
logarithms is taken. What the backbone makes of a transcript behind the clip's own prompt is left out: a small backbone that
was trained on few hours believes its audio tokens too readily, and with what it knows without sound and CTC there is
nothing left for it to add (docs/results/candidates.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..model.ctc import DraftToken, transcript_scores
from ..model.ctc_beam import Prefix, likeliest
from ..model.model import DiffusionGemmaASR
from ..model.prefill import Prefill
from ..model.projector import noise

ROWS = 64  # transcripts read at once
# Weight of language beside CTC's 1, and nats for each token, since language likes short texts; benchmarks/candidates.py fits
# them.
LANGUAGE, LENGTH = 0.3, 1.5


def proposed_draft(
    model: DiffusionGemmaASR, slots: Tensor, draft: list[DraftToken], count: int, language: str, context: str = ""
) -> list[DraftToken]:
    """The best of the drafts that CTC finds likeliest.

    Args:
        model: that made the slots.
        slots: (S, H) of one clip.
        draft: greedy CTC's, one of the candidates.
        count: candidates.
        language, context: see `PromptBuilder.row`.
    """
    candidates = proposed(model, slots, draft, count)
    best = candidates[chosen(model, slots, candidates, language, context)]
    spans = None if best == candidates[0] else model.align(slots, best)
    if spans is None:
        return draft
    aligned = zip(best, spans, strict=True)
    return [DraftToken(token, span.start, span.end, math.exp(span.logprob)) for token, span in aligned]


def proposed(model: DiffusionGemmaASR, slots: Tensor, draft: Sequence[DraftToken], count: int) -> list[Prefix]:
    """The tokens of at most `count` transcripts: the draft of greedy CTC, then those that CTC finds likeliest."""
    found = [prefix for prefix, _ in likeliest(model.head, slots, model.blank, count)]
    return list(dict.fromkeys([tuple(token.id for token in draft), *found]))[:count]


@torch.no_grad()
def chosen(
    model: DiffusionGemmaASR, slots: Tensor, candidates: Sequence[Sequence[int]], language: str, context: str = ""
) -> int:
    """The place of the transcript with the largest weighted sum of log-probabilities.

    Args:
        model: that made the slots.
        slots: (S, H) of one clip.
        candidates: tokens of the transcripts.
        language, context: see `PromptBuilder.row`.
    """
    by_ctc = transcript_scores(model.head, slots, candidates, model.blank)
    if all(score == -math.inf for score in by_ctc):  # more tokens than slots in each
        by_ctc = [0.0] * len(by_ctc)
    said = language_scores(model, candidates, language, context)
    totals = [a + LANGUAGE * b + LENGTH * len(tokens) for a, b, tokens in zip(by_ctc, said, candidates, strict=True)]
    return max(range(len(totals)), key=totals.__getitem__)


@torch.no_grad()
def language_scores(
    model: DiffusionGemmaASR, candidates: Sequence[Sequence[int]], language: str, context: str = ""
) -> list[float]:
    """Log-probabilities in nats of transcripts and their ends, read token after token behind a prompt without sound.

    What transcripts begin with in common is read once: they are a tree, in which a token sees those that lead to it.

    Args:
        model: with the backbone.
        candidates: tokens of the transcripts.
        language, context: see `PromptBuilder.row`.
    """
    prefill, last = prompt_without_sound(model, language, context)
    parts = (candidates[at : at + ROWS] for at in range(0, len(candidates), ROWS))
    return [score for part in parts for score in _tree_scores(model, part, prefill, last)]


def prompt_without_sound(model: DiffusionGemmaASR, language: str, context: str = "") -> tuple[Prefill, Tensor]:
    """A prompt that holds one audio token of noise, as training has it for language alone.

    Returns:
        its cache, one row, and the backbone's hidden state (1, H) at its end.
    """
    slots = noise(1, model.backbone.hidden_size, float(model.projector.scale), torch.Generator().manual_seed(0))
    one = torch.ones(1, dtype=torch.long, device=model.device)
    prefill, hidden = model.read_prompts(slots[None].to(model.head.weight), one, [language], context=context)
    return prefill, hidden[0, int(prefill.lengths[0]) - 1][None]


def _tree_scores(
    model: DiffusionGemmaASR, candidates: Sequence[Sequence[int]], prefill: Prefill, hidden: Tensor
) -> list[float]:
    """The same of transcripts that are read at once, behind a prompt; hidden (1, H) is what predicts a first token."""
    places: dict[Prefix, int] = {(): 0}  # of each beginning of a transcript
    before, tokens = [0], [0]  # of each place: that of the beginning without its last token, and this token
    for row in candidates:
        for size in range(1, len(row) + 1):
            beginning = tuple(row[:size])
            if beginning not in places:
                places[beginning] = len(tokens)
                before.append(places[beginning[:-1]])
                tokens.append(beginning[-1])
    device = hidden.device
    if len(tokens) > 1:
        seen = torch.eye(len(tokens), dtype=torch.bool)
        for place in range(1, len(tokens)):
            seen[place] |= seen[before[place]]
        ids = torch.tensor([tokens[1:]], device=device)  # (1, N)
        alone = prefill.keep(torch.zeros(1, dtype=torch.long, device=device), int(prefill.lengths[0]))
        _, behind = model.backbone.extend(model.backbone.embed(ids), alone, seen[1:, 1:].to(device))
        hidden = torch.cat([hidden, behind[0]])  # (N + 1, H)
    ends = [places[tuple(row)] for row in candidates]
    predicting = torch.tensor([*before[1:], *ends], device=device)
    predicted = [*tokens[1:], *[model.prompts.special["end_of_turn"]] * len(ends)]
    found = model.head.token_log_probs(hidden[predicting], torch.tensor(predicted, device=device)).tolist()
    totals = [0.0]
    for place in range(1, len(tokens)):
        totals.append(totals[before[place]] + found[place - 1])
    return [totals[end] + score for end, score in zip(ends, found[len(tokens) - 1 :], strict=True)]
