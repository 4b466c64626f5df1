"""data/features.py: features are computed once, an interruption loses little, and the numbers stay right."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from torch import nn

from diffusion_gemma_asr.data import features as features_module
from diffusion_gemma_asr.data.features import FeatureCache, fingerprint
from diffusion_gemma_asr.data.manifest import Utterance
from diffusion_gemma_asr.errors import DataError

WIDTH = 3
MARK = "an encoder"


def utterances(count: int, first: int = 0) -> list[Utterance]:
    """Of different durations, not in order."""
    return [Utterance(f"/sound/{i}.wav", f"number {i}", "en", 0.1 * (1 + i * 7 % 11)) for i in range(first, first + count)]


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
    assert_holds(FeatureCache.build(tmp_path / "cache", rows, WIDTH, encoder, MARK, batch_size=5), rows)
    assert sorted(encoder.asked) == sorted(u.audio_filepath for u in rows)
    again = Encoder(limit=0)
    assert_holds(FeatureCache.build(tmp_path / "cache", rows, WIDTH, again, MARK), rows)
    assert_holds(FeatureCache(tmp_path / "cache"), rows)
    assert again.asked == []


def test_the_encoder_is_asked_for_batches_of_like_duration(tmp_path: Path) -> None:
    sizes, durations = list[int](), list[float]()

    def compute(batch: list[Utterance]) -> list[np.ndarray]:
        sizes.append(len(batch))
        durations.extend(u.duration for u in batch)
        return [features(u) for u in batch]

    FeatureCache.build(tmp_path, utterances(37), WIDTH, compute, MARK, batch_size=5)
    assert sizes == [5] * 7 + [2]
    assert durations == sorted(u.duration for u in utterances(37))


def test_new_utterances_are_appended(tmp_path: Path) -> None:
    old, new = utterances(8), utterances(8, first=8)
    before = FeatureCache.build(tmp_path, old, WIDTH, Encoder(), MARK)
    encoder = Encoder()
    after = FeatureCache.build(tmp_path, [*new, *old], WIDTH, encoder, MARK, batch_size=3)
    assert sorted(encoder.asked) == sorted(u.audio_filepath for u in new)
    assert_holds(after, [*old, *new])
    assert_holds(before, old)  # an open cache stays valid
    assert new[0] not in before and utterances(1, first=99)[0] not in after
    with pytest.raises(KeyError):
        after[utterances(1, first=99)[0]]


@pytest.mark.parametrize("limit", [40, 430])
def test_an_interrupted_build_resumes_and_equals_an_uninterrupted_one(
    tmp_path: Path, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The index is written every INDEXED frames; frames behind it are computed again and never doubled."""
    rows, kept, behind = utterances(450), 0, 0
    monkeypatch.setattr(features_module, "INDEXED", 30)
    for number, row in enumerate(sorted(rows, key=lambda u: u.duration)[:limit], 1):
        behind += len(features(row))
        if behind >= 30:
            kept, behind = number, 0
    FeatureCache.build(tmp_path / "whole", rows, WIDTH, Encoder(), MARK, batch_size=1)
    with pytest.raises(KeyboardInterrupt):
        FeatureCache.build(tmp_path / "broken", rows, WIDTH, Encoder(limit), MARK, batch_size=1)
    encoder = Encoder()
    cache = FeatureCache.build(tmp_path / "broken", rows, WIDTH, encoder, MARK, batch_size=1)
    assert 0 < kept < limit and len(encoder.asked) == len(rows) - kept
    assert_holds(cache, rows)
    for name in ("frames.f16", "index.json"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_several_workers_build_one_cache(tmp_path: Path) -> None:
    rows, encoders = utterances(37), [Encoder(), Encoder(), Encoder()]
    FeatureCache.build(tmp_path, rows[:9], WIDTH, Encoder(), MARK)
    for number, encoder in enumerate(encoders):
        FeatureCache.build(tmp_path, rows, WIDTH, encoder, MARK, 4, number, len(encoders))
    asked = [path for encoder in encoders for path in encoder.asked]
    assert sorted(asked) == sorted(u.audio_filepath for u in rows[9:])
    assert all(encoder.asked for encoder in encoders)
    assert_holds(FeatureCache(tmp_path), rows)
    alone = Encoder()
    assert_holds(FeatureCache.build(tmp_path, [*rows, *utterances(3, first=50)], WIDTH, alone, MARK), rows)
    assert len(alone.asked) == 3


def test_a_second_run_waits_for_the_one_that_fills_the_cache(tmp_path: Path) -> None:
    rows, encoder = utterances(5), Encoder()
    with ThreadPoolExecutor() as pool:
        with FileLock(tmp_path / ".lock-0"):
            second = pool.submit(FeatureCache.build, tmp_path, rows, WIDTH, encoder, MARK)
            with pytest.raises(TimeoutError):
                second.result(timeout=0.3)
            assert not encoder.asked
        assert_holds(second.result(timeout=60), rows)


def test_an_encoder_that_returns_too_little_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shorter"):
        FeatureCache.build(tmp_path, utterances(4), WIDTH, lambda batch: [features(u) for u in batch[1:]], MARK)


def test_a_cache_of_another_width_is_refused(tmp_path: Path) -> None:
    """Two recipes that name one cache folder but not one encoder would read each other's numbers."""
    FeatureCache.build(tmp_path, utterances(4), WIDTH, Encoder(), MARK)
    for rows in (utterances(4), utterances(5)):
        with pytest.raises(DataError, match=rf"{tmp_path.name}.*{WIDTH}.*{WIDTH + 1}"):
            FeatureCache.build(tmp_path, rows, WIDTH + 1, Encoder(), MARK)
    assert_holds(FeatureCache(tmp_path), utterances(4))  # and is left whole


def test_frames_of_another_width_in_the_batch_are_noticed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"frames of shape .*, not \(n, 3\)"):
        FeatureCache.build(tmp_path, utterances(4), WIDTH, lambda batch: [features(u)[:, :2] for u in batch], MARK)


