"""The chunked cross-entropy equals the plain one, in values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffusion_gemma_asr.model.head import Head
from diffusion_gemma_asr.train import losses

SOFTCAP = 5.0
VOCAB, HIDDEN = 11, 6


def make(shape: tuple[int, ...], seed: int, grad_weight: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = 2 * torch.randn(*shape, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator, dtype=torch.float64)
    targets = torch.randint(VOCAB, shape, generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(grad_weight), targets


def head(weight: Tensor, positions: int | None = None) -> Head:
    """A head that projects so many positions at a time; None: all."""
    return Head(weight, SOFTCAP) if positions is None else Head(weight, SOFTCAP, positions * VOCAB)


def naive(hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    logits = SOFTCAP * torch.tanh(hidden @ weight.T / SOFTCAP)
    loss = F.cross_entropy(logits[mask], targets[mask])
    return loss, (logits.argmax(-1) == targets)[mask].double().mean()


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 3),
    length=st.integers(1, 7),
    chunk=st.one_of(st.none(), st.integers(1, 25)),
    seed=st.integers(0, 2**16),
)
def test_equals_plain_cross_entropy(rows: int, length: int, chunk: int | None, seed: int) -> None:
    hidden, weight, targets = make((rows, length), seed)
    mask = torch.rand(rows, length, generator=torch.Generator().manual_seed(seed)) < 0.6
    mask[0, 0] = True
    loss, accuracy = losses.cross_entropy(head(weight, chunk), hidden, targets, mask)
    wanted, wanted_accuracy = naive(hidden, weight, targets, mask)
    torch.testing.assert_close(loss, wanted)
    assert accuracy.item() == pytest.approx(wanted_accuracy.item())
    assert not accuracy.requires_grad
    got = torch.autograd.grad(3 * loss, (hidden, weight))
    torch.testing.assert_close(got, torch.autograd.grad(3 * wanted, (hidden, weight)))


@pytest.mark.parametrize("chunk", [None, 2])
def test_gradients_against_finite_differences(chunk: int | None) -> None:
    hidden, weight, targets = make((5,), 3)
    assert torch.autograd.gradcheck(lambda h, w: losses.cross_entropy(head(w, chunk), h, targets)[0], (hidden, weight))


@pytest.mark.parametrize("chunk", [None, 2])
def test_a_frozen_head_gets_no_gradient(chunk: int | None) -> None:
    hidden, weight, targets = make((2, 4), 0, grad_weight=False)
    losses.cross_entropy(head(weight, chunk), hidden, targets)[0].backward()
    assert weight.grad is None
    assert hidden.grad is not None and hidden.grad.abs().sum() > 0


def test_an_empty_mask_gives_zero_and_zero_gradient() -> None:
    hidden, weight, targets = make((2, 3), 0)
    mask = torch.zeros(2, 3, dtype=torch.bool)
    loss, accuracy = losses.cross_entropy(head(weight), hidden, targets, mask)
    loss.backward()
    assert loss.item() == 0 and accuracy.item() == 0
    assert hidden.grad is not None and hidden.grad.abs().sum() == 0


def test_targets_outside_the_mask_are_not_looked_at() -> None:
    hidden, weight, targets = make((2, 3), 1)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    wanted = losses.cross_entropy(head(weight), hidden, targets, mask)
    got = losses.cross_entropy(head(weight), hidden, targets.masked_fill(~mask, -100), mask)
    torch.testing.assert_close(got, wanted)


def test_no_more_than_a_chunk_of_logits_is_held() -> None:
    """Nothing that is kept for the backward pass is as large as the logits."""
    hidden, weight, targets = make((100,), 1)
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    def largest(chunk: int | None) -> int:
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            losses.cross_entropy(head(weight, chunk), hidden, targets)
        return max(saved)

    assert largest(None) == len(hidden) * VOCAB
    assert largest(4) <= hidden.numel()


def test_bfloat16_gives_a_float32_loss() -> None:
    hidden, weight, targets = make((2, 3), 1)
    loss, _ = losses.cross_entropy(head(weight.bfloat16()), hidden.float(), targets)
    wanted, _ = losses.cross_entropy(head(weight), hidden, targets)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(wanted.item(), rel=0.05)


def test_wrong_shapes_are_named() -> None:
    hidden, weight, targets = make((2, 3), 1)
    with pytest.raises(ValueError, match=r"\(2, 3, 6\).*\(2, 2\)"):
        losses.cross_entropy(head(weight), hidden, targets[:, :2])


def test_autoregressive_loss_predicts_the_next_token() -> None:
    # The head is the identity: a hidden state that is a large one-hot vector predicts its own token.
    ids = torch.tensor([[3, 1, 4, 1, 5], [2, 0, 1, 0, 3]])
    identity = Head(torch.eye(6), 30.0)
    hidden = 50 * F.one_hot(ids.roll(-1, dims=1), 6).float()
    mask = torch.tensor([[True, False, True, True, True], [False, False, False, True, False]])
    loss, accuracy = losses.autoregressive_loss(identity, hidden, ids, mask)
    assert loss.item() < 1e-6 and accuracy.item() == 1
    shifted, accuracy = losses.autoregressive_loss(identity, hidden.roll(1, dims=1), ids, mask)
    assert shifted.item() > 10 and accuracy.item() < 1


def test_autoregressive_loss_counts_the_masked_tokens_alone() -> None:
    hidden, weight, ids = make((2, 5), 4)
    mask = torch.tensor([[True, False, True, True, False], [False, False, False, True, True]])
    loss, _ = losses.autoregressive_loss(head(weight), hidden, ids, mask)
    pairs = [(b, p) for b in range(2) for p in range(1, 5) if mask[b, p]]
    logits = SOFTCAP * torch.tanh(hidden @ weight.T / SOFTCAP)
    wanted = -torch.stack([logits[b, p - 1].log_softmax(-1)[ids[b, p]] for b, p in pairs]).mean()
    torch.testing.assert_close(loss, wanted)


def test_diffusion_loss_is_flat_over_the_supervised_positions() -> None:
    hidden, weight, x0 = make((2, 5), 5)
    mask = torch.tensor([[True, True, True, False, False], [True, False, False, False, False]])
    loss, accuracy = losses.diffusion_loss(head(weight, 3), hidden, x0, mask)
    wanted, wanted_accuracy = naive(hidden, weight, x0, mask)
    torch.testing.assert_close(loss, wanted)
    assert accuracy.item() == pytest.approx(wanted_accuracy.item())
