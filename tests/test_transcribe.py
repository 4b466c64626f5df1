from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sounds import PitchModel, tone, write, write_wav

import diffusion_gemma_asr as asr
from diffusion_gemma_asr.denoise import DenoiseOptions
from diffusion_gemma_asr.transcribe import POOL_BATCHES

LOUD = asr.TranscribeOptions(vad_method="energy")  # a tone is no speech to the other one


def transcribe(audio: object, model: PitchModel, **options: object) -> asr.Transcript:
    return asr.transcribe(audio, model, vad_method="energy", **options)


def long_recording(pitches: list[float]) -> np.ndarray:
    """A tone of 27 s each, with a second of silence between them."""
    return np.concatenate(
        [np.concatenate([tone(hertz, 27.0), np.zeros(16_000, np.float32)]) for hertz in pitches]
    )


def test_the_names_of_the_package() -> None:
    assert callable(asr.transcribe) and callable(asr.load)
    for name in asr.__all__:
        assert hasattr(asr, name)


def test_one_recording(tmp_path: Path) -> None:
    model = PitchModel()
    transcript = transcribe(write(tmp_path / "a.wav", tone(440, 1.5)), model)
    assert transcript.text == "440 hertz"
    assert transcript.language == "en"
    assert transcript.duration == 1.5
    (segment,) = transcript.segments
    assert (segment.id, segment.start) == (0, 0.0)
    assert segment.end == pytest.approx(1.5, abs=0.001)
    assert segment.tokens == (440, 7)
    assert segment.avg_logprob == -0.5
    assert segment.no_speech_prob == 0.0
    assert 0 < segment.compression_ratio < 1
    assert segment.words is None and segment.fallback is None


def test_long_sound_is_cut_and_joined() -> None:
    model = PitchModel()
    transcript = transcribe(long_recording([440, 880, 1320]), model)
    assert transcript.text == "440 hertz 880 hertz 1320 hertz"
    assert transcript.duration == pytest.approx(84)
    assert [segment.id for segment in transcript.segments] == [0, 1, 2]
    bounds = [(segment.start, segment.end) for segment in transcript.segments]
    assert bounds == [pytest.approx((28 * i, 28 * i + 27), abs=0.04) for i in range(3)]


def test_order_is_kept_though_chunks_finish_in_another() -> None:
    model = PitchModel()
    durations_s = [3.0, 0.5, 2.0, 1.0, 2.5, 1.5]
    pitches = [400, 500, 600, 700, 800, 900]
    audio = [tone(hertz, seconds) for hertz, seconds in zip(pitches, durations_s, strict=True)]
    results = list(asr.transcribe_many(model, audio, replace(LOUD, batch_size=2)))
    assert [result.text for result in results] == [f"{hertz} hertz" for hertz in pitches]
    assert [len(batch) for batch in model.batches] == [2, 4]  # the first pool is one batch, the next twice that


def test_chunks_of_several_recordings_share_a_batch() -> None:
    model = PitchModel()
    results = asr.transcribe_many(model, [long_recording([440, 880]), tone(660, 1.0)], LOUD)
    assert [result.text for result in results] == ["440 hertz 880 hertz", "660 hertz"]
    assert len(model.batches) == 1


def test_a_bad_recording_does_not_lose_the_others(tmp_path: Path) -> None:
    good = write(tmp_path / "good.wav", tone(440, 0.5))
    text = tmp_path / "text.wav"
    text.write_text("not sound")
    sources = [tmp_path / "missing.wav", good, text, np.full(8000, np.nan), tone(880, 0.05), tone(660, 0.5)]
    results = list(asr.transcribe_many(PitchModel(), sources, LOUD))
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
        transcribe(tmp_path / "missing.wav", PitchModel())


def test_silence_gives_no_text_and_does_not_ask_the_model() -> None:
    model = PitchModel()
    results = list(asr.transcribe_many(model, [np.zeros(40 * 16_000, np.float32), tone(440, 20.0)]))
    assert [(result.text, result.segments) for result in results] == [("", ())] * 2
    assert [result.duration for result in results] == [40.0, 20.0]
    assert model.batches == []


def test_what_drafts_nothing_heard_no_speech() -> None:
    model = PitchModel()
    model.draft_text = ""
    assert transcribe(tone(440, 1.0), model).segments == ()
    model.drafts = False  # it cannot know
    assert transcribe(tone(440, 1.0), model).text == "440 hertz"


def test_doubtful_speech_with_an_unsure_text_is_left_out() -> None:
    sound = tone(440, 1.0)
    sound[4000:12_000:] = 0.0  # half of it speech
    assert transcribe(sound, PitchModel()).text
    assert not transcribe(sound, PitchModel(), no_speech_threshold=0.3, logprob_threshold=-0.4).text
    assert transcribe(sound, PitchModel(), no_speech_threshold=0.3, logprob_threshold=-0.6).text
    assert transcribe(sound, PitchModel(), no_speech_threshold=0.6, logprob_threshold=-0.4).text


