"""Fake models whose drafts are their transcripts, so that nothing is denoised: these depend on the samples alone.

`PitchModel` takes a whole stretch of sound for one word, its pitch; `WordModel` takes every tone between short gaps for one.
To both a tone is what a spoken sentence is to the real model, so that a test sees at once when sound is lost, mixed up or
resampled wrongly. They stand in for `DiffusionGemmaASR`; a slot of theirs is 160 ms of samples.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import torch
from numpy.typing import NDArray
from sounds import pitch, tone
from torch.nn.utils.rnn import pad_sequence

import diffusion_gemma_asr as asr
from diffusion_gemma_asr.model.config import BackboneConfig, EncoderConfig, ModelConfig
from diffusion_gemma_asr.model.ctc import DraftToken, TokenSpan
from diffusion_gemma_asr.model.drafts import Encoded, Heard
from diffusion_gemma_asr.model.head import Head
from diffusion_gemma_asr.model.lengths import length_mask
from diffusion_gemma_asr.model.model import DiffusionGemmaASR
from diffusion_gemma_asr.transcribe.recognizer import Recognizer

Sound = NDArray[np.float32]
RATE = 16_000
SLOT = 2560  # samples: 160 ms
HERTZ = 7  # the token of the word "hertz"
SURE_S = 0.15  # of a tone before it is heard rightly


@dataclass
class SoundModel(ABC):
    """What the fakes have in common.

    Attributes:
        languages: codes that it knows; the first one is what it finds.
        batches: samples of every sound, call by call.
    """

    languages: tuple[str, ...] = ("en",)
    batches: list[list[int]] = field(default_factory=list)

    slot_s = SLOT / RATE
    blank = 0
    device = torch.device("cpu")
    backbone = SimpleNamespace(sampler_settings=dict, device=device, head=Head(torch.zeros(1, 1), 30.0))

    @property
    def config(self) -> ModelConfig:
        return ModelConfig("fake", EncoderConfig("none"), BackboneConfig("none"), languages=self.languages, start="ctc")

    @property
    def greedy(self) -> SoundModel:
        return self

    @property
    def calls(self) -> int:
        """How often it was asked."""
        return len(self.batches)

    @property
    def longest(self) -> int:
        """Samples of the longest sound it was given."""
        return max((n for batch in self.batches for n in batch), default=0)

    def check_context(self, context: str) -> None:
        assert not context, "it reads none"

    def encode(self, audio: Sequence[Sound]) -> Encoded:
        """Samples as frames (B, n, 1), and the same 2560 at a time as slots (B, S, 2560)."""
        assert all(samples.dtype == np.float32 and samples.ndim == 1 for samples in audio)
        self.batches.append([len(samples) for samples in audio])
        rows = [torch.from_numpy(np.ascontiguousarray(samples)) for samples in audio]
        slots = [torch.nn.functional.pad(row, (0, -len(row) % SLOT)).view(-1, SLOT) for row in rows]
        lengths = [torch.tensor([len(row) for row in part]) for part in (rows, slots)]
        return Encoded(pad_sequence(rows, True)[..., None], lengths[0], pad_sequence(slots, True), lengths[1])

    def hear(self, encoded: Encoded) -> Heard:
        return Heard(self.drafts(encoded), encoded.slots[..., 0])

    def read_mask(self, slots: torch.Tensor, slot_lengths: torch.Tensor, heard: Heard) -> torch.Tensor:
        return length_mask(slot_lengths, slots.shape[1])

    def drafts(self, encoded: Encoded) -> list[list[DraftToken]]:
        rows = zip(encoded.frames[..., 0], encoded.frame_lengths.tolist(), strict=True)
        return [self.words(samples[:n].numpy()) for samples, n in rows]

    def align(self, slots: torch.Tensor, tokens: Sequence[int]) -> list[TokenSpan]:
        draft = self.words(slots.flatten().numpy())
        assert len(draft) == len(tokens)
        return [TokenSpan(token.start, token.end, math.log(token.probability)) for token in draft]

    def text(self, tokens: Sequence[int]) -> str:
        """A token is a word, its number."""
        return " ".join("hertz" if token == HERTZ else str(token) for token in tokens)

    @abstractmethod
    def words(self, samples: Sound) -> list[DraftToken]:
        """What it hears in a sound."""


@dataclass
class PitchModel(SoundModel):
    """Transcribes every sound to its pitch, to the nearest 20 Hz: "440 hertz".

    Attributes:
        deaf: it drafts nothing, whatever there is.
    """

    deaf: bool = False

    def words(self, samples: Sound) -> list[DraftToken]:
        hertz = round(pitch(samples) / 20) * 20
        return [] if self.deaf else [DraftToken(hertz, 1, 2, math.exp(-0.25)), DraftToken(HERTZ, 4, 5, math.exp(-0.75))]


@dataclass
class WordModel(SoundModel):
    """Transcribes sound to the pitches of its tones. One that has only just begun it takes for another, as real models do.

    Attributes:
        slip: (number of the call, place of a word, the word) → the word that is heard instead.
    """

    slip: Callable[[int, int, int], int] = lambda call, place, word: word

    def drafts(self, encoded: Encoded) -> list[list[DraftToken]]:
        drafts = super().drafts(encoded)
        return [
            [token._replace(id=self.slip(self.calls, place, token.id)) for place, token in enumerate(draft)]
            for draft in drafts
        ]

    def words(self, samples: Sound) -> list[DraftToken]:
        loud = np.abs(samples) > 0.01
        edges = np.flatnonzero(np.diff(np.concatenate([[False], loud, [False]]).astype(int)))
        runs = [[int(a), int(b)] for a, b in zip(edges[::2], edges[1::2], strict=True)]
        tones: list[list[int]] = []
        for start, end in runs:  # a sine crosses zero
            if tones and start - tones[-1][1] < 0.02 * RATE:
                tones[-1][1] = end
            else:
                tones.append([start, end])
        draft = []
        for start, end in tones:
            word = round(pitch(samples[start:end]) / 100) * 100 if end - start >= SURE_S * RATE else 1
            slot = (start + end) // 2 // SLOT
            draft.append(DraftToken(word, slot, slot + 1, math.exp(-0.1)))
        return draft


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


def live(
    sound: Sound, model: SoundModel | DiffusionGemmaASR, block_s: float = 0.1, **options: object
) -> list[asr.LiveUpdate]:
    """All updates, after a look at what holds for each of them."""
    updates = list(Recognizer(model).live(blocks(sound, block_s), **{"vad_method": "energy", **options}))
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
