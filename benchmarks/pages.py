"""Pages with generated parts: what stands between two markers is replaced. And what every measurement says of itself."""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusion_gemma_asr.evaluate.summary import machine
from diffusion_gemma_asr.files import write_whole

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def fill(path: Path, parts: dict[str, str]) -> None:
    """Writes each part between the markers of its name, `<!-- table NAME -->` and `<!-- end NAME -->`."""
    page = path.read_text(encoding="utf-8")
    for name, content in parts.items():
        begin, end = f"<!-- table {name} -->", f"<!-- end {name} -->"
        if begin not in page or end not in page:
            raise SystemExit(f"{path} has no markers {begin} ... {end}; put them where the table belongs")
        head, rest = page.split(begin, 1)
        page = f"{head}{begin}\n{content}\n{end}{rest.split(end, 1)[1]}"
    write_whole(path, page)


def markdown(heading: list[str], rows: list[list[str]]) -> str:
    """A table as Markdown."""
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def read_results(path: Path) -> dict[str, Any]:
    """What a data file holds so far; nothing where there is none yet."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write_results(path: Path, content: dict[str, Any]) -> None:
    """Writes a data file; makes its folder if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def add_results(path: Path, name: str, content: dict[str, Any]) -> None:
    """Adds to a data file what was measured of one model, and where."""
    write_results(path, read_results(path) | {name: content | {"circumstances": circumstances()}})


def measure_or_report(
    description: str, measure: Callable[[argparse.Namespace], None], report: Callable[[], None]
) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """A command line whose parsed arguments have `run`, and the parser of `measure`, to add arguments to."""
    parser = argparse.ArgumentParser(description=description)
    commands = parser.add_subparsers(required=True)
    measuring = commands.add_parser("measure")
    measuring.set_defaults(run=measure)
    commands.add_parser("report").set_defaults(run=lambda _: report())
    return parser, measuring


def circumstances() -> dict[str, Any]:
    """The machine, versions, date and commit of a measurement; a "+" behind the commit says that sources differ."""
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "src"], capture_output=True, text=True).stdout.strip()
    return machine() | {"commit": commit + "+" if commit and changed else commit or None}


def stated(facts: dict[str, Any]) -> str:
    """What `circumstances` says, in words."""
    device = facts["gpu"] or f"{facts['threads']} of {facts['processor']}"
    versions = f"torch {facts['torch']}, transformers {facts['transformers']}"
    return f"{device}, {versions}, {facts['date']}, commit {facts['commit']}"
