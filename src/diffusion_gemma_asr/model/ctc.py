"""Connectionist temporal classification over audio slots: greedy draft, forced alignment, loss.

A path gives every slot one symbol, a token or the blank; it spells the tokens that remain when runs of one
symbol are collapsed and blanks dropped. Source: Graves et al. 2006, "Connectionist Temporal Classification".
The blank is the tokenizer's pad token. Spans are [start, end) in slots.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import DataError
from .head import Head
from .lengths import length_mask


class DraftToken(NamedTuple):
    """A token of the greedy draft: its id, its slots [start, end), and its mean probability over them."""

    id: int
    start: int
    end: int
    probability: float


class TokenSpan(NamedTuple):
    """Where a token lies in the best path: its slots [start, end), and its mean log-probability over them."""

    start: int
    end: int
    logprob: float


def collapse(best: Tensor, log_probs: Tensor, lengths: Tensor, blank: int) -> list[list[DraftToken]]:
    """Collapse the runs of one path per row and drop its blanks.

    Args:
        best: (B, S) long, the symbol of each slot.
        log_probs: (B, S) float, the log-probability of that symbol.
        lengths: (B,) long, slots in use per row.
        blank: id of the blank.

    Returns:
        the tokens of each row, in order. A token's probability is the mean over all slots of its run.
    """
    drafts = []
    probabilities = log_probs.detach().exp().tolist()
    for row, values, length in zip(best.tolist(), probabilities, lengths.tolist(), strict=True):
        draft, start = [], 0
        for end in range(1, length + 1):
            if end < length and row[end] == row[start]:
                continue
            if row[start] != blank:
                probability = sum(values[start:end]) / (end - start)
                draft.append(DraftToken(row[start], start, end, probability))
            start = end
        drafts.append(draft)
    return drafts


def slots_needed(targets: Tensor, target_lengths: Tensor) -> Tensor:
    """The fewest slots that can spell each transcript: its tokens, and a blank between equal neighbours.

    Args:
        targets: (B, L) long, padded on the right with anything.
        target_lengths: (B,) long.

    Returns:
        (B,) long.
    """
    second = torch.arange(1, max(1, targets.shape[1]), device=targets.device)  # (L - 1,)
    repeats = (targets[:, 1:] == targets[:, :-1]) & (second < target_lengths[:, None])
    return target_lengths + repeats.sum(1)


def forced_align(log_probs: Tensor, tokens: Sequence[int], blank: int) -> list[TokenSpan]:
    """The most probable path that spells exactly the tokens (Viterbi, exact, computed in float64 on the CPU).

    Args:
        log_probs: (S, V) log-probabilities of the slots in use. V may be a selection of the vocabulary's
            columns (see `Head.log_probs`); tokens and blank are then indices into that selection.
        tokens: the transcript's L tokens, none of them the blank.
        blank: index of the blank.

    Returns:
        L spans in order, none of them empty, that do not overlap.

    Raises:
        DataError: the tokens do not fit into S slots, every path has probability 0, or a token is the blank.
    """
    if blank in tokens:
        raise DataError(f"the transcript holds the blank, token {blank}; remove it before the alignment")
    if len(tokens) == 0:
        return []
    symbols = np.full(2 * len(tokens) + 1, blank)  # blank, token, blank, ..., token, blank
    symbols[1::2] = tokens
    columns = torch.as_tensor(symbols, device=log_probs.device)
    scores = log_probs.detach()[:, columns].to("cpu", torch.float64).numpy()  # (S, 2L + 1)
    states = _best_states(scores, symbols, blank)
    if states is None:
        raise DataError(
            f"{len(tokens)} tokens cannot be aligned with {len(scores)} slots; give a shorter transcript or more sound"
        )
    spans = []
    for state in range(1, len(symbols), 2):
        slots = np.flatnonzero(states == state)
        spans.append(TokenSpan(int(slots[0]), int(slots[-1]) + 1, float(scores[slots, state].mean())))
    return spans


def _best_states(scores: np.ndarray, symbols: np.ndarray, blank: int) -> np.ndarray | None:
    """Viterbi over the states of `symbols`: (S, N) scores -> (S,) state of each slot; None without a path."""
    slots, size = scores.shape
    if slots == 0:
        return None
    may_skip = np.zeros(size, dtype=bool)  # a blank may be left out between two different tokens
    may_skip[2:] = (symbols[2:] != blank) & (symbols[2:] != symbols[:-2])
    total = np.full(size, -np.inf)
    total[:2] = scores[0, :2]
    steps = np.zeros((slots, size), dtype=np.int8)  # how many states the best path moved on into each state
    arrivals = np.full((3, size), -np.inf)  # by moving on 0, 1 or 2 states
    for slot in range(1, slots):
        arrivals[0] = total
        arrivals[1, 1:] = total[:-1]
        arrivals[2, 2:] = np.where(may_skip[2:], total[:-2], -np.inf)
        steps[slot] = arrivals.argmax(0)
        total = arrivals.max(0) + scores[slot]
    state = size - 1 if total[-1] >= total[-2] else size - 2
    if not np.isfinite(total[state]):
        return None
    states = np.empty(slots, dtype=np.int64)
    for slot in range(slots - 1, -1, -1):
        states[slot] = state
        state -= int(steps[slot, state])
    return states


def only(slots: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Some slots of each row, in their order.

    Args:
        slots: (B, S, H).
        kept: (B, S) bool.

    Returns:
        (B, S', H), zeros behind each end, with gradient; how many there are (B,).
    """
    lengths = kept.sum(1)
    order = torch.argsort((~kept).long(), dim=1, stable=True)[:, : int(lengths.max())]  # (B, S')
    shorter = slots.gather(1, order[..., None].expand(-1, -1, slots.shape[2]))
    return shorter * length_mask(lengths, order.shape[1])[..., None].to(slots.dtype), lengths


