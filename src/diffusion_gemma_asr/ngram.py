"""A language model of tokens that is counted, not learnt: how likely a token is behind the few before it.

Small CTC models hear sounds well and know few words. Millions of tokens of text, counted in a minute, know them; beam.py
joins both. Probabilities are Kneser and Ney's (1995), interpolated: each sequence's count loses a constant, and what the
counts of one context lose goes to the model of the context that is one token shorter. There a sequence counts once for each
token that it was seen behind, however often: what follows in many places is likely in a new one.

Where text of several languages is counted, a token that nothing is known of in its context has a probability for each
language; which of them is written the tokens of the context tell. A language of which there is little text would else hardly
occur.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from .arrays import read_arrays, write_arrays

DISCOUNT = 0.75
CODES = 16.0  # steps a nat in which logarithms of probabilities are stored, in a byte each
SHARES = np.exp(np.arange(256) / -CODES)  # of each code
LM_WEIGHT, TOKEN_BONUS = 0.5, 3.5  # see beam.py: best of those tried on the mini models' monitor lists


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

    @classmethod
    def count(
        cls, sentences: Iterable[Sequence[int]], vocab_size: int, bos: int, eos: int, order: int = 5, least: int = 2,
        languages: Sequence[int] | None = None,
    ) -> NgramLM:  # fmt: skip
        """Counts the sequences in sentences of token ids, each of which begins with `bos` and ends with `eos`.

        Args:
            order: length of the longest sequences; vocab_size ** order has to be below 2 ** 64.
            least: sequences of three and more tokens that occur less often are not kept.
            languages: number of each sentence's; None: all are in one.

        Raises:
            ValueError: such sequences do not fit into 64 bits.
        """
        if vocab_size**order >= 2**64:
            raise ValueError(f"{order} of {vocab_size} tokens do not fit into 64 bits; choose a smaller order")
        rows = [np.array([bos, *sentence, eos], dtype=np.uint64) for sentence in sentences]
        tokens = np.concatenate(rows)
        place = np.concatenate([np.arange(len(row)) for row in rows])  # in its sentence
        sequences, contexts = [], []
        base, running = np.uint64(vocab_size), np.zeros_like(tokens)
        power = np.uint64(1)
        seen = []
        for length in range(1, order + 1):
            # The sequence that ends at each token; those that reach beyond their sentence's beginning are left out.
            running[length - 1 :] += power * tokens[: len(tokens) - length + 1]
            power *= base
            ends = place >= max(1, length - 1)  # nothing predicts the beginning
            seen.append(np.unique(running[ends], return_counts=True))
        for length, (keys, occurrences) in enumerate(seen, 1):
            counts = occurrences
            if length < order:  # nothing stands before a sentence's beginning, where occurrences count
                behind, tokens_before = np.unique(seen[length][0] % base**length, return_counts=True)
                counts = occurrences.copy()
                counts[keys.searchsorted(behind)] = tokens_before
            heads, first, owner = np.unique(keys // base, return_index=True, return_inverse=True)
            total = np.add.reduceat(counts, first)
            kept = occurrences >= (least if length > 2 else 1)
            taken = np.where(kept, DISCOUNT, counts)  # of each count, for the shorter context
            left = np.add.reduceat(taken, first) / total
            used = np.maximum.reduceat(kept, first)
            sequences.append((keys[kept], _coded(((counts - DISCOUNT) / total[owner])[kept])))
            contexts.append((heads[used], _coded(left[used])))
        if languages is None or order < 2:
            return cls(vocab_size, sequences, contexts)
        spoken = np.repeat(np.asarray(languages), [len(row) for row in rows])
        return cls(vocab_size, sequences, contexts, *_by_language(tokens, place, spoken, vocab_size, {bos, eos}))

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

    def arrays(self) -> dict[str, np.ndarray]:
        """All that it is made of, by name; the sequences as differences, which are packed better."""
        arrays = {"vocab_size": np.array(self.vocab_size)}
        for name, tables in (("sequences", self.sequences), ("contexts", self.contexts)):
            for i, (keys, codes) in enumerate(tables):
                arrays |= {f"{name}{i}": np.diff(keys, prepend=np.uint64(0)), f"{name}{i}_codes": codes}
        if self.within is not None and self.belongs is not None:
            arrays |= {"within": self.within, "belongs": self.belongs}
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> NgramLM:
        """The model of what `arrays` gave.

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

    def save(self, path: str | Path) -> None:
        """Writes the model to an .npz file, whole or not at all."""
        write_arrays(path, self.arrays())

    @classmethod
    def load(cls, path: str | Path) -> NgramLM:
        """Reads what `save` wrote.

        Raises:
            CheckpointError: the file is missing, damaged, or another's.
        """
        with read_arrays(path, "a language model") as file:
            return cls.from_arrays(file)


def _coded(shares: np.ndarray) -> np.ndarray:
    return np.clip(np.round(-CODES * np.log(shares)), 0, 255).astype(np.uint8)


def _by_language(
    tokens: np.ndarray, place: np.ndarray, languages: np.ndarray, vocab_size: int, everywhere: set[int]
) -> tuple[np.ndarray, np.ndarray]:
    """`within` and `belongs` of tokens (n,) at places (n,) of sentences in languages (n,); `everywhere` tell of none."""
    within, belongs = [], []
    for language in range(int(languages.max()) + 1):
        own, follows = languages == language, place[1:] > 0
        pairs = np.unique((tokens[:-1] * np.uint64(vocab_size) + tokens[1:])[follows & own[1:]])
        counts = np.bincount((pairs % np.uint64(vocab_size)).astype(np.int64), minlength=vocab_size)
        left = DISCOUNT * np.count_nonzero(counts) / vocab_size
        within.append((np.maximum(counts - DISCOUNT, 0.0) + left) / counts.sum())
        times = np.bincount(tokens[own].astype(np.int64), minlength=vocab_size)
        belongs.append((times + 0.5) / (times.sum() + 0.5 * vocab_size))
    shares = np.stack(belongs, 1)
    shares[sorted(everywhere)] = 1.0
    return _coded(np.stack(within, 1)), _coded(shares / shares.sum(1, keepdims=True))


def _look_up(table: tuple[np.ndarray, np.ndarray], keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shares (N,) of keys (N,), 0 where there are none, and whether there are."""
    held, codes = table
    if not len(held):
        return np.zeros(len(keys)), np.zeros(len(keys), dtype=bool)
    at = np.minimum(held.searchsorted(keys), len(held) - 1)
    there = held[at] == keys
    return np.where(there, SHARES[codes[at]], 0.0), there
