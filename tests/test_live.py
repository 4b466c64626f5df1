"""Live transcription: words are committed when they are stable, never taken back, and the work stays bounded."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from spoken import RATE, WORDS, Sound, WordModel, blocks, live, pause, said, text

import diffusion_gemma_asr as asr
from diffusion_gemma_asr.audio.read import load_audio
from diffusion_gemma_asr.transcribe.recognizer import Recognizer

EXAMPLE = Path(__file__).parents[1] / "examples" / "en.flac"


def test_words_are_committed_while_they_are_spoken() -> None:
    updates = live(np.concatenate([pause(1.0), said(WORDS), pause(1.0)]), WordModel())
    assert text(updates) == " ".join(map(str, WORDS))
    assert len([update for update in updates if update.committed]) >= 3
    first = next(update for update in updates if update.committed)
    assert first.heard < 4.0 and first.partial and first.segment is None
    for index, word in enumerate(word for update in updates for word in update.committed):
        assert word.start == pytest.approx(1.0 + 0.44 * index, abs=0.06)
        assert word.end == pytest.approx(1.34 + 0.44 * index, abs=0.06)
    assert updates[-1].heard < 7.0  # committed at the pause, not at the end
    assert updates[-1].segment.text == text(updates) and updates[-1].segment.tokens == ()
    assert updates[-1].segment.avg_logprob == pytest.approx(-0.1)


def test_the_partial_text_stands_behind_the_committed_words() -> None:
    for update in live(said(WORDS), WordModel()):
        heard = update.partial.split()
        assert all(word in (*map(str, WORDS), "1") for word in heard)
    (first, *_) = live(said(WORDS), WordModel())
    assert first.committed == () and first.partial.startswith("400 700")


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.lists(st.integers(4, 20).map(lambda n: 100 * n), min_size=1, max_size=12), min_size=1, max_size=3),
    st.floats(0.6, 2.0),
    st.sampled_from([0.03, 0.1, 0.7, 5.0]),
    st.floats(0.3, 3.0),
    st.floats(2.0, 30.0),
)
def test_in_the_end_it_is_the_batch_transcript(
    sentences: list[list[int]], gap_s: float, block_s: float, every: float, chunk_length: float
) -> None:
    sound = np.concatenate([part for words in sentences for part in (said(words), pause(gap_s))])
    model = WordModel()
    updates = live(sound, model, block_s, every=every, chunk_length=chunk_length)
    assert text(updates) == Recognizer(WordModel()).transcribe(sound, vad_method="energy").text
    assert text(updates) == " ".join(str(word) for words in sentences for word in words)
    assert model.longest <= chunk_length * RATE


def test_nothing_is_taken_back_when_hypotheses_flip() -> None:
    rng = np.random.default_rng(0)
    lies = WordModel(slip=lambda call, place, word: word + int(rng.integers(3)))
    updates = live(np.concatenate([said(WORDS * 3), pause(1.0)]), lies)
    assert len(text(updates).split()) == 30  # each word once, whatever it is taken for
    assert lies.calls > 10


def test_a_word_that_was_committed_stays_though_it_is_heard_otherwise_later() -> None:
    honest = live(said(WORDS), WordModel())
    number = next(i for i, update in enumerate(honest, 1) if update.committed)
    taken = [word.word for word in honest[number - 1].committed]
    late = WordModel(slip=lambda call, place, word: word if call <= number else 8)
    updates = live(said(WORDS), late)
    assert text(updates).split() == [*(word.strip() for word in taken), *["8"] * (len(WORDS) - len(taken))]


def test_what_two_hypotheses_agree_on_up_to_the_first_difference() -> None:
    model = WordModel(slip=lambda call, place, word: word + call if place == 2 else word)
    updates = live(said(WORDS), model)
    before_the_end = [word for update in updates[:-1] for word in update.committed]
    assert [word.word.strip() for word in before_the_end] == ["400", "700"]
    assert len(text(updates).split()) == len(WORDS)


@pytest.mark.parametrize("sound", [pause(20.0), 0.05 * np.random.default_rng(0).standard_normal(20 * RATE)])
def test_silence_and_noise_yield_nothing_and_cost_nothing(sound: Sound) -> None:
    model = WordModel()
    assert live(sound.astype(np.float32), model, vad_method="silero") == []
    assert live(np.zeros(0, np.float32), model) == []
    assert model.calls == 0


def test_a_pause_is_not_decoded_again_and_again() -> None:
    short, long = WordModel(), WordModel()
    live(np.concatenate([said([400, 500]), pause(0.6)]), short, every=0.1)
    live(np.concatenate([said([400, 500]), pause(30.0)]), long, every=0.1)
    assert short.calls == long.calls


def test_a_long_unbroken_stream_keeps_the_buffer_bounded() -> None:
    words = [400 + 100 * (i * 7 % 13) for i in range(100)]
    model = WordModel()
    updates = live(said(words), model, chunk_length=10)
    assert text(updates) == " ".join(map(str, words))
    assert model.longest <= 6.5 * RATE  # half of it, and what comes between two updates
    assert sum(update.segment is not None for update in updates) > 6


def test_also_where_nothing_is_ever_agreed_on() -> None:
    words = [400 + 100 * (i * 7 % 13) for i in range(100)]
    model = WordModel(slip=lambda call, place, word: word + call)
    updates = live(said(words), model, chunk_length=10)
    assert len(text(updates).split()) == 100
    assert model.longest <= 10 * RATE
    assert sum(update.segment is not None for update in updates) >= 4


def test_memory_stays_bounded() -> None:
    sentence = np.concatenate([said([400, 900, 500]), pause(0.7)])
    stream = (block for _ in range(60) for block in blocks(sentence))
    list(Recognizer(WordModel()).live(blocks(sentence), vad_method="energy"))
    tracemalloc.start()
    try:
        words = sum(len(u.committed) for u in Recognizer(WordModel()).live(stream, vad_method="energy", every=2))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert words == 180
    assert peak < 1.5e6  # of 8 MB of sound


def test_a_source_that_falls_behind_costs_less() -> None:
    sound = np.concatenate([said(WORDS * 2), pause(1.0)])
    prompt, late = WordModel(), WordModel()
    assert text(live(sound, prompt, 0.1)) == text(live(sound, late, 4.0))
    assert late.calls < prompt.calls / 2


def test_any_rate_and_type() -> None:
    sound = np.concatenate([pause(0.2), said(WORDS[:4]), pause(1.0)])
    fine = np.repeat(sound, 3)  # 48 kHz
    stereo = (np.stack([fine, fine], axis=1) * 32767).astype(np.int16)
    pieces = [stereo[i : i + 4800] for i in range(0, len(stereo), 4800)]
    updates = list(Recognizer(WordModel()).live(pieces, vad_method="energy", sampling_rate=48_000))
    assert text(updates) == "400 700 500 900"


def test_errors() -> None:
    with pytest.raises(asr.AsrError, match="every is 0; choose"):
        Recognizer(WordModel()).live([], every=0)
    with pytest.raises(asr.AsrError, match="clip_timestamps"):
        Recognizer(WordModel()).live([], clip_timestamps=(1.0, 2.0))
    with pytest.raises(asr.AsrError, match="chunk_length is 40"):
        Recognizer(WordModel()).live([], chunk_length=40)
    with pytest.raises(asr.AsrError, match="'de'; it knows en"):
        Recognizer(WordModel()).live([], language="de")
    with pytest.raises(asr.AudioError, match="one is a str; give numpy arrays"):
        list(Recognizer(WordModel()).live("talk.mp3"))
    with pytest.raises(asr.AudioError, match="NaN"):
        list(Recognizer(WordModel()).live([np.full(1600, np.nan)]))


def test_the_bundled_model() -> None:
    mini = asr.load("mini", device="cpu")
    sound = load_audio(EXAMPLE)
    updates = live(np.concatenate([sound, pause(1.0), sound, pause(1.0)]), mini.model, vad_method="silero")
    segments = [update.segment for update in updates if update.segment is not None]
    assert len(segments) == 2
    assert text(updates) == " ".join(segment.text for segment in segments)
    batch = mini.transcribe(sound).text.split()
    for segment in segments:  # the first words are those of an early hypothesis
        assert len(set(segment.text.split()) & set(batch)) >= len(set(batch)) - 2
    assert any(update.committed and update.segment is None for update in updates)
    assert any(update.partial for update in updates)
