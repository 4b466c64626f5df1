from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sounds import tone

from diffusion_gemma_asr.audio.read import SAMPLE_RATE
from diffusion_gemma_asr.audio.vad import Chunk, VadOptions, quietest, speech_chunks, speech_finder
from diffusion_gemma_asr.errors import AsrError

ENERGY = VadOptions("energy")


def pause(seconds: float) -> np.ndarray:
    return np.zeros(round(seconds * SAMPLE_RATE), np.float32)


def blocks(sound: np.ndarray, size: int = 7000) -> list[np.ndarray]:
    return [sound[i : i + size] for i in range(0, len(sound), size)]


def noise(seconds: float, seed: int = 0, amplitude: float = 0.1) -> np.ndarray:
    return (amplitude * np.random.default_rng(seed).standard_normal(round(seconds * SAMPLE_RATE))).astype(np.float32)


def chunks(sound: np.ndarray, options: VadOptions = ENERGY, **others: object) -> list[Chunk]:
    return list(speech_chunks(blocks(sound), options, **others))


def test_sounds_are_found_between_pauses() -> None:
    sound = np.concatenate([pause(1.0), tone(300, 2.0), pause(0.7), tone(500, 1.0), pause(0.3), tone(500, 1.0), pause(3.0)])
    first, second = chunks(sound)
    assert (first.start, first.end) == pytest.approx((1.0, 3.0), abs=0.04)
    assert (second.start, second.end) == pytest.approx((3.7, 6.0), abs=0.04)  # 0.3 s are no pause
    for chunk, before in ((first, 0.4), (second, 0.7 - 0.4)):  # the silence between goes to the first
        assert chunk.offset == pytest.approx(chunk.start - before, abs=0.04)
        assert chunk.duration == pytest.approx(chunk.end - chunk.start + before + 0.4, abs=0.04)
        at = round(chunk.offset * SAMPLE_RATE)
        np.testing.assert_array_equal(chunk.samples, sound[at : at + len(chunk.samples)])
        assert chunk.speech_prob > 0.85


@pytest.mark.parametrize("sound", [pause(20.0), pause(20.0) + 0.1, noise(20.0, amplitude=1e-4)])
def test_silence_holds_nothing(sound: np.ndarray) -> None:
    assert chunks(sound) == []
    assert chunks(sound, VadOptions()) == []


@pytest.mark.parametrize("sound", [noise(10.0), tone(440, 10.0), tone(100, 10.0), noise(10.0, amplitude=0.5)])
def test_the_detector_knows_noise_and_tones_from_speech(sound: np.ndarray) -> None:
    assert chunks(sound, VadOptions()) == []


def test_a_click_is_no_speech() -> None:
    assert chunks(np.concatenate([pause(1.0), tone(1000, 0.03), pause(1.0)])) == []


def test_long_sound_is_cut_in_the_pause_between_words() -> None:
    sound = noise(70.0)
    for pause_s in (10.0, 27.0, 29.97, 55.0):  # the first is too early to matter, the third too short
        sound[round(pause_s * SAMPLE_RATE) : round((pause_s + 0.3) * SAMPLE_RATE)] = 0
    starts = [chunk.start for chunk in chunks(sound)]
    assert len(starts) == 3
    assert 27.0 < starts[1] < 27.3
    assert 55.0 < starts[2] < 55.3


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.25, 40), st.floats(0.6, 3)), min_size=1, max_size=4),
    st.floats(2, 30),
    st.integers(500, 50_000),
)
def test_chunks_hold_all_that_is_loud_once(parts: list[tuple[float, float]], longest: float, block: int) -> None:
    sound = np.concatenate([piece for i, (loud, quiet) in enumerate(parts) for piece in (noise(loud, i), pause(quiet))])
    found = list(speech_chunks(blocks(sound, block), VadOptions("energy", chunk_length=longest)))
    assert all(0.1 <= chunk.duration <= longest + 1e-6 for chunk in found)
    spans = [(round(c.offset * SAMPLE_RATE), round(c.offset * SAMPLE_RATE) + len(c.samples)) for c in found]
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
    covered = np.zeros(len(sound), bool)
    for (start, end), chunk in zip(spans, found, strict=True):
        covered[start:end] = True
        np.testing.assert_array_equal(chunk.samples, sound[start:end])
    missing = np.flatnonzero((sound != 0) & ~covered)
    assert len(missing) <= 0.2 * SAMPLE_RATE * len(found)  # a rest under the shortest speech


def test_only_the_clips_are_looked_at() -> None:
    sound = np.concatenate([tone(hertz, 2.0) for hertz in (300, 400, 500, 600)])
    found = chunks(sound, clips=((1.0, 2.0), (2.0, 4.0), (7.0, float("inf"))))
    assert [(c.start, c.end) for c in found] == [pytest.approx(pair, abs=0.001) for pair in ((1, 2), (2, 4), (7, 8))]
    assert [c.offset for c in found] == pytest.approx([1.0, 2.0, 7.0])  # nothing from outside
    assert sum(c.duration for c in found) == pytest.approx(4.0)
    assert chunks(sound, clips=((9.0, 10.0),)) == []


def test_two_streams_at_once_do_not_disturb_each_other() -> None:
    sound = np.concatenate([pause(1.0), tone(300, 1.0), noise(2.0), pause(1.0)])
    alone = [(c.start, c.end) for c in chunks(sound, VadOptions(onset=0.01))]
    one, other = (speech_chunks(blocks(sound), VadOptions(onset=0.01)) for _ in range(2))
    both = list(zip(one, other, strict=True))
    assert [(a.start, a.end) for a, _ in both] == [(b.start, b.end) for _, b in both] == alone


def test_the_quietest_place_is_the_last_of_equals() -> None:
    sound = noise(5.0)
    sound[16_000:24_000] = 0
    assert 16_000 < quietest(sound) < 24_000


def test_options_out_of_range() -> None:
    for wrong, says in (
        ({"method": "ear"}, "vad_method"),
        ({"onset": 1.5}, "vad_onset"),
        ({"chunk_length": 31}, "chunk_length"),
    ):
        with pytest.raises(AsrError, match=says):
            VadOptions(**wrong)


def test_speech_under_way_can_be_looked_at_and_cut() -> None:
    sound = np.concatenate([pause(1.0), tone(300, 4.0), pause(1.0)])
    with speech_finder(ENERGY) as finder:
        assert list(finder.feed(sound[:16_000])) == [] and finder.under_way() is None
        assert not finder.cut(0.5)
        assert list(finder.feed(sound[16_000:48_000])) == []
        begun = finder.under_way()
        assert (begun.start, begun.end, begun.offset) == pytest.approx((1.0, 3.0, 0.6), abs=0.04)
        assert finder.under_way().samples.tolist() == begun.samples.tolist()  # looking changes nothing
        assert finder.cut(2.5) and not finder.cut(2.4) and not finder.cut(2.97)
        rest = finder.under_way()
        assert (rest.offset, rest.start) == (2.5, 2.5) and rest.end == begun.end
        assert rest.speech_prob == pytest.approx(1.0)
        (whole,) = finder.feed(sound[48_000:])
        assert (whole.start, whole.end) == pytest.approx((2.5, 5.0), abs=0.04)
        np.testing.assert_array_equal(whole.samples, sound[40_000 : 40_000 + len(whole.samples)])
        assert finder.under_way() is None and list(finder.finish()) == []
