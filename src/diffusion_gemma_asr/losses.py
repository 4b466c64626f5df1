"""Cross-entropy through the backbone's output head, without ever holding (positions, vocabulary) logits.

The head has up to 262144 rows: float32 logits of one thousand positions are 1 GB, and their backward pass
needs several such matrices. The functions here walk over the positions in chunks and compute each chunk
anew in the backward pass. Values and gradients (to the hidden states, and to the head where it is trained)
are those of the plain formula.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_ELEMENTS = 2**24  # logits of one chunk: 64 MB in float32


def soft_capped_logits(hidden: Tensor, weight: Tensor, softcap: float) -> Tensor:
    """Project hidden states on the vocabulary and squash the result into (-softcap, softcap).

    The product runs in the dtype of the head, the rest in float32 (float64 for a float64 head).

    Args:
        hidden: (..., H) hidden states.
        weight: (V, H) rows of the output head.
        softcap: bound of the logits' absolute value, greater than zero.

    Returns:
        (..., V) logits, softcap * tanh(hidden @ weight.T / softcap). Source: Gemma 2 (arXiv:2408.00118).
    """
    logits = F.linear(hidden.to(weight.dtype), weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return softcap * torch.tanh(logits / softcap)


def default_chunk(vocab_size: int) -> int:
    """Positions per chunk such that its logits are at most `CHUNK_ELEMENTS` elements (at least 1)."""
    return max(1, CHUNK_ELEMENTS // vocab_size)


def over_chunks(
    function: Callable[..., tuple[Tensor, ...]], chunk: int, weight: Tensor, *tensors: Tensor
) -> list[tuple[Tensor, ...]]:
    """Call `function(weight, *parts)` on parts of the tensors; the backward pass computes each part anew.

    One chunk alone is not computed anew: it fits, and small vocabularies keep their full speed.

    Args:
        function: takes the weight and one part of each tensor; must be deterministic.
        chunk: rows per part, at least 1.
        weight: handed to every call whole.
        tensors: each (N, ...), split along the first dimension. N may be 0: that is one empty part.

    Returns:
        what each call returned, in order.

    Raises:
        ValueError: chunk is less than 1.
    """
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; give at least 1 position per chunk")
    parts = list(zip(*(torch.split(tensor, chunk) for tensor in tensors), strict=True))
    if len(parts) == 1 or not torch.is_grad_enabled():
        return [function(weight, *part) for part in parts]
    return [checkpoint(function, weight, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]


def lm_head_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    softcap: float,
    targets: Tensor,
    mask: Tensor | None = None,
    chunk_positions: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of the soft-capped output head over the masked positions.

    Only the masked positions are projected. Gradients reach `hidden`, and `weight` where it requires them.

    Args:
        hidden: (..., H) hidden states.
        weight: (V, H) rows of the output head.
        softcap: bound of the logits' absolute value.
        targets: (...) long, the right token of every position; not looked at outside the mask.
        mask: (...) bool, the positions that count; None counts all.
        chunk_positions: positions projected at a time; None takes `default_chunk(V)`.

    Returns:
        (loss, accuracy), both scalars: the mean negative log-likelihood in nats, and the share of positions
        whose arg-max is the target (without gradient). Both are 0 where the mask is empty.

    Raises:
        ValueError: the shapes of hidden, targets and mask do not match.
    """
    if hidden.shape[:-1] != targets.shape or (mask is not None and mask.shape != targets.shape):
        shapes = f"hidden {tuple(hidden.shape)}, targets {tuple(targets.shape)}"
        shapes += "" if mask is None else f", mask {tuple(mask.shape)}"
        raise ValueError(f"{shapes}: give hidden (..., H) with targets and mask (...)")
    if mask is None:
        hidden, targets = hidden.flatten(0, -2), targets.flatten()  # (N, H), (N,)
    else:
        hidden, targets = hidden[mask], targets[mask]  # (N, H), (N,)

    def chunk_sums(weight: Tensor, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = soft_capped_logits(hidden, weight, softcap)  # (n, V)
        correct = (logits.detach().argmax(-1) == targets).sum()
        return F.cross_entropy(logits, targets, reduction="sum"), correct

    chunk = default_chunk(weight.shape[0]) if chunk_positions is None else chunk_positions
    sums = over_chunks(chunk_sums, chunk, weight, hidden, targets)
    count = max(1, targets.numel())
    loss = torch.stack([nll for nll, _ in sums]).sum() / count
    accuracy = torch.stack([correct for _, correct in sums]).sum() / count
    return loss, accuracy


def diffusion_loss(
    hidden: Tensor,
    weight: Tensor,
    softcap: float,
    x0: Tensor,
    mask: Tensor,
    chunk_positions: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Flat cross-entropy of the clean canvas: every supervised position counts the same, corrupted or not.

    There is no 1/t weight, whatever the noise level that the canvas was corrupted with.

    Args:
        hidden: (B, C, H) hidden states of the corrupted canvas.
        weight: (V, H) rows of the output head.
        softcap: bound of the logits' absolute value.
        x0: (B, C) long, the clean canvas.
        mask: (B, C) bool, the supervised positions.
        chunk_positions: see `lm_head_cross_entropy`.

    Returns:
        (loss, accuracy), scalars as in `lm_head_cross_entropy`.
    """
    return lm_head_cross_entropy(hidden, weight, softcap, x0, mask, chunk_positions)


def autoregressive_loss(
    hidden: Tensor,
    weight: Tensor,
    softcap: float,
    ids: Tensor,
    target_mask: Tensor,
    chunk_positions: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Next-token cross-entropy: the hidden state at position p predicts the token at p + 1.

    Args:
        hidden: (B, P, H) hidden states of the causal pass over prompt and transcript.
        weight: (V, H) rows of the output head.
        softcap: bound of the logits' absolute value.
        ids: (B, P) long, the tokens that were read.
        target_mask: (B, P) bool, the tokens to be predicted (the transcript). Nothing predicts position
            0: its mask is not looked at.
        chunk_positions: see `lm_head_cross_entropy`.

    Returns:
        (loss, accuracy), scalars as in `lm_head_cross_entropy`.
    """
    return lm_head_cross_entropy(hidden[:, :-1], weight, softcap, ids[:, 1:], target_mask[:, 1:], chunk_positions)
