"""Speech is found and handed on the same whatever its level; noise and silence stay what they are."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable, Iterator

import numpy as np
import pytest
from sounds import tone

from diffusion_gemma_asr.audio.level import BOUND_DB, HeardAhead, Level, raised
from diffusion_gemma_asr.audio.read import SAMPLE_RATE, load_audio
from diffusion_gemma_asr.audio.vad import Chunk, VadOptions, speech_chunks, speech_finder

SENTENCE = "My brother bought a new bicycle last week."


def blocks(sound: np.ndarray, size: int = SAMPLE_RATE) -> list[np.ndarray]:
    return [sound[i : i + size] for i in range(0, len(sound), size)]


def heard_ahead(sound: Iterable[np.ndarray], level: Level) -> Iterator[np.ndarray]:
    ahead = HeardAhead(level)
    for block in sound:
        yield from ahead.feed(block)
    yield from ahead.finish()


def pause(seconds: float) -> np.ndarray:
    return np.zeros(round(seconds * SAMPLE_RATE), np.float32)


def noise(seconds: float, amplitude: float, seed: int = 0) -> np.ndarray:
    return (amplitude * np.random.default_rng(seed).standard_normal(round(seconds * SAMPLE_RATE))).astype(np.float32)


def times(decibel: float, sound: np.ndarray) -> np.ndarray:
    return (sound * 10.0 ** (decibel / 20)).astype(np.float32)


def live(sound: np.ndarray) -> list[Chunk]:
    with speech_finder() as finder:
        return [chunk for block in blocks(sound, 1600) for chunk in finder.feed(block)] + list(finder.finish())


def level_of(sound: np.ndarray) -> Level:
    level = Level()
    for block in blocks(sound, 3000):
        level.hear(block)
    return level


@pytest.fixture(scope="module")
def speech() -> np.ndarray:
    """(n,) a sentence, from 0.7 s on."""
    if not shutil.which("espeak-ng"):
        pytest.skip("needs espeak-ng")
    spoken = subprocess.run(["espeak-ng", "-v", "en-us", "-s", "150", "--stdout", SENTENCE], capture_output=True, check=True)
    return np.concatenate([pause(0.7), load_audio(spoken.stdout), pause(0.7)])


@pytest.mark.parametrize("steps", [None, 32768])
@pytest.mark.parametrize("decibel", [-40, -60, -70])
def test_speech_is_found_at_every_level(speech: np.ndarray, decibel: float, steps: int | None) -> None:
    quiet = times(decibel, speech)
    if steps is not None:
        quiet = (np.round(quiet * steps) / steps).astype(np.float32)
    expected = list(speech_chunks(blocks(speech)))
    for found in (list(speech_chunks(blocks(quiet))), live(quiet)):
        assert [(c.start, c.end) for c in found] == [pytest.approx((c.start, c.end), abs=0.15) for c in expected]
        for chunk, loud in zip(found, expected, strict=True):
            assert 0.1 < np.abs(chunk.samples).max() <= 1.0
            at = round(chunk.offset * SAMPLE_RATE)
            same = speech[at : at + len(chunk.samples)]
            assert np.corrcoef(chunk.samples, same)[0, 1] > (0.9999 if steps is None or decibel > -50 else 0.97)
            assert chunk.speech_prob > loud.speech_prob - 0.1


def test_speech_of_usual_level_is_handed_on_bit_by_bit(speech: np.ndarray) -> None:
    peak = float(np.abs(speech).max())
    for wanted in (-20.0, -10.0, 0.0):
        sound = np.concatenate([noise(4.0, 1e-3), times(wanted - 20 * np.log10(peak), speech), noise(4.0, 1e-3, 1)])
        assert level_of(sound).gain == 1.0
        for found in (list(speech_chunks(blocks(sound))), live(sound)):
            assert found
            for chunk in found:
                at = round(chunk.offset * SAMPLE_RATE)
                np.testing.assert_array_equal(chunk.samples, sound[at : at + len(chunk.samples)])


def test_a_quiet_beginning_of_a_recording_of_usual_level_stays_as_it_is(speech: np.ndarray) -> None:
    sound = np.concatenate([times(-40, speech), pause(5.0), speech])
    level = Level()
    out = []
    for block in heard_ahead(blocks(sound), level):
        out.append(block)
        assert level.gain == 1.0
    np.testing.assert_array_equal(np.concatenate(out), sound)


def test_a_click_does_not_hide_quiet_speech(speech: np.ndarray) -> None:
    sound = times(-50, speech)
    sound[5000:5040] = 0.5
    assert level_of(sound).gain > 30
    (first, *_) = speech_chunks(blocks(sound))
    assert first.start == pytest.approx(0.7, abs=0.5)


def brown(seconds: float, amplitude: float) -> np.ndarray:
    sound = np.cumsum(noise(seconds, 1.0))
    sound -= np.convolve(sound, np.ones(800) / 800, mode="same")
    return (amplitude * sound / sound.std()).astype(np.float32)


@pytest.mark.parametrize(
    "sound",
    [pause(8), pause(8) + 0.1, noise(8, 1e-4), noise(8, 3e-3), noise(8, 1e-5), brown(8, 1e-4), tone(50, 8, amplitude=1e-3),
     np.concatenate([noise(4, 1e-4), pause(4)]), np.round(noise(8, 0.3)) / 32768],
)  # fmt: skip
def test_silence_noise_and_hum_are_not_raised(sound: np.ndarray) -> None:
    sound = sound.astype(np.float32)
    assert level_of(sound).gain == 1.0
    assert list(speech_chunks(blocks(sound))) == [] == live(sound)
    if sound.std() < 5e-4:
        assert list(speech_chunks(blocks(sound), VadOptions("energy"))) == []


def test_the_gain_has_a_bound(speech: np.ndarray) -> None:
    assert level_of(times(-100, speech)).gain == pytest.approx(10.0 ** (BOUND_DB / 20))
    loud = times(-30, speech)
    loud[20_000] = 1.0
    assert np.abs(raised(loud, level_of(loud).gain)).max() == 1.0


def test_what_is_held_back_is_bounded(speech: np.ndarray) -> None:
    taken = 0

    def endless() -> object:
        nonlocal taken
        while True:
            taken += 1
            yield pause(1.0)

    stream = heard_ahead(endless(), Level())
    for _ in range(100):
        next(stream)
    assert taken == 130
    taken = 0

    def usual() -> object:
        nonlocal taken
        for block in blocks(np.tile(speech, 10)):
            taken += 1
            yield block

    stream = heard_ahead(usual(), Level())
    for _ in range(20):
        next(stream)
    assert taken == 20
