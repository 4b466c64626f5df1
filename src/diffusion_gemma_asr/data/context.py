"""Context as users give it, drawn for training: text that came before, words that may occur."""

from __future__ import annotations

import random
from collections.abc import Sequence

from ..model.prompt import context_of

HOTWORDS = 0.7  # share of the contexts that are words; the others are text
SAID = 0.7  # share of the lists of words that hold some of the transcript's own
MAX_WORDS = 6  # of a transcript: hotwords are names and terms, not sentences


def drawn_context(index: int, texts: Sequence[str], rng: random.Random) -> str:
    """Context for one transcript; most of it is of no use, so that the model does not write down what was not said.

    Args:
        index: of the transcript.
        texts: all transcripts, which strange words and earlier texts are taken from; those with spaces between words.
    """
    if rng.random() >= HOTWORDS:
        return context_of(initial_prompt=rng.choice(texts))
    words = _some(texts[index], rng, 3) if rng.random() < SAID else []
    for _ in range(rng.randint(1, 3)):
        words += _some(rng.choice(texts), rng, 2)
    rng.shuffle(words)
    return context_of(hotwords=", ".join(dict.fromkeys(words)))


def _some(text: str, rng: random.Random, most: int) -> list[str]:
    """Up to so many of its longest words, or pieces of as many characters where it has no spaces."""
    words = text.split() if " " in text else [text[i : i + 2] for i in range(0, len(text), 2)]
    longest = sorted(words, key=len, reverse=True)[:MAX_WORDS]
    return rng.sample(longest, min(len(longest), rng.randint(1, most)))
