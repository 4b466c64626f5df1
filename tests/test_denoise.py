"""Denoising steps: each rule on small tensors, and the loop over a backbone whose predictions are a table."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffusion_gemma_asr.denoise.canvas import uniform_canvas
from diffusion_gemma_asr.denoise.steps import (
    DenoiseOptions,
    accept,
    cut_at_end,
    denoise,
    pick,
    renoise,
    sample,
    sample_by_inversion,
    should_stop,
    temperature_at,
    token_entropy,
    token_logprobs,
)
from diffusion_gemma_asr.errors import AsrError

VOCAB = 16
entropies = st.lists(st.lists(st.floats(0, 12, width=32), min_size=5, max_size=5), min_size=1, max_size=3).map(torch.tensor)
bounds = st.floats(0, 5)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# The rules


def test_temperature_falls_linearly_and_the_last_step_is_still_above_t_min() -> None:
    options = DenoiseOptions(steps=4, t_max=0.8, t_min=0.4)
    temperatures = [temperature_at(left, options) for left in (4, 3, 2, 1)]
    assert temperatures == pytest.approx([0.8, 0.7, 0.6, 0.5])


def test_entropy_of_uniform_certain_and_even_odds() -> None:
    probs = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.0, 1.0, 0.0, 0.0], [0.5, 0.0, 0.5, 0.0]])
    assert token_entropy(probs).tolist() == pytest.approx([math.log(4), 0.0, math.log(2)])


def test_entropy_is_that_of_the_categorical_distribution() -> None:
    logits = 10 * torch.randn(6, 1000, generator=seeded())
    expected = torch.distributions.Categorical(logits=logits).entropy()
    assert torch.allclose(token_entropy(logits.softmax(-1)), expected, atol=1e-5)


def test_logprobs_are_those_of_log_softmax() -> None:
    logits, tokens = torch.randn(2, 3, VOCAB, generator=seeded()), torch.tensor([[1, 0, 15], [3, 3, 8]])
    expected = torch.stack([logits.log_softmax(-1)[b, c, tokens[b, c]] for b in range(2) for c in range(3)])
    assert torch.allclose(token_logprobs(logits, tokens).flatten(), expected)


@pytest.mark.parametrize(
    ("bound", "positions"),
    [(0, [1]), (0.125, [1, 3]), (0.374, [1, 3]), (0.375, [0, 1, 3]), (1, [0, 1, 2, 3]), (9, [0, 1, 2, 3, 4])],
)
def test_accept_takes_the_surest_while_those_before_sum_to_the_bound(bound: float, positions: list[int]) -> None:
    entropy = torch.tensor([[0.5, 0.125, 2.0, 0.25, 4.0]])  # sums before, in rising order: 0 .125 .375 .875 2.875
    assert accept(entropy, bound)[0].nonzero().flatten().tolist() == positions


@given(entropies, bounds)
def test_accept_takes_at_least_the_surest(entropy: Tensor, bound: float) -> None:
    accepted = accept(entropy, bound)
    assert torch.equal(entropy.masked_fill(~accepted, math.inf).amin(1), entropy.amin(1))


@given(entropies, bounds, bounds)
def test_accept_takes_more_with_a_larger_bound(entropy: Tensor, one: float, other: float) -> None:
    fewer, more = accept(entropy, min(one, other)), accept(entropy, max(one, other))
    assert (fewer <= more).all()


@given(entropies, bounds)
def test_accept_never_takes_the_less_sure_of_two(entropy: Tensor, bound: float) -> None:
    accepted = accept(entropy, bound)
    surest_left = entropy.masked_fill(accepted, math.inf).amin(1)
    assert (entropy.masked_fill(~accepted, 0).amax(1) <= surest_left).all()


def test_renoise_touches_only_rejected_positions() -> None:
    tokens = torch.full((3, 200), VOCAB)  # an id that noise never has
    accepted = torch.rand(3, 200, generator=seeded()) < 0.5
    assert torch.equal(renoise(tokens, accepted, VOCAB, seeded(1)) == VOCAB, accepted)


def test_sample_draws_from_the_distribution() -> None:
    probs = torch.tensor([0.7, 0.2, 0.1, 0.0])
    tokens, entropy = sample(probs.log().expand(1, 50_000, 4), seeded())
    shares = torch.bincount(tokens[0], minlength=4) / 50_000
    assert torch.allclose(shares, probs, atol=0.01) and shares[3] == 0
    assert torch.allclose(entropy, token_entropy(probs).expand_as(entropy))


def test_sample_with_a_generator_per_row_does_not_see_the_batch() -> None:
    logits = torch.randn(3, 40, VOCAB, generator=seeded())
    together, _ = sample(logits, [seeded(1), seeded(2), seeded(3)])
    alone, _ = sample(logits[1:2], [seeded(2)])
    assert torch.equal(together[1:2], alone)


@pytest.mark.parametrize("vocab", [7, 64, 200])
def test_pick_inverts_the_cumulative_sum(vocab: int) -> None:
    weights = torch.rand(500, vocab, generator=seeded()) ** 4
    weights[:, 2] = 0
    uniform = torch.rand(500, generator=seeded(1))
    found = pick(weights, uniform)
    risen = weights.double().cumsum(-1) / weights.double().sum(-1, keepdim=True)
    assert torch.equal(found, torch.searchsorted(risen, uniform.double()[:, None], right=True)[:, 0])
    assert not (found == 2).any()
    assert torch.equal(pick(weights[:1], torch.zeros(1)), torch.zeros(1, dtype=torch.long))
    assert pick(weights[:1], torch.tensor([1 - 2**-24])).item() == vocab - 1


def test_sampling_by_inversion_draws_each_token_as_often_as_sampling_does() -> None:
    logits = torch.tensor([2.0, 0.0, 1.0, -1.0]).expand(1, 40_000, 4)
    tokens, entropy = sample_by_inversion(logits, seeded(3))
    shares = torch.bincount(tokens.flatten(), minlength=4) / tokens.numel()
    torch.testing.assert_close(shares, logits[0, 0].softmax(-1), atol=0.01, rtol=0)
    torch.testing.assert_close(entropy, sample(logits, seeded())[1])
    rows = torch.randn(3, 40, VOCAB, generator=seeded())
    together, _ = sample_by_inversion(rows, [seeded(1), seeded(2), seeded(3)])
    alone, _ = sample_by_inversion(rows[1:2], [seeded(2)])
    assert torch.equal(together[1:2], alone)


def test_stop_needs_a_stable_and_a_sure_canvas() -> None:
    options = DenoiseOptions(stability_threshold=2, confidence_threshold=0.1)
    unchanged = torch.tensor([2, 1, 3, 2])
    mean_entropy = torch.tensor([0.075, 0.0, 0.2, 0.1])
    assert should_stop(unchanged, mean_entropy, options).tolist() == [True, False, False, False]


def test_cut_at_the_first_end_token() -> None:
    canvas = torch.tensor([[5, 6, 1, 7], [1, 5, 5, 5], [5, 6, 7, 8], [5, 9, 1, 9]])
    assert cut_at_end(canvas, {1, 9}) == [[5, 6], [], [5, 6, 7, 8], [5]]


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"t_min": 0.0},
        {"t_min": 0.9, "t_max": 0.8},
        {"entropy_bound": -0.1},
        {"confidence_threshold": math.nan},
        {"stability_threshold": -1},
    ],
    ids=str,
)
def test_options_out_of_range_are_refused_by_name(wrong: dict[str, float]) -> None:
    with pytest.raises(AsrError, match=next(iter(wrong))):
        DenoiseOptions(**wrong)  # type: ignore[arg-type]


# The loop


@dataclass
class TableBackbone:
    """Predicts what `table(step, canvas)` says, whatever the prompt; remembers what it was given."""

    table: Callable[[int, Tensor], Tensor]  # (step from 0, canvas (B, C)) -> logits (B, C, V)
    vocab_size: int = VOCAB
    canvases: list[Tensor] = field(default_factory=list)
    conditioning: list[Tensor | None] = field(default_factory=list)

    def denoise_logits(self, canvas: Tensor, prefill: None, self_conditioning: Tensor | None = None) -> Tensor:
        self.canvases.append(canvas)
        self.conditioning.append(None if self_conditioning is None else self_conditioning.clone())
        return self.table(len(self.canvases) - 1, canvas)


def peaked(tokens: Tensor, height: float) -> Tensor:
    """Logits (B, C, V) that put `height` on the given tokens (B, C) and 0 elsewhere."""
    return height * torch.nn.functional.one_hot(tokens, VOCAB).float()


def unsure(step: int, canvas: Tensor) -> Tensor:
    """A table that prefers each position's own token a little, so that draws and canvases matter."""
    return peaked(canvas, 2.0) + torch.randn(VOCAB, generator=seeded(step))


