"""data/batches.py: every utterance once an epoch, batches within limits, all a function of the step."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffusion_gemma_asr.data.batches import UNLIMITED, LengthBuckets, Mixture, tempered

PATIENT = settings(deadline=None, derandomize=True, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
sizes = st.lists(st.integers(1, 100), min_size=1, max_size=60)


def epochs(buckets: LengthBuckets, count: int) -> list[list[list[int]]]:
    """The batches of the first epochs: an epoch ends when as many utterances were shown as there are."""
    found, step = [], 0
    for _ in range(count):
        epoch: list[list[int]] = []
        while sum(map(len, epoch)) < len(buckets.lengths):
            epoch.append(buckets.at(step))
            step += 1
            assert step <= count * len(buckets.lengths), "more steps than utterances"
        found.append(epoch)
    return found


def flat(epoch: list[list[int]]) -> list[int]:
    return [i for batch in epoch for i in batch]


def spoken() -> list[int]:
    rng = random.Random(0)
    return [rng.randint(50, 1000) for _ in range(400)]


@PATIENT
@given(sizes, st.integers(100, 400), st.integers(1, 12), st.integers(0, 5))
def test_every_utterance_once_an_epoch_and_no_batch_over_its_limits(
    lengths: list[int], batch_total: int, batch_size: int, seed: int
) -> None:
    for epoch in epochs(LengthBuckets(lengths, batch_total, batch_size, seed), 3):
        assert sorted(flat(epoch)) == list(range(len(lengths)))
        for batch in epoch:
            assert 1 <= len(batch) <= batch_size
            assert len(batch) * max(lengths[i] for i in batch) <= batch_total


def test_an_utterance_over_the_limit_comes_alone() -> None:
    epoch = epochs(LengthBuckets([5, 500, 6, 5], 20, 10, 0), 1)[0]
    assert [1] in epoch and sorted(flat(epoch)) == [0, 1, 2, 3]


@PATIENT
@given(sizes, st.integers(0, 40), st.integers(0, 5))
def test_a_fresh_object_goes_on_from_any_step(lengths: list[int], n: int, seed: int) -> None:
    whole, resumed = (LengthBuckets(lengths, 300, 4, seed) for _ in range(2))
    expected = [whole.at(step) for step in range(n + 20)][n:]
    assert [resumed.at(step) for step in range(n, n + 20)] == expected


def test_a_step_may_be_asked_for_twice() -> None:
    buckets = LengthBuckets(spoken(), 8000, 32, 0)
    for step in (0, 3, 40, 200):
        assert buckets.at(step) == buckets.at(step)


def test_epochs_and_seeds_differ_in_order_and_in_company() -> None:
    first, second = epochs(LengthBuckets(spoken(), 8000, 32, 0), 2)
    other = epochs(LengthBuckets(spoken(), 8000, 32, 1), 1)[0]
    for a, b in ((first, second), (first, other)):
        together = {frozenset(batch) for batch in a} & {frozenset(batch) for batch in b}
        assert len(together) < len(a) / 4
    lengths = spoken()
    longest = [[max(lengths[i] for i in batch) for batch in epoch] for epoch in (first, second)]
    assert longest[0] != sorted(longest[0]) and longest[0] != longest[1]  # long and short batches in turns


def test_batches_hold_utterances_of_like_length() -> None:
    lengths = spoken()
    epoch = epochs(LengthBuckets(lengths, 16_000, 16, 0), 1)[0]
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in epoch)
    assert padded < 1.25 * sum(lengths)  # in random batches of 16: 1.8


# -- several lists -----------------------------------------------------------------------------------------

SIZES, WEIGHTS = (300, 20, 80), (0.5, 0.3, 0.2)


def shown(mixture: Mixture, steps: int) -> list[int]:
    return [i for step in range(steps) for i in mixture.at(step)]


def test_lists_are_drawn_by_their_weights_and_evenly_within() -> None:
    mixture = Mixture(SIZES, WEIGHTS, [10] * sum(SIZES), UNLIMITED, 8, seed=0)
    counts = Counter(shown(mixture, sum(SIZES) * Mixture.PASSES // 8))
    start = 0
    for size, weight in zip(SIZES, WEIGHTS, strict=True):
        own = [counts[i] for i in range(start, start + size)]
        assert sum(own) == pytest.approx(weight * sum(counts.values()), rel=0.01)
        assert max(own) - min(own) <= 1  # nobody twice before everybody once
        start += size
    assert sum(counts.values()) == sum(SIZES) * Mixture.PASSES


def test_one_list_is_mixed_with_the_others_in_time() -> None:
    mixture = Mixture(SIZES, WEIGHTS, [10] * sum(SIZES), UNLIMITED, 8, seed=0)
    for start in range(0, 400, 100):
        some = [i for step in range(start, start + 100) for i in mixture.at(step)]
        share = sum(300 <= i < 320 for i in some) / len(some)
        assert share == pytest.approx(0.3, abs=0.08)


def test_a_mixture_is_a_function_of_step_and_seed() -> None:
    lengths = [5 + i % 90 for i in range(sum(SIZES))]
    a, b, other = (Mixture(SIZES, WEIGHTS, lengths, 600, 8, seed) for seed in (1, 1, 2))
    expected = [a.at(step) for step in range(700)]
    assert [b.at(step) for step in range(300, 700)] == expected[300:]
    assert [other.at(step) for step in range(700)] != expected
    assert all(len(batch) * max(lengths[i] for i in batch) <= 600 for batch in expected)


@pytest.mark.parametrize(("temperature", "shares"), [(1.0, [0.9, 0.1]), (2.0, [0.75, 0.25]), (1e6, [0.5, 0.5])])
def test_the_higher_the_temperature_the_more_alike_the_shares(temperature: float, shares: list[float]) -> None:
    weights = tempered([900, 100], temperature)
    assert [weight / sum(weights) for weight in weights] == pytest.approx(shares, abs=1e-4)
