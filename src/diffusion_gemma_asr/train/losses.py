"""Cross-entropy through the backbone's output head in chunks, so that memory never has all (positions, vocabulary) logits.

Values and gradients (to the hidden states, and to the head if it is trained) equal those of the plain formula.
"""

from __future__ import annotations

from torch import Tensor

from ..model.head import Head


def cross_entropy(
    head: Head,
    hidden: Tensor,
    targets: Tensor,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of the soft-capped output head over the masked positions.

    Logits are computed for the masked positions only.

    Args:
        head: of the backbone; its weight gets a gradient if it requires one.
        hidden: (..., H) hidden states.
        targets: (...) long, target tokens; ignored outside the mask.
        mask: (...) bool, True for positions that count; None counts all.

    Returns:
        (loss, accuracy), both scalars: the mean negative log-likelihood in nats, and the share of positions whose arg-max is
        the target (without gradient). Both are 0 if the mask is empty.

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

    log_probs, best = head.judged(hidden, targets)
    count = max(1, targets.numel())
    loss = -log_probs.sum() / count
    accuracy = (best == targets).sum() / count
    return loss, accuracy


def diffusion_loss(
    head: Head,
    hidden: Tensor,
    x0: Tensor,
    mask: Tensor,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the clean canvas, with the same weight for all supervised positions, corrupted or not.

    There is no 1/t weight for the noise level.

    Args:
        head: of the backbone.
        hidden: (B, C, H) hidden states of the corrupted canvas.
        x0: (B, C) long, the clean canvas.
        mask: (B, C) bool, the supervised positions.

    Returns:
        (loss, accuracy), scalars as in `cross_entropy`.
    """
    return cross_entropy(head, hidden, x0, mask)


def autoregressive_loss(
    head: Head,
    hidden: Tensor,
    ids: Tensor,
    target_mask: Tensor,
) -> tuple[Tensor, Tensor]:
    """Next-token cross-entropy: the hidden state at position p predicts the token at p + 1.

    Args:
        head: of the backbone.
        hidden: (B, P, H) hidden states of the causal pass over prompt and transcript.
        ids: (B, P) long, the input tokens.
        target_mask: (B, P) bool, the tokens to predict (the transcript); position 0 is ignored.

    Returns:
        (loss, accuracy), scalars as in `cross_entropy`.
    """
    return cross_entropy(head, hidden[:, :-1], ids[:, 1:], target_mask[:, 1:])
