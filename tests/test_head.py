"""The output head: in chunks it gives what the whole matrix gives, in values and in gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from diffusion_gemma_asr.model.head import Head

POSITIONS, WIDTH, VOCAB, CAP = 11, 6, 13, 5.0


def draw(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Hidden states and a weight that learns."""
    generator = torch.Generator().manual_seed(0)
    hidden = 2 * torch.randn(POSITIONS, WIDTH, generator=generator, dtype=dtype)
    weight = torch.randn(VOCAB, WIDTH, generator=generator, dtype=dtype)
    return hidden.requires_grad_(), weight.requires_grad_()


def whole(hidden: Tensor, weight: Tensor) -> Tensor:
    """Log-probabilities (..., V) by the formula, all at once."""
    return (CAP * torch.tanh(hidden @ weight.T / CAP)).log_softmax(-1)


def test_logits_are_soft_capped() -> None:
    hidden, weight = draw()
    head = Head(weight, CAP)
    logits = head.logits(100 * hidden)
    assert logits.dtype == torch.float64 and logits.shape == (POSITIONS, VOCAB)
    assert logits.abs().max() <= CAP
    torch.testing.assert_close(logits, CAP * torch.tanh(100 * hidden @ weight.T / CAP))
    torch.testing.assert_close(head.cap(torch.tensor([0.0, 1e-3])), torch.tensor([0.0, 1e-3]))


@torch.no_grad()
def test_a_16_bit_head_gives_float32_logits_and_leaves_its_input_alone() -> None:
    hidden, weight = draw(torch.float32)
    head = Head(weight.bfloat16(), CAP)
    before = hidden.clone()
    logits = head.logits(hidden)
    assert logits.dtype == torch.float32 and torch.equal(hidden, before)
    torch.testing.assert_close(logits, Head(weight, CAP).logits(hidden), atol=0.1, rtol=0.05)


def test_the_same_with_and_without_a_gradient() -> None:
    """Without one the soft-cap works in place."""
    hidden, weight = draw()
    with torch.no_grad():
        plain = Head(weight, CAP).logits(hidden)
    torch.testing.assert_close(plain, Head(weight, CAP).logits(hidden))


Function = Callable[[Head, Tensor], Tensor]
TOKENS = torch.arange(POSITIONS) % VOCAB
COLUMNS = torch.tensor([[0, 4, 4, 12]])
MASK = torch.arange(POSITIONS)[None] < 8

FUNCTIONS: dict[str, tuple[Function, Callable[[Tensor], Tensor]]] = {
    "over_chunks": (
        lambda head, hidden: torch.cat(head.over_chunks(lambda part: head.logits(part).log_softmax(-1), hidden)),
        lambda log_probs: log_probs,
    ),
    "token_log_probs": (
        lambda head, hidden: head.token_log_probs(hidden, TOKENS),
        lambda log_probs: log_probs.gather(1, TOKENS[:, None])[:, 0],
    ),
    "log_probs": (
        lambda head, hidden: head.log_probs(hidden[None], COLUMNS, MASK),
        lambda log_probs: log_probs[None, :, COLUMNS[0]].masked_fill(~MASK[..., None], 0.0),
    ),
    "best": (
        lambda head, hidden: head.best(hidden)[1],
        lambda log_probs: log_probs.amax(-1),
    ),
}


@pytest.mark.parametrize("positions", [1, 3, POSITIONS, 1000])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_chunks_give_what_the_whole_matrix_gives(name: str, positions: int) -> None:
    function, wanted_of = FUNCTIONS[name]
    hidden, weight = draw()
    found = function(Head(weight, CAP, positions * VOCAB), hidden)
    wanted = wanted_of(whole(hidden, weight))
    torch.testing.assert_close(found, wanted)
    noise = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = torch.autograd.grad((found * noise).sum(), (hidden, weight))
    torch.testing.assert_close(gradients, torch.autograd.grad((wanted * noise).sum(), (hidden, weight)))


