"""The likeliest transcripts under CTC, without a language model: prefix beam search (Hannun et al. 2014, arXiv 1408.2873).

The greedy path takes the best symbol of each slot; here the chances of all paths that spell one transcript are added up,
and several transcripts come out, for something else to choose from.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from heapq import nlargest
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .head import Head

BEAM = 16  # prefixes that are kept after each slot, at least
TRIED = 8  # tokens that are tried in each slot
LEAST = -9.0  # nats; what is less likely in a slot is not tried there
NEVER = -math.inf

Prefix = tuple[int, ...]


class Slot(NamedTuple):
    """What CTC hears in a slot: log-probabilities in nats of the blank, and of its likeliest tokens."""

    blank: float
    tokens: list[tuple[int, float]]


@torch.no_grad()
def heard_in(head: Head, slots: Tensor, blank: int) -> list[Slot]:
    """What CTC hears in each slot.

    Args:
        head: of the backbone.
        slots: (S, H), without padding.
        blank: id of the CTC blank.
    """
    if not len(slots):
        return []

    def best(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        log_probs = head.logits(hidden).log_softmax(-1)  # (n, V)
        blanks = log_probs[:, blank].clone()
        log_probs[:, blank] = NEVER
        values, tokens = log_probs.topk(min(TRIED, log_probs.shape[-1] - 1))
        return blanks, values, tokens

    columns = (torch.cat(column).tolist() for column in zip(*head.over_chunks(best, slots), strict=True))
    return [
        Slot(silent, [(token, value) for token, value in zip(tokens, values, strict=True) if value >= LEAST])
        for silent, values, tokens in zip(*columns, strict=True)
    ]


def likeliest(heard: Sequence[Slot], count: int) -> list[tuple[Prefix, float]]:
    """The likeliest transcripts of some slots.

    Args:
        heard: in each slot.
        count: transcripts wanted, at least 1.

    Returns:
        at most `count` transcripts, the likeliest first, and their log-probabilities in nats, as far as the search has seen
        their paths; one without tokens is among them where silence is likely.
    """
    width = max(BEAM, 2 * count)
    beams: dict[Prefix, tuple[float, float]] = {(): (0.0, NEVER)}  # of paths that end in a blank, and in the last token
    for silent, tried in heard:
        grown: dict[Prefix, list[float]] = defaultdict(lambda: [NEVER, NEVER])
        for prefix, (in_blank, in_token) in beams.items():
            total = either(in_blank, in_token)
            same = grown[prefix]
            same[0] = either(same[0], total + silent)
            for token, value in tried:
                repeats = bool(prefix) and token == prefix[-1]
                if repeats:
                    same[1] = either(same[1], in_token + value)
                longer = grown[(*prefix, token)]
                longer[1] = either(longer[1], (in_blank if repeats else total) + value)
        kept = nlargest(width, grown.items(), key=lambda item: either(*item[1]))
        beams = {prefix: (scores[0], scores[1]) for prefix, scores in kept}
    found = [(prefix, either(*scores)) for prefix, scores in beams.items()]
    return nlargest(count, found, key=lambda item: item[1])


def pieces(heard: Sequence[Slot], size: int) -> list[tuple[int, int]]:
    """Cuts slots into pieces [start, end) of about `size` each, from a half to one and a half of it, where CTC is surest of
    blanks."""
    silent = [sum(slot.blank for slot in heard[max(0, i - 1) : i + 2]) for i in range(len(heard))]
    cuts = [0]
    while len(heard) - cuts[-1] > 1.5 * size:
        cuts.append(max(range(cuts[-1] + (size + 1) // 2, cuts[-1] + 3 * size // 2), key=silent.__getitem__))
    return list(pairwise([*cuts, len(heard)]))


def either(a: float, b: float) -> float:
    """log(e^a + e^b)."""
    if a < b:
        a, b = b, a
    return a if b == NEVER else a + math.log1p(math.exp(b - a))
