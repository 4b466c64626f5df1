"""A pronouncing dictionary: which words sound like a string of phonemes.

Each phoneme is a class of the speller's second head (speller.py), one for each language that has it, so that what is heard
says the language as well. The dictionary is made from text by train/lexicon.py.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from .arrays import pack_lines, read_arrays, unpack_lines, write_arrays

Counts = Mapping[str, Mapping[str, Mapping[tuple[str, ...], float]]]  # language → word → phonemes → how often

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

    def classes_of(self, phonemes: Iterable[str], language: str) -> list[int]:
        """Phonemes of a language (data/phonemes.py) as classes; those that it hardly has are left out."""
        found = (self.classes.get(f"{language}:{phoneme}") for phoneme in phonemes)
        return [one for one in found if one is not None]

    def narrowed(self, low: int, high: int, depth: int, found: int) -> tuple[int, int]:
        """Of the entries from low to high, all alike in their first depth phonemes, those that go on with class found."""
        head = self.said[low][:depth]
        first = bisect_left(self.said, head + chr(found), low, high)
        return first, bisect_left(self.said, head + chr(found + 1), first, high)

    def pronunciations(self, word: str) -> list[str]:
        """All of a word's, in whichever language."""
        first = bisect_left(self._sorted_words, word)
        return self._their_said[first : bisect_right(self._sorted_words, word, first)]

    def save(self, path: str | Path) -> None:
        """Writes the dictionary to an .npz file, whole or not at all."""
        order = sorted(range(len(self.words)), key=lambda i: (self.words[i], self.said[i]))
        arrays = {
            "symbols": pack_lines(self.symbols),
            "words": pack_lines([self.words[i] for i in order]),
            "said": np.array([ord(c) for i in order for c in self.said[i]], dtype=np.uint16),
            "lengths": np.array([len(self.said[i]) for i in order], dtype=np.uint8),
            "frequency": np.clip(np.round(-CODES * self.frequency[order]), 0, 255).astype(np.uint8),
        }
        write_arrays(path, arrays)

    @classmethod
    def load(cls, path: str | Path) -> Lexicon:
        """Reads what `save` wrote.

        Raises:
            CheckpointError: the file is missing, damaged, or another's.
        """
        with read_arrays(path, "a dictionary") as file:
            letters = file["said"].astype("<u2").tobytes().decode("utf-16-le")
            ends = np.cumsum(file["lengths"], dtype=np.int64).tolist()
            said = [letters[start:end] for start, end in zip([0, *ends], ends, strict=False)]
            symbols, words = unpack_lines(file["symbols"]), unpack_lines(file["words"])
            return cls(symbols, said, words, file["frequency"] / -CODES)


def symbols_of(counts: Counts, least: int) -> list[str]:
    """The classes of all phonemes that were counted, but for those that a language has less often than `least`."""
    symbols = [""]
    for language, words in counts.items():
        seen: dict[str, float] = {}
        for ways in words.values():
            for way, n in ways.items():
                for phoneme in way:
                    seen[phoneme] = seen.get(phoneme, 0) + n
        symbols += [f"{language}:{phoneme}" for phoneme in sorted(seen) if seen[phoneme] >= least]
    return symbols


def lexicon_of(counts: Counts, symbols: Sequence[str]) -> Lexicon:
    """The dictionary of pronunciations that were counted, with the classes that are given; other phonemes are left out."""
    classes = {symbol: i for i, symbol in enumerate(symbols)}
    entries: list[tuple[str, str, float]] = []
    for language, words in counts.items():
        total = sum(n for ways in words.values() for n in ways.values())
        for word, ways in words.items():
            merged: dict[str, float] = {}
            for way, n in ways.items():
                said = "".join(chr(classes[key]) for phoneme in way if (key := f"{language}:{phoneme}") in classes)
                if said:
                    merged[said] = merged.get(said, 0) + n
            entries += [(said, word, float(np.log(n / total))) for said, n in merged.items()]
    return Lexicon(symbols, *zip(*entries, strict=True)) if entries else Lexicon(symbols, [], [], [])
