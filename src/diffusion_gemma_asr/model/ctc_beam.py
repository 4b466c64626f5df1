"""The likeliest transcripts under CTC, without a language model: prefix beam search (Hannun et al. 2014, arXiv 1408.2873).

The greedy path takes the best symbol of each slot; here the chances of all paths that spell one transcript are added up,
and several transcripts come out, for something else to choose from.
"""

from __future__ import annotations

import math
from collections import defaultdict
from heapq import nlargest

import torch
from torch import Tensor

from .head import Head

BEAM = 16  # prefixes that are kept after each slot, at least
TRIED = 8  # tokens that are tried in each slot
LEAST = -9.0  # nats; what is less likely in a slot is not tried there
NEVER = -math.inf

Prefix = tuple[int, ...]


@torch.no_grad()
def likeliest(head: Head, slots: Tensor, blank: int, count: int) -> list[tuple[Prefix, float]]:
    """The likeliest transcripts of one clip.

    Args:
        head: of the backbone.
        slots: (S, H), without padding.
        blank: id of the CTC blank.
        count: transcripts wanted, at least 1.

    Returns:
        at most `count` transcripts, the likeliest first, and their log-probabilities in nats, as far as the search has seen
        their paths; one without tokens is among them where silence is likely.
    """
    if not len(slots):
        return [((), 0.0)]

    def best(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        log_probs = head.logits(hidden).log_softmax(-1)  # (n, V)
        blanks = log_probs[:, blank].clone()
        log_probs[:, blank] = NEVER
        values, tokens = log_probs.topk(min(TRIED, log_probs.shape[-1] - 1))
        return blanks, values, tokens

    blanks, values, tokens = (torch.cat(column).tolist() for column in zip(*head.over_chunks(best, slots), strict=True))
    width = max(BEAM, 2 * count)
    beams: dict[Prefix, tuple[float, float]] = {(): (0.0, NEVER)}  # of paths that end in a blank, and in the last token
    for slot_blank, slot_values, slot_tokens in zip(blanks, values, tokens, strict=True):
        tried = [(token, value) for token, value in zip(slot_tokens, slot_values, strict=True) if value >= LEAST]
        grown: dict[Prefix, list[float]] = defaultdict(lambda: [NEVER, NEVER])
        for prefix, (in_blank, in_token) in beams.items():
            total = either(in_blank, in_token)
            same = grown[prefix]
            same[0] = either(same[0], total + slot_blank)
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


def either(a: float, b: float) -> float:
    """log(e^a + e^b)."""
    if a < b:
        a, b = b, a
    return a if b == NEVER else a + math.log1p(math.exp(b - a))
