"""JSONL manifests: one utterance a line, in the fields that NeMo made common, or as lhotse writes its cuts."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..audio.read import SAMPLE_RATE, duration_of, read_blocks
from ..errors import AsrError, AudioError, DataError
from ..languages import language_code
from .text import read_text

FIELDS = "audio_filepath, text, language, duration"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Utterance:
    """A part of a sound file and its transcript.

    Attributes:
        audio_filepath: absolute after reading (a manifest may write it relative to its own folder).
        text: what is said.
        language: one of the six codes; as it was written where it is none of them.
        duration: seconds of the part.
        speaker: any name, or nothing.
        offset: seconds from the start of the file to that of the part.
    """

    audio_filepath: str
    text: str
    language: str
    duration: float
    speaker: str = ""
    offset: float = 0.0

    @property
    def key(self) -> str:
        """32 hexadecimal digits for sound file, offset, duration, text and language: the same where all of these are."""
        what = [self.audio_filepath, float(self.offset), float(self.duration), self.text, self.language]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]


def read_manifest(
    path: str | Path, languages: Iterable[str] = (), max_duration_s: float = 30.0, skipped: list[str] | None = None
) -> list[Utterance]:
    """Reads a JSONL manifest.

    A line is an object with audio_filepath, text, language (or lang), duration, and if wanted offset and speaker; or a
    lhotse cut of one channel. Without a duration the part goes on to the end of the file.

    Args:
        path: manifest file; relative `audio_filepath` values are taken from its folder.
        languages: keep only these (empty: all), by code or name.
        max_duration_s: leave out longer utterances.
        skipped: takes a message for every line that is left out. None: a line that cannot be used is an error, and what
            is left out for its language or length is counted in a warning.

    Returns:
        utterances, their languages as codes; a language that is none of the six stays as it is written.

    Raises:
        DataError: the file is missing or no UTF-8, a line is no JSON object, or a field is missing; the message names
            file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such manifest; check the recipe's data section or make the data first")
    keep = frozenset(map(known_language, languages))
    rows, left_out = [], []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            utterance = _utterance(path.parent, line)
        except DataError as error:
            message = f"{path}, line {number}: {error}"
            if skipped is None:
                raise DataError(message) from None
            skipped.append(message)
            continue
        if why := why_left_out(utterance, keep, max_duration_s):
            left_out.append(f"{path}, line {number}: {why}")
        else:
            rows.append(utterance)
    report(left_out, skipped)
    if not rows and not skipped:
        hint = f" ({left_out[0]})" if left_out else ""
        raise DataError(f"{path}: no utterance of at most {max_duration_s} s in {sorted(keep) or 'any language'}{hint}")
    return rows


def known_language(name: str) -> str:
    """The code of a language; the name itself where it is none of the six."""
    try:
        return language_code(name)
    except AsrError:
        return name


def why_left_out(utterance: Utterance, languages: frozenset[str], max_duration_s: float) -> str:
    """Why an utterance is not one of those asked for, by language (none: all will do) or length; "" if it is."""
    if languages and utterance.language not in languages:
        return f"language {utterance.language!r} is not one of those kept, {', '.join(sorted(languages))}"
    if utterance.duration > max_duration_s:
        return f"{utterance.duration:g} s long; at most {max_duration_s:g} s are kept"
    return ""


def report(left_out: list[str], skipped: list[str] | None) -> None:
    """Hands on what is said of utterances that were left out on purpose; as one warning where nobody takes it."""
    if skipped is not None:
        skipped += left_out
    elif left_out:
        logger.warning("utterances left out: %d, the first is %s", len(left_out), left_out[0])


def file_seconds(path: str) -> float:
    """How long a sound file lasts, as it says, or else as it is decoded.

    Raises:
        AudioError: it cannot be read.
    """
    return duration_of(path) or sum(map(len, read_blocks(path))) / SAMPLE_RATE


def _utterance(folder: Path, line: str) -> Utterance:
    """The utterance of a line; DataError without the line's place."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON ({getattr(error, 'msg', error)})") from None
    if not isinstance(row, dict):
        raise DataError(f"expected an object, found {type(row).__name__}")
    if "recording" in row and "supervisions" in row:
        row = _of_cut(row)
    spoken: Any = row.get("language", row.get("lang"))
    for name, value in (("audio_filepath", row.get("audio_filepath")), ("text", row.get("text")), ("language", spoken)):
        if not isinstance(value, str) or (not value and name == "audio_filepath"):
            found = f"missing or wrong field {name}: {json.dumps(value)[:60]}"
            raise DataError(f"{found}; each line needs {FIELDS}")
    path = os.path.abspath(os.path.join(folder, row["audio_filepath"]))
    offset, duration = _seconds(row, "offset") or 0.0, _seconds(row, "duration")
    if not duration:
        try:
            duration = round(file_seconds(path) - offset, 3)
        except AudioError as error:
            raise DataError(f"no duration, and the file does not tell it: {error}") from None
        if duration <= 0:
            raise DataError(f"offset {offset:g} s is behind the end of {path}, at {duration + offset:g} s")
    speaker = row.get("speaker")
    return Utterance(path, row["text"], known_language(spoken), duration, "" if speaker is None else str(speaker), offset)


def _seconds(row: dict[str, Any], name: str) -> float | None:
    """A field in seconds; None where it is missing or null."""
    value = row.get(name)
    if value is None:
        return None
    try:
        seconds = float(value if not isinstance(value, bool) else "true")
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise DataError(f"missing or wrong field {name}: {json.dumps(value)[:60]} is no number of seconds; {FIELDS}")
    return seconds


def _of_cut(cut: dict[str, Any]) -> dict[str, Any]:
    """A lhotse MonoCut in our fields: its texts in order, the language and speaker of the first."""
    try:
        (source,) = cut["recording"]["sources"]
        if source["type"] != "file" or len(source["channels"]) != 1:
            raise DataError("a cut of one channel of several, or of no file; save it as a mono file first")
        said = sorted(cut["supervisions"], key=lambda part: part["start"])
        first = said[0] if said else {}
        return {
            "audio_filepath": source["source"], "offset": cut["start"], "duration": cut["duration"],
            "text": " ".join(part["text"] for part in said if part.get("text")) if said else None,
            "language": first.get("language"), "speaker": first.get("speaker"),
        }  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"missing or wrong field in a lhotse cut: {error}") from None


def write_manifest(path: str | Path, rows: Iterable[Utterance]) -> None:
    """Writes the manifest whole or not at all; paths are stored relative to its folder.

    Args:
        path: of the manifest; its folder is made if missing.
        rows: utterances; an offset is written where there is one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        for row in rows:
            fields = asdict(row)
            fields["audio_filepath"] = os.path.relpath(row.audio_filepath, path.parent)
            if not row.offset:
                del fields["offset"]
            file.write(json.dumps(fields, ensure_ascii=False) + "\n")
    part.replace(path)
