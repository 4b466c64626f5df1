"""JSONL manifests: one utterance a line, in the fields that NeMo made common."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from ..errors import DataError


@dataclass(frozen=True)
class Utterance:
    """One recording and its transcript.

    `audio_filepath` is absolute after reading (a manifest may write it relative to its own folder); `duration` is in
    seconds.
    """

    audio_filepath: str
    text: str
    language: str
    duration: float
    speaker: str = ""


def read_manifest(
    path: str | Path, languages: Iterable[str] = (), max_duration_s: float = 30.0, skipped: list[str] | None = None
) -> list[Utterance]:
    """Reads a JSONL manifest.

    Args:
        path: manifest file; relative `audio_filepath` values are taken from its folder.
        languages: keep only these codes (empty: all).
        max_duration_s: leave out longer utterances.
        skipped: takes a message for every line that cannot be used, and reading goes on; None stops at the first.

    Raises:
        DataError: the file is missing, a line is no JSON object, or a field is missing; the message names file and
        line.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such manifest; check the recipe's data section or make the data first")
    keep = frozenset(languages)
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            utterance = _utterance(path, number, line)
        except DataError as error:
            if skipped is None:
                raise
            skipped.append(str(error))
            continue
        if utterance.duration <= max_duration_s and (not keep or utterance.language in keep):
            rows.append(utterance)
    if not rows and not skipped:
        raise DataError(f"{path}: no utterance of at most {max_duration_s} s in {sorted(keep) or 'any language'}")
    return rows


def _utterance(path: Path, number: int, line: str) -> Utterance:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {number}: not JSON ({error.msg})") from None
    if not isinstance(row, dict):
        raise DataError(f"{path}, line {number}: expected an object, found {type(row).__name__}")
    try:
        for name in ("text", "language"):
            if not isinstance(row[name], str):
                raise TypeError(f"{name}: {row[name]!r}")
        audio = os.path.abspath(os.path.join(path.parent, row["audio_filepath"]))
        return Utterance(audio, row["text"], row["language"], float(row["duration"]), str(row.get("speaker", "")))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path}, line {number}: missing or wrong field {error}; each line needs "
            "audio_filepath, text, language, duration"
        ) from None


def write_manifest(path: str | Path, rows: Iterable[Utterance]) -> None:
    """Writes the manifest whole or not at all; paths are stored relative to its folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        for row in rows:
            fields = asdict(row)
            fields["audio_filepath"] = os.path.relpath(row.audio_filepath, path.parent)
            file.write(json.dumps(fields, ensure_ascii=False) + "\n")
    part.replace(path)
