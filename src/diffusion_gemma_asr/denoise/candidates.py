"""Several transcripts of a clip, of which the backbone chooses one: n-best rescoring by the system itself.

The backbone's encoder is an autoregressive language model: behind a prompt without sound it says how likely anybody is to
say a transcript. CTC says how likely the transcript is by the sound alone. The one with the largest weighted sum of both
logarithms is taken. What the backbone makes of a transcript behind the clip's own prompt is left out: a small backbone that
was trained on few hours believes its audio tokens too readily, and with what it knows without sound and CTC there is
nothing left for it to add (docs/results/candidates.md).

A draft is put together piece by piece. CTC proposes transcripts of each, and the backbone reads them behind the best
beginnings so far: the N likeliest transcripts of half a minute differ in a word or two, those of two seconds in everything
that is in doubt there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from heapq import nlargest
from typing import NamedTuple

import torch
from torch import Tensor

from ..model.ctc import DraftToken, transcript_scores
from ..model.ctc_beam import Prefix, heard_in, likeliest, pieces
from ..model.model import DiffusionGemmaASR
from ..model.prefill import Prefill
from ..model.projector import noise

ROWS = 96  # transcripts read at once
PIECE_S = 2.0  # seconds of a piece, about
BEGINNINGS = 3  # that are kept behind each piece
PROMPTS = 8  # without sound that a model keeps, by language and context


class Weights(NamedTuple):
    """Of the scores, beside CTC's 1; benchmarks/candidates.py fits them.

    Attributes:
        language: of the log-probability that the backbone gives.
        length: nats for each token, since language likes short texts.
    """

    language: float = 0.4
    length: float = 2.0


WEIGHTS = Weights()


@torch.no_grad()
def proposed_draft(
    model: DiffusionGemmaASR,
    slots: Tensor,
    draft: list[DraftToken],
    count: int,
    language: str,
    context: str = "",
    weights: Weights = WEIGHTS,
) -> list[DraftToken]:
    """The best draft that can be put together.

    Args:
        model: that made the slots.
        slots: (S, H) of one clip.
        draft: greedy CTC's, which is kept where nothing is better.
        count: transcripts that CTC proposes of each piece.
        language, context: see `PromptBuilder.row`.
        weights: of the scores.
    """
    tokens = proposed(model, slots, count, language, context, weights)
    spans = None if tokens == tuple(token.id for token in draft) else model.align(slots, tokens)
    if spans is None:
        return draft
    return [
        DraftToken(token, span.start, span.end, math.exp(span.logprob)) for token, span in zip(tokens, spans, strict=True)
    ]


def proposed(
    model: DiffusionGemmaASR, slots: Tensor, count: int, language: str, context: str, weights: Weights = WEIGHTS
) -> Prefix:
    """The tokens of that draft."""
    heard = heard_in(model.head, slots, model.blank)
    prefill, last = prompt_without_sound(model, language, context)
    best: dict[Prefix, float] = {(): 0.0}  # beginnings, with their scores without language
    for start, end in pieces(heard, max(2, round(PIECE_S / model.slot_s))):
        found = likeliest(heard[start:end], count)
        rows: dict[Prefix, float] = {}
        for beginning, score in best.items():
            for tokens, more in found:
                row, total = (*beginning, *tokens), score + more + weights.length * len(tokens)
                rows[row] = max(total, rows.get(row, total))
        read = _read(model, list(rows), prefill, last)
        ranked = zip(rows.items(), read, strict=True)
        totals = {
            row: score + weights.language * (said + ended * (end == len(heard))) for (row, score), (said, ended) in ranked
        }
        best = {row: rows[row] for row in nlargest(BEGINNINGS, rows, key=totals.__getitem__)}
    return next(iter(best))


@torch.no_grad()
def chosen(
    model: DiffusionGemmaASR, slots: Tensor, candidates: Sequence[Sequence[int]], language: str, context: str = ""
) -> int:
    """The place of the best of several whole transcripts.

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
    totals = [
        a + WEIGHTS.language * b + WEIGHTS.length * len(row) for a, b, row in zip(by_ctc, said, candidates, strict=True)
    ]
    return max(range(len(totals)), key=totals.__getitem__)


def language_scores(
    model: DiffusionGemmaASR, candidates: Sequence[Sequence[int]], language: str, context: str = ""
) -> list[float]:
    """Log-probabilities in nats of transcripts and their ends, read token after token behind a prompt without sound.

    Args:
        model: with the backbone.
        candidates: tokens of the transcripts.
        language, context: see `PromptBuilder.row`.
    """
    prefill, last = prompt_without_sound(model, language, context)
    return [said + ended for said, ended in _read(model, candidates, prefill, last)]


@torch.no_grad()
def prompt_without_sound(model: DiffusionGemmaASR, language: str, context: str = "") -> tuple[Prefill, Tensor]:
    """A prompt that holds one audio token of noise, as training has it for language alone.

    A model whose weights are all frozen keeps the last `PROMPTS`, since every clip of a language asks for the same.

    Returns:
        its cache, one row, and the backbone's hidden state (1, H) at its end.
    """
    asked, kept = (language, context, model.device), model.without_sound
    if any(parameter.requires_grad for parameter in model.parameters()):
        kept.clear()
        return _read_without_sound(model, language, context)
    found: tuple[Prefill, Tensor] = kept.pop(asked, None) or _read_without_sound(model, language, context)
    for oldest in list(kept)[: max(0, len(kept) + 1 - PROMPTS)]:
        kept.pop(oldest, None)
    kept[asked] = found
    return found


def _read_without_sound(model: DiffusionGemmaASR, language: str, context: str) -> tuple[Prefill, Tensor]:
    """Reads it."""
    slots = noise(1, model.backbone.hidden_size, float(model.projector.scale), torch.Generator().manual_seed(0))
    one = torch.ones(1, dtype=torch.long, device=model.device)
    prefill, hidden = model.read_prompts(slots[None].to(model.head.weight), one, [language], context=context)
    return prefill, hidden[0, int(prefill.lengths[0]) - 1][None]


def _read(
    model: DiffusionGemmaASR, rows: Sequence[Sequence[int]], prefill: Prefill, last: Tensor
) -> list[tuple[float, float]]:
    """The log-probability of each row of tokens behind a prompt, and of an end behind the row.

    What rows begin with in common is read once: they are a tree, in which a token sees those that lead to it.
    """
    return [pair for at in range(0, len(rows), ROWS) for pair in _read_at_once(model, rows[at : at + ROWS], prefill, last)]


def _read_at_once(
    model: DiffusionGemmaASR, rows: Sequence[Sequence[int]], prefill: Prefill, hidden: Tensor
) -> list[tuple[float, float]]:
    """The same of few rows; hidden (1, H) is what predicts a first token."""
    places: dict[Prefix, int] = {(): 0}  # of each beginning of a row
    before, tokens = [0], [0]  # of each place: that of the beginning without its last token, and this token
    for row in rows:
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
    ends = [places[tuple(row)] for row in rows]
    predicting = torch.tensor([*before[1:], *ends], device=device)
    predicted = [*tokens[1:], *[model.prompts.special["end_of_turn"]] * len(ends)]
    found = model.head.token_log_probs(hidden[predicting], torch.tensor(predicted, device=device)).tolist()
    totals = [0.0]
    for place in range(1, len(tokens)):
        totals.append(totals[before[place]] + found[place - 1])
    return [(totals[end], ended) for end, ended in zip(ends, found[len(tokens) - 1 :], strict=True)]