@pytest.mark.parametrize("positions", [1, 3, POSITIONS])
def test_mean_rows_and_a_token_beside_the_best(positions: int) -> None:
    hidden, weight = draw()
    head, log_probs = Head(weight, CAP, positions * VOCAB), whole(hidden, weight)
    torch.testing.assert_close(head.mean_rows(hidden), log_probs.exp() @ weight)
    tokens, values, beside = head.best_beside(hidden, 2)
    assert torch.equal(tokens, log_probs.argmax(-1))
    torch.testing.assert_close(values, log_probs.amax(-1))
    torch.testing.assert_close(beside, log_probs[:, 2])


@pytest.mark.parametrize("positions", [1, 3, POSITIONS, 1000])
@pytest.mark.parametrize("name", ["token_log_probs", "log_probs"])
def test_a_frozen_head_gives_the_same(name: str, positions: int) -> None:
    """Its gradient is computed with the value."""
    function, wanted_of = FUNCTIONS[name]
    hidden, weight = draw()
    wanted = wanted_of(whole(hidden, weight))
    found = function(Head(weight.detach(), CAP, positions * VOCAB), hidden)
    torch.testing.assert_close(found, wanted)
    noise = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = [torch.autograd.grad((values * noise).sum(), hidden) for values in (found, wanted)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("cap", [30.0, 100.0])
def test_a_frozen_head_with_large_logits(cap: float) -> None:
    """Sums of exp(logit) near exp(cap) are finite, whatever the cap."""
    hidden, weight = draw(torch.float32)
    hidden = (1000 * hidden).detach().requires_grad_()
    head = Head(weight.detach(), cap)
    logits = cap * torch.tanh(hidden @ weight.T / cap)
    values = head.log_normalisers(hidden)
    torch.testing.assert_close(values, logits.logsumexp(-1))
    assert torch.autograd.grad(values.sum(), hidden)[0].isfinite().all()


@torch.no_grad()
def test_no_token_of_a_16_bit_head_is_more_than_certain() -> None:
    """The logit of a token and the sum that it is part of are rounded alike."""
    generator = torch.Generator().manual_seed(2)
    hidden, weight = (torch.randn(shape, generator=generator) for shape in ((200, 64), (500, 64)))
    head = Head(weight.bfloat16(), 30.0, 7 * 500)
    tokens, log_probs = head.best(hidden)
    found, best = head.judged(hidden, tokens)
    assert found.max() <= 1e-5 and torch.exp(found).max() > 0.9
    assert torch.equal(head.logits(hidden).gather(1, best[:, None]), head.logits(hidden).gather(1, tokens[:, None]))
    torch.testing.assert_close(found, log_probs, atol=1e-5, rtol=0)


def test_the_best_token_of_every_position_in_any_shape() -> None:
    hidden, weight = draw()
    shaped = hidden[:10].view(2, 5, WIDTH)
    tokens, log_probs = Head(weight, CAP, 3 * VOCAB).best(shaped)
    values, wanted = whole(shaped, weight).max(-1)
    assert torch.equal(tokens, wanted)
    torch.testing.assert_close(log_probs, values)


def test_no_position_at_all() -> None:
    hidden, weight = draw()
    head = Head(weight, CAP)
    assert head.token_log_probs(hidden[:0], TOKENS[:0]).shape == (0,)
    assert head.best(hidden[:0])[0].shape == (0,)
    nowhere = torch.zeros(1, POSITIONS, dtype=torch.bool)
    assert not head.log_probs(hidden[None], COLUMNS, nowhere).any()


def test_logits_of_all_positions_never_exist_at_once() -> None:
    hidden, weight = draw()
    head = Head(weight, CAP, 2 * VOCAB)
    sizes: list[int] = []
    head.over_chunks(lambda part: sizes.append(len(part)), hidden)
    assert sizes == [2] * 5 + [1]
    saved: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        head.token_log_probs(hidden, TOKENS)
    assert all(VOCAB not in shape or shape == (VOCAB, WIDTH) for shape in saved), "backward keeps logits"
