"""Greedy draft, forced alignment and the CTC loss, held against enumeration and the full matrix."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffusion_gemma_asr.errors import DataError
from diffusion_gemma_asr.model import ctc
from diffusion_gemma_asr.model.drafts import Encoded, GreedyCtc
from diffusion_gemma_asr.model.head import Head

SOFTCAP = 5.0
HIDDEN = 6


def head_of(weight: Tensor, positions: int | None = None) -> Head:
    """A head that makes logits of so many positions at a time."""
    return Head(weight, SOFTCAP, None if positions is None else positions * len(weight))


def ctc_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    slot_lengths: Tensor,
    target_lengths: Tensor,
    blank: int = 0,
    positions: int | None = None,
) -> Tensor:
    return ctc.ctc_loss(head_of(weight, positions), hidden, targets, slot_lengths, target_lengths, blank)


def greedy_draft(logits: Tensor, lengths: Tensor, blank: int) -> list[list[ctc.DraftToken]]:
    log_probs, best = logits.log_softmax(-1).max(-1)
    return ctc.collapse(best, log_probs, lengths, blank)


def spell(path: list[int], blank: int) -> list[int]:
    return [symbol for symbol, _ in itertools.groupby(path) if symbol != blank]


def random_log_probs(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).log_softmax(-1)


# --- greedy draft ---


@settings(max_examples=50, deadline=None)
@given(path=st.lists(st.integers(0, 3), max_size=10), blank=st.integers(0, 3), padding=st.integers(0, 3))
def test_greedy_collapses_runs_and_drops_blanks(path: list[int], blank: int, padding: int) -> None:
    best = torch.tensor([path + [1] * padding], dtype=torch.long)
    logits = F.one_hot(best, 4).float()
    lengths = torch.tensor([len(path)])
    (draft,) = greedy_draft(logits, lengths, blank)
    assert [token.id for token in draft] == spell(path, blank)
    for token in draft:
        assert 0 <= token.start < token.end <= len(path)
        assert set(path[token.start : token.end]) == {token.id}
    assert sum(token.end - token.start for token in draft) == sum(symbol != blank for symbol in path)
    assert all(a.end <= b.start for a, b in itertools.pairwise(draft))


def test_draft_probability_is_the_mean_over_the_run() -> None:
    probabilities = torch.tensor([[[0.1, 0.9], [0.4, 0.6], [0.8, 0.2], [0.3, 0.7]]])
    draft = greedy_draft(probabilities.log(), torch.tensor([4]), 0)[0]
    assert [token[:3] for token in draft] == [(1, 0, 2), (1, 3, 4)]
    assert [token.probability for token in draft] == pytest.approx([0.75, 0.7])


@pytest.mark.parametrize("chunk", [None, 3])
def test_greedy_ctc_is_the_draft_of_the_full_matrix(chunk: int | None) -> None:
    hidden, weight = make_head(3, 7, 5, seed=0)
    lengths = torch.tensor([7, 4, 0])
    wanted = greedy_draft(SOFTCAP * torch.tanh(hidden @ weight.T / SOFTCAP), lengths, 0)
    encoded = Encoded(hidden, lengths, hidden.detach(), lengths)
    got = GreedyCtc(head_of(weight.detach(), chunk), 0).drafts(encoded)
    assert [len(row) for row in got] == [len(row) for row in wanted]
    for token, other in zip(itertools.chain(*got), itertools.chain(*wanted), strict=True):
        assert token[:3] == other[:3]
        assert token.probability == pytest.approx(other.probability)


# --- forced alignment ---


@settings(max_examples=60, deadline=None)
@given(
    slots=st.integers(1, 6),
    tokens=st.lists(st.sampled_from([0, 2, 3]), min_size=1, max_size=4),
    seed=st.integers(0, 2**16),
)
def test_alignment_is_the_best_of_all_paths(slots: int, tokens: list[int], seed: int) -> None:
    blank = 1
    log_probs = random_log_probs(slots, 4, seed=seed)
    paths = [p for p in itertools.product(range(4), repeat=slots) if spell(list(p), blank) == tokens]
    if not paths:
        with pytest.raises(DataError, match="cannot be aligned"):
            ctc.forced_align(log_probs, tokens, blank)
        return
    best = max(paths, key=lambda p: sum(log_probs[s, symbol].item() for s, symbol in enumerate(p)))
    wanted, slot = [], 0
    for symbol, run in itertools.groupby(best):
        size = len(list(run))
        if symbol != blank:
            mean = log_probs[slot : slot + size, symbol].mean().item()
            wanted.append((slot, slot + size, pytest.approx(mean)))
        slot += size
    assert ctc.forced_align(log_probs, tokens, blank) == wanted


def test_alignment_of_a_hundred_tokens() -> None:
    tokens = [2, 3] * 50
    log_probs = torch.full((200, 4), -9.0)
    log_probs[torch.arange(200), torch.tensor([symbol for token in tokens for symbol in (0, token)])] = 0.0
    spans = ctc.forced_align(log_probs, tokens, 0)
    assert [(span.start, span.end) for span in spans] == [(2 * i + 1, 2 * i + 2) for i in range(100)]


def test_alignment_of_nothing_and_of_the_impossible() -> None:
    log_probs = random_log_probs(3, 4, seed=0)
    assert ctc.forced_align(log_probs, [], 0) == []
    with pytest.raises(DataError, match=r"2 tokens .* 0 slots"):
        ctc.forced_align(log_probs[:0], [1, 2], 0)
    with pytest.raises(DataError, match="holds the blank, token 0"):
        ctc.forced_align(log_probs, [1, 0], 0)
    log_probs[:, 2] = -torch.inf
    with pytest.raises(DataError, match="cannot be aligned"):
        ctc.forced_align(log_probs, [1, 2], 0)


def test_slots_needed_counts_repeats_within_the_length() -> None:
    targets = torch.tensor([[1, 1, 2, 2], [1, 2, 1, 1], [3, 3, 3, 3], [1, 1, 1, 1]])
    assert ctc.slots_needed(targets, torch.tensor([4, 3, 4, 0])).tolist() == [6, 3, 7, 0]
    nothing = torch.zeros(2, 0, dtype=torch.long)
    assert ctc.slots_needed(nothing, torch.tensor([0, 0])).tolist() == [0, 0]


# --- loss ---


def make_head(rows: int, slots: int, vocab: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = 2 * torch.randn(rows, slots, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocab, HIDDEN, generator=generator, dtype=torch.float64)
    return hidden.requires_grad_(), weight.requires_grad_()


def full_matrix_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, slot_lengths: Tensor, target_lengths: Tensor, blank: int
) -> Tensor:
    logits = SOFTCAP * torch.tanh(hidden @ weight.T / SOFTCAP)
    log_probs = logits.log_softmax(-1).transpose(0, 1)  # (S, B, V)
    return F.ctc_loss(log_probs, targets, slot_lengths, target_lengths, blank, zero_infinity=True)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.integers(1, 8), st.lists(st.sampled_from([0, 1, 3, 4]), max_size=6)),
        min_size=1,
        max_size=4,
    ),
    chunk=st.one_of(st.none(), st.integers(1, 10)),
    seed=st.integers(0, 2**16),
)
def test_equals_ctc_on_the_full_matrix(rows: list[tuple[int, list[int]]], chunk: int | None, seed: int) -> None:
    """Few distinct tokens give repeats; lengths of 0 and transcripts that do not fit occur as well."""
    blank, vocab = 2, 9
    width = max(1, *(len(tokens) for _, tokens in rows), 1)
    targets = torch.tensor([tokens + [blank] * (width - len(tokens)) for _, tokens in rows])
    slot_lengths = torch.tensor([slots for slots, _ in rows])
    target_lengths = torch.tensor([len(tokens) for _, tokens in rows])
    hidden, weight = make_head(len(rows), 8, vocab, seed)
    got = ctc_loss(hidden, weight, targets, slot_lengths, target_lengths, blank, chunk)
    wanted = full_matrix_loss(hidden, weight, targets, slot_lengths, target_lengths, blank)
    torch.testing.assert_close(got, wanted)
    got_grads = torch.autograd.grad(2 * got, (hidden, weight))
    torch.testing.assert_close(got_grads, torch.autograd.grad(2 * wanted, (hidden, weight)), atol=1e-10, rtol=1e-7)


@pytest.mark.parametrize("tokens", [[1, 1, 3], [1, 3, 1, 4], [4], []])
def test_loss_is_the_probability_of_all_paths(tokens: list[int]) -> None:
    hidden, weight = make_head(1, 5, 5, seed=1)
    log_probs = (SOFTCAP * torch.tanh(hidden @ weight.T / SOFTCAP)).log_softmax(-1)[0]
    paths = [p for p in itertools.product(range(5), repeat=5) if spell(list(p), 0) == tokens]
    scores = torch.stack([log_probs[range(5), list(path)].sum() for path in paths])
    wanted = -scores.logsumexp(0) / max(1, len(tokens))
    targets = torch.tensor([tokens], dtype=torch.long)
    loss = ctc_loss(hidden, weight, targets, torch.tensor([5]), torch.tensor([len(tokens)]), 0)
    torch.testing.assert_close(loss, wanted)
    got, expected = (torch.autograd.grad(value, (hidden, weight)) for value in (loss, wanted))
    torch.testing.assert_close(got, expected, atol=1e-10, rtol=1e-7)


@pytest.mark.parametrize("chunk", [None, 4])
def test_gradients_against_finite_differences(chunk: int | None) -> None:
    hidden, weight = make_head(2, 5, 6, seed=2)
    targets = torch.tensor([[1, 1, 3], [5, 0, 0]])
    lengths = torch.tensor([5, 4]), torch.tensor([3, 1])
    assert torch.autograd.gradcheck(lambda h, w: ctc_loss(h, w, targets, *lengths, 0, chunk), (hidden, weight))


def test_a_transcript_that_does_not_fit_changes_nothing_but_the_mean() -> None:
    hidden, weight = make_head(3, 4, 6, seed=3)
    targets = torch.tensor([[1, 2, 3, 4, 5], [1, 1, 1, 0, 0], [3, 4, 0, 0, 0]])
    slot_lengths, target_lengths = torch.tensor([4, 4, 4]), torch.tensor([5, 3, 2])
    loss = ctc_loss(hidden, weight, targets, slot_lengths, target_lengths, 0)
    alone = ctc_loss(hidden[2:], weight, targets[2:], slot_lengths[2:], target_lengths[2:], 0)
    torch.testing.assert_close(loss, alone / 3)
    loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    assert hidden.grad[:2].abs().max() == 0 and hidden.grad[2].abs().max() > 0
    assert weight.grad.isfinite().all()


def test_a_batch_without_any_slot_gives_zero() -> None:
    hidden, weight = make_head(2, 3, 6, seed=3)
    targets = torch.tensor([[1, 2], [1, 1]])
    loss = ctc_loss(hidden, weight, targets, torch.tensor([0, 0]), torch.tensor([2, 0]), 0)
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad is not None and hidden.grad.abs().max() == 0


def test_padding_does_not_matter() -> None:
    hidden, weight = make_head(1, 6, 6, seed=4)
    lengths = torch.tensor([4]), torch.tensor([2])
    wanted = ctc_loss(hidden[:, :4], weight, torch.tensor([[3, 3]]), *lengths, 0)
    for padding in (0, 3, 5, -100):
        targets = torch.tensor([[3, 3, padding, padding]])
        got = ctc_loss(hidden, weight, targets, *lengths, 0)
        torch.testing.assert_close(got, wanted)
    (grad,) = torch.autograd.grad(got, hidden)
    assert grad[:, 4:].abs().max() == 0


def test_a_frozen_head_gets_no_gradient_and_float32_is_close() -> None:
    hidden, weight = make_head(2, 6, 300, seed=5)
    targets, lengths = torch.tensor([[7, 7, 250], [4, 9, 0]]), (torch.tensor([6, 5]), torch.tensor([3, 2]))
    wanted = full_matrix_loss(hidden, weight, targets, *lengths, 0)
    single = hidden.detach().float().requires_grad_()
    frozen = weight.detach().float()
    loss = ctc_loss(single, frozen, targets, *lengths, 0, 5)
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-5)
    (got,), (expected,) = torch.autograd.grad(loss, single), torch.autograd.grad(wanted, hidden)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)
    assert frozen.grad is None


def test_no_matrix_of_slots_by_vocabulary_is_held() -> None:
    hidden, weight = make_head(2, 10, 500, seed=6)
    saved: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tuple(tensor.shape))
        return tensor

    targets, lengths = torch.tensor([[7, 7], [4, 9]]), (torch.tensor([10, 10]), torch.tensor([2, 2]))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ctc_loss(hidden, weight.detach(), targets, *lengths, 0, 4)
    assert all(500 not in shape or shape == (500, HIDDEN) for shape in saved)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: its CTC kernels are others")
def test_gradients_on_a_gpu_equal_those_on_the_cpu() -> None:
    hidden, weight = make_head(2, 6, 300, seed=7)
    targets, lengths = torch.tensor([[7, 7, 250], [4, 9, 0]]), (torch.tensor([6, 5]), torch.tensor([3, 2]))
    loss = ctc_loss(hidden, weight, targets, *lengths, 0, 5)
    there = [tensor.detach().cuda().requires_grad_() for tensor in (hidden, weight)]
    moved = [tensor.cuda() for tensor in lengths]
    got = ctc_loss(there[0], there[1], targets.cuda(), moved[0], moved[1], 0, 5)
    torch.testing.assert_close(got.cpu(), loss)
    for ours, wanted in zip(torch.autograd.grad(got, there), torch.autograd.grad(loss, (hidden, weight)), strict=True):
        torch.testing.assert_close(ours.cpu(), wanted, atol=1e-9, rtol=1e-7)


def test_a_blank_in_the_transcript_is_refused() -> None:
    hidden, weight = make_head(1, 4, 6, seed=0)
    with pytest.raises(DataError, match="holds the blank, token 0"):
        ctc_loss(hidden, weight, torch.tensor([[1, 0]]), torch.tensor([4]), torch.tensor([2]), 0)


def test_scores_of_transcripts_are_those_of_torch() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 8), torch.randn(20, 8)
    head = Head(weight, 30.0)
    logprobs = head.logits(hidden).log_softmax(-1)
    transcripts = [(3, 5, 5), (), (7,), tuple(range(1, 9))]
    found = ctc.transcript_scores(head, hidden, transcripts, 0)
    for row, score in zip(transcripts[:3], found, strict=False):
        target = torch.tensor([row], dtype=torch.long).view(1, -1)
        expected = -F.ctc_loss(logprobs[:, None], target, torch.tensor([6]), torch.tensor([len(row)]), reduction="sum")
        assert score == pytest.approx(float(expected), rel=1e-4)
    assert found[3] == -math.inf  # eight tokens in six slots
    assert ctc.transcript_scores(head, hidden[:0], [(), (3,)], 0) == [0.0, -math.inf]


def test_alignment_through_the_head_is_that_of_the_full_matrix() -> None:
    hidden, weight = (tensor.detach() for tensor in make_head(1, 9, 30, seed=8))
    log_probs = (SOFTCAP * torch.tanh(hidden[0] @ weight.T / SOFTCAP)).log_softmax(-1)
    tokens = [7, 7, 21, 4]
    for positions in (None, 2):
        spans = ctc.align(head_of(weight, positions), hidden[0], tokens, 0)
        wanted = ctc.forced_align(log_probs, tokens, 0)
        assert spans is not None
        assert [span[:2] for span in spans] == [span[:2] for span in wanted]
        assert [span.logprob for span in spans] == pytest.approx([span.logprob for span in wanted])
    assert ctc.align(head_of(weight), hidden[0], [7] * 6, 0) is None  # eleven slots would be needed
