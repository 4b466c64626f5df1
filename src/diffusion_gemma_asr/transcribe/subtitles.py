"""Transcripts as subtitles: cues made from segments or words, and SubRip and WebVTT, which write them down.

Without options cues are laid out as subtitlers do: of all ways to cut the words of a stretch of speech within the limits,
the cheapest is found. A cut costs least at punctuation and pauses; nearly empty cues and such as are too quick to read cost.
"""

from __future__ import annotations

import itertools
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from ..errors import AsrError
from ..strict import option
from .results import Segment, Transcript, Word

LINE_WIDTH, WIDE_LINE_WIDTH, LINE_COUNT = 42, 32, 2  # columns of a line, and where characters take two; lines of a cue
SHORTEST_S, LONGEST_S = 1.0, 7.0  # a cue is shown
READING_SPEED = 20.0  # characters a second at most, where there is time
JOINED_S = 0.3  # segments that are no further apart are one stretch of speech, cut for the model's sake
LONG_PAUSE_S = 3.0  # a longer silence between two words ends a cue, as in openai/whisper
_ARROW = re.compile(r"-{2,}>")
_ZERO_WIDTH = {"Mn", "Me", "Cf"}  # Unicode categories, here and below
_NOT_FIRST = _ZERO_WIDTH | {"Mc", "Sk", "Po", "Pe", "Pf"}  # marks and closing punctuation: no line starts with one
_NOT_LAST = {"Zs", "Cf", "Ps", "Pi"}  # space, joiners, opening punctuation: no line is broken behind one
_CLUSTER = re.compile(r".[\u0300-\u036f\u0900-\u0903\u093a-\u094f\u200c\u200d\ufe0f]*", re.DOTALL)  # a letter and its marks
_CLOSING = "\"'”’»)]」』】）"
_SENTENCE_ENDS, _CLAUSE_ENDS = ".!?…。！？।॥", ",;:–—，；：、"