def run(
    backbone: TableBackbone, canvas: Tensor, options: DenoiseOptions, seed: int = 0
) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor]:
    drafts: list[Tensor] = []
    result = denoise(backbone, None, canvas, options, seeded(seed), lambda step, draft, entropy: drafts.append(draft))
    return drafts, result.canvas, result.logprobs, result.entropy, result.steps


TRUTH = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def test_a_sure_backbone_is_believed_after_two_steps() -> None:
    backbone = TableBackbone(lambda step, canvas: peaked(TRUTH, 30.0))
    _, canvas, logprobs, entropy, steps = run(backbone, torch.zeros_like(TRUTH), DenoiseOptions())
    assert torch.equal(canvas, TRUTH)
    assert steps.tolist() == [2, 2]  # the second step shows that the draft is stable
    assert torch.allclose(logprobs, torch.zeros(2, 5)) and torch.allclose(entropy, torch.zeros(2, 5), atol=1e-6)


@pytest.mark.parametrize("threshold", [0, 1, 3])
def test_stability_threshold_counts_steps_without_change(threshold: int) -> None:
    backbone = TableBackbone(lambda step, canvas: peaked(TRUTH, 30.0))
    options = DenoiseOptions(stability_threshold=threshold)
    assert run(backbone, torch.zeros_like(TRUTH), options)[-1].tolist() == [threshold + 1] * 2


