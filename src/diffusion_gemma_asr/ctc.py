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

from .errors import DataError
from .losses import default_chunk, over_chunks, soft_capped_logits


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


def greedy_draft(logits: Tensor, lengths: Tensor, blank: int) -> list[list[DraftToken]]:
    """The tokens of the most probable path of each row, with spans and probabilities (see `collapse`).

    Args:
        logits: (B, S, V) logits or log-probabilities: both give the same.
        lengths: (B,) long, slots in use per row.
        blank: id of the blank.
    """
    log_probs, best = logits.log_softmax(-1).max(-1)  # (B, S) each
    return collapse(best, log_probs, lengths, blank)


def greedy(logits: Tensor, lengths: Tensor, blank: int) -> list[list[int]]:
    """The token ids of `greedy_draft` alone."""
    return [[token.id for token in draft] for draft in greedy_draft(logits, lengths, blank)]


@torch.no_grad()
def lm_head_draft(
    hidden: Tensor,
    weight: Tensor,
    softcap: float,
    lengths: Tensor,
    blank: int,
    chunk_positions: int | None = None,
) -> list[list[DraftToken]]:
    """`greedy_draft` straight from hidden states (B, S, H), projected by the head (V, H) in chunks."""

    def best_of(weight: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        log_probs, best = soft_capped_logits(hidden, weight, softcap).log_softmax(-1).max(-1)
        return log_probs, best

    chunk = default_chunk(weight.shape[0]) if chunk_positions is None else chunk_positions
    parts = over_chunks(best_of, chunk, weight, hidden.flatten(0, 1))
    log_probs = torch.cat([part[0] for part in parts]).view(hidden.shape[:2])  # (B*S,) -> (B, S)
    best = torch.cat([part[1] for part in parts]).view(hidden.shape[:2])
    return collapse(best, log_probs, lengths, blank)


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
            columns (see `lm_head_log_probs`); tokens and blank are then indices into that selection.
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


def lm_head_log_probs(
    hidden: Tensor,
    weight: Tensor,
    softcap: float,
    columns: Tensor,
    mask: Tensor,
    chunk_positions: int | None = None,
) -> Tensor:
    """Log-probabilities of some tokens under the soft-capped output head, without (B, S, V) logits.

    The log-normaliser is computed over the whole vocabulary, some positions at a time, and anew in the
    backward pass.

    Args:
        hidden: (B, S, H) hidden states.
        weight: (V, H) rows of the output head.
        softcap: bound of the logits' absolute value.
        columns: (B, K) long, the tokens wanted for each row; one may occur more than once.
        mask: (B, S) bool, the positions to normalise.
        chunk_positions: positions projected at a time; None takes `losses.default_chunk(V)`.

    Returns:
        (B, S, K) log-probabilities, 0 outside the mask. Float32 (float64 for a float64 head).
    """

    def normaliser(weight: Tensor, hidden: Tensor) -> tuple[Tensor]:
        return (soft_capped_logits(hidden, weight, softcap).logsumexp(-1),)

    chunk = default_chunk(weight.shape[0]) if chunk_positions is None else chunk_positions
    parts = over_chunks(normaliser, chunk, weight, hidden[mask])
    log_z = torch.cat([part[0] for part in parts])  # (mask.sum(),)
    rows = F.embedding(columns, weight)  # (B, K, H)
    logits = hidden.to(weight.dtype) @ rows.transpose(1, 2)  # (B, S, K)
    logits = softcap * torch.tanh(logits.to(log_z.dtype) / softcap)
    nothing = torch.zeros(mask.shape, dtype=log_z.dtype, device=log_z.device)
    log_z = nothing.masked_scatter(mask, log_z)  # (B, S)
    return (logits - log_z[..., None]).masked_fill(~mask[..., None], 0.0)


@torch.no_grad()
def lm_head_align(
    hidden: Tensor, weight: Tensor, softcap: float, tokens: Sequence[int], blank: int
) -> list[TokenSpan] | None:
    """`forced_align` straight from the slots (S, H) of one clip, through the head (V, H); None where it is not possible."""
    classes, (targets,) = numbered([tokens], blank)
    try:
        return forced_align(_lm_head_columns(hidden, weight, softcap, classes), targets, 0)
    except DataError:
        return None


@torch.no_grad()
def lm_head_scores(
    hidden: Tensor, weight: Tensor, softcap: float, transcripts: Sequence[Sequence[int]], blank: int
) -> list[float]:
    """Log-probabilities of transcripts, over all ways to spell each in the slots (S, H) of one clip, through the head
    (V, H); -inf where there is none."""
    classes, rows = numbered(transcripts, blank)
    return scores(_lm_head_columns(hidden, weight, softcap, classes), rows)


def numbered(transcripts: Sequence[Sequence[int]], blank: int) -> tuple[list[int], list[list[int]]]:
    """The symbols that occur in transcripts, the blank first, and the transcripts in their places among these."""
    classes = {blank: 0}
    rows = [[classes.setdefault(symbol, len(classes)) for symbol in row] for row in transcripts]
    return list(classes), rows


def _lm_head_columns(hidden: Tensor, weight: Tensor, softcap: float, classes: Sequence[int]) -> Tensor:
    """(S, K) log-probabilities of K tokens in the slots (S, H) of one clip."""
    columns = torch.tensor([classes], device=hidden.device)  # (1, K)
    everywhere = torch.ones(1, len(hidden), dtype=torch.bool, device=hidden.device)
    return lm_head_log_probs(hidden[None], weight, softcap, columns, everywhere)[0]


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


def lm_head_ctc_loss(
    hidden: Tensor,
    weight: Tensor,
    softcap: float,
    targets: Tensor,
    slot_lengths: Tensor,
    target_lengths: Tensor,
    blank: int,
    chunk_positions: int | None = None,
) -> Tensor:
    """CTC loss of slots that go straight through the soft-capped output head.

    Equal in value and gradients to `torch.nn.functional.ctc_loss(..., reduction="mean", zero_infinity=True)`
    on the (S, B, V) log-probabilities, which never exist here: only the columns of each row's own tokens do.

    Args:
        hidden: (B, S, H) slots.
        weight: (V, H) rows of the output head; gets exact gradients where it requires them.
        softcap: bound of the logits' absolute value.
        targets: (B, L) long, transcripts padded on the right with anything.
        slot_lengths: (B,) long, slots in use, at most S.
        target_lengths: (B,) long, tokens in use, at most L.
        blank: id of the blank.
        chunk_positions: positions projected at a time; None takes `losses.default_chunk(V)`.

    Returns:
        scalar: the mean over rows of the negative log-likelihood in nats divided by max(1, target length). A
        row whose transcript needs more slots than it has (`slots_needed`) adds 0 to the sum and gets no
        gradient.

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
    log_probs = lm_head_log_probs(hidden, weight, softcap, columns, scored, chunk_positions)  # (B, S, L + 2)
    losses = F.ctc_loss(
        log_probs.transpose(0, 1), classes, slot_lengths, target_lengths, reduction="none", zero_infinity=True
    )  # (B,)
    # The gradient that ctc_loss reports for a log-probability is exp(log_prob) - occupancy, not -occupancy.
    # That is right only behind a log_softmax over the same classes, whose backward cancels the first term.
    # Ours are normalised over the whole vocabulary, so we take it out with a term of value 0.
    extra = log_probs.exp().sum(-1).masked_fill(~scored, 0.0).sum(1)  # (B,)
    losses = losses - (extra - extra.detach())
    return (losses / target_lengths.clamp(min=1)).mean()
