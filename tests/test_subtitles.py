"""subtitles.py: whatever the layout, cues hold every word once and in order, and players read them back."""

from __future__ import annotations

import html
import itertools
import random
import re
from dataclasses import dataclass, replace

import pytest
import srt
import webvtt

from diffusion_gemma_asr.errors import AsrError
from diffusion_gemma_asr.transcribe.results import Segment, Transcript, Word
from diffusion_gemma_asr.transcribe.subtitles import Cue, SubtitleOptions, cues, display_width
from diffusion_gemma_asr.transcribe.writers import render

VOCABULARY = {
    "en": ["a", "I'm", "well", "over", "there", "&", "<b>", "x<y", "&amp;", "--", "incomprehensibilities"],
    "hi": ["नमस्ते", "दुनिया", "हिन्दी", "में", "क्षत्रिय", "है।", "स्त्री"],
    "zh": ["你好，", "世", "界。", "扩散语言模型", "Python", "“转写”", "一二三四五六七八九十一二三四五六七八九十"],
}
LAYOUTS = [
    SubtitleOptions(),
    SubtitleOptions(max_line_count=1),
    SubtitleOptions(max_line_count=3, highlight_words=True),
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
        of_old = layout.max_line_width or layout.max_words_per_line
        for line in (line for cue in found for line in cue.text.replace("<u>", "").replace("</u>", "").split("\n")):
            assert line and line == line.strip()
            assert display_width(line) <= (layout.max_line_width or 1000) or not BREAK.search(line)
            assert of_old or display_width(line) <= 42
            assert layout.max_words_per_line is None or line.count(" ") < layout.max_words_per_line
        assert all(cue.text.count("\n") < (layout.max_line_count or (1000 if of_old else 2)) for cue in found)

        # times grow, and none is shown when another is
        assert all(cue.start_ms < cue.end_ms for cue in found)
        assert all(one.end_ms <= two.start_ms for one, two in itertools.pairwise(found))

        # and by default it is shown for 1 to 7 s, but where the next comes too soon
        if not (of_old or layout.highlight_words):
            starts = [cue.start_ms for cue in found[1:]] + [60_000]
            ends = [0] + [cue.end_ms for cue in found[:-1]]
            for cue, before, after in zip(found, ends, starts, strict=True):
                assert cue.end_ms - cue.start_ms <= 7000
                assert cue.end_ms - cue.start_ms >= min(1000, after - before)

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
    told = transcript(segment(None, "a", 0.0, 2.0), segment(None, "b", 1.0, 1.5), segment(None, "c", 1.0, 3.0))
    for options in (SubtitleOptions(), SubtitleOptions(max_line_width=9)):
        assert cues(told, options) == [Cue(0, 1000, "a"), Cue(1000, 1001, "b"), Cue(1001, 3000, "c")]


def test_display_width() -> None:
    assert [display_width(text) for text in ("", "abc", "é", "e\u0301", "你好", "，", "हिन्दी")] == [0, 3, 1, 1, 4, 2, 5]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_line_width": 0}, "max_line_width is 0; it must be at least 1"),
        ({"max_line_width": 9, "max_line_count": -1}, "max_line_count is -1"),
        ({"max_words_per_line": 0}, "max_words_per_line is 0"),
        ({"max_line_count": 2, "max_words_per_line": 2}, "max_line_count has no effect with max_words_per_line"),
        ({"max_line_width": 9, "max_words_per_line": 2}, "max_words_per_line has no effect with max_line_width"),
    ],
)
def test_impossible_options(values: dict[str, int], message: str) -> None:
    with pytest.raises(AsrError, match=message):
        SubtitleOptions(**values)  # type: ignore[arg-type]


def test_chinese_characters_keep_their_punctuation_and_latin_words_their_letters() -> None:
    words = tuple(Word(c, i / 2, i / 2 + 0.5, 0.5) for i, c in enumerate("你好，“我”用GPU。"))
    told = transcript(segment(words), language="zh")
    assert cues(told, SubtitleOptions(max_line_width=4))[0].text == "你\n好，\n“我”\n用\nGPU。"
    few = cues(told, SubtitleOptions(max_words_per_line=2))
    assert few == [Cue(0, 1500, "你好，"), Cue(1500, 3500, "“我”用"), Cue(3500, 5500, "GPU。")]
    said = [cue.text for cue in cues(told, SubtitleOptions(highlight_words=True))]
    assert said[1:3] == ["你<u>好，</u>“我”用GPU。", "你好，<u>“我”</u>用GPU。"]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_only_what_marks_words_needs_their_times(layout: SubtitleOptions) -> None:
    told = transcript(segment(None, "good morning to you", 1.0, 5.0))
    for form in ("srt", "vtt"):
        if layout.highlight_words:
            with pytest.raises(
                AsrError, match=r"^highlight_words needs the times of words; give --word_timestamps as well$"
            ):
                render(told, form, subtitles=layout)
        else:
            found = cues(told, layout)
            assert shown("".join(cue.text for cue in found)) == "goodmorningtoyou" and found[0].start_ms == 1000
            assert all(cue.text in render(told, form, subtitles=layout) for cue in found)
    assert render(told, "txt", subtitles=layout) == "good morning to you\n"
    layout.check_words(True)
    SubtitleOptions().check_words(False)