@torch.no_grad()
def align(head: Head, hidden: Tensor, tokens: Sequence[int], blank: int) -> list[TokenSpan] | None:
    """`forced_align` straight from the slots (S, H) of one clip, through the head; None where it is not possible."""
    classes, (targets,) = numbered([tokens], blank)
    return _best_spans(_class_log_probs(head, hidden, classes), targets)


@torch.no_grad()
def places(head: Head, hidden: Tensor, tokens: Sequence[int], blank: int) -> list[tuple[int, int]] | None:
    """The slots [start, end) of each token in the best path through the slots (S, H) of one clip; None without a path.

    Those of `align`, without its log-probabilities: what normalises them is the same for all paths, and needs all rows of
    the head.
    """
    classes, (targets,) = numbered([tokens], blank)
    rows = head.weight[torch.tensor(classes, device=hidden.device)]  # (K, H)
    spans = _best_spans(head.cap(hidden.to(rows.dtype) @ rows.T), targets)
    return None if spans is None else [(span.start, span.end) for span in spans]


def _best_spans(scores: Tensor, targets: Sequence[int]) -> list[TokenSpan] | None:
    """`forced_align` by scores (S, K) of symbols of which the first is the blank; None where it is not possible."""
    try:
        return forced_align(scores, targets, 0)
    except DataError:
        return None


@torch.no_grad()
def transcript_scores(head: Head, hidden: Tensor, transcripts: Sequence[Sequence[int]], blank: int) -> list[float]:
    """Log-probabilities of transcripts, over all ways to spell each in the slots (S, H) of one clip, through the head;
    -inf where there is none."""
    classes, rows = numbered(transcripts, blank)
    return scores(_class_log_probs(head, hidden, classes), rows)


def numbered(transcripts: Sequence[Sequence[int]], blank: int) -> tuple[list[int], list[list[int]]]:
    """The symbols that occur in transcripts, the blank first, and the transcripts in their places among these."""
    classes = {blank: 0}
    rows = [[classes.setdefault(symbol, len(classes)) for symbol in row] for row in transcripts]
    return list(classes), rows


def _class_log_probs(head: Head, hidden: Tensor, classes: Sequence[int]) -> Tensor:
    """(S, K) log-probabilities of K tokens in the slots (S, H) of one clip."""
    columns = torch.tensor([classes], device=hidden.device)  # (1, K)
    everywhere = torch.ones(1, len(hidden), dtype=torch.bool, device=hidden.device)
    return head.log_probs(hidden[None], columns, everywhere)[0]


