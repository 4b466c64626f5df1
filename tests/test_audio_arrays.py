"""Arrays of integers in types wider than their samples: heard, or refused in one line, but never silence."""

from __future__ import annotations

import numpy as np
import pytest
from sounds import tone

from diffusion_gemma_asr.audio.read import convert_blocks, load_audio
from diffusion_gemma_asr.errors import AudioError

SOUND = tone(440, 0.5)
STEPS = (SOUND * 32767).astype(np.int16)


@pytest.mark.parametrize(
    "array",
    [
        STEPS,
        np.array(STEPS.tolist()),
        STEPS.astype(np.int32),
        STEPS.astype(np.int64),
        STEPS.astype(np.int32) * 256,  # 24 bits
        STEPS.astype(np.int64) * 256,
        STEPS.astype(np.int32) * 65536,
        STEPS.astype(np.int64) * 65536,
        STEPS.astype(np.int64) * 2**48,
        (STEPS.astype(np.int32) + 32768).astype(np.uint16),
        (STEPS.astype(np.int64) * 65536 + 2**31).astype(np.uint32),
        STEPS.astype(">i2"),
        STEPS.astype(">i4"),
        np.stack([STEPS, STEPS]).astype(np.int64),
        np.stack([STEPS, STEPS], axis=1).astype(np.int32),
    ],
)
def test_integers_are_scaled_by_the_bits_they_have(array: np.ndarray) -> None:
    np.testing.assert_allclose(load_audio(array), SOUND, atol=1e-4)


def test_integers_that_use_all_of_their_type() -> None:
    for kind in (np.int16, np.int32, np.int64):
        info = np.iinfo(kind)
        samples = load_audio(np.repeat(np.array([info.min, 0, info.max], kind), 1000))
        np.testing.assert_allclose(samples[[0, 1500, 2500]], [-1, 0, 1], atol=1e-4)


def test_silence_is_silence() -> None:
    for kind in (np.int16, np.int32, np.int64):
        assert not load_audio(np.zeros(4000, kind)).any()
        assert np.abs(load_audio(np.random.default_rng(0).integers(-2, 3, 4000).astype(kind))).max() < 1e-4


@pytest.mark.parametrize(
    ("array", "says"),
    [
        ((STEPS.astype(np.int32) + 32768).astype(np.uint32), "uint32 samples that reach only"),
        (STEPS.astype(np.float32), r"whole numbers that reach \d+, full scale is 1"),
        ((STEPS / 1000).round(), r"whole numbers that reach 10, full scale is 1"),
        (STEPS.astype(np.float64) + 0.25, "samples reach 98.., full scale is 1"),
        (STEPS.astype(complex), "type complex128"),
        (STEPS.astype(object), "type object"),
    ],
)
def test_arrays_that_are_refused(array: np.ndarray, says: str) -> None:
    with pytest.raises(AudioError, match=says) as caught:
        load_audio(array)
    assert "\n" not in str(caught.value)


def test_floats_may_be_louder_than_full_scale_or_whole_numbers() -> None:
    np.testing.assert_array_equal(load_audio(4 * SOUND), 4 * SOUND)
    np.testing.assert_array_equal(load_audio(np.sign(SOUND)), np.sign(SOUND))


def test_blocks_of_integers() -> None:
    def converted(array: np.ndarray) -> np.ndarray:
        return np.concatenate(list(convert_blocks(np.array_split(array, 9))))

    for array in (STEPS, STEPS.astype(np.int32) * 65536):
        np.testing.assert_allclose(converted(array), SOUND, atol=1e-4)
    quiet = np.random.default_rng(0).integers(-500, 500, 8000).astype(np.int32)  # what a 32-bit converter makes of silence
    assert np.abs(converted(quiet)).max() < 1e-6
    with pytest.raises(AudioError, match="int32 samples that reach only 9830 of 2147483648; give 16-bit samples as int16"):
        converted(STEPS.astype(np.int32))
    for kind in (np.int64, np.uint32, np.uint64):
        with pytest.raises(AudioError, match=f"type {kind.__name__}, whose full scale is not known"):
            converted(STEPS.astype(kind))