# -- what is reused is known by what it was made from --------------------------------------------------------------


def test_frames_of_another_encoder_are_refused(tmp_path: Path) -> None:
    FeatureCache.build(tmp_path, utterances(4), WIDTH, Encoder(), MARK)
    encoder = Encoder()
    attempts: list[Callable[[], object]] = [
        lambda: FeatureCache.build(tmp_path, utterances(4), WIDTH, encoder, "another"),
        lambda: FeatureCache.build(tmp_path, utterances(8), WIDTH, encoder, "another", 4, 1, 2),
        lambda: FeatureCache.open(tmp_path, utterances(4), "another"),
        lambda: FeatureCache(tmp_path, "another"),
    ]
    for attempt in attempts:
        with pytest.raises(DataError, match=rf"{tmp_path.name} holds frames of another encoder .*; delete it"):
            attempt()
    assert encoder.asked == []
    assert_holds(FeatureCache.open(tmp_path, utterances(4), MARK), utterances(4))  # and are left whole
    assert FeatureCache(tmp_path).fingerprint == MARK


def test_an_utterance_that_has_changed_is_computed_anew(tmp_path: Path) -> None:
    sound = tmp_path / "a.wav"
    sound.write_bytes(b"first")
    one = Utterance(str(sound), "one", "en", 0.3)
    cache = FeatureCache.build(tmp_path / "cache", [one], WIDTH, Encoder(), MARK)
    for other in (replace(one, offset=0.1), replace(one, duration=0.2), replace(one, text="two")):
        assert one in cache and other not in cache
        encoder = Encoder()
        assert_holds(FeatureCache.build(tmp_path / "cache", [one, other, other], WIDTH, encoder, MARK), [one, other])
        assert encoder.asked == [str(sound)]  # once, and the first not again
    for change in (
        lambda: sound.write_bytes(b"other"),
        lambda: sound.write_bytes(b"longer"),
    ):
        change()
        assert one not in FeatureCache(tmp_path / "cache")
        with pytest.raises(DataError, match=r"lacks 1 utterances as they are now, such as .*a\.wav"):
            FeatureCache.open(tmp_path / "cache", [one])
        encoder = Encoder()
        cache = FeatureCache.build(tmp_path / "cache", [one], WIDTH, encoder, MARK)
        assert one in cache and encoder.asked == [str(sound)]


