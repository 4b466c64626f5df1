"""Evaluation during training: error rates on fixed dev lists, example transcripts, a warning on collapse."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from rich.console import Console

from ..data.text import error_name
from ..denoise.clip import Decoded
from ..evaluate.metrics import error_rate
from .loop import Metrics

COLLAPSE = 0.25  # share of repeated tokens above which a warning is printed; in references it is below 0.02


def repeated_share(tokens: Sequence[Sequence[int]]) -> float:
    """Share of tokens, over all transcripts, that equal the preceding token ("the the the")."""
    pairs = [pair for row in tokens for pair in pairwise(row)]
    return sum(a == b for a, b in pairs) / max(1, len(pairs))


def judge(references: Sequence[str], decoded: Sequence[Decoded], language: str = "en") -> Metrics:
    """Scores transcripts.

    Args:
        references: texts.
        decoded: a result for each reference.
        language: code, of all texts.

    Returns:
        error_rate and error_rate_draft: of transcripts and CTC drafts, see `error_rate`;
        repeated: see `repeated_share`; empty: share of empty transcripts;
        steps: mean number of denoising steps.
    """
    count = max(1, len(decoded))
    return {
        "error_rate": round(error_rate(references, [d.text for d in decoded], language), 4),
        "error_rate_draft": round(error_rate(references, [d.draft for d in decoded], language), 4),
        "repeated": round(repeated_share([d.tokens for d in decoded]), 4),
        "empty": round(sum(not d.text for d in decoded) / count, 4),
        "steps": round(sum(d.steps for d in decoded) / count, 2),
    }


def warnings(figures: Metrics) -> list[str]:
    """Warnings about collapsed or empty transcripts, given the figures of `judge`."""
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
    """As `report`, for CTC drafts alone; returns their error rate."""
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
        references: texts.
        decoded: a result for each reference.
        language: code, of all texts.
        shown: number of transcripts to print.

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
