"""What transcription returns. Field names are those of faster-whisper; times are seconds from the start."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal


@dataclass(frozen=True)
class Word:
    """A word and when it was said.

    Attributes:
        word: the word, with the space that precedes it, if any.
        start, end: seconds.
        probability: 0 to 1.
    """

    word: str
    start: float
    end: float
    probability: float


@dataclass(frozen=True)
class Segment:
    """A stretch of speech that was transcribed at once, of at most 30 seconds.

    Attributes:
        id: its number in the transcript, from 0.
        start, end: seconds.
        text: without space at either end, never empty.
        tokens: ids in the backbone's vocabulary.
        avg_logprob: mean natural-log probability of the tokens; 0 where there are none.
        no_speech_prob: 1 less the mean probability that voice activity detection gives to its windows.
        compression_ratio: of the text, see `compression_ratio`; above 2.4 or so the text repeats itself.
        words: None where no word times were asked for.
        fallback: None; "seed" where the first text repeated itself and this one comes from another seed; "draft" where
            that did so, too, and this one is the CTC draft.
        language: its code, as the model was told or as it decided.
        decoder: what wrote the text: "denoising", or "draft" where the model's draft is its transcript.
        steps: denoising passes that it took.
        channel: of the recording, from 0; None where channels were mixed or one was chosen.
    """

    id: int
    start: float
    end: float
    text: str
    tokens: tuple[int, ...]
    avg_logprob: float
    no_speech_prob: float
    compression_ratio: float
    words: tuple[Word, ...] | None = None
    fallback: Literal["seed", "draft"] | None = None
    language: str = "en"
    decoder: Literal["denoising", "draft"] = "denoising"
    steps: int = 0
    channel: int | None = None


@dataclass(frozen=True)
class Transcript:
    """The transcript of one recording.

    Attributes:
        text: of all segments, joined as the language does; see `joiner`.
        language: code of the language, see `language_of`.
        duration: of the sound, in seconds.
        segments: in order of time.
    """

    text: str
    language: str
    duration: float
    segments: tuple[Segment, ...]

    @classmethod
    def from_segments(cls, segments: tuple[Segment, ...], language: str, duration: float) -> Transcript:
        """The transcript whose text is that of its segments, those of several channels in order of time."""
        if any(segment.channel is not None for segment in segments):
            ordered = sorted(segments, key=lambda segment: (segment.start, segment.end))
            segments = tuple(replace(segment, id=number) for number, segment in enumerate(ordered))
        text = joiner(language).join(segment.text for segment in segments if segment.text)
        return cls(text, language, duration, segments)

    def to_dict(self) -> dict[str, Any]:
        """Nested dicts and lists, ready for json.dumps."""
        return _lists(asdict(self))


def language_of(segments: Sequence[Segment], told: str) -> str:
    """The language that most of the time was spoken; what the model was told where nothing was said."""
    seconds: dict[str, float] = {}
    for segment in segments:
        seconds[segment.language] = seconds.get(segment.language, 0.0) + segment.end - segment.start
    return max(seconds, key=lambda code: seconds[code]) if seconds else told


def joiner(language: str) -> str:
    """What stands between two texts of a language, by its code: nothing in Mandarin, a space in others."""
    return "" if language == "zh" else " "


def compression_ratio(text: str) -> float:
    """UTF-8 bytes of the text over those of its zlib compression, as openai/whisper has it; 0 for no text."""
    data = text.encode("utf-8")
    return len(data) / len(zlib.compress(data))


def _lists(value: Any) -> Any:
    """The value with tuples turned to lists at every depth, which is how it would come back from JSON."""
    if isinstance(value, dict):
        return {key: _lists(item) for key, item in value.items()}
    return [_lists(item) for item in value] if isinstance(value, list | tuple) else value
