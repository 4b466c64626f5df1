"""Judging a run by its transcripts: word error rates of a fixed held-out set, examples to read, a warning on collapse."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import jiwer
from rich.console import Console

from ..data.text import error_name, error_unit, plain_text
from ..decoding import Decoded
from .loop import Metrics

COLLAPSE = 0.25  # share of repeated tokens from which a warning is printed; the references stay under 0.02


def repeated_share(tokens: Sequence[Sequence[int]]) -> float:
    """Share of tokens that equal the token before them ("the the the"), over all transcripts."""
    pairs = [pair for row in tokens for pair in pairwise(row)]
    return sum(a == b for a, b in pairs) / max(1, len(pairs))


def error_rate(references: Sequence[str], written: Sequence[str], language: str) -> float:
    """Errors in plain text, by word, in Hindi and Mandarin by character; references must hold something."""
    said, heard = ([plain_text(text, language) for text in texts] for texts in (references, written))
    return jiwer.cer(said, heard) if error_unit(language) == "character" else jiwer.wer(said, heard)


def judge(references: Sequence[str], decoded: Sequence[Decoded], language: str = "en") -> Metrics:
    """Error rates of the transcripts and of the CTC drafts, under the name of WER whatever they count (`error_rate`), and
    signs of collapse."""
    count = max(1, len(decoded))
    return {
        "wer": round(error_rate(references, [d.text for d in decoded], language), 4),
        "wer_draft": round(error_rate(references, [d.draft for d in decoded], language), 4),
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


def report_drafts(
    console: Console, step: int, name: str, references: Sequence[str], drafts: Sequence[str], language: str, shown: int = 2
) -> float:
    """As `report`, of a model that so far has learnt nothing but to draft; returns the drafts' error rate."""
    rate = round(error_rate(references, drafts, language), 4)
    kind = error_name(language)
    console.print(f"[bold]step {step} · {name} · CTC draft {kind} {rate:.1%}[/bold]")
    for reference, draft in list(zip(references, drafts, strict=True))[:shown]:
        console.print(f"  said   {reference}\n  draft  {draft}", style="dim", markup=False)
    return rate


def report(
    console: Console, step: int, name: str, references: Sequence[str], decoded: Sequence[Decoded], language: str = "en",
    shown: int = 4,
) -> Metrics:  # fmt: skip
    """Prints figures, some transcripts beside their references, and warnings; returns the figures."""
    figures = judge(references, decoded, language)
    kind = error_name(language)
    console.print(f"[bold]step {step} · {name} · {kind} {figures['wer']:.1%} · CTC draft {figures['wer_draft']:.1%}[/bold]")
    for reference, row in list(zip(references, decoded, strict=True))[:shown]:
        console.print(f"  said   {reference}\n  wrote  {row.text}\n  draft  {row.draft}", style="dim", markup=False)
    for warning in warnings(figures):
        console.print(f"  warning: {warning}", style="bold yellow", markup=False)
    return figures
