"""subtitles.py: whatever the layout, cues hold every word once and in order, and players read them back."""

from __future__ import annotations

import html
import itertools
import random
import re

import pytest
import srt
import webvtt

from diffusion_gemma_asr.errors import AsrError
from diffusion_gemma_asr.results import Segment, Transcript, Word
from diffusion_gemma_asr.subtitles import Cue, SubtitleOptions, cues, display_width
from diffusion_gemma_asr.writers import render

VOCABULARY = {
    "en": ["a", "I'm", "well", "over", "there", "&", "<b>", "x<y", "&amp;", "--", "incomprehensibilities"],
    "hi": ["नमस्ते", "दुनिया", "हिन्दी", "में", "क्षत्रिय", "है।", "स्त्री"],
    "zh": ["你好，", "世", "界。", "扩散语言模型", "Python", "“转写”", "一二三四五六七八九十一二三四五六七八九十"],
}
LAYOUTS = [
    SubtitleOptions(max_line_width=16),
    SubtitleOptions(max_line_width=16, max_line_count=1),
    SubtitleOptions(max_line_width=9, max_line_count=2),
    SubtitleOptions(max_line_width=42, max_line_count=2, highlight_words=True),
    SubtitleOptions(max_words_per_line=3),
    SubtitleOptions(max_words_per_line=1, highlight_words=True),
    SubtitleOptions(highlight_words=True),
]
BREAK = re.compile(r" |[一-鿿。，][^。，”]|[^“][一-鿿]")  # where a line may end, or have ended


def words_of(text: str, start: float = 0.0, step: float = 0.5) -> tuple[Word, ...]:
    """A word for each part, with its space except in front; each lasts `step` seconds."""
    parts = re.findall(r" ?[^ ]+", text)
    return tuple(Word(part, start + i * step, start + (i + 1) * step, 0.5) for i, part in enumerate(parts))


def segment(words: tuple[Word, ...] | None, text: str | None = None, start: float = 0.0, end: float = 30.0) -> Segment:
    text = "".join(word.word for word in words or ()).strip() if text is None else text
    return Segment(0, start, end, text, (), 0.0, 0.0, 1.0, words)


def transcript(*segments: Segment, language: str = "en") -> Transcript:
    return Transcript.from_segments(segments, language, 60.0)


def random_transcript(rng: random.Random, language: str) -> Transcript:
    """Segments, silent ones among them, of words that may last no time, overlap, or come after a long pause."""
    segments, clock = [], 0.0
    for _ in range(rng.randint(1, 4)):
        start, words = clock, []
        for index in range(rng.randint(0, 25)):
            space = "" if language == "zh" or not index else " "
            end = clock + rng.choice([0.0, 0.0004, 0.16, 0.48])
            words.append(Word(space + rng.choice(VOCABULARY[language]), clock, end, 0.5))
            clock = max(start, end + rng.choice([0.0, 0.0, 0.2, -0.1, 3.5]))
        segments.append(segment(tuple(words), None, start, clock))
    return transcript(*segments, language=language)


def shown(text: str) -> str:
    """A text without space, which lines may end in place of, and markup."""
    return "".join(text.replace("<u>", "").replace("</u>", "").split())


def said(found: list[Cue], highlighted: bool) -> list[str]:
    """The texts of cues; or, of those that highlight, the words that they underline."""
    if not highlighted:
        return [cue.text for cue in found]
    return [match[1] for cue in found if (match := re.search(r"<u>(.*)</u>", cue.text))]


