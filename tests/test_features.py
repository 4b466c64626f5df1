"""data/features.py: features are computed once, an interruption loses little, and the numbers stay right."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from diffusion_gemma_asr.data.features import FeatureCache
from diffusion_gemma_asr.data.manifest import Utterance
from diffusion_gemma_asr.errors import DataError

WIDTH = 3


def utterances(count: int, first: int = 0) -> list[Utterance]:
    """Of different durations, not in order."""
    return [
        Utterance(f"/sound/{i}.wav", f"number {i}", "en", 0.1 * (1 + i * 7 % 11))
        for i in range(first, first + count)
    ]


def features(utterance: Utterance) -> np.ndarray:
    """(n, WIDTH) numbers from 0.001 to 1000 that depend on the utterance alone."""
    seed = int.from_bytes(hashlib.sha1(utterance.audio_filepath.encode()).digest()[:4], "big")
    rng = np.random.default_rng(seed)
    size = (round(utterance.duration * 10), WIDTH)
    return (rng.choice([-1, 1], size) * 10 ** rng.uniform(-3, 3, size)).astype(np.float32)


class Encoder:
    """Computes `features`, remembers what it was asked for, and dies before it has done more than `limit`."""

    def __init__(self, limit: int = 10**9):
        self.limit, self.asked = limit, list[str]()

    def __call__(self, batch: list[Utterance]) -> list[np.ndarray]:
        if len(self.asked) + len(batch) > self.limit:
            raise KeyboardInterrupt
        self.asked += [u.audio_filepath for u in batch]
        return [features(u) for u in batch]


def assert_holds(cache: FeatureCache, rows: Sequence[Utterance]) -> None:
    for row in rows:
        expected = features(row)
        assert row in cache and cache.length(row) == len(expected)
        assert cache[row].dtype == np.float16 and cache[row].shape == expected.shape
        # float16 has 11 significant bits: half a unit in the last place is 2^-11 of the number
        np.testing.assert_allclose(cache[row].astype(np.float64), expected, rtol=2**-11)


def test_every_utterance_is_computed_once_and_a_second_build_computes_nothing(tmp_path: Path) -> None:
    rows, encoder = utterances(37), Encoder()
    assert_holds(FeatureCache.build(tmp_path / "cache", rows, WIDTH, encoder, batch_size=5), rows)
    assert sorted(encoder.asked) == sorted(u.audio_filepath for u in rows)
    again = Encoder(limit=0)
    assert_holds(FeatureCache.build(tmp_path / "cache", rows, WIDTH, again), rows)
    assert_holds(FeatureCache(tmp_path / "cache"), rows)
    assert again.asked == []


def test_the_encoder_is_asked_for_batches_of_like_duration(tmp_path: Path) -> None:
    sizes, durations = list[int](), list[float]()

    def compute(batch: list[Utterance]) -> list[np.ndarray]:
        sizes.append(len(batch))
        durations.extend(u.duration for u in batch)
        return [features(u) for u in batch]

    FeatureCache.build(tmp_path, utterances(37), WIDTH, compute, batch_size=5)
    assert sizes == [5] * 7 + [2]
    assert durations == sorted(u.duration for u in utterances(37))


def test_new_utterances_are_appended(tmp_path: Path) -> None:
    old, new = utterances(8), utterances(8, first=8)
    before = FeatureCache.build(tmp_path, old, WIDTH, Encoder())
    encoder = Encoder()
    after = FeatureCache.build(tmp_path, [*new, *old], WIDTH, encoder, batch_size=3)
    assert sorted(encoder.asked) == sorted(u.audio_filepath for u in new)
    assert_holds(after, [*old, *new])
    assert_holds(before, old)  # an open cache stays valid
    assert new[0] not in before and utterances(1, first=99)[0] not in after
    with pytest.raises(KeyError):
        after[utterances(1, first=99)[0]]


@pytest.mark.parametrize(("limit", "kept"), [(40, 0), (430, 400)])
def test_an_interrupted_build_resumes_and_equals_an_uninterrupted_one(
    tmp_path: Path, limit: int, kept: int
) -> None:
    """The index is written every 50 batches; frames behind it are computed again and never doubled."""
    rows = utterances(450)
    FeatureCache.build(tmp_path / "whole", rows, WIDTH, Encoder(), batch_size=1)
    with pytest.raises(KeyboardInterrupt):
        FeatureCache.build(tmp_path / "broken", rows, WIDTH, Encoder(limit), batch_size=1)
    encoder = Encoder()
    cache = FeatureCache.build(tmp_path / "broken", rows, WIDTH, encoder, batch_size=1)
    assert len(encoder.asked) == len(rows) - kept
    assert_holds(cache, rows)
    for name in ("frames.f16", "index.json"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_several_workers_build_one_cache(tmp_path: Path) -> None:
    rows, encoders = utterances(37), [Encoder(), Encoder(), Encoder()]
    FeatureCache.build(tmp_path, rows[:9], WIDTH, Encoder())
    for number, encoder in enumerate(encoders):
        FeatureCache.build(tmp_path, rows, WIDTH, encoder, 4, number, len(encoders))
    asked = [path for encoder in encoders for path in encoder.asked]
    assert sorted(asked) == sorted(u.audio_filepath for u in rows[9:])
    assert all(encoder.asked for encoder in encoders)
    assert_holds(FeatureCache(tmp_path), rows)
    alone = Encoder()
    assert_holds(FeatureCache.build(tmp_path, [*rows, *utterances(3, first=50)], WIDTH, alone), rows)
    assert len(alone.asked) == 3


def test_an_encoder_that_returns_too_little_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shorter"):
        FeatureCache.build(tmp_path, utterances(4), WIDTH, lambda batch: [features(u) for u in batch[1:]])


def test_a_cache_of_another_width_is_refused(tmp_path: Path) -> None:
    """Two recipes that name one cache folder but not one encoder would read each other's numbers."""
    FeatureCache.build(tmp_path, utterances(4), WIDTH, Encoder())
    for rows in (utterances(4), utterances(5)):
        with pytest.raises(DataError, match=rf"{tmp_path.name}.*{WIDTH}.*{WIDTH + 1}"):
            FeatureCache.build(tmp_path, rows, WIDTH + 1, Encoder())
    assert_holds(FeatureCache(tmp_path), utterances(4))  # and is left whole
