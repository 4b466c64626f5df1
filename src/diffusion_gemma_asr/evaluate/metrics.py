"""Error rates: counts of edits by jiwer, corpus-level rates, bootstrap intervals and a paired test. Pure functions.

`error_rate` is what every figure of this project is: training's monitor, benchmarks and `evaluate` count by it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from ..data.text import error_unit
from ..errors import AsrError
from . import INSTALL
from .normalise import Rules, normaliser

try:
    import jiwer
except ModuleNotFoundError as error:
    raise AsrError(f"error rates need {error.name}: {INSTALL}") from None

Unit = Literal["word", "character"]
RESAMPLES = 2000


class Piece(NamedTuple):
    """A stretch of an alignment.

    Attributes:
        kind: equal, substitute, delete or insert.
        said: what the reference has there.
        written: what the hypothesis has there.
    """

    kind: str
    said: str
    written: str


@dataclass(frozen=True)
class Edits:
    """How a hypothesis differs from its reference, in words or characters.

    Attributes:
        hits: units that are equal.
        substitutions: units in place of others.
        deletions: units of the reference that the hypothesis lacks.
        insertions: units of the hypothesis that the reference lacks.
    """

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
        return math.inf if self.errors else 0.0


def error_rate(references: Sequence[str], hypotheses: Sequence[str], language: str) -> float:
    """The error rate of a corpus: edits over units of all references, after Whisper's normaliser.

    Args:
        references: what was said.
        hypotheses: what was written, in the same order.
        language: code, which decides the normaliser, and the unit: characters for Hindi and Mandarin, words elsewhere.

    Returns:
        the rate; infinite where nothing was said and something written.

    Raises:
        ValueError: the lists differ in length.
    """
    pairs = zip(references, hypotheses, strict=True)
    return total([edits(reference, hypothesis, language) for reference, hypothesis in pairs]).rate


def edits(reference: str, hypothesis: str, language: str, rules: Rules = "whisper") -> Edits:
    """Edits between two texts of a language, in its unit, after a normaliser; see `error_rate`."""
    normalise = normaliser(language, rules)
    return count(normalise(reference), normalise(hypothesis), error_unit(language))


def percent(rate: float | None, digits: int = 1) -> str:
    """A rate for people; a dash where there is none."""
    return "–" if rate is None or not math.isfinite(rate) else f"{rate:.{digits}%}"


def align(reference: str, hypothesis: str, unit: Unit) -> list[Piece]:
    """A cheapest alignment of two normalised texts (Levenshtein), in order."""
    if not reference and not hypothesis:
        return []
    joint = " " if unit == "word" else ""
    process = jiwer.process_words if unit == "word" else jiwer.process_characters
    if not reference:
        return [Piece("insert", "", hypothesis)]
    result = process(reference, hypothesis)
    said, written = result.references[0], result.hypotheses[0]
    return [
        Piece(
            chunk.type,
            joint.join(said[chunk.ref_start_idx : chunk.ref_end_idx]),
            joint.join(written[chunk.hyp_start_idx : chunk.hyp_end_idx]),
        )
        for chunk in result.alignments[0]
    ]


def count(reference: str, hypothesis: str, unit: Unit) -> Edits:
    """Edits between two normalised texts; a reference without units has insertions alone."""
    if not reference:
        return Edits(insertions=len(hypothesis.split() if unit == "word" else hypothesis))
    result = (jiwer.process_words if unit == "word" else jiwer.process_characters)(reference, hypothesis)
    return Edits(result.hits, result.substitutions, result.deletions, result.insertions)


def total(rows: Sequence[Edits]) -> Edits:
    """The corpus' edits."""
    return sum(rows, Edits())


def confidence_interval(rows: Sequence[Edits], seed: int = 0, level: float = 0.95) -> tuple[float, float]:
    """Bootstrap interval of the corpus' error rate: utterances are drawn anew with replacement (Bisani & Ney 2004).

    Args:
        rows: edits of each utterance.
        seed: of the draws.
        level: share of the draws that the interval holds.

    Returns:
        the lower and the upper end; both 0 without a reference.
    """
    if not total(rows).reference:
        return 0.0, 0.0
    rates = _resampled([[e.errors for e in rows]], [e.reference for e in rows], seed)[0]
    low, high = np.quantile(rates, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class Paired:
    """Two systems on the same utterances.

    Attributes:
        difference: error rate of the second minus that of the first.
        low, high: its 95 % interval.
        p_value: two-sided, the share of resamples on the other side of zero, doubled.
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
