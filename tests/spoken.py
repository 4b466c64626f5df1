"""A fake model that hears words, and streams of sound for it.

Every tone between short gaps is a word, its pitch to the nearest 100 Hz. What the model makes of a tone that has only just
begun is wrong, as with a real model.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from sounds import pitch, tone

import diffusion_gemma_asr as asr
from diffusion_gemma_asr.ctc import TokenSpan

Sound = NDArray[np.float32]
RATE = 16_000
SURE_S = 0.15  # of a tone before it is heard rightly


@dataclass(frozen=True)
class HeardWords:
    """What the model returns for one sound, as `decoding.Decoded`."""

    text: str
    tokens: list[int]
    logprobs: list[float]
    spans: list[TokenSpan]
    draft: str = "a draft"
    language: str = "en"

    def as_drafted(self) -> HeardWords:
        return self


class Hertz:
    """The fake model's tokenizer: a token is a word, its number."""

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        return " ".join(str(token) for token in tokens)


@dataclass
class WordModel:
    """Stands in for DiffusionGemmaASR: transcribes sound to the pitches of its tones.

    Attributes:
        slip: (number of the call, place of a word, the word) → the word that is heard instead.
        longest: samples of the longest sound it was given.
    """

    slip: Callable[[int, int, int], int] = lambda call, place, word: word
    drafts: bool = True
    slot_s: float = 0.16
    tokenizer: Hertz = field(default_factory=Hertz)
    calls: int = 0
    longest: int = 0

    def text(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens)

    def transcribe_batch(self, audio: Sequence[Sound], *, on_done: object = None, **others: object) -> list[HeardWords]:
        return [self._hear(samples) for samples in audio]

    def _hear(self, samples: Sound) -> HeardWords:
        assert samples.dtype == np.float32 and samples.ndim == 1
        self.longest = max(self.longest, len(samples))
        self.calls += 1
        loud = np.abs(samples) > 0.01
        edges = np.flatnonzero(np.diff(np.concatenate([[False], loud, [False]]).astype(int)))
        runs = [[int(a), int(b)] for a, b in zip(edges[::2], edges[1::2], strict=True)]
        tones: list[list[int]] = []
        for start, end in runs:  # a sine crosses zero
            if tones and start - tones[-1][1] < 0.02 * RATE:
                tones[-1][1] = end
            else:
                tones.append([start, end])
        words, spans = [], []
        for place, (start, end) in enumerate(tones):
            word = round(pitch(samples[start:end]) / 100) * 100 if end - start >= SURE_S * RATE else 1
            words.append(self.slip(self.calls, place, word))
            middle = (start + end) / 2 / RATE / 0.16  # slots of 160 ms
            spans.append(TokenSpan(int(middle), int(middle) + 1, -0.1))
        return HeardWords(self.text(words), words, [-0.1] * len(words), spans)


def said(words: Sequence[int], gap_s: float = 0.1, word_s: float = 0.34) -> Sound:
    """Words, a gap behind each."""
    gap = np.zeros(round(gap_s * RATE), np.float32)
    return np.concatenate([part for word in words for part in (tone(word, word_s), gap)])


def pause(seconds: float) -> Sound:
    return np.zeros(round(seconds * RATE), np.float32)


def blocks(sound: Sound, seconds: float = 0.1) -> Iterator[Sound]:
    size = round(seconds * RATE)
    for first in range(0, len(sound), size):
        yield sound[first : first + size]


def live(sound: Sound, model: object, block_s: float = 0.1, **options: object) -> list[asr.LiveUpdate]:
    """All updates, after a look at what holds for each of them."""
    updates = list(asr.transcribe_live(blocks(sound, block_s), model, **{"vad_method": "energy", **options}))
    words = [word for update in updates for word in update.committed]
    for before, after in itertools.pairwise(words):
        assert before.end <= after.start
    for word in words:
        assert word.start < word.end
    for update in updates:
        assert all(word.end <= update.heard for word in update.committed)
    segments = [update.segment for update in updates if update.segment is not None]
    assert [word for segment in segments for word in segment.words] == words
    assert [segment.id for segment in segments] == list(range(len(segments)))
    if updates:
        assert updates[-1].partial == ""
    return updates


def text(updates: Sequence[asr.LiveUpdate]) -> str:
    return "".join(word.word for update in updates for word in update.committed)


WORDS = [400, 700, 500, 900, 600, 1100, 800, 400, 1300, 500]