@pytest.mark.parametrize("language", VOCABULARY)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_random_transcripts(language: str, layout: SubtitleOptions) -> None:
    rng = random.Random(0)
    for _ in range(30):
        told = random_transcript(rng, language)
        spoken = [word for part in told.segments for word in part.words or ()]
        found = cues(told, layout)

        # every word is there once and in order
        texts = said(found, layout.highlight_words)
        assert shown("".join(texts)) == shown("".join(word.word for word in spoken))

        # lines are as narrow, and cues as short, as asked
        for line in (line for cue in found for line in cue.text.replace("<u>", "").replace("</u>", "").split("\n")):
            assert line and line == line.strip()
            assert display_width(line) <= (layout.max_line_width or 1000) or not BREAK.search(line)
            assert layout.max_words_per_line is None or line.count(" ") < layout.max_words_per_line
        assert all(cue.text.count("\n") < (layout.max_line_count or 1000) for cue in found)

        # times grow, and none is shown when another is
        assert all(cue.start_ms < cue.end_ms for cue in found)
        assert all(one.end_ms <= two.start_ms for one, two in itertools.pairwise(found))

        # players read the same
        read = list(srt.parse(render(told, "srt", subtitles=layout), ignore_errors=False))
        assert [cue.content for cue in read] == [cue.text for cue in found]
        assert [round(cue.start.total_seconds() * 1000) for cue in read] == [cue.start_ms for cue in found]
        assert [round(cue.end.total_seconds() * 1000) for cue in read] == [cue.end_ms for cue in found]
        web = list(webvtt.from_string(render(told, "vtt", subtitles=layout)))
        plain = [re.sub("</?u>", "", cue.text) for cue in found]
        assert [html.unescape(caption.text) for caption in web] == plain
        assert [caption.start_time.in_milliseconds() for caption in web] == [cue.start_ms for cue in found]


def test_lines_are_filled_and_cues_follow() -> None:
    told = transcript(segment(words_of("the quick brown fox jumps over the lazy dog")))
    (cue,) = cues(told, SubtitleOptions(max_line_width=15))
    assert cue == Cue(0, 4500, "the quick brown\nfox jumps over\nthe lazy dog")
    two = cues(told, SubtitleOptions(max_line_width=15, max_line_count=2))
    assert two == [Cue(0, 3000, "the quick brown\nfox jumps over"), Cue(3000, 4500, "the lazy dog")]
    few = cues(told, SubtitleOptions(max_words_per_line=4))
    assert [cue.text for cue in few] == ["the quick brown fox", "jumps over the lazy", "dog"]


def test_a_long_word_stands_alone() -> None:
    told = transcript(segment(words_of("an incomprehensible word")))
    assert cues(told, SubtitleOptions(max_line_width=7))[0].text == "an\nincomprehensible\nword"


def test_a_long_chinese_run_is_broken_and_its_time_shared_out() -> None:
    told = transcript(segment((Word("扩散语言模型。", 1.0, 2.4, 0.5),)), language="zh")
    found = cues(told, SubtitleOptions(max_line_width=8, max_line_count=1))
    assert found == [Cue(1000, 1800, "扩散语言"), Cue(1800, 2400, "模型。")]
    narrow = cues(told, SubtitleOptions(max_line_width=1))
    assert narrow[0].text == "扩\n散\n语\n言\n模\n型。"


@pytest.mark.parametrize(
    "layout", [{"max_line_width": 99}, {"max_line_width": 99, "max_line_count": 2}, {"max_words_per_line": 9}]
)
def test_no_cue_spans_a_long_pause_or_two_segments(layout: dict[str, int]) -> None:
    told = transcript(
        segment((Word("one", 0.0, 1.0, 0.5), Word(" two", 4.0, 5.0, 0.5), Word(" three", 8.1, 9.0, 0.5))),
        segment((Word("four", 9.0, 9.5, 0.5),)),
    )
    assert cues(told, SubtitleOptions(**layout)) == [  # type: ignore[arg-type]
        Cue(0, 5000, "one two"), Cue(8100, 9000, "three"), Cue(9000, 9500, "four")
    ]  # fmt: skip


def test_the_word_that_is_said_is_underlined() -> None:
    words = (Word("well", 1.0, 1.5, 0.5), Word(" A&B", 1.5, 2.0, 0.5), Word(" no", 2.2, 3.0, 0.5))
    told = transcript(segment(words))
    assert cues(told, SubtitleOptions(highlight_words=True)) == [
        Cue(1000, 1500, "<u>well</u> A&B no"),
        Cue(1500, 2000, "well <u>A&B</u> no"),
        Cue(2000, 2200, "well A&B no"),
        Cue(2200, 3000, "well A&B <u>no</u>"),
    ]
    assert "\nwell <u>A&amp;B</u> no\n" in render(told, "vtt", subtitles=SubtitleOptions(highlight_words=True))


