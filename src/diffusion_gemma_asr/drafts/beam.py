"""The draft that CTC and a language model find together: prefix beam search (Hannun et al. 2014, arXiv 1408.2873).

A transcript's score is its log-probability under CTC, over all ways to spell it, plus `weight` times that of the language
model, plus `bonus` a token, without which short transcripts would win. The greedy draft (ctc.py) takes every slot on its
own; here a token that was heard half gets in because it follows from those before it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import nlargest
from typing import NamedTuple

import numpy as np
import torch

from ..model.ctc import DraftToken, forced_align, numbered
from .ngram import NgramLM

WIDTH = 12  # transcripts that are kept after each slot
LEAST = -7.0  # nats; tokens that are less likely in a slot are not tried there
NEVER = -1e30
UNHEARD = -20.0  # nats, of tokens that are not among a slot's likely ones

Prefix = tuple[int, ...]


@dataclass(frozen=True)
class DraftLM:
    """A language model, what it sees at both ends of a transcript, and how much it counts in drafts."""

    lm: NgramLM
    bos: int
    eos: int
    weight: float
    bonus: float  # nats a token

    @property
    def reach(self) -> int:
        """Tokens before one that it looks at."""
        return self.lm.order - 1

    def context(self, before: Sequence[int]) -> Prefix:
        """What it looks at behind a transcript's first tokens."""
        return (self.bos, *before)[-self.reach :] if self.reach else ()


class _Beam(NamedTuple):
    """Log-probabilities of all paths of one transcript that end in a blank and in its last token; its language score."""

    blank: float
    token: float
    language: float

    @property
    def heard(self) -> float:
        return either(self.blank, self.token)


def draft_with_lm(ids: np.ndarray, logprobs: np.ndarray, blanks: np.ndarray, blank: int, model: DraftLM) -> list[DraftToken]:
    """The draft of one clip, its tokens where CTC finds them likeliest; the arguments are those of `beam_search`."""
    found = beam_search(ids, logprobs, blanks, blank, model)
    classes, (targets,) = numbered([found], blank)
    spans = forced_align(heard_columns(ids, logprobs, blanks, classes), targets, 0)
    return [DraftToken(token, s.start, s.end, math.exp(s.logprob)) for token, s in zip(found, spans, strict=True)]


def heard_columns(ids: np.ndarray, logprobs: np.ndarray, blanks: np.ndarray, classes: Sequence[int]) -> torch.Tensor:
    """(S, C) log-probabilities of C classes, the blank first, where only the likely ones of each slot are known: ids and
    logprobs (S, K), blanks (S,)."""
    columns = np.full((len(ids), len(classes)), UNHEARD)
    for column, found in enumerate(classes):
        slots, places = np.nonzero(ids == found)
        columns[slots, column] = logprobs[slots, places]
    columns[:, 0] = blanks
    return torch.from_numpy(columns)


def beam_search(ids: np.ndarray, logprobs: np.ndarray, blanks: np.ndarray, blank: int, model: DraftLM) -> list[int]:
    """The best transcript found.

    Args:
        ids: (S, K) tokens that are likely in each slot; logprobs: (S, K) of these.
        blanks: (S,) log-probabilities of the blank.
    """
    known: dict[tuple[Prefix, int], float] = {}  # language scores

    def learn(pairs: set[tuple[Prefix, int]]) -> None:
        new = list(pairs - known.keys())
        if new:
            scores = model.lm.logprobs([pair[0] for pair in new], [pair[1] for pair in new])
            known.update(zip(new, (model.weight * scores).tolist(), strict=True))

    beams: dict[Prefix, _Beam] = {(): _Beam(0.0, NEVER, 0.0)}
    for row, values, silent in zip(ids.tolist(), logprobs.tolist(), blanks.tolist(), strict=True):
        heard = [(token, value) for token, value in zip(row, values, strict=True) if token != blank and value > LEAST]
        if not heard:
            beams = {prefix: _Beam(beam.heard + silent, NEVER, beam.language) for prefix, beam in beams.items()}
            continue
        values_of, contexts = dict(heard), {prefix: model.context(prefix) for prefix in beams}
        learn({(context, token) for context in contexts.values() for token, _ in heard})
        found: dict[Prefix, _Beam] = {}
        for prefix, beam in beams.items():
            total, context = beam.heard, contexts[prefix]
            stays = beam.token + values_of.get(prefix[-1], NEVER) if prefix else NEVER
            old = found.get(prefix)
            blanked = total + silent
            found[prefix] = (
                _Beam(blanked, stays, beam.language)
                if old is None
                else _Beam(either(old.blank, blanked), either(old.token, stays), beam.language)
            )
            for token, value in heard:
                before = beam.blank if prefix and token == prefix[-1] else total
                if before <= NEVER:
                    continue
                longer = (*prefix, token)
                old = found.get(longer)
                if old is not None:
                    found[longer] = old._replace(token=either(old.token, before + value))
                else:
                    language = beam.language + known[context, token] + model.bonus
                    found[longer] = _Beam(NEVER, before + value, language)
        beams = dict(nlargest(WIDTH, found.items(), key=lambda item: item[1].heard + item[1].language))
    contexts = {prefix: model.context(prefix) for prefix in beams}
    learn({(context, model.eos) for context in contexts.values()})
    ended = {prefix: beam.heard + beam.language + known[contexts[prefix], model.eos] for prefix, beam in beams.items()}
    best, _ = max(ended.items(), key=lambda item: item[1])
    return list(best)


def either(a: float, b: float) -> float:
    """log(exp(a) + exp(b)), of nats."""
    if a < b:
        a, b = b, a
    return a if b <= NEVER else a + math.log1p(math.exp(b - a))
