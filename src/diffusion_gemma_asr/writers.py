"""Transcripts as text: plain, subtitles (SubRip, WebVTT), a table, JSON; and as files that are whole or not there."""

from __future__ import annotations

import json
import os
from pathlib import Path

from .errors import AsrError
from .results import Segment, Transcript


def txt(transcript: Transcript) -> str:
    """The text in one line."""
    return transcript.text + "\n"


def srt(transcript: Transcript) -> str:
    """SubRip: numbered cues."""
    cues = (f"{i}\n{_span(s, ',', hours=True)}\n{_cue_text(s)}\n" for i, s in enumerate(_spoken(transcript), 1))
    return "\n".join(cues)


def vtt(transcript: Transcript) -> str:
    """WebVTT."""
    return "\n".join(["WEBVTT\n", *(f"{_span(s, '.', hours=False)}\n{_cue_text(s)}\n" for s in _spoken(transcript))])


def tsv(transcript: Transcript) -> str:
    """A table with a heading: start and end in ms, text."""
    rows = (f"{round(1000 * s.start)}\t{round(1000 * s.end)}\t{s.text.replace(chr(9), ' ')}\n" for s in _spoken(transcript))
    return "start\tend\ttext\n" + "".join(rows)


def to_json(transcript: Transcript, audio: str | None = None) -> str:
    """All of it in one line, as `Transcript.to_dict`; with the name of the recording, if given, under "audio"."""
    named = {} if audio is None else {"audio": audio}
    return json.dumps(named | transcript.to_dict(), ensure_ascii=False) + "\n"


FORMATS = ("txt", "vtt", "srt", "tsv", "json")


def render(transcript: Transcript, output_format: str, audio: str | None = None) -> str:
    """A transcript in one of FORMATS; `audio` is the recording's name, which JSON mentions."""
    if output_format == "json":
        return to_json(transcript, audio)
    return {"txt": txt, "vtt": vtt, "srt": srt, "tsv": tsv}[output_format](transcript)


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that it is never seen half-written: beside its place, then moved there.

    Raises:
        AsrError: it cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise AsrError(f"{path}: cannot be written ({error.strerror}); see --output_dir") from None


def _spoken(transcript: Transcript) -> list[Segment]:
    return [segment for segment in transcript.segments if segment.text]


def _cue_text(segment: Segment) -> str:
    """The text without what would end a cue: an arrow, an empty line."""
    lines = (line.strip() for line in segment.text.replace("-->", "->").splitlines())
    return "\n".join(line for line in lines if line)


def _span(segment: Segment, point: str, hours: bool) -> str:
    return f"{timestamp(segment.start, point, hours)} --> {timestamp(segment.end, point, hours)}"


def timestamp(seconds: float, point: str = ".", hours: bool = False) -> str:
    """1.5 → "00:01.500"; with `hours`, or from an hour on, "00:00:01.500". `point` stands before the milliseconds."""
    ms = round(1000 * seconds)
    h, m, s = ms // 3_600_000, ms // 60_000 % 60, ms // 1000 % 60
    return (f"{h:02}:" if hours or h else "") + f"{m:02}:{s:02}{point}{ms % 1000:03}"
