"""Transcripts in all formats: plain text, subtitles, a table, JSON."""

from __future__ import annotations

import json
from typing import Literal, get_args

from .results import Segment, Transcript
from .subtitles import SubtitleOptions, srt, vtt


def txt(transcript: Transcript) -> str:
    """A line for each segment, as openai/whisper writes it."""
    return "".join(f"{' '.join(segment.text.split())}\n" for segment in _spoken(transcript))


def tsv(transcript: Transcript) -> str:
    """A table with a heading: start and end in ms, text."""
    rows = (f"{round(1000 * s.start)}\t{round(1000 * s.end)}\t{s.text.replace(chr(9), ' ')}\n" for s in _spoken(transcript))
    return "start\tend\ttext\n" + "".join(rows)


def to_json(transcript: Transcript, audio: str | None = None) -> str:
    """All of it in one line, as `Transcript.to_dict`; with the name of the recording, if given, under "audio"."""
    named = {} if audio is None else {"audio": audio}
    return json.dumps(named | transcript.to_dict(), ensure_ascii=False) + "\n"


Format = Literal["txt", "vtt", "srt", "tsv", "json"]
FORMATS: tuple[Format, ...] = get_args(Format)


def render(
    transcript: Transcript, output_format: str, audio: str | None = None, subtitles: SubtitleOptions | None = None
) -> str:
    """A transcript in one of FORMATS.

    Args:
        transcript: what is written.
        output_format: one of FORMATS.
        audio: the recording's name, which JSON mentions.
        subtitles: how words are laid out in "vtt" and "srt"; None is `SubtitleOptions()`: a cue is a segment.

    Raises:
        AsrError: `subtitles` needs word times, and the transcript has none.
    """
    forms = {
        "txt": lambda: txt(transcript),
        "vtt": lambda: vtt(transcript, subtitles),
        "srt": lambda: srt(transcript, subtitles),
        "tsv": lambda: tsv(transcript),
        "json": lambda: to_json(transcript, audio),
    }
    return forms[output_format]()


def _spoken(transcript: Transcript) -> list[Segment]:
    return [segment for segment in transcript.segments if segment.text]
