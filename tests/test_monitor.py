"""train/monitor.py: error rates, and warnings that a person understands."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from diffusion_gemma_asr.denoise.clip import Decoded
from diffusion_gemma_asr.train.monitor import COLLAPSE, judge, repeated_share, report, report_drafts, warnings

HEALTHY = {"error_rate": 0.1, "error_rate_draft": 0.2, "repeated": 0.01, "empty": 0.0, "steps": 8.0}


def decoded(text: str, tokens: list[int] | None = None, draft: str = "", steps: int = 8) -> Decoded:
    tokens = list(range(len(text.split()))) if tokens is None else tokens
    return Decoded(text, tokens, [-0.1] * len(tokens), draft, [], steps, "en")


@pytest.mark.parametrize(
    ("tokens", "share"),
    [
        ([], 0),
        ([[], [5]], 0),
        ([[1, 2, 1, 2]], 0),
        ([[7, 7, 7]], 1),
        ([[1, 1, 2, 3, 3]], 2 / 4),
        ([[1, 2], [2, 3]], 0),  # not across transcripts
        ([[1, 1, 1], [2, 3]], 2 / 3),
    ],
)
def test_share_of_tokens_that_repeat_the_one_before(tokens: list[list[int]], share: float) -> None:
    assert repeated_share(tokens) == pytest.approx(share)


def test_transcripts_are_judged_in_plain_words() -> None:
    rows = [decoded("do not stop", draft="do nut stop"), decoded("it is\nLATE!", draft="it is late")]
    figures = judge(["Don't stop.", "It is late"], rows)
    assert figures["error_rate"] == 0 and figures["error_rate_draft"] == pytest.approx(1 / 6, abs=1e-4)


def test_hindi_and_mandarin_are_judged_by_characters() -> None:
    assert judge(["\u4f60\u597d"], [decoded("\u4f60\u4eec")], "zh")["error_rate"] == 0.5


def test_errors_are_counted_over_all_words_of_all_transcripts() -> None:
    # one wrong, two missing, one extra
    rows = [decoded("a b x d e f"), decoded(""), decoded("to be sure")]
    figures = judge(["a b c d e f", "left out", "to be"], rows)
    assert figures["error_rate"] == pytest.approx(4 / 10)
    assert figures["error_rate_draft"] == 1.0  # no draft at all
    assert figures["empty"] == pytest.approx(1 / 3, abs=1e-4)


def test_repeats_and_steps_are_averaged() -> None:
    figures = judge(["a", "b"], [decoded("a", [1, 1, 1], steps=3), decoded("b", [1, 2, 3], steps=8)])
    assert figures["repeated"] == 0.5 and figures["steps"] == 5.5


def test_drafts_are_reported_where_there_is_nothing_else() -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=200)
    assert report_drafts(console, "step 3 · dev", ["a b", "c"], ["a x", "c"], "en") == pytest.approx(1 / 3, abs=1e-4)
    assert "step 3 · dev · CTC draft WER 33.3%" in stream.getvalue() and "a x" in stream.getvalue()


def test_a_list_of_nothing_is_no_error() -> None:
    assert judge([], []) == {"error_rate": 0, "error_rate_draft": 0, "repeated": 0, "empty": 0, "steps": 0}


def test_a_healthy_run_has_no_warnings() -> None:
    assert warnings(HEALTHY) == [] == warnings(HEALTHY | {"repeated": COLLAPSE, "empty": 0.5})


def test_collapse_and_silence_are_named_with_their_share() -> None:
    (collapse,) = warnings(HEALTHY | {"repeated": 0.62})
    assert "collapse" in collapse and "62%" in collapse and "the the the" in collapse and "learning rate" in collapse
    (silence,) = warnings(HEALTHY | {"empty": 0.9})
    assert "90%" in silence and "empty" in silence
    assert len(warnings(HEALTHY | {"repeated": 0.62, "empty": 0.9})) == 2


def test_a_report_shows_transcripts_beside_references_and_warns() -> None:
    stream = io.StringIO()
    rows = [
        decoded("the the the the", [9, 9, 9, 9], draft="the cat [/bold]"),
        *(decoded("ok") for _ in range(5)),
    ]
    references = ["the cat [sat] there", *(f"number {i}" for i in range(5))]
    figures = report(Console(file=stream, width=200), "step 250 · dev/en", references, rows, shown=3)
    shown = stream.getvalue()
    assert figures == judge(references, rows)
    assert "step 250" in shown and "dev/en" in shown and f"WER {figures['error_rate']:.1%}" in shown
    # brackets of a transcript are text, not rich's markup
    assert shown.index("the cat [sat] there") < shown.index("the the the the") < shown.index("the cat [/bold]")
    assert "number 1" in shown and "number 2" not in shown
    assert "warning: output collapses: 100% of the tokens" in shown


def test_a_good_report_does_not_warn() -> None:
    stream = io.StringIO()
    report(Console(file=stream, width=200), "dev", ["a b"], [decoded("a b", draft="a b")])
    assert "WER 0.0%" in stream.getvalue() and "warning" not in stream.getvalue()