@dataclass(frozen=True)
class SubtitleOptions:
    """How words are laid out in subtitles; names and meanings are openai/whisper's.

    Without max_line_width and max_words_per_line a cue has at most two lines of 42 columns (32, that is 16 characters, where
    most characters are wide), lasts 1 to 7 s, and has at most 20 characters a second, where the words allow it. Each of the
    two fills lines and cues from the front instead.

    Raises AsrError on values that are out of range or do not go together.
    """

    max_line_width: int | None = option(
        None, "Columns of a line in srt and vtt; a wide East Asian character takes two.", min=1
    )
    max_line_count: int | None = option(
        None, "Lines of a cue in srt and vtt; two, but with --max_line_width a segment's words are one cue.", min=1
    )
    max_words_per_line: int | None = option(None, "Words of a cue in srt and vtt, which are in one line.", min=1)
    highlight_words: bool = option(False, "Underline each word in srt and vtt as it is said; needs --word_timestamps.")

    def __post_init__(self) -> None:
        for name in ("max_line_width", "max_line_count", "max_words_per_line"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise AsrError(f"{name} is {value}; it must be at least 1")
        if self.max_words_per_line and self.max_line_width:
            raise AsrError("max_words_per_line has no effect with max_line_width: give one of them")
        if self.max_words_per_line and self.max_line_count:
            raise AsrError("max_line_count has no effect with max_words_per_line, whose cues are one line: give one of them")

    def check_words(self, word_timestamps: bool) -> None:
        """Raises AsrError if these options need word times and there are none."""
        if self.highlight_words and not word_timestamps:
            raise AsrError("highlight_words needs the times of words; give --word_timestamps as well")


@dataclass(frozen=True)
class Cue:
    """What is shown from one time to another.

    Attributes:
        start_ms: milliseconds, not before the end of the cue before.
        end_ms: milliseconds, behind the start.
        text: one or more lines, marked up and escaped for the format.
    """

    start_ms: int
    end_ms: int
    text: str


_Block = list[list[Word]]  # a cue's lines, each of words


def cues(transcript: Transcript, options: SubtitleOptions | None = None, escape: Callable[[str], str] = str) -> list[Cue]:
    """The cues of a transcript, in order of time.

    Args:
        transcript: its silent segments give no cue; where words have no times, they share their segment's by width.
        options: None is `SubtitleOptions()`.
        escape: applied to the text, not to the markup of the current word.

    Returns:
        cues that do not overlap, none of them empty; together they hold all the text.

    Raises:
        AsrError: the options need word times, and the transcript has none.
    """
    options = options or SubtitleOptions()
    spoken = [segment for segment in transcript.segments if segment.text.strip()]
    options.check_words(all(segment.words is not None for segment in spoken))
    filled = bool(options.max_line_width or options.max_words_per_line)
    if filled:
        blocks = [block for segment in spoken for block in _filled(_clean(_words(segment)), options)]
    else:
        blocks = [block for words in _stretches(spoken) for block in _balanced(words, options.max_line_count or LINE_COUNT)]
    if len({segment.channel for segment in spoken}) > 1:  # people who talk at once
        blocks.sort(key=lambda block: block[0][0].start)
    if options.highlight_words:
        return _apart([cue for block in blocks for cue in _highlights(block, _block_text(block, escape), escape)])
    found = [Cue(_ms(block[0][0].start), _ms(block[-1][-1].end), _block_text(block, escape)) for block in blocks]
    return _apart(found) if filled else _readable(_apart(found), _ms(transcript.duration))


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


def _words(segment: Segment) -> Sequence[Word]:
    """The words of a segment with their times; without times, or where they are not its text, times by width."""
    text = segment.text.split()
    if segment.words and "".join("".join(word.word for word in segment.words).split()) == "".join(text):
        return segment.words
    atoms = [" " * (i > 0) * (not place) + atom for i, part in enumerate(text) for place, atom in enumerate(_atoms(part))]
    return _shared(Word("", segment.start, segment.end, 1.0), atoms)


def _stretches(segments: Sequence[Segment]) -> Iterator[list[Word]]:
    """The words of segments; those that follow each other at once, in one language and channel, are put together."""
    words: list[Word] = []
    for before, segment in zip([None, *segments], segments, strict=False):
        own = list(_words(segment))
        if before is not None and words:
            alike = (before.language, before.channel) == (segment.language, segment.channel)
            if not (alike and -0.01 <= segment.start - before.end <= JOINED_S):
                yield _clean(words)
                words = []
            elif segment.language != "zh":
                own[0] = replace(own[0], word=" " + own[0].word.lstrip())
        words += own
    if words:
        yield _clean(words)


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


def _filled(words: list[Word], options: SubtitleOptions) -> Iterator[_Block]:
    """The words of a segment as cues whose lines are filled from the front."""
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


def _balanced(words: list[Word], line_count: int) -> Iterator[_Block]:
    """The words of a stretch of speech as cues, cut where it costs least in all."""
    total = sum(map(display_width, (word.word for word in words)))
    wide = sum(2 for word in words for character in word.word if _is_wide(character))
    width = WIDE_LINE_WIDTH if 2 * wide > total else LINE_WIDTH
    pieces = [piece for word in words for piece in _pieces(word, width, anywhere=True)]
    sizes = [(display_width(piece.word), piece.word.startswith(" "), len(piece.word)) for piece in pieces]
    cuts = [_cut_cost(*pair) for pair in itertools.pairwise(pieces)] + [0.0]
    best: list[tuple[float, int]] = [(0.0, 0)] + [(math.inf, 0)] * len(pieces)  # cost of the words before, last cue's first
    for first, start in enumerate(piece.start for piece in pieces):
        lines, line, columns, characters, inside = 1, 0, 0, 0, 0.0
        for last in range(first, len(pieces)):
            columns_here, spaced, characters_here = sizes[last]
            if line and line + columns_here > width:
                lines, line = lines + 1, 0
            line += columns_here - (spaced and not line)
            if last > first:
                pause = pieces[last].start - pieces[last - 1].end
                inside += 0.5 * (cuts[last - 1] <= 0.5) + 4.0 * max(0.0, pause - 0.4)
                if lines > line_count or pieces[last].end - start > LONGEST_S or pause > LONG_PAUSE_S:
                    break
            columns, characters = columns + columns_here, characters + characters_here
            time = min(LONGEST_S, pieces[last + 1].start - start if last + 1 < len(pieces) else LONGEST_S)
            fill = columns / (width * line_count)
            cost = best[first][0] + 2.0 + cuts[last] + inside + 1.5 * (1 - min(fill, 1.0)) ** 2
            cost += 10.0 * max(0.0, SHORTEST_S - time) + 0.3 * max(0.0, characters / max(time, 0.1) - READING_SPEED)
            if cost < best[last + 1][0]:
                best[last + 1] = cost, first
    edges = [len(pieces)]
    while edges[-1]:
        edges.append(best[edges[-1]][1])
    for last, first in itertools.pairwise(edges[::-1]):
        yield _lines(pieces[last:first], width, line_count)


def _lines(words: list[Word], width: int, line_count: int) -> _Block:
    """The words of a cue in as few lines as they need, of like length, the lower ones rather the longer."""
    count = next(n for n in range(1, len(words) + 1) if n >= line_count or _fits(words, width, n))
    if count == 1:
        return [words]
    whole = display_width("".join(word.word for word in words).strip())
    choices = []
    for last in range(1, len(words)):
        upper, rest = words[:last], words[last:]
        columns = display_width("".join(word.word for word in upper).strip())
        if columns <= width and _fits(rest, width, count - 1):
            away = columns - whole / count
            choices.append((abs(away) + max(0.0, away) * 0.5 + 3.0 * _cut_cost(upper[-1], rest[0]), last))
    if not choices:  # a single word is wider than a line
        return [words]
    last = min(choices)[1]
    return [words[:last], *_lines(words[last:], width, count - 1)]


def _fits(words: Sequence[Word], width: int, count: int) -> bool:
    """Whether words find place in so many lines."""
    lines, line = 1, ""
    for word in words:
        if line and display_width((line + word.word).strip()) > width:
            lines, line = lines + 1, ""
        line += word.word
    return lines <= count


def _cut_cost(before: Word, after: Word) -> float:
    """What it costs to end a cue or line between two words: nothing behind a sentence, much behind a short word."""
    text = before.word.rstrip(_CLOSING)
    mark = text[-1:] or before.word[-1]
    if mark in _SENTENCE_ENDS:
        return 0.0
    pause = 3.0 * min(1.0, max(0.0, after.start - before.end))
    if mark in _CLAUSE_ENDS:
        return max(0.0, 1.0 - pause)
    return max(0.5, 3.0 + (not _is_wide(mark) and len(text.strip()) <= 3) - pause)


def _pieces(word: Word, width: int | None, anywhere: bool = False) -> list[Word]:
    """A word that is wider than a line in as many as it takes, if its script may be broken anywhere; else the word.

    Args:
        width: of a line; None: any word fits.
        anywhere: whether a word of any script is broken rather than left wider than a line.
    """
    if width is None or display_width(word.word) <= width:
        return [word]
    texts, atoms = [""], _atoms(word.word)
    if anywhere:
        atoms = [part for atom in atoms for part in (_CLUSTER.findall(atom) if display_width(atom) > width else [atom])]
    for atom in atoms:
        if texts[-1] and display_width((texts[-1] + atom).strip()) > width:
            texts.append("")
        texts[-1] += atom
    return _shared(word, texts)


def _shared(word: Word, texts: Sequence[str]) -> list[Word]:
    """A word in parts, among which its time is shared out by width."""
    edges = list(itertools.accumulate((display_width(text) for text in texts), initial=0))
    times = [word.start + (word.end - word.start) * edge / max(1, edges[-1]) for edge in edges]
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


def _highlights(block: _Block, plain: str, escape: Callable[[str], str]) -> Iterator[Cue]:
    """A cue for each word of a block, and the plain text between words."""
    words = [word for line in block for word in line]
    last = _ms(words[0].start)
    for word in words:
        start, end = _ms(word.start), _ms(word.end)
        if start > last:
            yield Cue(last, start, plain)
        yield Cue(start, end, _block_text(block, escape, word))
        last = max(last, end)


def _block_text(block: _Block, escape: Callable[[str], str], current: Word | None = None) -> str:
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


def _readable(found: list[Cue], end_ms: int) -> list[Cue]:
    """The cues, which last longer where there is time, for what they hold and at least 1 s, and 7 s at most."""
    held: list[Cue] = []
    for index, cue in enumerate(found):
        wanted = min(max(SHORTEST_S, len(cue.text) / READING_SPEED), LONGEST_S) * 1000
        limit = found[index + 1].start_ms if index + 1 < len(found) else max(end_ms, cue.end_ms)
        end = min(max(cue.end_ms, cue.start_ms + math.ceil(wanted)), limit, cue.start_ms + round(LONGEST_S * 1000))
        earliest = max(held[-1].end_ms if held else 0, cue.start_ms - round(SHORTEST_S * 1000))
        start = max(min(cue.start_ms, end - round(SHORTEST_S * 1000)), min(earliest, cue.start_ms))
        held.append(replace(cue, start_ms=start, end_ms=end))
    return held


def _without_arrows(text: str) -> str:
    return _ARROW.sub("->", text)  # a long one would be read as the times of a cue


def _vtt_escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")


def _is_wide(character: str) -> bool:
    return unicodedata.east_asian_width(character) in ("W", "F")


def _ms(seconds: float) -> int:
    return round(1000 * seconds)


def _span(cue: Cue, point: str, hours: bool) -> str:
    return f"{timestamp(cue.start_ms / 1000, point, hours)} --> {timestamp(cue.end_ms / 1000, point, hours)}"
