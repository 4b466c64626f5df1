"""JSONL manifests: one utterance a line, with NeMo's fields or as a lhotse cut."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ..audio.read import SAMPLE_RATE, duration_of, read_blocks
from ..errors import AsrError, AudioError, DataError
from ..files import whole_file
from ..languages import language_code
from .text import read_text

FIELDS = "audio_filepath, text, language, duration"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Utterance:
    """A part of a sound file and its transcript.

    Attributes:
        audio_filepath: absolute after reading (a manifest may write it relative to its own folder).
        text: transcript.
        language: one of the six codes; any other value is as the manifest has it.
        duration: length of the part in seconds.
        speaker: any name; "" if unknown.
        offset: start of the part in the file, in seconds.
    """

    audio_filepath: str
    text: str
    language: str
    duration: float
    speaker: str = ""
    offset: float = 0.0

    @property
    def key(self) -> str:
        """A hash of sound file, offset, duration, text and language: 32 hexadecimal digits."""
        values = [self.audio_filepath, float(self.offset), float(self.duration), self.text, self.language]
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:32]


def read_manifest(
    path: str | Path, languages: Iterable[str] = (), max_duration_s: float = 30.0, skipped: list[str] | None = None
) -> list[Utterance]:
    """Reads a JSONL manifest.

    A line is an object with audio_filepath, text, language (or lang), duration, and optionally offset and speaker; or a
    lhotse cut of one channel. Without a duration the utterance extends to the end of the file.

    Args:
        path: manifest file; relative `audio_filepath` values start from its folder.
        languages: codes or names of the languages to keep; empty keeps all.
        max_duration_s: longer utterances are left out.
        skipped: a message is appended for every line that is left out. None: an invalid line is an error, and lines left
            out by language or length are counted in a warning.

    Returns:
        the utterances in order, their languages as codes; a language other than the six is kept as written.

    Raises:
        DataError: the file is missing or not UTF-8, a line is not a JSON object, or a field is missing or wrong; the message
            names file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such manifest; check the recipe's data section or make the data first")
    lines = Lines(path, read_text(path).split("\n"), path.parent)
    return read_lines([lines], path, languages, max_duration_s, skipped)


class Lines(NamedTuple):
    """What `read_lines` reads.

    Attributes:
        path: of the file, for messages.
        lines: its content.
        place: folder from which relative paths start; of cuts of a Shar, the tar file with their sounds.
        source: type of a cut's sound: a file of its own, or what lies in the tar file under the cut's name.
        language: of lines that name none; None is an error.
    """

    path: Path
    lines: list[str]
    place: Path
    source: Literal["file", "shar"] = "file"
    language: str | None = None


def read_lines(
    files: Iterable[Lines], name: Path, languages: Iterable[str], max_duration_s: float, skipped: list[str] | None
) -> list[Utterance]:
    """The utterances of one or several files of lines.

    Args:
        files: in order.
        name: what to call them together.
        languages, max_duration_s, skipped: see `read_manifest`.

    Raises:
        DataError: see `read_manifest`.
    """
    keep = frozenset(map(known_language, languages))
    rows, left_out = [], []
    for file in files:
        for number, line in enumerate(file.lines, 1):
            if not line.strip():
                continue
            try:
                utterance = _utterance(file, line)
            except DataError as error:
                message = f"{file.path}, line {number}: {error}"
                if skipped is None:
                    raise DataError(message) from None
                skipped.append(message)
                continue
            if why := why_left_out(utterance, keep, max_duration_s):
                left_out.append(f"{file.path}, line {number}: {why}")
            else:
                rows.append(utterance)
    report(left_out, skipped)
    if not rows and not skipped:
        hint = f" ({left_out[0]})" if left_out else ""
        raise DataError(f"{name}: no utterance of at most {max_duration_s} s in {sorted(keep) or 'any language'}{hint}")
    return rows


def known_language(name: str) -> str:
    """The code of a language; a name other than the six is returned unchanged."""
    try:
        return language_code(name)
    except AsrError:
        return name


def why_left_out(utterance: Utterance, languages: frozenset[str], max_duration_s: float) -> str:
    """The reason to leave out an utterance.

    Args:
        utterance: to check.
        languages: codes to keep; empty keeps all.
        max_duration_s: longest duration to keep.

    Returns:
        the reason in words; "" to keep the utterance.
    """
    if languages and utterance.language not in languages:
        return f"language {utterance.language!r} is not one of those kept, {', '.join(sorted(languages))}"
    if utterance.duration > max_duration_s:
        return f"{utterance.duration:g} s long; at most {max_duration_s:g} s are kept"
    return ""


def report(left_out: list[str], skipped: list[str] | None) -> None:
    """Appends messages about utterances left out by language or length to `skipped`; if it is None, logs one warning."""
    if skipped is not None:
        skipped += left_out
    elif left_out:
        logger.warning("utterances left out: %d, the first is %s", len(left_out), left_out[0])


