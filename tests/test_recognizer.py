"""What users hold: one object, options by name, and a bundled model that finds real words."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_model import clips, tiny_model

import diffusion_gemma_asr as asr
from diffusion_gemma_asr.audio.read import load_audio
from diffusion_gemma_asr.model.model import DiffusionGemmaASR

EXAMPLES = Path(__file__).parents[1] / "examples"
FEW = {"language": "en", "steps": 2, "entropy_bound": 2.0, "vad_method": "energy"}


@pytest.fixture(scope="module")
def recognizer(whisper_folder: Path, backbone_folder: Path) -> asr.Recognizer:
    return asr.Recognizer(tiny_model(whisper_folder, backbone_folder, languages=("en", "de")))


@pytest.fixture(scope="module")
def bundled() -> asr.Recognizer:
    """The model that transcribes where none is named."""
    return asr.load(device="cpu")


@pytest.fixture(scope="module")
def audio() -> list[np.ndarray]:
    return clips([24_000, 9000, 16_000])


# -- names ------------------------------------------------------------------------------------------------------


def test_every_public_name_is_there() -> None:
    for name in asr.__all__:
        assert getattr(asr, name) is not None
    assert not callable(asr.transcribe), "there is one way: the recognizer's"  # a folder of the package
    with pytest.raises(AttributeError, match="has no attribute 'trancribe'"):
        _ = asr.trancribe


def test_the_package_alone_does_not_load_torch() -> None:
    code = "import sys, diffusion_gemma_asr; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_load_says_what_is_wrong() -> None:
    with pytest.raises(asr.AsrError, match="device abacus cannot be used"):
        asr.load(device="abacus")
    with pytest.raises(asr.AsrError, match="dtype int3 is not known"):
        asr.load(dtype="int3")
    with pytest.raises(asr.AsrError, match=r"devcie is no option here; did you mean 'device'\?"):
        asr.load(devcie="cpu")
    with pytest.raises(asr.CheckpointError, match="no such checkpoint"):
        asr.load("nowhere")


# -- options ----------------------------------------------------------------------------------------------------


def test_a_wrong_name_is_one_error_with_the_nearest_one(recognizer: asr.Recognizer, audio: list[np.ndarray]) -> None:
    message = r"langauge is no option here; did you mean 'language'\?"
    with pytest.raises(asr.AsrError, match=message):
        recognizer.transcribe(audio[0], langauge="en")
    with pytest.raises(asr.AsrError, match=message):
        list(recognizer.stream(audio[0], langauge="en"))
    with pytest.raises(asr.AsrError, match=message):
        list(recognizer.transcribe_many(audio, langauge="en"))
    with pytest.raises(asr.AsrError, match=message):
        list(recognizer.live(audio, langauge="en"))


def test_options_by_name_or_as_a_whole_but_not_both(recognizer: asr.Recognizer, audio: list[np.ndarray]) -> None:
    decode = asr.DecodeOptions(language="de", steps=2, seed=3)
    whole = asr.TranscribeOptions(decode, vad_method="energy", word_timestamps=True)
    named = {"language": "de", "steps": 2, "seed": 3, "vad_method": "energy", "word_timestamps": True}
    assert recognizer.transcribe(audio[0], whole) == recognizer.transcribe(audio[0], **named)
    assert recognizer.transcribe(audio[0], whole) == recognizer.transcribe(
        audio[0], decode=decode, vad_method="energy", word_timestamps=True
    )
    with pytest.raises(TypeError, match="as a whole or by name, not both"):
        recognizer.transcribe(audio[0], whole, steps=2)


def test_a_language_that_the_model_does_not_know_is_refused(recognizer: asr.Recognizer) -> None:
    assert recognizer.languages == ("en", "de")
    for call in (recognizer.transcribe, lambda path, **named: list(recognizer.stream(path, **named))):
        with pytest.raises(asr.AsrError, match="was not trained for language 'fr'; it knows en, de"):
            call("no such file.wav", language="fr")  # not even looked for


# -- one way to do each thing -------------------------------------------------------------------------------------


def test_streams_and_many_recordings_are_what_single_calls_give(recognizer: asr.Recognizer, audio: list[np.ndarray]) -> None:
    alone = [recognizer.transcribe(clip, **FEW) for clip in audio]
    assert all(transcript.text for transcript in alone)
    many = list(recognizer.transcribe_many(audio, batch_size=2, **FEW))
    assert [(t.text, t.duration) for t in many if isinstance(t, asr.Transcript)] == [(t.text, t.duration) for t in alone]
    for clip, transcript in zip(audio, alone, strict=True):
        segments = tuple(recognizer.stream(clip, **FEW))
        assert [segment.text for segment in segments] == [segment.text for segment in transcript.segments]


def test_progress_is_reported(recognizer: asr.Recognizer, audio: list[np.ndarray]) -> None:
    seen: list[asr.Progress] = []
    recognizer.transcribe(audio[0], on_progress=seen.append, **FEW)
    list(recognizer.stream(audio[0], on_progress=seen.append, **FEW))
    assert [progress.done_s for progress in seen] == [pytest.approx(1.5)] * 2


def test_a_file_that_cannot_be_read_is_an_error_or_a_result(recognizer: asr.Recognizer, audio: list[np.ndarray]) -> None:
    with pytest.raises(asr.AudioError, match="no such file"):
        recognizer.transcribe("missing.wav", **FEW)
    bad, good = recognizer.transcribe_many(["missing.wav", audio[0]], **FEW)
    assert isinstance(bad, asr.AudioError) and isinstance(good, asr.Transcript)


# -- a bundled model ----------------------------------------------------------------------------------------------


def words(text: str) -> list[str]:
    return "".join(c for c in text.lower() if c.isalpha() or c.isspace()).split()


@pytest.mark.parametrize("code, share", [("en", 0.7), ("es", 0.6)])
def test_real_words_of_real_sound(bundled: asr.Recognizer, code: str, share: float) -> None:
    expected = words((EXAMPLES / f"{code}.txt").read_text(encoding="utf-8"))
    transcript = bundled.transcribe(EXAMPLES / f"{code}.flac", language=code)
    found = words(transcript.text)
    assert len(set(found) & set(expected)) >= share * len(set(expected)), transcript.text
    assert len(found) <= 1.3 * len(expected)
    assert transcript.language == code
    assert bundled.transcribe(EXAMPLES / f"{code}.flac").language == code  # found by itself


def test_segments_say_what_wrote_them(bundled: asr.Recognizer) -> None:
    path = EXAMPLES / "en.flac"
    written = {
        start: bundled.transcribe(path, language="en", start=start).segments[0].decoder
        for start in (None, "draft", "noise", "ctc")
    }
    assert written == {None: "denoising", "draft": "denoising", "noise": "denoising", "ctc": "draft"}


def test_words_have_times_in_order(bundled: asr.Recognizer) -> None:
    transcript = bundled.transcribe(EXAMPLES / "en.flac", language="en", word_timestamps=True)
    (segment,) = transcript.segments
    assert segment.words is not None and len(segment.words) >= 6
    assert "".join(word.word for word in segment.words).strip() == segment.text
    times = [time for word in segment.words for time in (word.start, word.end)]
    assert times == sorted(times) and segment.start <= times[0] and times[-1] <= segment.end
    assert all(0 <= word.probability <= 1 for word in segment.words)


def test_a_known_text_is_placed_in_the_sound(bundled: asr.Recognizer) -> None:
    sound = load_audio(EXAMPLES / "en.flac")
    text = "follow the river until you reach the mill"
    placed = bundled.align(sound, text)
    assert "".join(word.word for word in placed).strip() == text
    times = [time for word in placed for time in (word.start, word.end)]
    assert times == sorted(times) and times[0] >= 0 and times[-1] <= len(sound) / 16_000
    late = bundled.align(np.concatenate([np.zeros(16_000, np.float32), sound]), text)
    shifts = [b.start - a.start for a, b in zip(placed, late, strict=True)]
    assert np.median(shifts) == pytest.approx(1.0, abs=0.1)
    with pytest.raises(asr.DataError, match="do not fit into"):
        bundled.align(sound[:8000], text * 20)


def test_the_module_is_behind_it(bundled: asr.Recognizer) -> None:
    assert isinstance(bundled.model, DiffusionGemmaASR)
    assert not bundled.model.training and not any(p.requires_grad for p in bundled.model.parameters())
