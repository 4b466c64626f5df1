"""Several transcripts of a clip, of which the backbone chooses one: n-best rescoring by the system itself.

The backbone's encoder is an autoregressive language model: behind a prompt it gives each transcript a probability, token
by token, all of them in one pass over one cache. Behind the clip's prompt that is how likely the transcript is once the
clip is heard; behind a prompt without sound, how likely anybody is to say it. CTC gives a third probability, straight from
the sound. The transcript with the largest weighted sum of the three logarithms is taken. A backbone that was trained on few
hours believes its audio tokens too readily, and what it knows of language counts for little behind them: hence the second.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..model.ctc import DraftToken, transcript_scores
from ..model.ctc_beam import Prefix, likeliest
from ..model.model import DiffusionGemmaASR
from ..model.prefill import Prefill
from ..model.projector import noise

ROWS = 32  # transcripts read at once
# Weights beside CTC's 1, and nats for each token, since language likes short texts; benchmarks/candidates.py fits them.
READ, SAID, LENGTH = 0.5, 0.5, 1.0


class ReadPrompt(NamedTuple):
    """A prompt that was read: its cache, one row, and the backbone's hidden state (1, H) at its end."""

    prefill: Prefill
    last: Tensor


@torch.no_grad()
def prompt_without_sound(model: DiffusionGemmaASR, language: str, context: str = "") -> ReadPrompt:
    """The prompt of a clip that holds one audio token of noise, as training has it for language alone.

    Args:
        model: that reads it.
        language, context: see `PromptBuilder.row`.
    """
    slots = noise(1, model.backbone.hidden_size, float(model.projector.scale), torch.Generator().manual_seed(0))
    one = torch.ones(1, dtype=torch.long, device=model.device)
    prefill, hidden = model.read_prompts(slots[None].to(model.head.weight), one, [language], context=context)
    return ReadPrompt(prefill, hidden[0, int(prefill.lengths[0]) - 1][None])


@torch.no_grad()
def proposed_draft(
    model: DiffusionGemmaASR,
    slots: Tensor,
    draft: list[DraftToken],
    heard: ReadPrompt,
    unheard: ReadPrompt,
    count: int,
) -> list[DraftToken]:
    """The best of the drafts that CTC finds likeliest.

    Args:
        model: that made the slots.
        slots: (S, H) of one clip.
        draft: greedy CTC's, one of the candidates.
        heard: the clip's prompt.
        unheard: see `prompt_without_sound`.
        count: candidates.
    """
    candidates = proposed(model, slots, draft, count)
    best = candidates[chosen(model, slots, candidates, heard, unheard)]
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
    model: DiffusionGemmaASR, slots: Tensor, candidates: Sequence[Sequence[int]], heard: ReadPrompt, unheard: ReadPrompt
) -> int:
    """The place of the transcript with the largest weighted sum of log-probabilities.

    Args:
        model: that made the slots.
        slots: (S, H) of one clip.
        candidates: tokens of the transcripts.
        heard, unheard: see `proposed_draft`.
    """
    by_ctc = transcript_scores(model.head, slots, candidates, model.blank)
    if all(score == -math.inf for score in by_ctc):  # more tokens than slots in each
        by_ctc = [0.0] * len(by_ctc)
    read, said = read_scores(model, candidates, heard), read_scores(model, candidates, unheard)
    totals = [
        a + READ * b + SAID * c + LENGTH * len(tokens)
        for a, b, c, tokens in zip(by_ctc, read, said, candidates, strict=True)
    ]
    return max(range(len(totals)), key=totals.__getitem__)


@torch.no_grad()
def read_scores(model: DiffusionGemmaASR, candidates: Sequence[Sequence[int]], prompt: ReadPrompt) -> list[float]:
    """Log-probabilities in nats of transcripts and their ends behind one prompt, read token after token.

    Args:
        model: with the backbone.
        candidates: tokens of the transcripts.
        prompt: that they stand behind.
    """
    prefill, last = prompt
    end, scores = model.prompts.special["end_of_turn"], []
    for at in range(0, len(candidates), ROWS):
        rows = candidates[at : at + ROWS]
        longest = max(len(row) for row in rows)
        ids = torch.tensor([[*row, end, *[end] * (longest - len(row))] for row in rows], device=model.device)  # (N, L + 1)
        counts = torch.tensor([len(row) + 1 for row in rows], device=model.device)
        hidden = last[:, None].expand(len(rows), -1, -1)  # what predicts the first token
        if longest:
            shared = prefill.keep(torch.zeros(len(rows), dtype=torch.long, device=model.device), int(prefill.lengths[0]))
            _, behind = model.backbone.extend(model.backbone.embed(ids[:, :-1]), shared)
            hidden = torch.cat([hidden, behind], 1)  # (N, L + 1, H)
        logprobs = model.head.token_log_probs(hidden.flatten(0, 1), ids.flatten()).view(ids.shape)
        used = torch.arange(longest + 1, device=model.device) < counts[:, None]
        scores += logprobs.where(used, 0.0).sum(-1).tolist()
    return scores