def test_a_text_that_goes_round_in_circles_is_decoded_again() -> None:
    audio = [tone(440, 1.0), tone(880, 1.0), tone(660, 1.0)]
    model = PitchModel(loops={440: (5,), 660: (5, 6)})
    results = asr.transcribe_many(model, audio, replace(LOUD, seed=5))
    found = [result.segments[0] for result in results]
    assert [(s.text, s.fallback) for s in found] == [("440 hertz", "seed"), ("880 hertz", None), ("a draft", "draft")]
    assert found[2].tokens == (3,) and found[2].avg_logprob == -0.125
    assert [call[2] for call in model.calls] == [5, 6]
    assert [len(batch) for batch in model.batches] == [3, 2]
    (again,) = transcribe(audio[0], PitchModel(loops={440: (0,)}), compression_ratio_threshold=99.0).segments
    assert again.fallback == "seed"


def test_words_have_times() -> None:
    sound = np.concatenate([np.zeros(32_000, np.float32), tone(440, 1.0)])
    (segment,) = transcribe(sound, PitchModel(), word_timestamps=True).segments
    assert [word.word for word in segment.words] == ["440", " 7"]
    first, second = segment.words
    assert segment.start == first.start == pytest.approx(2.0, abs=0.04)
    assert first.end <= second.start and second.end == segment.end
    assert first.probability == pytest.approx(np.exp(-0.25))


def test_languages_and_context_reach_the_model() -> None:
    model = PitchModel()
    sound = tone(440, 1.0)
    assert transcribe(sound, model).language == "en"
    found = transcribe(sound, model, language="en, de", initial_prompt="Good morning.", hotwords="Kant, Hegel")
    assert found.language == found.segments[0].language == "de"
    context = "Before it was said: Good morning. Words that may occur: Kant, Hegel."
    assert model.asked == [("auto", None, ""), ("auto", ["en", "de"], context)]
    assert transcribe(0.0 * sound, model, hotwords="Kant, Hegel", language="de").text == ""
    assert transcribe(0.0 * sound, model, language="de").language == "de"


def test_clips() -> None:
    sound = np.concatenate([tone(hertz, 2.0) for hertz in (400, 500, 600, 700)])
    transcript = transcribe(sound, PitchModel(), clip_timestamps=(2.0, 4.0, 6.0))
    assert transcript.text == "500 hertz 700 hertz"
    assert [(s.start, s.end) for s in transcript.segments] == [pytest.approx((2, 4)), pytest.approx((6, 8))]
    assert transcript.duration == 8.0
    for wrong in ((3.0, 2.0), (-1.0, 2.0), (1.0, 1.0)):
        with pytest.raises(asr.AsrError, match="clip_timestamps"):
            asr.TranscribeOptions(clip_timestamps=wrong)


def test_a_stream_gives_segments_while_it_reads() -> None:
    read = 0

    class Slow(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            nonlocal read
            read += 1
            return super().read(size)

    data = write_wav(np.concatenate([np.append(tone(440, 1.0), np.zeros(16_000, np.float32)) for _ in range(40)]))
    segments = asr.stream(Slow(data), PitchModel(), vad_method="energy", batch_size=2)
    assert next(segments).text == "440 hertz"
    begun = read
    rest = list(segments)
    assert [segment.id for segment in rest] == list(range(1, 40))
    assert begun < read / 2
    with pytest.raises(asr.AudioError):
        list(asr.stream("missing.wav", PitchModel()))


def test_recordings_are_read_as_needed() -> None:
    read = 0

    def sources():
        nonlocal read
        for _ in range(1000):
            read += 1
            yield tone(440, 0.2)

    results = asr.transcribe_many(PitchModel(), sources(), replace(LOUD, batch_size=2))
    next(results)
    assert read == 2
    for _ in range(100):
        next(results)
    assert read <= 101 + 2 * POOL_BATCHES


def test_options_reach_the_model() -> None:
    model = PitchModel()
    denoise = DenoiseOptions(steps=3)
    sound = tone(440, 0.5, rate=8_000)
    transcript = transcribe(
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
    transcribe(sound, model)
    assert model.calls[1] == ("auto", None, 0, None, "fast", 16)


def test_errors_that_concern_every_recording() -> None:
    with pytest.raises(asr.AsrError, match="language xx"):
        transcribe(tone(440, 0.5), PitchModel(), language="xx")
    with pytest.raises(asr.AsrError, match="batch_size is 0"):
        asr.TranscribeOptions(batch_size=0)
    with pytest.raises(asr.AsrError, match="start is 'middle'; choose 'noise' or 'draft'"):
        asr.TranscribeOptions(start="middle")  # type: ignore[arg-type]
    with pytest.raises(asr.AsrError, match="engine is 'steam'; choose 'fast' or 'reference'"):
        asr.TranscribeOptions(engine="steam")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="langauge"):
        transcribe(tone(440, 0.5), PitchModel(), langauge="en")


def test_progress_goes_up_to_all_that_was_read() -> None:
    seen: list[asr.Progress] = []
    audio = [np.zeros(16_000, np.float32), *(tone(440, 1.0) for _ in range(5))]
    list(asr.transcribe_many(PitchModel(), audio, replace(LOUD, batch_size=2), on_progress=seen.append))
    assert [progress.done_s for progress in seen] == pytest.approx([1.0, 2.0, 4.0, 5.0, 6.0])
    assert [progress.read_s for progress in seen] == pytest.approx([3.0, 3.0, 6.0, 6.0, 6.0])


def test_load_says_what_is_wrong_with_device_and_dtype() -> None:
    with pytest.raises(asr.AsrError, match="device abacus cannot be used"):
        asr.load(device="abacus")
    with pytest.raises(asr.AsrError, match="dtype int3 is not known"):
        asr.load(dtype="int3")
