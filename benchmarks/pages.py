"""Pages with generated parts: what stands between two markers is replaced."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffusion_gemma_asr.evaluate.run import write_whole


def fill(path: Path, parts: dict[str, str]) -> None:
    """Writes each part between the markers of its name, `<!-- table NAME -->` and `<!-- end NAME -->`."""
    page = path.read_text(encoding="utf-8")
    for name, content in parts.items():
        begin, end = f"<!-- table {name} -->", f"<!-- end {name} -->"
        if begin not in page or end not in page:
            raise SystemExit(f"{path} has no markers {begin} ... {end}; put them where the table belongs")
        head, rest = page.split(begin)
        page = f"{head}{begin}\n{content}\n{end}{rest.split(end)[1]}"
    write_whole(path, page)


def measured(path: Path) -> dict[str, Any]:
    """What a data file holds so far; nothing where there is none yet."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def circumstances(machine: dict[str, Any]) -> str:
    """What `evaluate.run.machine` says of a measurement, in words."""
    m = machine
    versions = f"torch {m['torch']}, transformers {m['transformers']}"
    return f"{m['threads']} of {m['processor']}, {versions}, {m['date']}"