def test_an_unsure_backbone_gets_all_steps() -> None:
    backbone = TableBackbone(unsure)
    drafts, canvas, *_, steps = run(backbone, torch.zeros_like(TRUTH), DenoiseOptions(steps=6))
    assert steps.tolist() == [6, 6] and len(backbone.canvases) == len(drafts) == 6
    assert torch.equal(canvas, drafts[-1])


def test_same_seed_same_canvas() -> None:
    canvas = uniform_canvas(2, 30, VOCAB, seeded())
    canvases = []
    for seed in (1, 1, 2):
        backbone = TableBackbone(unsure)
        run(backbone, canvas, DenoiseOptions(), seed)
        canvases.append(torch.stack(backbone.canvases))
    assert torch.equal(canvases[0], canvases[1])
    assert not torch.equal(canvases[0], canvases[2])
    assert torch.equal(canvas, uniform_canvas(2, 30, VOCAB, seeded()))  # the caller's canvas is left alone


def test_conditioning_is_the_scaled_prediction_of_the_step_before() -> None:
    tables = [torch.randn(2, 5, VOCAB, generator=seeded(step)) for step in range(3)]
    backbone = TableBackbone(lambda step, canvas: tables[step])
    options = DenoiseOptions(steps=3)
    untouched = [table.clone() for table in tables]
    run(backbone, TRUTH, options)
    assert backbone.conditioning[0] is None
    for step in (1, 2):
        given = backbone.conditioning[step]
        assert given is not None
        assert torch.allclose(given, tables[step - 1] / temperature_at(4 - step, options))
    assert all(torch.equal(*pair) for pair in zip(tables, untouched, strict=True))


