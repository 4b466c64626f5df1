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
from functools import reduce
from heapq import nlargest
from typing import NamedTuple

import torch
from torch import Tensor

from ..model.ctc import DraftToken, transcript_scores
from ..model.ctc_beam import Prefix, heard_in, likeliest, pieces
from ..model.model import DiffusionGemmaASR
from ..model.prefill import Prefill
from .token_tree import read_tree

ROWS = 96  # transcripts read at once at most
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
    begun = [Beginning((), 0.0, 0.0, *prompt_without_sound(model, language, context))]
    for start, end in pieces(heard, max(2, round(PIECE_S / model.slot_s))):
        begun = continued(model, begun, likeliest(heard[start:end], count), weights, last=end == len(heard))
    return begun[0].tokens


class Beginning(NamedTuple):
    """Of a transcript.

    Attributes:
        tokens: of it.
        score: CTC's, and what the length adds, nats.
        said: log-probability that the backbone gives it without sound, nats.
        prefill: the prompt without sound and the tokens, one row.
        last: (1, H), hidden state at its end.
    """

    tokens: Prefix
    score: float
    said: float
    prefill: Prefill
    last: Tensor


def continued(
    model: DiffusionGemmaASR,
    begun: Sequence[Beginning],
    found: Sequence[tuple[Prefix, float]],
    weights: Weights,
    last: bool,
) -> list[Beginning]:
    """The best beginnings that go on with a piece, the best first, `BEGINNINGS` at most.

    Args:
        model: with the backbone.
        begun: what is there so far.
        found: transcripts of the piece, with their log-probabilities under CTC.
        weights: of the scores.
        last: whether the transcript ends with this piece; nothing goes on behind what is returned then.
    """
    prefill = reduce(Prefill.join, [one.prefill for one in begun])
    states = torch.cat([one.last for one in begun])
    size = max(1, ROWS // len(begun))
    end = model.prompts.special["end_of_turn"] if last else None
    reading = [
        read_tree(model.backbone, [tokens for tokens, _ in found[at : at + size]], prefill, states, end)
        for at in range(0, len(found), size)
    ]
    grown: dict[Prefix, tuple[float, float, float, int, int]] = {}  # total, score, said, places of beginning and piece
    for number, beginning in enumerate(begun):
        for place, (tokens, more) in enumerate(found):
            part, row = reading[place // size], place % size
            score = beginning.score + more + weights.length * len(tokens)
            said = beginning.said + part.said[number][row]
            total = score + weights.language * (said + part.ended[number][row])
            whole = (*beginning.tokens, *tokens)
            if whole not in grown or score > grown[whole][1]:
                grown[whole] = total, score, said, number, place
    best = nlargest(1 if last else BEGINNINGS, grown.items(), key=lambda item: item[1][0])
    return [
        Beginning(whole, score, said, *reading[place // size].behind(number, place % size))
        for whole, (_, score, said, number, place) in best
    ]


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
    end = model.prompts.special["end_of_turn"]
    parts = [
        read_tree(model.backbone, candidates[at : at + ROWS], prefill, last, end) for at in range(0, len(candidates), ROWS)
    ]
    return [said + ended for part in parts for said, ended in zip(part.said[0], part.ended[0], strict=True)]


@torch.no_grad()
def prompt_without_sound(model: DiffusionGemmaASR, language: str, context: str = "") -> tuple[Prefill, Tensor]:
    """A prompt that holds one audio token without sound, as training has it for language alone.

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
    slots = model.projector.without_sound(1, torch.Generator().manual_seed(0))
    one = torch.ones(1, dtype=torch.long, device=model.device)
    prefill, hidden = model.read_prompts(slots[None].to(model.head.weight), one, [language], context=context)
    return prefill, hidden[0, int(prefill.lengths[0]) - 1][None]
