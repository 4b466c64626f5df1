"""Noise on canvases: exact ends of the noise schedule, frequencies in between, and who draws from which generator."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffusion_gemma_asr.denoise.canvas import draw_groups, q_xt, sample_t, uniform_canvas

VOCAB = 50


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clean(batch: int = 3, length: int = 2000) -> Tensor:
    """Canvases of ids outside the vocabulary, so that every replacement shows."""
    return torch.full((batch, length), VOCAB)


def test_level_zero_changes_nothing_and_level_one_is_the_prior() -> None:
    x0 = clean()
    xt = q_xt(x0, torch.tensor([0.0, 1.0, 0.0]), VOCAB, seeded())
    assert torch.equal(xt[[0, 2]], x0[[0, 2]])
    assert xt[1].min() == 0 and xt[1].max() == VOCAB - 1  # every position replaced, over the whole vocabulary


def test_share_replaced_is_the_level_of_each_row() -> None:
    t = torch.tensor([0.1, 0.5, 0.9])
    replaced = q_xt(clean(length=20_000), t, VOCAB, seeded()) != VOCAB
    assert torch.allclose(replaced.float().mean(dim=1), t, atol=0.015)  # four standard deviations


def test_replacements_are_uniform() -> None:
    xt = q_xt(clean(1, 100_000), torch.tensor([1.0]), VOCAB, seeded())
    counts = torch.bincount(xt[0], minlength=VOCAB).float()
    expected = 100_000 / VOCAB
    assert ((counts - expected).abs() < 5 * expected**0.5).all()


def test_mask_protects_positions() -> None:
    x0 = clean()
    mask = torch.zeros_like(x0, dtype=torch.bool)
    mask[:, 100:300] = True
    xt = q_xt(x0, torch.ones(3), VOCAB, seeded(), mask)
    assert torch.equal(xt != x0, mask)


def test_same_seed_same_noise_and_inputs_are_left_alone() -> None:
    x0, t = clean(), torch.full((3,), 0.5)
    mask = torch.ones_like(x0, dtype=torch.bool)
    first, second = (q_xt(x0, t, VOCAB, seeded(7), mask) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, q_xt(x0, t, VOCAB, seeded(8), mask))
    assert torch.equal(x0, clean()) and mask.all()


def test_levels_lie_between_eps_and_one() -> None:
    t = sample_t(10_000, seeded(), eps=0.2)
    assert t.shape == (10_000,) and t.dtype == torch.float32
    assert 0.2 <= t.min() < 0.21 and 0.99 < t.max() <= 1.0
    assert t.mean().item() == pytest.approx(0.6, abs=0.01)


def test_canvas_covers_the_vocabulary() -> None:
    canvas = uniform_canvas(4, 1000, VOCAB, seeded())
    assert canvas.shape == (4, 1000) and canvas.dtype == torch.long
    assert canvas.min() == 0 and canvas.max() == VOCAB - 1


def test_one_generator_draws_as_randint_does() -> None:
    assert torch.equal(uniform_canvas(3, 7, VOCAB, seeded(5)), torch.randint(0, VOCAB, (3, 7), generator=seeded(5)))


def test_none_is_torch_s_default_generator() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        canvas = uniform_canvas(2, 6, VOCAB, None)
    assert torch.equal(canvas, uniform_canvas(2, 6, VOCAB, seeded(3)))


def test_a_generator_per_row_makes_rows_independent_of_the_batch() -> None:
    alone = uniform_canvas(1, 9, VOCAB, [seeded(2)])
    together = uniform_canvas(3, 9, VOCAB, [seeded(1), seeded(2), seeded(3)])
    assert torch.equal(together[1:2], alone)


def test_generators_must_match_the_rows() -> None:
    with pytest.raises(ValueError, match="2 generators for 3 rows"):
        list(draw_groups(3, [seeded(), seeded()]))