# -- cues as a subtitler makes them ------------------------------------------------------------------------------------

ENGLISH = (
    "When the sunlight strikes raindrops in the air, they act as a prism and form a rainbow. The rainbow is a division of "
    "white light into many beautiful colors. These take the shape of a long round arch, with its path high above, and its "
    "two ends apparently beyond the horizon. There is, according to legend, a boiling pot of gold at one end. People look, "
    "but no one ever finds it. When a man looks for something beyond his reach, his friends say he is looking for the pot "
    "of gold at the end of the rainbow."
)
PLAIN = re.sub(r"[.,]", "", ENGLISH).lower()
MANDARIN = (
    "当阳光照射到空中的雨滴时，它们就像棱镜一样形成彩虹。彩虹是白光分解成许多美丽的颜色。"
    "这些颜色呈长长的圆弧形，路径高高在上，两端显然在地平线之外。"
)


def spoken(text: str, speed: float, start: float = 0.0, pauses: dict[str, float] | None = None) -> Segment:
    """A segment with word times at so many characters a second, and pauses behind some words."""
    words, clock = [], start
    for part in re.findall(r" ?[^ ]+", text) if " " in text else text:
        words.append(Word(part, clock, clock + len(part) / speed, 0.9))
        clock += len(part) / speed + (pauses or {}).get(part.strip(), 0.0)
    return segment(tuple(words), text, start, words[-1].end)


TALKS = {
    "punctuated": spoken(ENGLISH, 16),
    "plain words": spoken(PLAIN, 16),
    "no word times": segment(None, PLAIN, 0.0, 29.0),
    "no words": segment((), ENGLISH, 0.0, 29.0),
    "words of another text": segment(words_of("something else"), ENGLISH, 0.0, 29.0),
    "Mandarin": spoken(MANDARIN, 4),
    "Mandarin without word times": segment(None, re.sub("[，。]", "", MANDARIN), 0.0, 20.0),
    "slow": spoken(ENGLISH, 5),
    "one long word": segment(None, "ha" * 150, 0.0, 28.0),
    "Hindi": segment(
        None, "जब सूरज की रोशनी हवा में बारिश की बूंदों से टकराती है, तो वे एक प्रिज्म की तरह काम करती हैं। " * 4, 0.0, 26.0
    ),
    "a long address": segment(None, "扩散语言模型 https://example.org/" + "a-very-long-path/" * 6 + " 在这里", 0.0, 12.0),
}


@pytest.mark.parametrize("talk", TALKS)
def test_by_default_cues_can_be_read(talk: str) -> None:
    said = TALKS[talk]
    found = cues(transcript(said))
    width = 32 if talk.startswith("Mandarin") else 42
    assert shown("".join(cue.text for cue in found)) == shown(said.text)
    assert len(found) >= 3
    for cue in found:
        seconds = (cue.end_ms - cue.start_ms) / 1000
        assert 1.0 <= seconds <= 7.0
        assert len(cue.text) / seconds <= 20.0
        lines = cue.text.split("\n")
        assert len(lines) <= 2 and all(0 < display_width(line) <= width for line in lines)
        if len(lines) == 2 and talk not in ("one long word", "a long address"):
            assert max(map(display_width, lines)) <= 2.2 * min(map(display_width, lines))  # balanced
            assert sum(map(display_width, lines)) > width  # and not broken without need
    assert all(one.end_ms <= two.start_ms for one, two in itertools.pairwise(found))


def test_cues_end_at_punctuation_where_there_is_some() -> None:
    found = cues(transcript(spoken(ENGLISH, 16, pauses={"air,": 0.3})))
    assert sum(cue.text[-1] in ".," for cue in found) >= 0.8 * len(found)
    assert found[0].text.replace("\n", " ") == "When the sunlight strikes raindrops in the air,"
    chinese = cues(transcript(spoken(MANDARIN, 4)))
    assert [cue.text[-1] in "，。" for cue in chinese] == [True] * 3


