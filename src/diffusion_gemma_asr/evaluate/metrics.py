"""Error rates: counts of edits by jiwer, corpus-level rates, bootstrap intervals and a paired test. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jiwer
import numpy as np

Unit = Literal["word", "character"]
RESAMPLES = 2000


class Piece(NamedTuple):
    """A stretch of an alignment: what was said and what was written there, and whether that is equal, substitute,
    delete or insert."""

    kind: str
    said: str
    written: str


@dataclass(frozen=True)
class Edits:
    """How a hypothesis differs from its reference, in words or characters."""

    hits: int = 0
    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0

    def __add__(self, other: Edits) -> Edits:
        return Edits(*(a + b for a, b in zip(self.counts, other.counts, strict=True)))

    @property
    def counts(self) -> tuple[int, int, int, int]:
        """Hits, substitutions, deletions, insertions."""
        return self.hits, self.substitutions, self.deletions, self.insertions

    @property
    def errors(self) -> int:
        """All edits."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def reference(self) -> int:
        """Units in the reference."""
        return self.hits + self.substitutions + self.deletions

    @property
    def rate(self) -> float:
        """Errors a unit of the reference; without any, 0 or infinite."""
        if self.reference:
            return self.errors / self.reference
        return float("inf") if self.errors else 0.0


def align(reference: str, hypothesis: str, unit: Unit) -> list[Piece]:
    """A cheapest alignment of two normalised texts (Levenshtein), in order."""
    if not reference and not hypothesis:
        return []
    joint = " " if unit == "word" else ""
    process = jiwer.process_words if unit == "word" else jiwer.process_characters
    if not reference:
        return [Piece("insert", "", hypothesis)]
    found = process(reference, hypothesis)
    said, written = found.references[0], found.hypotheses[0]
    return [
        Piece(
            chunk.type,
            joint.join(said[chunk.ref_start_idx : chunk.ref_end_idx]),
            joint.join(written[chunk.hyp_start_idx : chunk.hyp_end_idx]),
        )
        for chunk in found.alignments[0]
    ]


def count(reference: str, hypothesis: str, unit: Unit) -> Edits:
    """Edits between two normalised texts; a reference without units has insertions alone."""
    if not reference:
        return Edits(insertions=len(hypothesis.split() if unit == "word" else hypothesis))
    found = (jiwer.process_words if unit == "word" else jiwer.process_characters)(reference, hypothesis)
    return Edits(found.hits, found.substitutions, found.deletions, found.insertions)


def total(edits: Sequence[Edits]) -> Edits:
    """The corpus' edits."""
    return sum(edits, Edits())


def confidence_interval(edits: Sequence[Edits], seed: int = 0, level: float = 0.95) -> tuple[float, float]:
    """Bootstrap interval of the corpus' error rate: utterances are drawn anew with replacement (Bisani & Ney 2004).

    Returns:
        the lower and the upper end; both 0 without a reference.
    """
    if not total(edits).reference:
        return 0.0, 0.0
    rates = _resampled([[e.errors for e in edits]], [e.reference for e in edits], seed)[0]
    low, high = np.quantile(rates, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class Paired:
    """Two systems on the same utterances.

    difference: error rate of the second minus that of the first; low, high: its 95 % interval; p_value: two-sided, the
    share of resamples on the other side of zero, doubled.
    """

    difference: float
    low: float
    high: float
    p_value: float


def paired_bootstrap(first: Sequence[Edits], second: Sequence[Edits], seed: int = 0) -> Paired:
    """Matched-pairs bootstrap of the difference between two error rates (Bisani & Ney 2004).

    Args:
        first, second: edits of the same utterances, in the same order.

    Raises:
        ValueError: the lists differ in length or in their references, or hold nothing.
    """
    references = [e.reference for e in first]
    if references != [e.reference for e in second] or not sum(references):
        raise ValueError("paired systems need the same utterances, in the same order, with something said")
    a, b = _resampled([[e.errors for e in rows] for rows in (first, second)], references, seed)
    differences = b - a
    low, high = np.quantile(differences, [0.025, 0.975])
    tail = min(np.mean(differences <= 0), np.mean(differences >= 0))
    return Paired(total(second).rate - total(first).rate, float(low), float(high), float(min(1.0, 2 * tail)))


def _resampled(errors: Sequence[Sequence[int]], references: Sequence[int], seed: int) -> np.ndarray:
    """(systems, RESAMPLES) error rates of the same resamples of utterances; empty resamples count as no error."""
    draws = np.random.default_rng(seed).integers(len(references), size=(RESAMPLES, len(references)))
    units = np.asarray(references)[draws].sum(1)  # (RESAMPLES,)
    return np.stack([np.asarray(row)[draws].sum(1) / np.maximum(units, 1) for row in errors])
