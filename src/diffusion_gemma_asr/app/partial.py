"""What an interrupted run leaves for the next one: the segments of a recording that is not done, beside its outputs."""

from __future__ import annotations

import hashlib
import json
import math
import os
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..errors import __version__
from ..transcribe.recordings import TranscribeOptions
from ..transcribe.results import Segment, Word

NAME_BYTES = 200  # of a recording's name at most: file systems take 255 for a file's


class Partial:
    """A hidden file of segments, a line each, which grows while a recording is transcribed.

    Its first line says what they are segments of: this recording, unchanged, by this model with these options. Segments of
    anything else are dropped.

    Args:
        output: one of the recording's outputs, beside which the file lies.
        recording: a regular file.
        options: with which it is transcribed.
        loaded: which model transcribes it, and how it was loaded.
    """

    def __init__(self, output: Path, recording: Path, options: TranscribeOptions, loaded: object):
        stem = os.fsdecode(os.fsencode(output.stem)[:NAME_BYTES])
        self._path = output.with_name(f".{stem}.partial.jsonl")
        state = recording.stat()
        identity = (str(recording.absolute()), state.st_size, state.st_mtime_ns, options, loaded, __version__)
        self._head = json.dumps({"segments_of": hashlib.sha256(repr(identity).encode("utf-8", "replace")).hexdigest()})
        self._kept = False  # the file holds this recording's segments

    def read(self) -> list[Segment]:
        """The segments that are there; none where the recording, the model or the options are others."""
        try:
            head, *lines = self._path.read_text(encoding="utf-8").split("\n")[:-1]  # a kill may have cut the last one
            segments = [_segment(json.loads(line)) for line in lines] if head == self._head else []
        except (OSError, ValueError, TypeError, KeyError):  # not there, or not ours
            return []
        self._kept = head == self._head
        return segments

    def keep(self, segments: list[Segment]) -> None:
        """Keeps these in place of those that are there."""
        self._kept = False
        for segment in segments:
            self.add(segment)

    def add(self, segment: Segment) -> None:
        """Keeps one more; where that is not possible, an interruption will lose it."""
        with suppress(OSError), self._path.open("a" if self._kept else "w", encoding="utf-8") as file:
            if not self._kept:
                file.write(self._head + "\n")
                self._kept = True
            file.write(json.dumps(asdict(segment), ensure_ascii=False) + "\n")

    def remove(self) -> None:
        """For when the recording is done."""
        with suppress(OSError):
            self._path.unlink(missing_ok=True)


def rest(options: TranscribeOptions, segments: list[Segment]) -> tuple[TranscribeOptions, list[Segment]]:
    """How to go on behind segments of a recording.

    Args:
        options: for all of it.
        segments: the first ones, in order of time.

    Returns:
        options for what follows, and the segments that stay. The last one does not where nothing follows it, since
        there is no such clip: it is transcribed once more. Of several channels those stay behind which all channels can be
        cut: what was said meanwhile on another one may not be there yet.
    """
    if any(segment.channel is not None for segment in segments):
        cuts = (n for n in reversed(range(len(segments))) if all(s.end <= segments[n].start for s in segments[:n]))
        segments = segments[: next(cuts)]
    while segments:
        done_s = max(segment.end for segment in segments)
        clips = [(max(start, done_s), end) for start, end in options.clips() or ((0.0, math.inf),) if end > done_s]
        if clips:
            times = tuple(time for clip in clips for time in clip if math.isfinite(time))
            return replace(options, clip_timestamps=times), segments
        segments = segments[:-1]
    return options, segments


def _segment(content: dict[str, Any]) -> Segment:
    words = content["words"]
    return Segment(
        **content
        | {"tokens": tuple(content["tokens"]), "words": None if words is None else tuple(Word(**word) for word in words)}
    )
