"""Several transcripts of a clip, of which the backbone chooses one: the likeliest as it reads them, and as CTC hears them.

The backbone's encoder is an autoregressive language model that has heard the clip: behind the same prompt it gives each
transcript a probability, token by token, all of them in one pass over one cache. CTC gives another, straight from the
sound. The transcript whose product of both is largest is taken: n-best rescoring with no other model than the system itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..model.backbone import Prefill
from ..model.ctc import DraftToken, transcript_scores
from ..model.ctc_beam import likeliest
from ..model.model import DiffusionGemmaASR

ROWS = 32  # transcripts read at once


@torch.no_grad()
def proposed_draft(
    model: DiffusionGemmaASR, slots: Tensor, draft: list[DraftToken], prefill: Prefill, last: Tensor, count: int
) -> list[DraftToken]:
    """The best of the drafts that CTC finds likeliest.

    Args:
        model: that made the slots.
        slots: (S, H) of one clip.
        draft: greedy CTC's, one of the candidates.
        prefill: of the clip's prompt, one row.
        last: (1, H), the backbone's hidden state at the prompt's end.
        count: candidates.
    """
    found = [prefix for prefix, _ in likeliest(model.head, slots, model.blank, count)]
    greedy = tuple(token.id for token in draft)
    candidates = list(dict.fromkeys([greedy, *found]))[:count]
    best = candidates[chosen(model, slots, candidates, prefill, last)]
    spans = None if best == greedy else model.align(slots, best)
    if spans is None:
        return draft
    aligned = zip(best, spans, strict=True)
    return [DraftToken(token, span.start, span.end, math.exp(span.logprob)) for token, span in aligned]


@torch.no_grad()
def chosen(
    model: DiffusionGemmaASR, slots: Tensor, candidates: Sequence[Sequence[int]], prefill: Prefill, last: Tensor
) -> int:
    """The place of the transcript with the largest sum of log-probabilities: the backbone's and CTC's.

    Args:
        model: that made the slots.
        slots: (S, H) of one clip.
        candidates: tokens of the transcripts.
        prefill: see `proposed_draft`.
        last: see `proposed_draft`.
    """
    read = read_scores(model, candidates, prefill, last)
    heard = transcript_scores(model.head, slots, candidates, model.blank)
    if all(score == -math.inf for score in heard):  # more tokens than slots in each
        heard = [0.0] * len(heard)
    totals = [a + b for a, b in zip(read, heard, strict=True)]
    return max(range(len(totals)), key=totals.__getitem__)


@torch.no_grad()
def read_scores(
    model: DiffusionGemmaASR, candidates: Sequence[Sequence[int]], prefill: Prefill, last: Tensor
) -> list[float]:
    """Log-probabilities in nats of transcripts and their ends behind one prompt, read token after token.

    Args:
        model: with the backbone.
        candidates: tokens of the transcripts.
        prefill: see `proposed_draft`.
        last: see `proposed_draft`.
    """
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
