"""Transcripts as subtitles: cues made from segments or words, and SubRip and WebVTT, which write them down."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from .errors import AsrError
from .results import Segment, Transcript, Word

LONG_PAUSE_S = 3.0  # a longer silence between two words ends a cue, as in openai/whisper
_ARROW = re.compile(r"-{2,}>")
_ZERO_WIDTH = {"Mn", "Me", "Cf"}  # Unicode categories, here and below
_NOT_FIRST = _ZERO_WIDTH | {"Mc", "Sk", "Po", "Pe", "Pf"}  # marks and closing punctuation: no line starts with one
_NOT_LAST = {"Zs", "Cf", "Ps", "Pi"}  # space, joiners, opening punctuation: no line is broken behind one


@dataclass(frozen=True)
class SubtitleOptions:
    """How words are laid out in subtitles; names and meanings are openai/whisper's. All but the default need word times.

    Attributes:
        max_line_width: columns of a line at most, where a wide East Asian character takes two; see `display_width`.
        max_line_count: lines of a cue at most; needs max_line_width. None: a segment's words are one cue.
        max_words_per_line: words of a cue at most, which are in one line; excludes max_line_width. In Mandarin a character
            with its punctuation is a word.
        highlight_words: a cue for each word, in which it is underlined among its neighbours.

    Raises:
        AsrError: a value that is out of range, or that does not go with another.
    """

    max_line_width: int | None = None
    max_line_count: int | None = None
    max_words_per_line: int | None = None
    highlight_words: bool = False

    def __post_init__(self) -> None:
        for name in ("max_line_width", "max_line_count", "max_words_per_line"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise AsrError(f"{name} is {value}; it must be at least 1")
        if self.max_line_count and not self.max_line_width:
            raise AsrError("max_line_count has no effect without max_line_width: give both, or neither")
        if self.max_words_per_line and self.max_line_width:
            raise AsrError("max_words_per_line has no effect with max_line_width: give one of them")

    @property
    def needs_words(self) -> bool:
        """Whether any of them is chosen, so that cues are made from words."""
        return self != SubtitleOptions()

    def check_words(self, word_timestamps: bool) -> None:
        """Raises AsrError if these options need word times and there are none."""
        if self.needs_words and not word_timestamps:
            chosen = next(name for name, value in vars(self).items() if value)
            raise AsrError(f"{chosen} needs the times of words; give --word_timestamps as well")


@dataclass(frozen=True)
class Cue:
    """What is shown from one time to another.

    Attributes:
        start_ms, end_ms: milliseconds; the start lies before the end, and not before the end of the cue before.
        text: one or more lines, marked up and escaped for the format.
    """

    start_ms: int
    end_ms: int
    text: str


def cues(transcript: Transcript, options: SubtitleOptions | None = None, escape: Callable[[str], str] = str) -> list[Cue]:
    """The cues of a transcript, in order of time.

    Without options a cue is a segment. With them it is made of words: a new one starts with each segment, after
    a pause of more than 3 s, and where the one before is full.

    Args:
        transcript: its silent segments give no cue; one with text but an empty list of words is a cue by itself.
        options: None is `SubtitleOptions()`.
        escape: applied to the text, not to the markup of the current word.

    Raises:
        AsrError: the options need word times, and the transcript has none.
    """
    options = options or SubtitleOptions()
    spoken = [segment for segment in transcript.segments if segment.text]
    options.check_words(all(segment.words is not None for segment in spoken))
    return _apart([cue for segment in spoken for cue in _segment_cues(segment, options, escape)])


def srt(transcript: Transcript, options: SubtitleOptions | None = None) -> str:
    """SubRip: numbered cues. It knows no escapes, so that text is as it is.

    Raises:
        AsrError: see `cues`.
    """
    return "\n".join(
        f"{number}\n{_span(cue, ',', hours=True)}\n{cue.text}\n" for number, cue in enumerate(cues(transcript, options), 1)
    )


def vtt(transcript: Transcript, options: SubtitleOptions | None = None) -> str:
    """WebVTT, with `&` and `<` escaped.

    Raises:
        AsrError: see `cues`.
    """
    blocks = (f"{_span(cue, '.', hours=False)}\n{cue.text}\n" for cue in cues(transcript, options, _vtt_escape))
    return "\n".join(["WEBVTT\n", *blocks])


def timestamp(seconds: float, point: str = ".", hours: bool = False) -> str:
    """1.5 → "00:01.500"; with `hours`, or from an hour on, "00:00:01.500". `point` stands before the milliseconds."""
    ms = round(1000 * seconds)
    h, m, s = ms // 3_600_000, ms // 60_000 % 60, ms // 1000 % 60
    return (f"{h:02}:" if hours or h else "") + f"{m:02}:{s:02}{point}{ms % 1000:03}"


def display_width(text: str) -> int:
    """Columns that a text takes: two for wide East Asian characters, none for marks set over others, else one."""
    return sum(
        0 if unicodedata.category(character) in _ZERO_WIDTH else 2 if _is_wide(character) else 1 for character in text
    )


def _segment_cues(segment: Segment, options: SubtitleOptions, escape: Callable[[str], str]) -> Iterator[Cue]:
    words = _clean(segment.words or ()) if options.needs_words else []
    if not words:
        lines = (line.strip() for line in segment.text.splitlines())
        yield Cue(_ms(segment.start), _ms(segment.end), _without_arrows("\n".join(escape(line) for line in lines if line)))
        return
    for block in _blocks(words, options):
        plain = _block_text(block, escape)
        if options.highlight_words:
            yield from _highlights(block, plain, escape)
        else:
            yield Cue(_ms(block[0][0].start), _ms(block[-1][-1].end), plain)


def _clean(words: Iterable[Word]) -> list[Word]:
    """The words that are not empty, without space but one in front, each with what no line may part from it.

    In Mandarin, whose words are characters, that is punctuation, and the letters of a Latin word.
    """
    clean: list[Word] = []
    for word in words:
        text = " ".join(word.word.split())
        if not text:
            continue
        before = clean[-1] if clean else None
        if before and not (word.word[0].isspace() or _may_break(before.word[-1], text[0]) or _long_pause(before, word)):
            clean[-1] = replace(before, word=before.word + text, end=max(before.end, word.end))
        else:
            clean.append(replace(word, word=" " * word.word[0].isspace() + text))
    return clean


def _blocks(words: list[Word], options: SubtitleOptions) -> Iterator[list[list[Word]]]:
    """The words of a segment as lines of cues: for each cue its lines, for each line its words."""
    width = options.max_line_width
    pieces = [piece for word in words for piece in _pieces(word, width)]
    block = [[pieces[0]]]
    for before, word in itertools.pairwise(pieces):
        line = block[-1]
        fits = width is None or display_width("".join(w.word for w in [*line, word]).strip()) <= width
        full = len(line) == options.max_words_per_line or (not fits and len(block) == options.max_line_count)
        if full or _long_pause(before, word):
            yield block
            block = [[word]]
        elif fits:
            line.append(word)
        else:
            block.append([word])
    yield block


def _pieces(word: Word, width: int | None) -> list[Word]:
    """A word that is wider than a line in as many as it takes, if its script may be broken anywhere; else the word.

    The time of the word is shared out by width.
    """
    whole = display_width(word.word)
    if width is None or whole <= width:
        return [word]
    texts = [""]
    for atom in _atoms(word.word):
        if texts[-1] and display_width((texts[-1] + atom).strip()) > width:
            texts.append("")
        texts[-1] += atom
    edges = [sum(map(display_width, texts[:count])) / whole for count in range(len(texts) + 1)]
    times = [word.start + (word.end - word.start) * edge for edge in edges]
    return [replace(word, word=text, start=times[i], end=times[i + 1]) for i, text in enumerate(texts)]


def _atoms(text: str) -> list[str]:
    """The parts of a word between which a line may end."""
    atoms = [text[0]]
    for before, character in itertools.pairwise(text):
        if _may_break(before, character):
            atoms.append("")
        atoms[-1] += character
    return atoms


def _may_break(before: str, after: str) -> bool:
    """Whether a line may end between two characters without space: beside a wide one, but for punctuation."""
    parts = unicodedata.category(before) not in _NOT_LAST and unicodedata.category(after) not in _NOT_FIRST
    return parts and (_is_wide(before) or _is_wide(after))


def _long_pause(before: Word, after: Word) -> bool:
    return after.start - before.end > LONG_PAUSE_S


def _highlights(block: list[list[Word]], plain: str, escape: Callable[[str], str]) -> Iterator[Cue]:
    """A cue for each word of a block, and the plain text between words."""
    words = [word for line in block for word in line]
    last = _ms(words[0].start)
    for word in words:
        start, end = _ms(word.start), _ms(word.end)
        if start > last:
            yield Cue(last, start, plain)
        yield Cue(start, end, _block_text(block, escape, word))
        last = max(last, end)


def _block_text(block: list[list[Word]], escape: Callable[[str], str], current: Word | None = None) -> str:
    """The lines of a cue, with the current word underlined."""

    def marked(word: Word) -> str:
        space, text = " " * word.word.startswith(" "), escape(word.word.strip())
        return f"{space}<u>{text}</u>" if word is current else space + text

    return _without_arrows("\n".join("".join(map(marked, line)).strip() for line in block))


def _apart(found: list[Cue]) -> list[Cue]:
    """The cues, none of which is empty or lasts into the next: the start of the next counts, and no cue is under 1 ms."""
    apart: list[Cue] = []
    for index, cue in enumerate(found):
        start = max(cue.start_ms, apart[-1].end_ms) if apart else cue.start_ms
        end = cue.end_ms if index + 1 == len(found) else min(cue.end_ms, found[index + 1].start_ms)
        apart.append(replace(cue, start_ms=start, end_ms=max(end, start + 1)))
    return apart


def _without_arrows(text: str) -> str:
    """The text with short arrows for long ones, which would be read as the times of a cue."""
    return _ARROW.sub("->", text)


def _vtt_escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")


def _is_wide(character: str) -> bool:
    return unicodedata.east_asian_width(character) in ("W", "F")


def _ms(seconds: float) -> int:
    return round(1000 * seconds)


def _span(cue: Cue, point: str, hours: bool) -> str:
    return f"{timestamp(cue.start_ms / 1000, point, hours)} --> {timestamp(cue.end_ms / 1000, point, hours)}"