def file_seconds(path: str) -> float:
    """The duration of a sound file in seconds, from its header if that has one, otherwise by decoding.

    Raises:
        AudioError: the file cannot be read.
    """
    return duration_of(path) or sum(map(len, read_blocks(path))) / SAMPLE_RATE


@dataclass(frozen=True)
class Sound:
    """Where the sound of a line is.

    Attributes:
        audio_filepath: as it is written, relative to the manifest's folder or not.
        offset: start of the part in the file, in seconds.
        duration: length of the part in seconds; None: to the end of the file.
    """

    audio_filepath: str
    offset: float
    duration: float | None


def read_sounds(text: str, name: str) -> list[Sound]:
    """Reads where the sound is from a JSONL manifest, whatever else its lines say or lack.

    Args:
        text: its content.
        name: what to call it.

    Raises:
        DataError: a line is not a JSON object, or a field is missing or wrong; the message names manifest and line.
    """
    sounds = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = _row(line)
            path = row.get("audio_filepath")
            if not isinstance(path, str) or not path:
                raise DataError(f"missing or wrong field audio_filepath: {json.dumps(path)[:60]}")
            sounds.append(Sound(path, _seconds(row, "offset") or 0.0, _seconds(row, "duration") or None))
        except DataError as error:
            raise DataError(f"{name}, line {number}: {error}") from None
    return sounds


def _row(line: str, source: str = "file") -> dict[str, Any]:
    """The fields of a line; `source` is the type of a cut's sound."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON ({getattr(error, 'msg', error)})") from None
    if not isinstance(row, dict):
        raise DataError(f"expected an object, found {type(row).__name__}")
    return _of_cut(row, source) if "recording" in row and "supervisions" in row else row


def _utterance(file: Lines, line: str) -> Utterance:
    """Parses one line; a DataError does not name file and line."""
    row = _row(line, file.source)
    language: Any = row.get("language", row.get("lang"))
    if language is None:
        language = file.language
    for name, value in (("audio_filepath", row.get("audio_filepath")), ("text", row.get("text")), ("language", language)):
        if not isinstance(value, str) or (not value and name == "audio_filepath"):
            problem = f"missing or wrong field {name}: {json.dumps(value)[:60]}"
            raise DataError(f"{problem}; each line needs {FIELDS}")
    path = os.path.abspath(os.path.join(file.place, row["audio_filepath"]))
    offset, duration = _seconds(row, "offset") or 0.0, _seconds(row, "duration")
    if not duration:
        try:
            duration = round(file_seconds(path) - offset, 3)
        except AudioError as error:
            raise DataError(f"no duration, and the file does not tell it: {error}") from None
        if duration <= 0:
            raise DataError(f"offset {offset:g} s is behind the end of {path}, at {duration + offset:g} s")
    speaker = row.get("speaker")
    return Utterance(path, row["text"], known_language(language), duration, "" if speaker is None else str(speaker), offset)


def _seconds(row: dict[str, Any], name: str) -> float | None:
    """A field in seconds; None if it is missing or null."""
    value = row.get(name)
    if value is None:
        return None
    try:
        seconds = float(value if not isinstance(value, bool) else "true")
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise DataError(f"missing or wrong field {name}: {json.dumps(value)[:60]} is no number of seconds")
    return seconds


def _of_cut(cut: dict[str, Any], kind: str) -> dict[str, Any]:
    """Converts a lhotse MonoCut to our fields: texts joined in order, language and speaker of the first supervision."""
    try:
        (source,) = cut["recording"]["sources"]
        if source["type"] != kind or len(source["channels"]) != 1:
            raise DataError("a cut of one channel of several, or of no file; save it as a mono file first")
        supervisions = sorted(cut["supervisions"], key=lambda part: part["start"])
        first = supervisions[0] if supervisions else {}
        return {
            "audio_filepath": source["source"] if kind == "file" else f"./{cut['id']}",
            "offset": cut["start"], "duration": cut["duration"],
            "text": " ".join(part["text"] for part in supervisions if part.get("text")) if supervisions else None,
            "language": first.get("language"), "speaker": first.get("speaker"),
        }  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"missing or wrong field in a lhotse cut: {error}") from None


def write_manifest(path: str | Path, rows: Iterable[Utterance]) -> None:
    """Writes a manifest atomically, with sound paths relative to its folder.

    Args:
        path: of the manifest; its folder is created if missing.
        rows: utterances; an offset of 0 is not written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as part, part.open("w", encoding="utf-8") as file:
        for row in rows:
            fields = asdict(row)
            fields["audio_filepath"] = os.path.relpath(row.audio_filepath, path.parent)
            if not row.offset:
                del fields["offset"]
            file.write(json.dumps(fields, ensure_ascii=False) + "\n")
