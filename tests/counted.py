"""Small language models and dictionaries for tests of drafts/, made by hand."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from diffusion_gemma_asr.drafts.lexicon import Lexicon
from diffusion_gemma_asr.drafts.ngram import CODES, NgramLM

DISCOUNT = 0.5


def codes(shares: Sequence[float]) -> np.ndarray:
    """Shares as NgramLM keeps them; 0 is the largest code."""
    return np.array([255 if share <= 0 else min(255, round(-math.log(share) * CODES)) for share in shares], np.uint8)


def ngram_of(sentences: Sequence[Sequence[int]], vocab_size: int, bos: int, eos: int, order: int) -> NgramLM:
    """Absolute discounting, interpolated: every count is 0.5 less, which the shorter context gets."""
    sequences, contexts = [], []
    for length in range(1, order + 1):
        counts: Counter[tuple[int, ...]] = Counter()
        for sentence in sentences:
            row = [bos, *sentence, eos]
            counts.update(tuple(row[i : i + length]) for i in range(len(row) - length + 1))
        counts = Counter({key: n for key, n in counts.items() if key[-1] != bos})
        totals, distinct = Counter[tuple[int, ...]](), Counter[tuple[int, ...]]()
        for key, n in counts.items():
            totals[key[:-1]] += n
            distinct[key[:-1]] += 1

        def table(shares: dict[tuple[int, ...], float]) -> tuple[np.ndarray, np.ndarray]:
            numbers = {number(key, vocab_size): share for key, share in shares.items()}
            keys = sorted(numbers)
            return np.array(keys, np.uint64), codes([numbers[key] for key in keys])

        sequences.append(table({key: (n - DISCOUNT) / totals[key[:-1]] for key, n in counts.items()}))
        contexts.append(table({key: DISCOUNT * distinct[key] / n for key, n in totals.items()}))
    return NgramLM(vocab_size, sequences, contexts)


def number(key: Sequence[int], base: int) -> int:
    """A sequence of tokens as one number."""
    value = 0
    for digit in key:
        value = value * base + digit
    return value


def arrays_of(lm: NgramLM) -> dict[str, np.ndarray]:
    """The arrays that `NgramLM.from_arrays` takes."""
    arrays: dict[str, np.ndarray] = {"vocab_size": np.array(lm.vocab_size)}
    for name, tables in (("sequences", lm.sequences), ("contexts", lm.contexts)):
        for i, (keys, shares) in enumerate(tables):
            arrays[f"{name}{i}"] = np.diff(keys, prepend=np.uint64(0))
            arrays[f"{name}{i}_codes"] = shares
    for name, table in (("within", lm.within), ("belongs", lm.belongs)):
        if table is not None:
            arrays[name] = table
    return arrays


# Pronunciations, a space between phonemes, and how often each was read
WORDS = [
    ("en", "sea", "s i", 3), ("en", "see", "s i", 1), ("en", "she", "S i", 4), ("en", "the", "D @", 3),
    ("en", "the", "D i", 1), ("en", "sells", "s E l z", 2), ("en", "is", "i s", 2),
    ("zh", "西", "S; i 55", 2), ("zh", "思", "s i 55", 2), ("zh", "席", "S; i 35", 1),
]  # fmt: skip


def small_lexicon() -> Lexicon:
    """The dictionary of WORDS."""
    symbols = ["", *sorted({f"{language}:{phoneme}" for language, _, way, _ in WORDS for phoneme in way.split()})]
    said = ["".join(chr(symbols.index(f"{language}:{phoneme}")) for phoneme in way.split()) for language, _, way, _ in WORDS]
    totals = Counter[str]()
    for language, _, _, n in WORDS:
        totals[language] += n
    frequency = [math.log(n / totals[language]) for language, _, _, n in WORDS]
    return Lexicon(symbols, said, [word for _, word, _, _ in WORDS], frequency)
