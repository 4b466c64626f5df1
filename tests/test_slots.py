"""train/mini/slots.py: imitated audio tokens spell their sentence, with the errors and the blur asked for."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rapidfuzz import fuzz
from rapidfuzz.distance import Levenshtein
from torch import Tensor

from diffusion_gemma_asr.train.mini import slots as slots_module
from diffusion_gemma_asr.train.mini.slots import SlotNoise, imitate, lookalikes, slot_rows

PATIENT = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
BLANK, VOCABULARY = 0, 500
SIMILAR = np.stack([(np.arange(VOCABULARY) + shift) % (VOCABULARY - 1) + 1 for shift in range(8)], axis=1)
CLEAN = SlotNoise(wrong=0, missing=0, extra=0, blur=0, gaussian=0)

targets = st.lists(st.integers(1, VOCABULARY - 1), max_size=30)


def collapsed(slots: list[int]) -> list[int]:
    return slots_module.collapsed(slots, BLANK)


def test_ctc_reads_repeats_as_one_token_and_blanks_as_none() -> None:
    assert collapsed([]) == collapsed([BLANK, BLANK]) == []
    assert collapsed([BLANK, 7, 7, BLANK, 7, 3, 3, BLANK]) == [7, 7, 3]


def imitated(target: list[int], noise: SlotNoise, seed: int) -> tuple[list[int], list[int], float, float]:
    return imitate(target, SIMILAR, BLANK, noise, random.Random(seed))


@PATIENT
@given(targets, st.integers(0, 10**6), st.sampled_from([0.0, 0.5, 1.0]))
def test_without_errors_the_slots_spell_the_target(target: list[int], seed: int, spread: float) -> None:
    slots, mixed, _, _ = imitated(target, replace(CLEAN, spread=spread), seed)
    assert collapsed(slots) == target and len(mixed) == len(slots) >= 1


@PATIENT
@given(st.lists(st.integers(1, 2), max_size=12), st.integers(0, 10**6))
def test_a_token_said_twice_is_two_tokens(target: list[int], seed: int) -> None:
    """CTC reads equal neighbours as one: a blank has to part them."""
    assert collapsed(imitated(target, CLEAN, seed)[0]) == target


def test_spread_decides_whether_tokens_take_more_than_a_slot() -> None:
    target = list(range(1, 401))
    assert imitated(target, replace(CLEAN, spread=0), 0)[0] == target
    half, full = (len(imitated(target, replace(CLEAN, spread=spread), 0)[0]) for spread in (0.5, 1.0))
    assert 1.3 < half / len(target) < 2.0 < full / len(target) < 3.0  # 2.37 slots a token, blanks included


def error_rates(noise: SlotNoise, examples: int = 300, length: int = 60) -> np.ndarray:
    """(examples,) edits a token between what the slots spell and the target."""
    rng = random.Random(7)
    rates = []
    for seed in range(examples):
        target = rng.sample(range(1, VOCABULARY), length)
        rates.append(Levenshtein.distance(collapsed(imitated(target, noise, seed)[0]), target) / length)
    return np.array(rates)


@pytest.mark.parametrize("kind", ["wrong", "missing", "extra"])
@pytest.mark.parametrize("level", [0.1, 0.4])
def test_an_error_is_as_frequent_as_asked_for(kind: str, level: float) -> None:
    """Each example draws its own level from 0 to the largest: half of it on average, all of them occur."""
    rates = error_rates(replace(CLEAN, **{kind: level}))
    assert rates.mean() == pytest.approx(level / 2, abs=0.15 * level)
    assert rates.min() <= 0.1 * level + 0.01 and rates.max() > 0.8 * level


def test_kinds_of_errors_do_what_they_say() -> None:
    target = list(range(1, 401))
    for seed in range(5):
        lost = collapsed(imitated(target, replace(CLEAN, missing=0.8), seed)[0])
        assert lost == sorted(lost) and set(lost) < set(target)  # some tokens gone, the others in order
        more = iter(collapsed(imitated(target, replace(CLEAN, extra=0.8), seed)[0]))
        assert all(token in more for token in target)  # the target is a subsequence


def test_wrong_tokens_are_mostly_lookalikes() -> None:
    target, pairs = list(range(1, 401)), []
    for seed in range(40):
        slots, _, _, _ = imitated(target, replace(CLEAN, wrong=0.8, spread=0), seed)
        shown = [token for token in slots if token != BLANK]
        if len(shown) == len(target):  # a blank that replaced a token would shift the others
            pairs += [pair for pair in zip(shown, target, strict=True) if pair[0] != pair[1]]
    assert len(pairs) > 1000
    assert sum(shown in SIMILAR[token] for shown, token in pairs) / len(pairs) == pytest.approx(0.7, abs=0.05)


def test_blur_and_noise_levels_are_drawn_up_to_the_largest() -> None:
    drawn = np.array([imitated([1, 2], SlotNoise(blur=0.6, gaussian=0.9), seed)[2:] for seed in range(400)])
    for column, level in zip(drawn.T, (0.6, 0.9), strict=True):
        assert 0 <= column.min() < 0.05 * level and 0.95 * level < column.max() <= level
        assert column.mean() == pytest.approx(level / 2, rel=0.1)


def test_the_generator_decides() -> None:
    target = list(range(1, 30))
    assert imitated(target, SlotNoise(), 3) == imitated(target, SlotNoise(), 3)
    assert imitated(target, SlotNoise(), 3) != imitated(target, SlotNoise(), 4)


# -- lookalikes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ["▁cat", "▁cats", "cat", "▁bat", "▁that", "▁hat", "s", "ing", "▁singing", "▁sing"],
        list("abcdefghijkl"),  # nothing alike: a token is then still no lookalike of itself
    ],
)
def test_lookalikes_are_the_most_similarly_spelled_others(words: list[str]) -> None:
    first, count = 3, 4
    found = lookalikes(["<pad>", "<eos>", "<bos>", *words], first, count)
    assert found.shape == (first + len(words), count)
    assert found.min() >= first and found.max() < first + len(words)
    for i, word in enumerate(words):
        chosen = {int(index) - first for index in found[first + i]}
        assert i not in chosen and len(chosen) == count
        alike = {k: round(fuzz.ratio(word, other)) for k, other in enumerate(words) if k != i}
        assert sorted(alike[k] for k in chosen) == sorted(alike.values())[-count:]


# -- rows --------------------------------------------------------------------------------------------------

WIDTH = 256


def rows(blur: float, gaussian: float, shown: Tensor, mixed: Tensor, scale: float = 1.0) -> Tensor:
    torch.manual_seed(0)
    level = torch.ones(len(shown), 1)
    return slot_rows(shown, mixed, blur * level, gaussian * level, scale)


def axes(count: int, axis: int) -> Tensor:
    """(count, WIDTH) rows of different size along one axis."""
    made = torch.zeros(count, WIDTH)
    made[:, axis] = torch.linspace(0.1, 10, count)
    return made


def test_every_row_has_the_size_asked_for() -> None:
    torch.manual_seed(1)
    shown, mixed = torch.randn(2, 50, WIDTH) * torch.logspace(-2, 2, 50)[:, None]
    for scale in (0.02, 1.0, 13.0):
        made = rows(0.5, 0.7, shown, mixed, scale)
        assert made.shape == shown.shape
        torch.testing.assert_close(made.square().mean(1).sqrt(), torch.full((50,), scale), rtol=1e-4, atol=0)


def test_without_blur_and_noise_only_the_size_changes() -> None:
    torch.manual_seed(1)
    shown, mixed = torch.randn(2, 50, WIDTH)
    similarity = torch.cosine_similarity(rows(0, 0, shown, mixed, 3.0), shown)
    torch.testing.assert_close(similarity, torch.ones(50))


def test_each_slot_draws_its_share_of_the_other_token() -> None:
    made = rows(0.6, 0, axes(2000, 0), axes(2000, 1))
    share = made[:, 1] / (made[:, 0] + made[:, 1])
    assert 0 <= share.min() < 0.02 and 0.58 < share.max() <= 0.6001
    assert float(share.mean()) == pytest.approx(0.3, abs=0.02)
    assert made[:, 2:].abs().max() == 0


@pytest.mark.parametrize("level", [0.3, 1.0, 2.0])
def test_noise_is_relative_to_the_slots_size(level: float) -> None:
    shown = axes(400, 0)
    similarity = torch.cosine_similarity(rows(0, level, shown, shown, 5.0), shown)
    assert float(similarity.mean()) == pytest.approx((1 + level**2) ** -0.5, abs=0.02)