def test_cues_end_at_pauses_where_there_is_nothing_else() -> None:
    pauses = dict.fromkeys(["raindrops", "prism", "division", "beautiful"], 1.2)
    found = cues(transcript(spoken(PLAIN, 16, pauses=pauses)))
    ends = {cue.text.split()[-1] for cue in found}
    assert set(pauses) <= ends


def test_text_that_takes_no_columns_is_a_cue() -> None:
    for options in (SubtitleOptions(), SubtitleOptions(max_line_width=9)):
        assert [cue.text for cue in cues(transcript(segment(None, "\u200b", 0.0, 2.0)), options)] == ["\u200b"]


def test_no_cue_spans_a_long_silence() -> None:
    found = cues(transcript(spoken("one two three four", 8, pauses={"two": 3.1})))
    assert [cue.text for cue in found] == ["one two", "three four"]


def test_a_short_cue_stays_for_a_second_if_nothing_follows() -> None:
    def at(*times: tuple[float, float]) -> list[tuple[int, int]]:
        told = Transcript.from_segments(tuple(segment(None, "yes", *time) for time in times), "en", 10.0)
        return [(cue.start_ms, cue.end_ms) for cue in cues(told)]

    assert at((2.0, 2.3)) == [(2000, 3000)]
    assert at((2.0, 2.3), (2.7, 4.0)) == [(1700, 2700), (2700, 4000)]  # shown earlier rather than later
    assert at((9.7, 9.9)) == [(9000, 10_000)]  # not longer than the recording
    assert at((2.0, 2.3), (2.8, 3.1), (3.6, 5.0)) == [(1800, 2800), (2800, 3600), (3600, 5000)]


def test_fast_speech_is_shown_for_longer_where_a_pause_follows() -> None:
    told = transcript(spoken("this was said much faster than anybody reads", 40), segment(None, "yes", 8.0, 9.5))
    assert cues(told)[0] == Cue(0, 2200, "this was said much\nfaster than anybody reads")  # 44 characters


def test_segments_that_follow_at_once_are_one_stretch_of_speech() -> None:
    first, second = "it was cut in the middle of what", "was said"
    told = transcript(segment(None, first, 0.0, 3.0), segment(None, second, 3.0, 3.6))
    assert [cue.text.split() for cue in cues(told)] == [[*first.split(), *second.split()]]
    apart = transcript(segment(None, first, 0.0, 3.0), segment(None, second, 3.6, 4.6))
    assert [cue.text for cue in cues(apart)] == [first, second]
    french = replace(segment(None, second, 3.0, 4.6), language="fr")
    assert [cue.text for cue in cues(transcript(segment(None, first, 0.0, 3.0), french))] == [first, second]
    chinese = [
        replace(segment(None, text, start, start + 1), language="zh") for start, text in enumerate(("扩散", "语言模型"))
    ]
    assert [cue.text for cue in cues(transcript(*chinese, language="zh"))] == ["扩散语言模型"]


def test_people_who_talk_at_once_on_two_channels_take_turns() -> None:
    @dataclass(frozen=True)
    class OnChannel(Segment):
        channel: str = ""

    def on(channel: str, text: str, start: float, end: float) -> Segment:
        return OnChannel(0, start, end, text, (), 0.0, 0.0, 1.0, channel=channel)

    left, right = on("left", ENGLISH[:87], 0.0, 6.0), on("right", "yes of course", 2.0, 3.0)
    found = cues(transcript(left, right, on("left", "and so on", 6.0, 7.0)))
    assert [cue.start_ms for cue in found] == sorted(cue.start_ms for cue in found)
    assert all(one.end_ms <= two.start_ms for one, two in itertools.pairwise(found))
    assert "yes of course" in [cue.text for cue in found]
    assert all(cue.end_ms - cue.start_ms >= 1000 for cue in found)
    assert [cue.text for cue in cues(transcript(on("left", "one", 0.0, 1.0), on("right", "two", 1.0, 2.0)))] == [
        "one",
        "two",
    ]


def test_options_override_the_default() -> None:
    told = transcript(spoken(ENGLISH, 16))
    one = cues(told, SubtitleOptions(max_line_count=1))
    assert all("\n" not in cue.text and display_width(cue.text) <= 42 for cue in one) and len(one) > 10
    three = cues(told, SubtitleOptions(max_line_count=3))
    assert max(cue.text.count("\n") for cue in three) == 2 and len(three) < len(cues(told))
    wide = cues(told, SubtitleOptions(max_line_width=60, max_line_count=1))
    assert max(display_width(cue.text) for cue in wide) > 50
    marked = cues(told, SubtitleOptions(highlight_words=True))
    plain = dict.fromkeys(re.sub("</?u>", "", cue.text) for cue in marked)
    assert list(plain) == [cue.text for cue in cues(told)]
