from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sounds import PitchModel, tone, write

import diffusion_gemma_asr as asr
from diffusion_gemma_asr.denoise import DenoiseOptions
from diffusion_gemma_asr.transcribe import POOL_BATCHES


def long_recording(pitches: list[float]) -> np.ndarray:
    """A tone of 27 s each, with half a second of silence between them."""
    return np.concatenate(
        [np.concatenate([tone(hertz, 27.0), np.zeros(8000, np.float32)]) for hertz in pitches]
    )


def test_the_names_of_the_package() -> None:
    assert callable(asr.transcribe) and callable(asr.load)
    for name in asr.__all__:
        assert hasattr(asr, name)


def test_one_recording(tmp_path: Path) -> None:
    model = PitchModel()
    transcript = asr.transcribe(write(tmp_path / "a.wav", tone(440, 1.5)), model)
    assert transcript.text == "440 hertz"
    assert transcript.language == "en"
    assert transcript.duration == 1.5
    (segment,) = transcript.segments
    assert (segment.id, segment.start, segment.end) == (0, 0.0, 1.5)
    assert segment.tokens == (440, 7)
    assert segment.avg_logprob == -0.5
    assert segment.no_speech_prob == 0.0
    assert 0 < segment.compression_ratio < 1
    assert segment.words is None


def test_long_sound_is_cut_and_joined() -> None:
    model = PitchModel()
    transcript = asr.transcribe(long_recording([440, 880, 1320]), model)
    assert transcript.text == "440 hertz 880 hertz 1320 hertz"
    assert transcript.duration == pytest.approx(82.5)
    assert [segment.id for segment in transcript.segments] == [0, 1, 2]
    assert transcript.segments[0].start == 0.0
    assert transcript.segments[-1].end == pytest.approx(82.5)
    for before, after in zip(transcript.segments, transcript.segments[1:], strict=False):
        assert before.end == pytest.approx(after.start)
    assert 27.0 < transcript.segments[1].start < 27.5


def test_order_is_kept_though_chunks_finish_in_another() -> None:
    model = PitchModel()
    durations_s = [3.0, 0.5, 2.0, 1.0, 2.5, 1.5]
    pitches = [400, 500, 600, 700, 800, 900]
    audio = [tone(hertz, seconds) for hertz, seconds in zip(pitches, durations_s, strict=True)]
    results = list(asr.transcribe_many(model, audio, asr.TranscribeOptions(batch_size=2)))
    assert [result.text for result in results] == [f"{hertz} hertz" for hertz in pitches]
    assert model.batches == [[round(16_000 * seconds) for seconds in durations_s]]  # all in one queue


def test_chunks_of_several_recordings_share_a_batch() -> None:
    model = PitchModel()
    results = asr.transcribe_many(model, [long_recording([440, 880]), tone(660, 1.0)])
    assert [result.text for result in results] == ["440 hertz 880 hertz", "660 hertz"]
    assert len(model.batches) == 1


def test_a_bad_recording_does_not_lose_the_others(tmp_path: Path) -> None:
    good = write(tmp_path / "good.wav", tone(440, 0.5))
    text = tmp_path / "text.wav"
    text.write_text("not sound")
    sources = [tmp_path / "missing.wav", good, text, np.full(8000, np.nan), tone(880, 0.05), tone(660, 0.5)]
    results = list(asr.transcribe_many(PitchModel(), sources))
    assert [type(result) for result in results] == [
        asr.AudioError,
        asr.Transcript,
        asr.AudioError,
        asr.AudioError,
        asr.AudioError,
        asr.Transcript,
    ]
    assert [results[1].text, results[5].text] == ["440 hertz", "660 hertz"]
    with pytest.raises(asr.AudioError, match="no such file"):
        asr.transcribe(tmp_path / "missing.wav", PitchModel())


def test_silence_gives_no_text_and_does_not_ask_the_model() -> None:
    model = PitchModel()
    (result,) = asr.transcribe_many(model, [np.zeros(40 * 16_000, np.float32)])
    assert isinstance(result, asr.Transcript)
    assert result.text == "" and result.duration == 40.0
    assert [segment.no_speech_prob for segment in result.segments] == [1.0, 1.0]
    assert [segment.compression_ratio for segment in result.segments] == [0.0, 0.0]
    assert model.batches == []


def test_recordings_are_read_as_needed() -> None:
    read = 0

    def sources():
        nonlocal read
        for _ in range(1000):
            read += 1
            yield tone(440, 0.2)

    results = asr.transcribe_many(PitchModel(), sources(), asr.TranscribeOptions(batch_size=2))
    next(results)
    assert read == 2 * POOL_BATCHES


def test_options_reach_the_model() -> None:
    model = PitchModel()
    denoise = DenoiseOptions(steps=3)
    sound = tone(440, 0.5, rate=8_000)
    transcript = asr.transcribe(
        sound,
        model,
        language="de",
        denoise=denoise,
        seed=5,
        sampling_rate=8_000,
        start="draft",
        engine="reference",
        batch_size=3,
    )
    assert transcript.text == "440 hertz" and transcript.language == "de"
    assert model.calls == [("de", denoise, 5, "draft", "reference", 3)]
    asr.transcribe(sound, model)
    assert model.calls[1] == ("en", None, 0, None, "fast", 16)


def test_errors_that_concern_every_recording() -> None:
    with pytest.raises(asr.AsrError, match="language xx"):
        asr.transcribe(tone(440, 0.5), PitchModel(), language="xx")
    with pytest.raises(asr.AsrError, match="batch_size is 0"):
        asr.TranscribeOptions(batch_size=0)
    with pytest.raises(asr.AsrError, match="start is 'middle'; choose 'noise' or 'draft'"):
        asr.TranscribeOptions(start="middle")  # type: ignore[arg-type]
    with pytest.raises(asr.AsrError, match="engine is 'steam'; choose 'fast' or 'reference'"):
        asr.TranscribeOptions(engine="steam")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="langauge"):
        asr.transcribe(tone(440, 0.5), PitchModel(), langauge="en")


def test_progress_goes_up_to_all_that_was_read() -> None:
    seen: list[asr.Progress] = []
    audio = [np.zeros(16_000, np.float32), *(tone(440, 1.0) for _ in range(5))]
    list(
        asr.transcribe_many(PitchModel(), audio, asr.TranscribeOptions(batch_size=2), on_progress=seen.append)
    )
    assert [progress.done_s for progress in seen] == pytest.approx([2.0, 3.0, 4.0, 5.0, 6.0])
    assert all(progress.read_s == pytest.approx(6.0) for progress in seen)


def test_load_says_what_is_wrong_with_device_and_dtype() -> None:
    with pytest.raises(asr.AsrError, match="device abacus cannot be used"):
        asr.load(device="abacus")
    with pytest.raises(asr.AsrError, match="dtype int3 is not known"):
        asr.load(dtype="int3")
