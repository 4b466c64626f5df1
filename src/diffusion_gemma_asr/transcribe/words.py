"""Words with times and probabilities, from the tokens of a transcript and where CTC places them in the sound.

CTC marks a token in one or a few slots somewhere in the word, so a word's bounds lie between its neighbours' marks
and its own; there they are put at the quietest place, or where a pause begins and ends, in steps of 10 ms.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..audio.read import SAMPLE_RATE, Samples
from ..audio.vad import Chunk
from ..denoise.clip import Decoded
from ..model.prompt import Decode, token_pieces
from .results import Word

FRAME_S = 0.01  # in which loudness is looked at
PAUSE_DB = 12.0  # a place is part of a pause if it is at most so much louder than the quietest one near it ...
PAUSE_S = 0.04  # what parts words; closures inside words are mostly shorter
SPEECH_DB = 18.0  # ... and at least so much quieter than the chunk's loud places

Marks = Sequence[tuple[float, float]]


def timed_words(decoded: Decoded, chunk: Chunk, decode: Decode, slot_s: float) -> tuple[Word, ...]:
    """The words of a chunk's transcript, with times in the recording.

    Args:
        decoded: with spans; without them the words share the chunk's time in proportion to their letters. In Mandarin ("zh")
            every character is a word.
        chunk: that was decoded.
        decode: ids to text.
        slot_s: seconds of sound that one slot stands for.

    Returns:
        words in order that do not overlap.
    """
    words = split_words(decoded.tokens, decode, decoded.language)
    if not words:
        return ()
    spans = decoded.spans
    start, end = chunk.start - chunk.offset, chunk.end - chunk.offset  # in the chunk
    if spans is None:
        bounds = _in_proportion([text for text, _ in words], start, end)
    else:
        # CTC may mark a word late, in the silence behind the speech.
        marks = [(min(slot_s * spans[own[0]].start, end), min(slot_s * spans[own[-1]].end, end)) for _, own in words]
        bounds = word_bounds(marks, chunk.samples, start, end)
    timed = []
    for (text, own), times in zip(words, bounds, strict=True):
        first, last = (round(chunk.offset + time, 3) for time in times)
        timed.append(Word(text, first, last, float(np.exp(np.mean([decoded.logprobs[i] for i in own])))))
    return tuple(timed)


def split_words(tokens: Sequence[int], decode: Decode, language: str) -> list[tuple[str, list[int]]]:
    """Words, with the space before them, and the places of their tokens; joined they are the text."""
    words: list[tuple[str, list[int]]] = []
    for text, own in token_pieces(tokens, decode):
        if language == "zh":
            words += [(character, own) for character in re.findall(r"\s*\S", text)]
        elif words and not text[0].isspace():
            words[-1] = (words[-1][0] + text, words[-1][1] + own)
        else:
            words.append((text, own))
    return words


def word_bounds(marks: Marks, samples: Samples, start: float, end: float) -> list[tuple[float, float]]:
    """Start and end of words, in seconds.

    A word reaches from its mark to the nearest pause on either side, so that it does not take in what was said but not
    transcribed; where there is no pause before the next mark, to the quietest place.

    Args:
        marks: (start, end) of the slots where each word's tokens are marked, in seconds, in order.
        samples: (n,) float32, 16 kHz.
        start, end: of the speech in the samples, in seconds.
    """
    level = loudness(samples)
    loud = float(np.percentile(level, 90)) if len(level) else 0.0
    edges = [(start, start), *marks, (end, end)]
    gaps = [_gap(level, loud, _centre(a), _centre(b)) for a, b in itertools.pairwise(edges)]
    gaps[0] = (start, max(start, gaps[0][1] if gaps[0][2] else start), False)
    gaps[-1] = (min(end, gaps[-1][0] if gaps[-1][2] else end), end, False)
    bounds, last = [], 0.0
    for before, after in itertools.pairwise(gaps):
        first = max(before[1], last)
        last = max(after[0], first + FRAME_S)
        bounds.append((first, last))
    return bounds


def _gap(level: NDArray[np.float32], loud: float, left: float, right: float) -> tuple[float, float, bool]:
    """Between two marks: where one word ends, where the next begins, and whether there is a pause at all."""
    first, last = round(left / FRAME_S), min(round(right / FRAME_S), len(level))
    if last - first < 2:
        return (left + right) / 2, (left + right) / 2, False
    between = level[first:last]
    lowest = int(np.argmin(between))
    quiet = min(between[lowest] + PAUSE_DB, loud - SPEECH_DB)
    pauses = _runs(between <= quiet)
    if not pauses:
        middle = (first + lowest + 0.5) * FRAME_S
        return middle, middle, False
    long = [run for run in pauses if run[1] - run[0] >= PAUSE_S / FRAME_S]
    chosen = long or [max(pauses, key=lambda run: run[1] - run[0])]
    return (first + chosen[0][0]) * FRAME_S, (first + chosen[-1][1]) * FRAME_S, True


def _runs(mask: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """[start, end) of each stretch of True."""
    steps = np.diff(np.concatenate([[0], mask.astype(int), [0]]))
    return list(zip(np.flatnonzero(steps == 1).tolist(), np.flatnonzero(steps == -1).tolist(), strict=True))


def loudness(samples: Samples) -> NDArray[np.float32]:
    """(n,) samples → (n / 160,) RMS of every 10 ms, smoothed over 30 ms, in dB of full scale."""
    size = round(FRAME_S * SAMPLE_RATE)
    frames = samples[: len(samples) // size * size].reshape(-1, size)
    power = np.square(frames).mean(axis=1) + 1e-10
    smooth = np.convolve(power, np.ones(3) / 3, mode="same") if len(power) >= 3 else power
    return (10 * np.log10(smooth)).astype(np.float32)


def _centre(mark: tuple[float, float]) -> float:
    return (mark[0] + mark[1]) / 2


def _in_proportion(texts: Sequence[str], start: float, end: float) -> list[tuple[float, float]]:
    edges = np.cumsum([0, *(len(text.strip()) for text in texts)])
    times = start + (end - start) * edges / edges[-1]
    return [(float(a), float(b)) for a, b in itertools.pairwise(times)]
