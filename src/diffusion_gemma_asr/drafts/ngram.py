"""An n-gram language model of tokens: how likely a token is behind the few before it.

Probabilities are interpolated Kneser-Ney (1995). Where text of several languages was counted, a token that nothing is
known of in its context has a probability for each language, and the tokens of the context say which of them is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from .arrays import read_arrays

CODES = 16.0  # steps a nat in which logarithms of probabilities are stored, in a byte each
SHARES = np.exp(np.arange(256) / -CODES)  # of each code


class NgramLM:
    """Probabilities of tokens by the last `order` - 1 tokens before them.

    A sequence of tokens is kept as one number whose digits, in base `vocab_size`, they are.

    Args:
        vocab_size: tokens have smaller ids.
        sequences: for each length 1, 2, ...: the sequences that are kept, sorted uint64 (n,), and the discounted share of
            their context's count, in codes (n,) uint8.
        contexts: for each length 0, 1, ...: the contexts of these, sorted uint64 (m,), and the share left to the shorter
            context, in codes (m,) uint8.
        within: how likely each token is in each of G languages, in codes (vocab_size, G) uint8, in place of sequences of
            one token; None: there is one language.
        belongs: how likely each language is where a token is seen, in codes (vocab_size, G) uint8.
    """

    def __init__(
        self, vocab_size: int, sequences: Sequence[tuple[np.ndarray, np.ndarray]],
        contexts: Sequence[tuple[np.ndarray, np.ndarray]], within: np.ndarray | None = None,
        belongs: np.ndarray | None = None,
    ):  # fmt: skip
        self.vocab_size, self.sequences, self.contexts = vocab_size, list(sequences), list(contexts)
        self.within, self.belongs = within, belongs

    @property
    def order(self) -> int:
        """Length of the longest sequences."""
        return len(self.sequences)

    def logprobs(self, contexts: Sequence[Sequence[int]], tokens: Sequence[int]) -> np.ndarray:
        """(N,) log-probabilities of N tokens, each behind its context, whatever its length."""
        found = np.full(len(tokens), 1.0 / self.vocab_size)
        following = np.asarray(tokens, dtype=np.uint64)
        before = np.zeros(len(tokens), dtype=np.uint64)
        known = np.ones(len(tokens), dtype=bool)
        base, power = np.uint64(self.vocab_size), np.uint64(1)
        reach = self.order - 1
        cut = [row[-reach:] if reach else () for row in contexts]
        sizes = np.fromiter(map(len, cut), dtype=np.int64, count=len(cut))
        nearest = np.array([(*(0,) * (reach - len(row)), *row) for row in cut], dtype=np.uint64).reshape(len(cut), reach)
        if self.within is not None and self.belongs is not None:
            told = np.zeros((len(tokens), self.within.shape[1]))
            for i in range(reach):  # behind the sentence's beginning, all languages are alike
                told -= np.where(sizes[:, None] > i, self.belongs[nearest[:, reach - 1 - i].astype(np.int64)] / CODES, 0.0)
            told = np.exp(told - told.max(1, keepdims=True))
            found = (told * SHARES[self.within[following.astype(np.int64)]]).sum(1) / told.sum(1)
        for length, (sequence, context) in enumerate(zip(self.sequences, self.contexts, strict=True)):
            if length == 0 and self.within is not None:
                continue
            if length:
                known &= sizes >= length
                before += power * nearest[:, reach - length]
                power *= base
            left, there = _look_up(context, before)
            known &= there
            share, _ = _look_up(sequence, before * base + following)
            found = np.where(known, share + left * found, found)
        return np.log(found)

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> NgramLM:
        """The model in these arrays: sequences as differences, which are packed better.

        Raises:
            KeyError: something is missing.
        """
        order = sum(name.startswith("sequences") for name in arrays) // 2
        sequences, contexts = (
            [(np.cumsum(arrays[f"{name}{i}"], dtype=np.uint64), arrays[f"{name}{i}_codes"]) for i in range(order)]
            for name in ("sequences", "contexts")
        )
        by_language = {name: arrays[name] for name in ("within", "belongs") if name in arrays}
        return cls(int(arrays["vocab_size"]), sequences, contexts, **by_language)

    @classmethod
    def load(cls, path: str | Path) -> NgramLM:
        """Reads an .npz file.

        Raises:
            CheckpointError: the file is missing, damaged, or another's.
        """
        with read_arrays(path, "a language model") as file:
            return cls.from_arrays(file)


def _look_up(table: tuple[np.ndarray, np.ndarray], keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shares (N,) of keys (N,), 0 where there are none, and whether there are."""
    held, codes = table
    if not len(held):
        return np.zeros(len(keys)), np.zeros(len(keys), dtype=bool)
    at = np.minimum(held.searchsorted(keys), len(held) - 1)
    there = held[at] == keys
    return np.where(there, SHARES[codes[at]], 0.0), there
