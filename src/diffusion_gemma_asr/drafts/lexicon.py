"""A pronouncing dictionary: which words sound like a string of phonemes.

Each phoneme is a class of the speller's second head (speller.py), one for each language that has it, so that what is heard
says the language as well.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from .arrays import read_arrays, unpack_lines

CODES = 8.0  # steps a nat in which frequencies are stored, in a byte each


class Lexicon:
    """Words and their pronunciations.

    A pronunciation is a string whose characters' numbers are classes; class 0 is the CTC blank.

    Args:
        symbols: what each class stands for: language and phoneme, as in "fr:y"; "" is the blank.
        said, words, frequency: pronunciations, what each is of, and how frequent it is among the language's words, as a
            logarithm in nats; in any order.

    Attributes:
        said, words, frequency: in the order of the pronunciations.
    """

    def __init__(self, symbols: Sequence[str], said: Sequence[str], words: Sequence[str], frequency: ArrayLike):
        self.symbols = list(symbols)
        self.classes = {symbol: i for i, symbol in enumerate(self.symbols) if i}
        order = sorted(range(len(said)), key=said.__getitem__)
        self.said = [said[i] for i in order]
        self.words = [words[i] for i in order]
        self.frequency = np.asarray(frequency, dtype=np.float32)[order]
        by_word = sorted(range(len(words)), key=words.__getitem__)
        self._sorted_words = [words[i] for i in by_word]
        self._their_said = [said[i] for i in by_word]

    def __len__(self) -> int:
        return len(self.symbols)

    def narrowed(self, low: int, high: int, depth: int, found: int) -> tuple[int, int]:
        """Of the entries from low to high, all alike in their first depth phonemes, those that go on with class found."""
        head = self.said[low][:depth]
        first = bisect_left(self.said, head + chr(found), low, high)
        return first, bisect_left(self.said, head + chr(found + 1), first, high)

    def pronunciations(self, word: str) -> list[str]:
        """All of a word's, in whichever language."""
        first = bisect_left(self._sorted_words, word)
        return self._their_said[first : bisect_right(self._sorted_words, word, first)]

    @classmethod
    def load(cls, path: str | Path) -> Lexicon:
        """Reads an .npz file.

        Raises:
            CheckpointError: the file is missing, damaged, or another's.
        """
        with read_arrays(path, "a dictionary") as file:
            letters = file["said"].astype("<u2").tobytes().decode("utf-16-le")
            ends = np.cumsum(file["lengths"], dtype=np.int64).tolist()
            said = [letters[start:end] for start, end in zip([0, *ends], ends, strict=False)]
            symbols, words = unpack_lines(file["symbols"]), unpack_lines(file["words"])
            return cls(symbols, said, words, file["frequency"] / -CODES)
