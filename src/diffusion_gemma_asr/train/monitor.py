"""Judging a run by its transcripts: error rates of a fixed held-out set, examples to read, a warning on collapse."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from rich.console import Console

from ..data.text import error_name
from ..denoise.decode import Decoded
from ..evaluate.metrics import error_rate
from .loop import Metrics

COLLAPSE = 0.25  # share of repeated tokens from which a warning is printed; the references stay under 0.02


def repeated_share(tokens: Sequence[Sequence[int]]) -> float:
    """Share of tokens that equal the token before them ("the the the"), over all transcripts."""
    pairs = [pair for row in tokens for pair in pairwise(row)]
    return sum(a == b for a, b in pairs) / max(1, len(pairs))


def judge(references: Sequence[str], decoded: Sequence[Decoded], language: str = "en") -> Metrics:
    """Error rates of the transcripts and of the CTC drafts (see `error_rate`), and signs of collapse."""
    count = max(1, len(decoded))
    return {
        "error_rate": round(error_rate(references, [d.text for d in decoded], language), 4),
        "error_rate_draft": round(error_rate(references, [d.draft for d in decoded], language), 4),
        "repeated": round(repeated_share([d.tokens for d in decoded]), 4),
        "empty": round(sum(not d.text for d in decoded) / count, 4),
        "steps": round(sum(d.steps for d in decoded) / count, 2),
    }


def warnings(figures: Metrics) -> list[str]:
    """What a person should look at, in words."""
    lines = []
    if figures["repeated"] > COLLAPSE:
        lines.append(
            f"output collapses: {figures['repeated']:.0%} of the tokens repeat the one before ('the the the'); "
            "lower the learning rate, or look whether the audio reaches the prompt"
        )
    if figures["empty"] > 0.5:
        lines.append(f"{figures['empty']:.0%} of the transcripts are empty: the canvas has learnt to end at once")
    return lines


def report_drafts(
    console: Console, title: str, references: Sequence[str], drafts: Sequence[str], language: str, shown: int = 2
) -> float:
    """As `report`, of a model that so far has learnt nothing but to draft; returns the drafts' error rate."""
    rate = round(error_rate(references, drafts, language), 4)
    console.print(f"[bold]{title} · CTC draft {error_name(language)} {rate:.1%}[/bold]")
    for reference, draft in list(zip(references, drafts, strict=True))[:shown]:
        console.print(f"  reference  {reference}\n  draft      {draft}", style="dim", markup=False)
    return rate


def report(
    console: Console, title: str, references: Sequence[str], decoded: Sequence[Decoded], language: str = "en", shown: int = 4
) -> Metrics:
    """Prints figures, some transcripts beside their references, and warnings.

    Args:
        console: to print on.
        title: of the list and the step.
        references, decoded: one row an utterance.
        language: of all of them.
        shown: so many transcripts.

    Returns:
        the figures of `judge`.
    """
    figures = judge(references, decoded, language)
    rates = f"{error_name(language)} {figures['error_rate']:.1%} · CTC draft {figures['error_rate_draft']:.1%}"
    console.print(f"[bold]{title} · {rates}[/bold]")
    for reference, row in list(zip(references, decoded, strict=True))[:shown]:
        lines = f"  reference  {reference}\n  transcript {row.text}\n  draft      {row.draft}"
        console.print(lines, style="dim", markup=False)
    for warning in warnings(figures):
        console.print(f"  warning: {warning}", style="bold yellow", markup=False)
    return figures
