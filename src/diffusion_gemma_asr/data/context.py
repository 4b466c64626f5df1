"""Random prompt contexts for training, like those of users: the preceding text, or hotwords."""

from __future__ import annotations

import random
from collections.abc import Sequence

from ..model.prompt import context_of

HOTWORDS = 0.7  # share of the contexts that are hotwords; the others are preceding text
RELEVANT = 0.7  # share of the hotword lists with words of the transcript
MAX_WORDS = 6  # longest words of a transcript that may become hotwords: names and terms rather than sentences


def drawn_context(index: int, texts: Sequence[str], rng: random.Random) -> str:
    """A random context for one transcript.

    Most of it is unrelated to the transcript, so that the model learns not to copy unspoken words from the prompt.

    Args:
        index: of the transcript in `texts`.
        texts: all transcripts, the source of distractors; words are separated by spaces where the language does so.
        rng: of all draws.

    Returns:
        the prompt's text, see `context_of`.
    """
    if rng.random() >= HOTWORDS:
        return context_of(initial_prompt=rng.choice(texts))
    words = _sample_words(texts[index], rng, 3) if rng.random() < RELEVANT else []
    for _ in range(rng.randint(1, 3)):
        words += _sample_words(rng.choice(texts), rng, 2)
    rng.shuffle(words)
    return context_of(hotwords=", ".join(dict.fromkeys(words)))


def _sample_words(text: str, rng: random.Random, most: int) -> list[str]:
    """1 to `most` of the text's longest words; of a text without spaces, pairs of characters."""
    words = text.split() if " " in text else [text[i : i + 2] for i in range(0, len(text), 2)]
    longest = sorted(words, key=len, reverse=True)[:MAX_WORDS]
    return rng.sample(longest, min(len(longest), rng.randint(1, most)))
