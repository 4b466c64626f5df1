"""Judging a run by its transcripts: word error rates of a fixed held-out set, examples to read, a warning on collapse."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import jiwer
from rich.console import Console

from ..data.text import plain_english
from ..decoding import Decoded
from .loop import Metrics

COLLAPSE = 0.25  # share of repeated tokens from which a warning is printed; the references stay under 0.02


def repeated_share(tokens: Sequence[Sequence[int]]) -> float:
    """Share of tokens that equal the token before them ("the the the"), over all transcripts."""
    pairs = [pair for row in tokens for pair in pairwise(row)]
    return sum(a == b for a, b in pairs) / max(1, len(pairs))


def judge(references: Sequence[str], decoded: Sequence[Decoded]) -> Metrics:
    """Word error rates in plain words, of the transcripts and of the CTC drafts, and signs of collapse."""
    plain = [plain_english(r) for r in references]
    count = max(1, len(decoded))
    return {
        "wer": round(jiwer.wer(plain, [plain_english(d.text) for d in decoded]), 4),
        "wer_draft": round(jiwer.wer(plain, [plain_english(d.draft) for d in decoded]), 4),
        "repeated": round(repeated_share([d.tokens for d in decoded]), 4),
        "empty": round(sum(not d.text for d in decoded) / count, 4),
        "steps": round(sum(d.steps for d in decoded) / count, 2),
    }


def warnings(figures: Metrics) -> list[str]:
    """What a person should look at, in words."""
    found = []
    if figures["repeated"] > COLLAPSE:
        found.append(
            f"output collapses: {figures['repeated']:.0%} of the tokens repeat the one before ('the the the'); "
            "lower the learning rate, or look whether the audio reaches the prompt"
        )
    if figures["empty"] > 0.5:
        found.append(f"{figures['empty']:.0%} of the transcripts are empty: the canvas has learnt to end at once")
    return found


def report(
    console: Console, step: int, name: str, references: Sequence[str], decoded: Sequence[Decoded], shown: int = 4
) -> Metrics:
    """Prints figures, some transcripts beside their references, and warnings; returns the figures."""
    figures = judge(references, decoded)
    console.print(f"[bold]step {step} · {name} · WER {figures['wer']:.1%} · CTC draft {figures['wer_draft']:.1%}[/bold]")
    for reference, row in list(zip(references, decoded, strict=True))[:shown]:
        console.print(f"  said   {reference}\n  wrote  {row.text}\n  draft  {row.draft}", style="dim", markup=False)
    for warning in warnings(figures):
        console.print(f"  warning: {warning}", style="bold yellow", markup=False)
    return figures