def scores(log_probs: Tensor, transcripts: Sequence[Sequence[int]]) -> list[float]:
    """Log-probabilities of transcripts over all ways to spell each, by those of the classes in each slot (S, K); class 0 is
    the blank; -inf where there is no way."""
    if len(log_probs) == 0:
        return [-math.inf if len(row) else 0.0 for row in transcripts]
    targets = [torch.tensor(row, dtype=torch.long) for row in transcripts]
    losses = F.ctc_loss(
        log_probs.cpu().float()[:, None].expand(-1, len(targets), -1),
        torch.nn.utils.rnn.pad_sequence(targets, batch_first=True),
        torch.full((len(targets),), len(log_probs)),
        torch.tensor([len(row) for row in targets]),
        reduction="none",
    )
    return (-losses).tolist()


def ctc_loss(
    head: Head, hidden: Tensor, targets: Tensor, slot_lengths: Tensor, target_lengths: Tensor, blank: int
) -> Tensor:
    """CTC loss of slots that go straight through the soft-capped output head.

    Equal in value and gradients to `torch.nn.functional.ctc_loss(..., reduction="mean", zero_infinity=True)`
    on the (S, B, V) log-probabilities, which never exist here: only the columns of each row's own tokens do.

    Args:
        head: its weight gets exact gradients where it requires them.
        hidden: (B, S, H) slots.
        targets: (B, L) long, transcripts padded on the right with anything.
        slot_lengths: (B,) long, slots in use, at most S.
        target_lengths: (B,) long, tokens in use, at most L.
        blank: id of the blank.

    Returns:
        scalar: the mean over rows of `ctc_losses`.

    Raises:
        DataError: a transcript holds the blank.
    """
    return ctc_losses(head, hidden, targets, slot_lengths, target_lengths, blank).mean()


def ctc_losses(
    head: Head, hidden: Tensor, targets: Tensor, slot_lengths: Tensor, target_lengths: Tensor, blank: int
) -> Tensor:
    """The loss of each row, see `ctc_loss`.

    Returns:
        (B,): the negative log-likelihood in nats divided by max(1, target length). That of a row whose transcript needs
        more slots than it has (`slots_needed`) is 0, without gradient.

    Raises:
        DataError: a transcript holds the blank.
    """
    in_use = torch.arange(targets.shape[1], device=targets.device) < target_lengths[:, None]  # (B, L)
    if bool(((targets == blank) & in_use).any()):
        raise DataError(f"a transcript holds the blank, token {blank}; remove it from the targets")
    # Local classes: 0 is the blank, i + 1 the token at i. A token that occurs again takes its first class, so
    # that the recursion sees the repeat; the later classes of the same token are then unused.
    targets = targets.masked_fill(~in_use, blank)
    targets = F.pad(targets, (0, 1), value=blank)  # (B, L + 1): never without a column
    same = targets[:, :, None] == targets[:, None, :]  # (B, L + 1, L + 1)
    classes = same.long().argmax(-1) + 1  # (B, L + 1): arg-max gives the first match
    columns = F.pad(targets, (1, 0), value=blank)  # (B, L + 2)
    fits = slots_needed(targets, target_lengths) <= slot_lengths  # (B,)
    slots = torch.arange(hidden.shape[1], device=hidden.device)
    scored = (slots < slot_lengths[:, None]) & fits[:, None]  # (B, S)
    log_probs = head.log_probs(hidden, columns, scored)  # (B, S, L + 2)
    losses = F.ctc_loss(
        log_probs.transpose(0, 1), classes, slot_lengths, target_lengths, reduction="none", zero_infinity=True
    )  # (B,)
    # The gradient that ctc_loss reports for a log-probability is exp(log_prob) - occupancy, not -occupancy.
    # That is right only behind a log_softmax over the same classes, whose backward cancels the first term.
    # Ours are normalised over the whole vocabulary, so we take it out with a term of value 0.
    extra = log_probs.exp().sum(-1).masked_fill(~scored, 0.0).sum(1)  # (B,)
    losses = losses - (extra - extra.detach())
    return losses / target_lengths.clamp(min=1)
