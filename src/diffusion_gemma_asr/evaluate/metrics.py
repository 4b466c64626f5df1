"""Error rates: edit counts (by jiwer), corpus-level rates, bootstrap intervals and a paired test. Pure functions.

All error rates of this project are computed by `error_rate`: in training, in benchmarks and by `evaluate`.
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
RESAMPLES = 2000  # of the bootstrap


class Piece(NamedTuple):
    """A segment of an alignment.

    Attributes:
        kind: equal, substitute, delete or insert.
        said: text of the reference.
        written: text of the hypothesis.
    """

    kind: str
    said: str
    written: str


@dataclass(frozen=True)
class Edits:
    """Edit counts between a reference and a hypothesis, in words or characters.

    Attributes:
        hits: equal units.
        substitutions: replaced units.
        deletions: units of the reference that are missing from the hypothesis.
        insertions: additional units of the hypothesis.
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
        """Number of edits: substitutions, deletions and insertions."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def reference(self) -> int:
        """Number of units in the reference."""
        return self.hits + self.substitutions + self.deletions

    @property
    def rate(self) -> float:
        """Errors per unit of the reference; for an empty reference 0 without errors, else infinite."""
        if self.reference:
            return self.errors / self.reference
        return math.inf if self.errors else 0.0


def error_rate(references: Sequence[str], hypotheses: Sequence[str], language: str) -> float:
    """The error rate of a corpus after Whisper's normaliser: all edits divided by the units of all references.

    Args:
        references: correct transcripts.
        hypotheses: transcripts of the system, in the same order.
        language: code; selects the normaliser, and the unit: characters for Hindi and Mandarin, words for others.

    Returns:
        the rate, 0.05 for 5 %; infinite if all references are empty and a hypothesis is not.

    Raises:
        ValueError: the lists differ in length.
    """
    pairs = zip(references, hypotheses, strict=True)
    return total([edits(reference, hypothesis, language) for reference, hypothesis in pairs]).rate


def edits(reference: str, hypothesis: str, language: str, rules: Rules = "whisper") -> Edits:
    """Edit counts of one utterance, after normalisation.

    Args:
        reference: correct transcript.
        hypothesis: transcript of the system.
        language: see `error_rate`.
        rules: see `normaliser`.
    """
    normalise = normaliser(language, rules)
    return count(normalise(reference), normalise(hypothesis), error_unit(language))


def percent(rate: float | None, digits: int = 1) -> str:
    """Formats a rate as a percentage; None and infinity as a dash."""
    return "–" if rate is None or not math.isfinite(rate) else f"{rate:.{digits}%}"


def align(reference: str, hypothesis: str, unit: Unit) -> list[Piece]:
    """A Levenshtein alignment of two normalised texts, as segments in order."""
    if not reference and not hypothesis:
        return []
    separator = " " if unit == "word" else ""
    process = jiwer.process_words if unit == "word" else jiwer.process_characters
    if not reference:
        return [Piece("insert", "", hypothesis)]
    result = process(reference, hypothesis)
    reference_units, hypothesis_units = result.references[0], result.hypotheses[0]
    return [
        Piece(
            chunk.type,
            separator.join(reference_units[chunk.ref_start_idx : chunk.ref_end_idx]),
            separator.join(hypothesis_units[chunk.hyp_start_idx : chunk.hyp_end_idx]),
        )
        for chunk in result.alignments[0]
    ]


def count(reference: str, hypothesis: str, unit: Unit) -> Edits:
    """Edit counts between two normalised texts; with an empty reference, all units are insertions."""
    if not reference:
        return Edits(insertions=len(hypothesis.split() if unit == "word" else hypothesis))
    result = (jiwer.process_words if unit == "word" else jiwer.process_characters)(reference, hypothesis)
    return Edits(result.hits, result.substitutions, result.deletions, result.insertions)


def total(rows: Sequence[Edits]) -> Edits:
    """The sum of edit counts over utterances."""
    return sum(rows, Edits())


def confidence_interval(rows: Sequence[Edits], seed: int = 0, level: float = 0.95) -> tuple[float, float]:
    """Bootstrap confidence interval of a corpus' error rate, resampling utterances (Bisani & Ney 2004).

    Args:
        rows: edit counts of each utterance.
        seed: of the resamples.
        level: confidence level.

    Returns:
        the lower and the upper bound; both 0 if all references are empty.
    """
    if not total(rows).reference:
        return 0.0, 0.0
    rates = _resampled([[e.errors for e in rows]], [e.reference for e in rows], seed)[0]
    low, high = np.quantile(rates, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class Paired:
    """The result of a matched-pairs test of two systems.

    Attributes:
        difference: error rate of the second minus that of the first.
        low: lower bound of its 95 % interval.
        high: upper bound of its 95 % interval.
        p_value: two-sided: twice the share of resamples whose difference is 0 or has the other sign.
    """

    difference: float
    low: float
    high: float
    p_value: float


def paired_bootstrap(first: Sequence[Edits], second: Sequence[Edits], seed: int = 0) -> Paired:
    """Matched-pairs bootstrap of the difference between two error rates (Bisani & Ney 2004).

    Args:
        first: edit counts of each utterance by the first system.
        second: edit counts by the second system, in the same order.
        seed: of the resamples.

    Raises:
        ValueError: the lists differ in length or in the sizes of their references, or all references are empty.
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
    """(systems, RESAMPLES) error rates of all systems on the same resamples of utterances.

    Args:
        errors: number of errors in each utterance, for each system.
        references: units in each reference.
        seed: of the resamples.
    """
    draws = np.random.default_rng(seed).integers(len(references), size=(RESAMPLES, len(references)))
    units = np.asarray(references)[draws].sum(1)  # (RESAMPLES,)
    return np.stack([np.asarray(row)[draws].sum(1) / np.maximum(units, 1) for row in errors])
