"""A language model of word classes: which kinds of words follow each other.

Sequences of words are rare, those of their kinds are not: whether a plural, a participle or an ending that nobody hears is
in place, three words tell of which only "les" and "sont" have to be themselves. Frequent words are classes of their own; all
others belong to the class of their last letters: a class-based model (Brown et al. 1992) whose classes are not learnt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from .arrays import pack_lines, read_arrays, unpack_lines, write_arrays
from .ngram import NgramLM

UNKNOWN, BOS, EOS, FIRST = 0, 1, 2, 3  # classes; those of words come behind
LETTERS = 2  # of an ending
RARE = 5  # endings that fewer words than these have together belong to UNKNOWN
MARK = "-"  # before endings


class ClassLM:
    """Log-probabilities of the classes of words.

    Args:
        names: of the classes from FIRST on: frequent words, and endings behind MARK.
        lm: of classes.
    """

    def __init__(self, names: Sequence[str], lm: NgramLM):
        self.names, self.lm = list(names), lm
        self._classes = {name: i for i, name in enumerate(self.names, FIRST)}

    @classmethod
    def count(
        cls, sentences: Mapping[str, Sequence[Sequence[str]]], frequent: Mapping[str, int], order: int, least: int
    ) -> ClassLM:
        """Counts the classes in sentences of words, by language.

        Args:
            frequent: so many words of each language are classes of their own.
            order, least: see `NgramLM.count`.
        """
        counts = {code: Counter(word for row in rows for word in row) for code, rows in sentences.items()}
        own = {word: None for code, words in counts.items() for word, _ in words.most_common(frequent[code])}
        endings: Counter[str] = Counter()
        for words in counts.values():
            for word, n in words.items():
                if word not in own:
                    endings[_ending(word)] += n
        found = cls([*own, *(ending for ending, n in endings.items() if n >= RARE)], NgramLM(0, [], []))
        rows = [found.classes(row) for part in sentences.values() for row in part]
        languages = [number for number, part in enumerate(sentences.values()) for _ in part]
        several = languages if len(sentences) > 1 else None
        found.lm = NgramLM.count(rows, len(found.names) + FIRST, BOS, EOS, order, least, several)
        return found

    def classes(self, words: Iterable[str]) -> list[int]:
        """The class of each word."""
        found = self._classes
        return [found[word] if word in found else found.get(_ending(word), UNKNOWN) for word in words]

    def scores(self, sentences: Sequence[Sequence[str]]) -> list[float]:
        """Log-probabilities of sentences of words, in nats."""
        rows = [[BOS, *self.classes(words), EOS] for words in sentences]
        reach = max(1, self.lm.order - 1)
        contexts = [row[max(0, i - reach) : i] for row in rows for i in range(1, len(row))]
        found = self.lm.logprobs(contexts, [one for row in rows for one in row[1:]])
        ends = np.cumsum([len(row) - 1 for row in rows])
        return [float(part.sum()) for part in np.split(found, ends[:-1])] if rows else []

    def save(self, path: str | Path) -> None:
        """Writes the model to an .npz file, whole or not at all."""
        write_arrays(path, self.lm.arrays() | {"names": pack_lines(self.names)})

    @classmethod
    def load(cls, path: str | Path) -> ClassLM:
        """Reads what `save` wrote.

        Raises:
            CheckpointError: the file is missing, damaged, or another's.
        """
        with read_arrays(path, "word classes") as file:
            return cls(unpack_lines(file["names"]), NgramLM.from_arrays(file))


def _ending(word: str) -> str:
    return MARK + word[-LETTERS:]
