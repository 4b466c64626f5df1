"""Recordings to transcripts: read as streams, cut, batched over recordings, put back in order, judged."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sounds import tone, write, write_wav
from spoken import PitchModel, SoundModel
from tiny_model import clips, tiny_model

import diffusion_gemma_asr as asr
from diffusion_gemma_asr.denoise.clip import Decoded
from diffusion_gemma_asr.denoise.decode import decode_clips
from diffusion_gemma_asr.denoise.options import DecodeOptions
from diffusion_gemma_asr.model.drafts import GreedyCtc, Heard
from diffusion_gemma_asr.model.model import DiffusionGemmaASR
from diffusion_gemma_asr.transcribe.recognizer import Recognizer
from diffusion_gemma_asr.transcribe.recordings import POOL_BATCHES, TranscribeOptions, stream_many, transcribe_many
from diffusion_gemma_asr.transcribe.results import compression_ratio

LOUD = asr.TranscribeOptions(vad_method="energy")  # a tone is no speech to the other one


def transcribe(audio: Any, model: SoundModel | DiffusionGemmaASR, **options: Any) -> asr.Transcript:
    return Recognizer(model).transcribe(audio, vad_method="energy", **options)  # type: ignore[arg-type]


def long_recording(pitches: list[float]) -> np.ndarray:
    """A tone of 27 s each, with a second of silence between them."""
    return np.concatenate([np.concatenate([tone(hertz, 27.0), np.zeros(16_000, np.float32)]) for hertz in pitches])


# -- reading, cutting, batching --------------------------------------------------------------------------------


def test_one_recording(tmp_path: Path) -> None:
    transcript = transcribe(write(tmp_path / "a.wav", tone(440, 1.5)), PitchModel())
    assert transcript.text == "440 hertz"
    assert transcript.language == "en"
    assert transcript.duration == 1.5
    (segment,) = transcript.segments
    assert (segment.id, segment.start) == (0, 0.0)
    assert segment.end == pytest.approx(1.5, abs=0.001)
    assert segment.tokens == (440, 7)
    assert segment.avg_logprob == pytest.approx(-0.5)
    assert segment.no_speech_prob == 0.0
    assert 0 < segment.compression_ratio < 1
    assert segment.words is None and segment.fallback is None and segment.decoder == "draft"


def test_long_sound_is_cut_and_joined() -> None:
    transcript = transcribe(long_recording([440, 880, 1320]), PitchModel())
    assert transcript.text == "440 hertz 880 hertz 1320 hertz"
    assert transcript.duration == pytest.approx(84)
    assert [segment.id for segment in transcript.segments] == [0, 1, 2]
    bounds = [(segment.start, segment.end) for segment in transcript.segments]
    assert bounds == [pytest.approx((28 * i, 28 * i + 27), abs=0.04) for i in range(3)]


def test_order_is_kept_though_chunks_are_sorted_into_batches() -> None:
    model = PitchModel()
    durations_s = [3.0, 0.5, 2.0, 1.0, 2.5, 1.5]
    pitches = [400, 500, 600, 700, 800, 900]
    audio = [tone(hertz, seconds) for hertz, seconds in zip(pitches, durations_s, strict=True)]
    results = list(transcribe_many(model, audio, replace(LOUD, batch_size=2)))
    assert [result.text for result in results] == [f"{hertz} hertz" for hertz in pitches]
    assert [result.duration for result in results] == durations_s
    assert [len(batch) for batch in model.batches] == [2, 2, 2]
    assert all(batch == sorted(batch) for batch in model.batches)


def test_chunks_of_several_recordings_share_a_batch() -> None:
    model = PitchModel()
    pair = np.concatenate([tone(440, 6.0), np.zeros(16_000, np.float32), tone(880, 6.0)])
    results = transcribe_many(model, [pair, tone(660, 1.0)], replace(LOUD, chunk_length=8.0))
    assert [result.text for result in results] == ["440 hertz 880 hertz", "660 hertz"]
    assert len(model.batches) == 1


def test_a_bad_recording_does_not_lose_the_others(tmp_path: Path) -> None:
    good = write(tmp_path / "good.wav", tone(440, 0.5))
    text = tmp_path / "text.wav"
    text.write_text("not sound")
    sources = [tmp_path / "missing.wav", good, text, np.full(8000, np.nan), tone(880, 0.05), tone(660, 0.5)]
    results = list(transcribe_many(PitchModel(), sources, LOUD))
    bad, whole = asr.AudioError, asr.Transcript
    assert [type(result) for result in results] == [bad, whole, bad, bad, bad, whole]
    assert [results[1].text, results[5].text] == ["440 hertz", "660 hertz"]
    with pytest.raises(asr.AudioError, match="no such file"):
        transcribe(tmp_path / "missing.wav", PitchModel())


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
    recognizer = Recognizer(PitchModel())  # type: ignore[arg-type]
    segments = recognizer.stream(Slow(data), vad_method="energy", batch_size=2)
    assert next(segments).text == "440 hertz"
    begun = read
    rest = list(segments)
    assert [segment.id for segment in rest] == list(range(1, 40))
    assert begun < read / 2
    with pytest.raises(asr.AudioError):
        list(recognizer.stream("missing.wav"))


def test_recordings_are_read_as_needed() -> None:
    read = 0

    def sources() -> Iterator[np.ndarray]:
        nonlocal read
        for _ in range(1000):
            read += 1
            yield tone(440, 0.2)

    results = transcribe_many(PitchModel(), sources(), replace(LOUD, batch_size=2))
    next(results)
    assert read == 2
    for _ in range(100):
        next(results)
    assert read <= 101 + 2 * POOL_BATCHES


def test_progress_goes_up_to_all_that_was_read() -> None:
    seen: list[asr.Progress] = []
    audio = [np.zeros(16_000, np.float32), *(tone(440, 1.0) for _ in range(5))]
    list(transcribe_many(PitchModel(), audio, replace(LOUD, batch_size=2), on_progress=seen.append))
    assert [progress.done_s for progress in seen] == pytest.approx([1.0, 2.0, 4.0, 5.0, 6.0])
    assert [progress.read_s for progress in seen] == pytest.approx([3.0, 3.0, 6.0, 6.0, 6.0])


def test_arrays_of_another_rate() -> None:
    sound = tone(440, 0.5, rate=8_000)
    assert transcribe(sound, PitchModel(), sampling_rate=8_000).text == "440 hertz"
    assert transcribe(sound, PitchModel()).text == "880 hertz"


def test_what_is_decoded_can_be_watched() -> None:
    shown: list[tuple[int, int, str]] = []
    events = stream_many(
        PitchModel(),
        [tone(440, 0.5), tone(660, 0.5)],
        LOUD,
        on_step=lambda clip, step, row: shown.append((clip, step, "".join(piece.text for piece in row))),
    )
    assert [event.text for _, event in events if isinstance(event, asr.Segment)] == ["440 hertz", "660 hertz"]
    assert shown == [(0, 0, "440 hertz"), (0, 0, "660 hertz")]  # chunk by chunk


# -- what counts as said -----------------------------------------------------------------------------------------


def test_silence_gives_no_text_and_does_not_ask_the_model() -> None:
    model = PitchModel()
    results = list(transcribe_many(model, [np.zeros(40 * 16_000, np.float32), tone(440, 20.0)]))
    assert [(result.text, result.segments) for result in results] == [("", ())] * 2
    assert [result.duration for result in results] == [40.0, 20.0]
    assert model.batches == []


def test_doubtful_speech_with_an_unsure_text_is_left_out() -> None:
    sound = tone(440, 1.0)
    sound[4000:12_000:] = 0.0  # half of it speech
    assert transcribe(sound, PitchModel()).text
    assert not transcribe(sound, PitchModel(), no_speech_threshold=0.3, logprob_threshold=-0.4).text
    assert transcribe(sound, PitchModel(), no_speech_threshold=0.3, logprob_threshold=-0.6).text
    assert transcribe(sound, PitchModel(), no_speech_threshold=0.6, logprob_threshold=-0.4).text


@pytest.fixture
def deaf(monkeypatch: pytest.MonkeyPatch) -> None:
    """CTC never hears anything."""
    monkeypatch.setattr(GreedyCtc, "hear", lambda self, encoded: Heard([[] for _ in encoded.slots], encoded.slots[..., 0]))


def test_what_drafts_nothing_heard_no_speech(
    whisper_folder: Path, backbone_folder: Path, request: pytest.FixtureRequest
) -> None:
    assert transcribe(tone(440, 1.0), PitchModel(deaf=True)).segments == ()
    model = tiny_model(whisper_folder, backbone_folder, start="draft")
    sound = clips([16_000])[0]
    options = {"language": "en", "steps": 2, "logprob_threshold": -99.0}
    assert transcribe(sound, model, **options).text
    request.getfixturevalue("deaf")
    (decoded,) = decode_clips(model, [sound], DecodeOptions(language="en", steps=2))
    assert decoded.text, "the denoiser writes something all the same"
    assert transcribe(sound, model, **options).segments == ()


def test_without_ctc_nothing_is_known_of_drafts(whisper_folder: Path, backbone_folder: Path, deaf: None) -> None:
    model = tiny_model(whisper_folder, backbone_folder, ctc=False)
    assert transcribe(clips([16_000])[0], model, language="en", steps=2).text


# -- with a model that denoises ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(whisper_folder: Path, backbone_folder: Path) -> DiffusionGemmaASR:
    return tiny_model(whisper_folder, backbone_folder, reads_context=True)


SOUNDS = clips([24_000, 9000, 16_000, 40_000])
FEW = DecodeOptions(language="en", steps=2, entropy_bound=2.0)


def test_a_recording_is_what_decoding_it_gives(model: DiffusionGemmaASR) -> None:
    decoded = decode_clips(model, SOUNDS, FEW)
    results = list(transcribe_many(model, SOUNDS, TranscribeOptions(decode=FEW, vad_method="energy", batch_size=2)))
    assert [r.text for r in results if isinstance(r, asr.Transcript)] == [d.text.strip() for d in decoded]
    for result, one in zip(results, decoded, strict=True):
        (segment,) = result.segments
        assert segment.tokens == tuple(one.tokens) and segment.decoder == "denoising"
        assert segment.avg_logprob == pytest.approx(np.mean(one.logprobs), abs=1e-3)


def test_a_text_that_repeats_itself_is_decoded_again(model: DiffusionGemmaASR) -> None:
    """With a threshold at which some of these texts count as repeating themselves: first another seed, then the draft."""

    def decode(seed: int) -> list[Decoded]:
        return decode_clips(model, SOUNDS, replace(FEW, steps=1, seed=seed))

    seen = set()
    for seed in (3,):
        first, second = decode(seed), decode(seed + 1)
        ratios = sorted(compression_ratio(one.text) for one in (*first, *second))
        threshold = (ratios[3] + ratios[4]) / 2
        options = TranscribeOptions(
            replace(FEW, steps=1, seed=seed),
            vad_method="energy",
            compression_ratio_threshold=threshold,
            logprob_threshold=-99.0,
        )
        for one, other, result in zip(first, second, transcribe_many(model, SOUNDS, options), strict=True):
            assert isinstance(result, asr.Transcript)
            expected = (one.text, None)
            if compression_ratio(one.text) > threshold:
                expected = (other.text, "seed") if compression_ratio(other.text) <= threshold else (one.draft, "draft")
            (segment,) = result.segments
            assert (segment.text, segment.fallback) == (expected[0].strip(), expected[1])
            assert segment.decoder == ("draft" if expected[1] == "draft" else "denoising")
            seen.add(segment.fallback)
    assert seen == {None, "seed", "draft"}, "choose other sounds"


def test_what_was_not_denoised_is_not_decoded_again() -> None:
    """Another seed would not change it."""
    model = PitchModel()
    assert transcribe(tone(440, 1.0), model, compression_ratio_threshold=0.1).segments[0].fallback is None
    assert model.calls == 1


def test_words_have_times() -> None:
    sound = np.concatenate([np.zeros(32_000, np.float32), tone(440, 1.0)])
    (segment,) = transcribe(sound, PitchModel(), word_timestamps=True).segments
    assert segment.words is not None
    assert [word.word for word in segment.words] == ["440", " hertz"]
    first, second = segment.words
    assert segment.start == first.start == pytest.approx(2.0, abs=0.04)
    assert first.end <= second.start and second.end == segment.end
    assert first.probability == pytest.approx(np.exp(-0.25))


def test_options_reach_the_model(model: DiffusionGemmaASR) -> None:
    """Each one changes the text."""
    plain = {"language": "en", "steps": 2, "entropy_bound": 2.0, "start": "noise"}
    others = [
        {},
        {"language": "de"},
        {"seed": 1},
        {"steps": 1},
        {"start": "draft"},
        {"hotwords": "Kant, Hegel"},
        {"initial_prompt": "Good morning."},
        {"entropy_bound": 9.0},
        {"canvas_length": 9},
    ]
    texts = [transcribe(SOUNDS[0], model, **plain | other).text for other in others]
    assert len(set(texts)) == len(others)
    assert transcribe(SOUNDS[0], model, **plain).text == texts[0]
    assert transcribe(SOUNDS[0], model, **plain | {"language": "de"}).language == "de"
    assert transcribe(0.0 * SOUNDS[0], model, language="de").language == "de"


# -- what is refused ---------------------------------------------------------------------------------------------


class Unread:
    """Recordings that nobody may ask for."""

    def __iter__(self) -> Iterator[np.ndarray]:
        raise AssertionError("sound was read before the options were looked at")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"language": "de"}, "the model fake was not trained for language 'de'; it knows en"),
        ({"language": "en,de"}, "was not trained for language 'de'"),
        ({"hotwords": "Kant"}, "not trained to read context"),
        ({"initial_prompt": "Before."}, "leave out initial_prompt and hotwords"),
    ],
)
def test_what_the_model_cannot_do_is_refused_before_any_sound_is_read(options: dict[str, str], message: str) -> None:
    model = PitchModel()
    chosen = TranscribeOptions(DecodeOptions(**options))  # type: ignore[arg-type]
    with pytest.raises(asr.AsrError, match=message):
        list(transcribe_many(model, Unread(), chosen))
    assert model.calls == 0


def test_a_model_of_several_languages_that_cannot_find_them_wants_a_name() -> None:
    model = PitchModel(languages=("en", "de"))
    with pytest.raises(asr.AsrError, match="not trained to find the language; name one of en, de"):
        list(transcribe_many(model, Unread()))
    assert transcribe(tone(440, 0.5), model, language="de").language == "de"


def test_impossible_options() -> None:
    for wrong, message in (
        ({"batch_size": 0}, "batch_size is 0"),
        ({"chunk_length": 40}, "chunk_length is 40"),
        ({"vad_method": "magic"}, "magic"),
    ):
        with pytest.raises(asr.AsrError, match=message):
            TranscribeOptions(**wrong)  # type: ignore[arg-type]
    for wrong, message in (
        ({"language": "xx"}, r"language 'xx' is not one of en .*, zh .*, auto"),
        ({"language": "auto,en"}, "give auto alone, or codes"),
        ({"start": "middle"}, "'start' must be one of noise, draft, ctc, found the text 'middle'"),
        ({"steps": 0}, "steps is 0"),
        ({"t_min": 0.9}, "choose 0 < t_min <= t_max"),
        ({"canvas_length": 0}, "canvas_length is 0"),
    ):
        with pytest.raises(asr.AsrError, match=message):
            DecodeOptions(**wrong)  # type: ignore[arg-type]