def test_without_options_a_segment_is_a_cue() -> None:
    told = transcript(segment(words_of("good morning", 2.0), start=1.0, end=5.0))
    assert cues(told) == cues(told, SubtitleOptions()) == [Cue(1000, 5000, "good morning")]


def test_text_without_words_is_not_lost() -> None:
    told = transcript(segment((), "unaligned", 0.0, 2.0), segment(None, "", 2.0, 3.0), segment(words_of("good", 3.0)))
    assert [cue.text for cue in cues(told, SubtitleOptions(max_line_width=20))] == ["unaligned", "good"]


@pytest.mark.parametrize("text", ["a --> b", "a ---> b", "a ------> b"])
def test_arrows_do_not_end_a_cue(text: str) -> None:
    for told in (
        transcript(segment(words_of(text))),
        transcript(segment((Word("a --", 0, 1, 1.0), Word("> b", 1, 2, 1.0)))),
    ):
        for options in (SubtitleOptions(), SubtitleOptions(max_line_width=40)):
            (cue,) = srt.parse(render(told, "srt", subtitles=options), ignore_errors=False)
            (caption,) = webvtt.from_string(render(told, "vtt", subtitles=options))
            assert cue.content == caption.text == "a -> b"


def test_segments_that_overlap_are_told_apart() -> None:
    told = transcript(segment(None, "a", 0.0, 2.0), segment(None, "b", 1.0, 1.0), segment(None, "c", 1.0, 3.0))
    assert cues(told) == [Cue(0, 1000, "a"), Cue(1000, 1001, "b"), Cue(1001, 3000, "c")]


def test_display_width() -> None:
    assert [display_width(text) for text in ("", "abc", "é", "e\u0301", "你好", "，", "हिन्दी")] == [0, 3, 1, 1, 4, 2, 5]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_line_width": 0}, "max_line_width is 0; it must be at least 1"),
        ({"max_line_width": 9, "max_line_count": -1}, "max_line_count is -1"),
        ({"max_words_per_line": 0}, "max_words_per_line is 0"),
        ({"max_line_count": 2}, "max_line_count has no effect without max_line_width"),
        ({"max_line_width": 9, "max_words_per_line": 2}, "max_words_per_line has no effect with max_line_width"),
    ],
)
def test_impossible_options(values: dict[str, int], message: str) -> None:
    with pytest.raises(AsrError, match=message):
        SubtitleOptions(**values)  # type: ignore[arg-type]


def test_chinese_characters_keep_their_punctuation_and_latin_words_their_letters() -> None:
    words = tuple(Word(c, float(i), i + 1.0, 0.5) for i, c in enumerate("你好，“我”用GPU。"))
    told = transcript(segment(words), language="zh")
    assert cues(told, SubtitleOptions(max_line_width=4))[0].text == "你\n好，\n“我”\n用\nGPU。"
    few = cues(told, SubtitleOptions(max_words_per_line=2))
    assert few == [Cue(0, 3000, "你好，"), Cue(3000, 7000, "“我”用"), Cue(7000, 11000, "GPU。")]
    said = [cue.text for cue in cues(told, SubtitleOptions(highlight_words=True))]
    assert said[1:3] == ["你<u>好，</u>“我”用GPU。", "你好，<u>“我”</u>用GPU。"]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_options_need_word_times(layout: SubtitleOptions) -> None:
    told = transcript(segment(None, "good morning"))
    for form in ("srt", "vtt"):
        with pytest.raises(AsrError, match=r"(max_\w+|highlight_words) needs the times of words; give --word_timestamps"):
            render(told, form, subtitles=layout)
    assert render(told, "txt", subtitles=layout) == "good morning\n"
    layout.check_words(True)
    SubtitleOptions().check_words(False)
