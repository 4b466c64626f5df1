"""A self-contained HTML report of a run, or of a sweep over denoising steps: tables, a plot, and all utterances."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files import write_whole
from .metrics import Piece, align, percent
from .normalise import NORMALISER
from .predictions import SUMMARY, Prediction, read_predictions
from .summary import cells, parts

MIME = {
    ".wav": "audio/wav",
    ".flac": "audio/flac",
    ".mp3": "audio/mpeg",
    ".ogg": "audio/ogg",
    ".opus": "audio/ogg",
    ".m4a": "audio/mp4",
    ".webm": "audio/webm",
}
PLAYER_BYTES = 4_000_000  # size of an embedded sound file at most
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem;color:#1b1b1b;background:#fff}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.3rem .7rem;text-align:right;border-bottom:1px solid #ddd}
th:first-child,td:first-child{text-align:left}.said,.written{font-family:ui-monospace,monospace}
.utterance{border-top:1px solid #ddd;padding:.6rem 0}.meta{color:#666;font-size:13px}
.substitute{background:#ffe08a}.delete{background:#ffb3b3;text-decoration:line-through}.insert{background:#b8e6b8}
input{font:inherit;padding:.3rem .5rem;width:20rem}audio{height:2rem;vertical-align:middle}
"""
SCRIPT = """
const box=document.getElementById('filter'),rows=[...document.querySelectorAll('.utterance')];
box.addEventListener('input',()=>{const wanted=box.value.toLowerCase();
for(const row of rows)row.hidden=!row.textContent.toLowerCase().includes(wanted)});
"""


def write_report(runs: Sequence[str | Path], target: str | Path, audio: int = 50) -> Path:
    """Writes report.html.

    Args:
        runs: folders of finished runs; the page lists the utterances of the last one.
        target: path of the page.
        audio: number of worst utterances with an audio player, whose sound is embedded if it is a whole file.

    Returns:
        `target`.
    """
    summaries = [json.loads((Path(run) / SUMMARY).read_text(encoding="utf-8")) for run in runs]
    rows = read_predictions(runs[-1])
    written = sorted((row for row in rows if row.error is None), key=lambda row: (-row.counts.errors, -row.counts.rate))
    body = [
        "<h1>Speech recognition report</h1>",
        _settings(summaries),
        f"<h2>Error rates after {NORMALISER}</h2>",
        _table(summaries),
        _plot(summaries),
        _skipped(summaries[-1]),
        "<h2>Utterances, worst first</h2>",
        '<p><input id="filter" placeholder="filter: text, language, file"></p>',
        *(_utterance(row, with_audio=i < audio) for i, row in enumerate(written)),
    ]
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Speech recognition report</title>'
        f"<style>{STYLE}</style><body>{''.join(body)}<script>{SCRIPT}</script></body></html>\n"
    )
    target = Path(target)
    write_whole(target, page)
    return target


def _settings(summaries: Sequence[dict[str, Any]]) -> str:
    """Settings and machine of the last run."""
    values = summaries[-1]["settings"] | summaries[-1]["machine"]
    listed = ", ".join(f"{key} {value}" for key, value in values.items() if value is not None)
    return f'<p class="meta">{html.escape(listed)}</p>'


def _table(summaries: Sequence[dict[str, Any]]) -> str:
    """Error rates by run, data set and language."""
    rows: list[dict[str, Any]] = []
    for summary in summaries:
        for data, language, figures in parts(summary):
            row = {"run": label(summary["settings"]), "data": data, "language": language} | cells(summary, figures)
            with_marks = figures.get("with_marks")
            row["marks kept"] = percent(with_marks["error_rate"], 2) if with_marks else ""
            row |= {"S": figures["substitutions"], "D": figures["deletions"], "I": figures["insertions"]}
            rows.append(row | {"of": figures["reference"]})
    lines = ["".join(f"<th>{html.escape(name)}</th>" for name in rows[0])] if rows else []
    lines += ["".join(f"<td>{html.escape(str(value))}</td>" for value in row.values()) for row in rows]
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def label(settings: dict[str, Any]) -> str:
    """A short name of a run: system, model, steps and start."""
    values = [settings.get(key) for key in ("system", "model", "steps", "start")]
    return " · ".join(f"{value} steps" if isinstance(value, int) else str(value) for value in values if value is not None)


def _plot(summaries: Sequence[dict[str, Any]]) -> str:
    """An SVG plot of error rate over speed; "" for a single run."""
    if len(summaries) < 2:
        return ""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for language in summaries[-1]["languages"]:
        rates = [(s["speed"]["rtfx"], s["languages"][language]["error_rate"], s) for s in summaries]
        points = [point for point in rates if None not in point[:2]]
        axis.plot([x for x, _, _ in points], [100 * y for _, y, _ in points], "o-", label=language)
        for x, y, summary in points:
            axis.annotate(str(summary["settings"].get("steps", "")), (x, 100 * y), textcoords="offset points", xytext=(5, 5))
    axis.set_xlabel("RTFx (seconds of sound a second)")
    axis.set_ylabel("error rate, %")
    axis.grid(alpha=0.3)
    axis.legend()
    image = io.StringIO()
    figure.savefig(image, format="svg")
    return image.getvalue().split("?>", 1)[-1]


def _skipped(summary: dict[str, Any]) -> str:
    """The number of skipped utterances, and reasons."""
    if not summary["skipped"]:
        return ""
    reasons = "".join(f"<li>{html.escape(reason)}</li>" for reason in summary["skipped_why"])
    return f"<p>{summary['skipped']} utterances were skipped:</p><ul>{reasons}</ul>"


def _utterance(row: Prediction, with_audio: bool) -> str:
    """One utterance: figures, player, and the aligned reference and hypothesis with their edits highlighted."""
    pieces = align(row.reference_normalised, row.hypothesis_normalised, "character" if row.unit == "character" else "word")
    edits = row.counts
    meta = (
        f"{Path(row.audio_filepath).name} · {row.language} · {row.duration:.1f} s · {percent(edits.rate, 0)} "
        f"({edits.substitutions} S, {edits.deletions} D, {edits.insertions} I) · {row.decoder}"
    )
    meta += "" if row.passes is None else f" · {row.passes} passes"
    separator = "" if row.unit == "character" else " "
    return (
        f'<div class="utterance"><div class="meta">{html.escape(meta)} {_player(row) if with_audio else ""}</div>'
        f'<div class="said">{separator.join(_highlighted(p, p.said) for p in pieces if p.said)}</div>'
        f'<div class="written">{separator.join(_highlighted(p, p.written) for p in pieces if p.written)}</div></div>'
    )


def _highlighted(piece: Piece, text: str) -> str:
    """The escaped text of a segment, coloured by the kind of its edit."""
    escaped = html.escape(text)
    return escaped if piece.kind == "equal" else f'<span class="{piece.kind}">{escaped}</span>'


def _player(row: Prediction) -> str:
    """An audio player with the embedded sound file; "" if that is missing, too large, or longer than the utterance."""
    path = Path(row.audio_filepath)
    mime_type = MIME.get(path.suffix.lower())
    if mime_type is None or row.offset or not path.is_file() or path.stat().st_size > PLAYER_BYTES:
        return ""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<audio controls preload="none" src="data:{mime_type};base64,{data}"></audio>'
