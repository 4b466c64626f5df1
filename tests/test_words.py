from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sounds import tone

from diffusion_gemma_asr.audio.read import SAMPLE_RATE
from diffusion_gemma_asr.audio.vad import Chunk
from diffusion_gemma_asr.denoise.clip import Decoded
from diffusion_gemma_asr.model.ctc import TokenSpan
from diffusion_gemma_asr.model.prompt import token_pieces
from diffusion_gemma_asr.transcribe.words import split_words, timed_words, word_bounds


class ByteTokens:
    """A tokenizer whose tokens are bytes of UTF-8, or whole strings that are given a number from 256 on."""

    def __init__(self, *strings: str):
        self.table = dict(enumerate(strings, 256))

    def decode(self, tokens: list[int], skip_special_tokens: bool = True) -> str:
        data = b"".join(self.table[t].encode() if t > 255 else bytes([t]) for t in tokens)
        return data.decode("utf-8", errors="replace").lstrip()

    def encode(self, text: str) -> list[int]:
        return list(text.encode())


@given(st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=12), st.sampled_from(["en", "zh"]))
def test_words_joined_are_the_text(text: str, language: str) -> None:
    tokenizer = ByteTokens()
    text = text.strip().replace("\ufffd", "")
    tokens = tokenizer.encode(text)
    found = split_words(tokens, tokenizer.decode, language)
    assert "".join(word for word, _ in found) == text.strip()
    used = [place for _, own in token_pieces(tokens, tokenizer.decode) for place in own]
    assert used == list(range(len(used)))


def test_words_of_languages() -> None:
    tokenizer = ByteTokens(" ne", "ver", " more", " ", "said")
    assert split_words([256, 257, 258, 259, 260], tokenizer.decode, "en") == [
        ("never", [0, 1]),
        (" more", [2]),
        (" said", [3, 4]),
    ]
    assert [word for word, _ in split_words(tokenizer.encode("नमस्ते दुनिया"), tokenizer.decode, "hi")] == ["नमस्ते", " दुनिया"]
    found = split_words(tokenizer.encode("我在 York"), tokenizer.decode, "zh")
    assert [word for word, _ in found] == ["我", "在", " Y", "o", "r", "k"]
    assert found[0][1] == [0, 1, 2]


def sound(*parts: tuple[float, float]) -> np.ndarray:
    """Tones of so many seconds, each with so much silence behind it."""
    pieces = [x for loud, quiet in parts for x in (tone(300, loud), np.zeros(round(quiet * SAMPLE_RATE), np.float32))]
    return np.concatenate(pieces) + 1e-4 * np.random.default_rng(0).standard_normal(sum(map(len, pieces))).astype(np.float32)


def test_bounds_are_where_pauses_begin_and_end() -> None:
    samples = sound((0.5, 0.2), (0.4, 0.1), (0.5, 0.5))
    found = word_bounds([(0.16, 0.32), (0.8, 0.96), (1.28, 1.44)], samples, 0.0, 1.7)
    for bounds, true in zip(found, [(0.0, 0.5), (0.7, 1.1), (1.2, 1.7)], strict=True):
        assert bounds == pytest.approx(true, abs=0.03)


def test_what_is_not_transcribed_belongs_to_no_word() -> None:
    samples = sound((0.5, 0.2), (0.4, 0.2), (0.5, 0.5))  # the word in the middle has no mark
    found = word_bounds([(0.16, 0.32), (1.44, 1.6)], samples, 0.0, 1.8)
    assert found[0] == pytest.approx((0.0, 0.5), abs=0.03)
    assert found[1] == pytest.approx((1.3, 1.8), abs=0.03)


def test_without_a_pause_words_meet_at_the_quietest_place() -> None:
    samples = tone(300, 2.0)
    samples[15_000:15_600] *= 0.5
    (_, end), (start, _) = word_bounds([(0.32, 0.48), (1.44, 1.6)], samples, 0.0, 2.0)
    assert end == start == pytest.approx(0.955, abs=0.03)


@given(st.lists(st.integers(0, 20), min_size=1, max_size=8), st.integers(0, 99))
def test_words_never_overlap_and_last(slots: list[int], seed: int) -> None:
    samples = np.random.default_rng(seed).standard_normal(3 * SAMPLE_RATE).astype(np.float32)
    marks = [(0.16 * s, 0.16 * (s + 1)) for s in sorted(slots)]
    found = word_bounds(marks, samples, 0.1, 2.9)
    times = [time for bounds in found for time in bounds]
    assert times == sorted(times)
    assert all(end - start > 0.009 for start, end in found)


def test_words_of_a_chunk() -> None:
    decode = ByteTokens(" ne", "ver", " more").decode
    chunk = Chunk(10.0, sound((0.5, 0.3), (0.6, 0.6)), 10.0, 11.4, 0.9)
    spans = [TokenSpan(1, 2, -0.1), TokenSpan(2, 3, -0.1), TokenSpan(6, 7, -0.1)]
    decoded = Decoded(
        text="never more",
        tokens=[256, 257, 258],
        logprobs=[float(np.log(0.5))] * 3,
        draft="",
        draft_tokens=[],
        steps=1,
        language="en",
        spans=spans,
    )
    never, more = timed_words(decoded, chunk, decode, 0.16)
    assert (never.word, more.word) == ("never", " more")
    assert (never.start, never.end) == pytest.approx((10.0, 10.5), abs=0.03)
    assert (more.start, more.end) == pytest.approx((10.8, 11.4), abs=0.03)
    assert never.probability == pytest.approx(0.5)
    never, more = timed_words(replace(decoded, spans=None), chunk, decode, 0.16)  # nothing to go by
    assert (never.start, more.end) == (10.0, 11.4) and never.end == more.start
    assert timed_words(replace(decoded, tokens=[], logprobs=[], spans=[]), chunk, decode, 0.16) == ()

    behind = [TokenSpan(1, 2, -0.1), TokenSpan(2, 3, -0.1), TokenSpan(20, 22, -0.1)]  # in silence behind the chunk
    never, more = timed_words(replace(decoded, spans=behind), chunk, decode, 0.16)
    assert never.end <= more.start and more.end == pytest.approx(11.4, abs=0.03)