def test_a_copy_of_the_sound_is_not_computed_anew(tmp_path: Path) -> None:
    """Data that was fetched again has new times."""
    sound = tmp_path / "a.wav"
    sound.write_bytes(b"first")
    one = Utterance(str(sound), "one", "en", 0.3)
    FeatureCache.build(tmp_path / "cache", [one], WIDTH, Encoder(), MARK)
    os.utime(sound, ns=(1, 1))
    encoder = Encoder()
    assert_holds(FeatureCache.build(tmp_path / "cache", [one], WIDTH, encoder, MARK), [one])
    assert encoder.asked == []
    index = tmp_path / "cache/index.json"  # as it was before sounds were hashed
    content = json.loads(index.read_text())
    content["spans"] = [span[:5] for span in content["spans"]]
    index.write_text(json.dumps(content))
    assert one not in FeatureCache(tmp_path / "cache")


@pytest.mark.parametrize("worker", [0, 1])
@pytest.mark.parametrize(
    "damage", ["cut index", "empty index", "no frames", "cut frames", "odd frames", "lying index", "list"]
)
def test_what_is_damaged_is_computed_anew(
    tmp_path: Path, damage: str, worker: int, caplog: pytest.LogCaptureFixture
) -> None:
    rows = utterances(12)
    for number in range(2):
        FeatureCache.build(tmp_path, rows, WIDTH, Encoder(), MARK, 4, number, 2)
    index, frames = (tmp_path / f"{name}{'-1' * worker}{end}" for name, end in (("index", ".json"), ("frames", ".f16")))
    size = frames.stat().st_size
    if damage == "cut index":
        index.write_text(index.read_text()[:-20])
    elif damage in ("empty index", "list"):
        index.write_text("" if damage == "empty index" else "[]")
    elif damage == "no frames":
        frames.unlink()
    elif damage == "lying index":
        content = json.loads(index.read_text())
        content["spans"][-1][3] = "0"
        index.write_text(json.dumps(content))
    else:
        os.truncate(frames, size // 2 if damage == "cut frames" else size - 1)
    assert len([u for u in rows if u in FeatureCache(tmp_path)]) < 12
    with pytest.raises(DataError, match=f"{tmp_path.name} lacks"):
        FeatureCache.open(tmp_path, rows)
    assert not caplog.records
    encoder = Encoder()
    assert_holds(FeatureCache.build(tmp_path, rows, WIDTH, encoder, MARK), rows)
    computed = len(encoder.asked)
    assert 1 < computed < 6 if damage == "cut frames" else computed == {"odd frames": 1}.get(damage, 6)
    assert [r.getMessage() for r in caplog.records if "anew" in r.getMessage()]
    assert_holds(FeatureCache.open(tmp_path, rows, MARK), rows)


def test_a_cache_of_an_older_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text(json.dumps({"width": WIDTH, "spans": [["/sound/0.wav", 0, 1]]}))
    (tmp_path / "frames.f16").write_bytes(bytes(2 * WIDTH))
    for attempt in (lambda: FeatureCache(tmp_path), lambda: FeatureCache.build(tmp_path, [], WIDTH, Encoder(), MARK)):
        with pytest.raises(DataError, match=rf"{tmp_path.name} holds frames of another version.*; delete it"):
            attempt()


def test_no_utterances_are_no_trouble(tmp_path: Path) -> None:
    assert FeatureCache.build(tmp_path, [], WIDTH, Encoder(), MARK).width == 0


# -- fingerprints ----------------------------------------------------------------------------------------------------


def small(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2, bias=False))


def test_a_fingerprint_changes_with_whatever_counts() -> None:
    plain = fingerprint(small())
    assert plain == fingerprint(small()) and len(plain) == 32
    changed = [small(1), small().to(torch.bfloat16), small().half(), nn.Sequential(small()), nn.Linear(3, 4)]
    bent, buffered = small(), small()
    with torch.no_grad():
        bent[2].weight[1, 2] += 1e-6  # type: ignore[index, union-attr]
        buffered[1].running_mean[0] = 1.0  # type: ignore[index, union-attr]
    found = {fingerprint(module) for module in (*changed, bent, buffered)}
    assert len(found | {plain, fingerprint(small(), "other features"), fingerprint(small(), "other", "features")}) == 10
    turned = small()
    turned[2].weight.data = turned[2].weight.data.T.contiguous().T  # type: ignore[index, union-attr]  # as laid out elsewhere
    assert fingerprint(turned) == plain


def test_a_fingerprint_is_the_same_in_every_run() -> None:
    module = nn.Linear(2, 2)
    nn.init.constant_(module.weight, 0.5)
    nn.init.zeros_(module.bias)
    assert fingerprint(module) == "5a649d573d59155e8240bdb198f177ab"