def test_result_is_scored_at_temperature_one() -> None:
    tables = [torch.randn(2, 5, VOCAB, generator=seeded(step)) for step in range(3)]
    options = DenoiseOptions(steps=3)
    _, canvas, logprobs, entropy, _ = run(TableBackbone(lambda step, _: tables[step]), TRUTH, options)
    best, tokens = tables[-1].log_softmax(-1).max(-1)
    assert torch.equal(canvas, tokens)
    assert torch.allclose(logprobs, best, atol=1e-6)
    scaled = tables[-1] / temperature_at(1, options)
    assert torch.allclose(entropy, token_entropy(scaled.softmax(-1)))


def test_a_finished_row_is_frozen_while_the_others_go_on() -> None:
    heights = torch.tensor([4.0, 1.0])[:, None, None]  # row 0 is sure enough at once, row 1 never

    def table(step: int, canvas: Tensor) -> Tensor:
        return heights * peaked((TRUTH + max(0, step - 1)) % VOCAB, 1.0)  # from step 2 on all would change

    backbone, options = TableBackbone(table), DenoiseOptions(steps=5, confidence_threshold=1.0)
    drafts, canvas, logprobs, _, steps = run(backbone, torch.zeros_like(TRUTH), options)
    assert steps.tolist() == [2, 5]
    assert torch.equal(canvas[0], TRUTH[0]) and torch.equal(canvas[1], (TRUTH[1] + 3) % VOCAB)
    assert all(torch.equal(draft[0], TRUTH[0]) for draft in drafts)
    assert all(torch.equal(fed[0], backbone.canvases[2][0]) for fed in backbone.canvases[2:])
    assert not torch.equal(backbone.canvases[3][1], backbone.canvases[2][1])
    conditioning = [given[0] for given in backbone.conditioning[2:] if given is not None]
    assert len(conditioning) == 3 and all(torch.equal(given, conditioning[0]) for given in conditioning)
    expected = (heights.exp() / (heights.exp() + VOCAB - 1)).log()[..., 0].expand(2, 5)  # at temperature 1
    assert torch.allclose(logprobs, expected, atol=1e-5)


def test_steps_are_told_one_by_one() -> None:
    told: list[tuple[int, tuple[int, ...], tuple[int, ...]]] = []
    denoise(
        TableBackbone(unsure), None, TRUTH, DenoiseOptions(steps=3), seeded(),
        lambda step, draft, entropy: told.append((step, tuple(draft.shape), tuple(entropy.shape))),
    )  # fmt: skip
    assert told == [(step, (2, 5), (2, 5)) for step in (1, 2, 3)]


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(4)), st.integers(1, 4))
def test_with_a_generator_per_row_a_result_does_not_depend_on_the_batch(order: list[int], count: int) -> None:
    rows = order[:count]
    canvas = torch.cat([uniform_canvas(1, 12, VOCAB, seeded(row)) for row in range(4)])
    options = DenoiseOptions(steps=4, entropy_bound=1.0)

    def results(chosen: list[int]) -> tuple[Tensor, Tensor, list[Tensor]]:
        backbone = TableBackbone(unsure)
        result = denoise(backbone, None, canvas[chosen], options, [seeded(100 + row) for row in chosen])
        return result.canvas, result.logprobs, backbone.canvases

    everything, some = results([0, 1, 2, 3]), results(rows)
    assert torch.equal(some[0], everything[0][rows])
    assert torch.allclose(some[1], everything[1][rows])
    assert all(torch.equal(mine, full[rows]) for mine, full in zip(some[2], everything[2], strict=True))


def test_no_gradient_is_recorded() -> None:
    weight = torch.ones(VOCAB, requires_grad=True)
    result = denoise(TableBackbone(lambda step, canvas: unsure(step, canvas) * weight), None, TRUTH, DenoiseOptions(), None)
    assert not result.logprobs.requires_grad
