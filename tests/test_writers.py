"""writers.py: what other programs read back is what was transcribed."""

from __future__ import annotations

import csv
import html
import io
import json

import pytest
import srt
import webvtt

from diffusion_gemma_asr.transcribe.results import Segment, Transcript, Word, joiner
from diffusion_gemma_asr.transcribe.subtitles import timestamp
from diffusion_gemma_asr.transcribe.writers import FORMATS, render

TEXTS = ["नमस्ते दुनिया", "", "你好世界", "a --> b\n\nc", "ends late"]
TIMES = [(0.0, 1.25), (1.25, 2.0), (57.5, 59.9996), (3596.5, 3599.9), (3601.1, 3605.4)]


def transcript() -> Transcript:
    segments = [
        Segment(i, start, end, text, (1, 2), -0.5, 0.0 if text else 1.0, 1.0)
        for i, (text, (start, end)) in enumerate(zip(TEXTS, TIMES, strict=True))
    ]
    return Transcript.from_segments(tuple(segments), "hi", 3605.4)


def test_subrip_is_read_back() -> None:
    cues = list(srt.parse(render(transcript(), "srt"), ignore_errors=False))
    assert [cue.index for cue in cues] == [1, 2, 3, 4]
    assert [cue.content for cue in cues] == ["नमस्ते दुनिया", "你好世界", "a -> b c", "ends late"]
    spans = [(cue.start.total_seconds(), cue.end.total_seconds()) for cue in cues]
    assert spans == [(0.0, 1.25), (57.5, 60.0), (3596.5, 3599.9), (3601.1, 3605.4)]


def test_webvtt_is_read_back() -> None:
    cues = list(webvtt.from_string(render(transcript(), "vtt")))
    assert [cue.text for cue in cues] == ["नमस्ते दुनिया", "你好世界", "a -> b c", "ends late"]
    assert [(cue.start, cue.end) for cue in cues][-2:] == [
        ("00:59:56.500", "00:59:59.900"),
        ("01:00:01.100", "01:00:05.400"),
    ]


def test_tables_and_json_are_read_back() -> None:
    rows = list(csv.DictReader(io.StringIO(render(transcript(), "tsv")), delimiter="\t", quoting=csv.QUOTE_NONE))
    assert rows[0] == {"start": "0", "end": "1250", "text": "नमस्ते दुनिया"}
    assert json.loads(render(transcript(), "json")) == transcript().to_dict()
    assert json.loads(render(transcript(), "json", "a.wav")) == {"audio": "a.wav"} | transcript().to_dict()
    assert render(transcript(), "txt").splitlines() == ["नमस्ते दुनिया", "你好世界", "a --> b c", "ends late"]


def test_words_are_in_json_as_lists_of_objects() -> None:
    words = (Word("a", 0.0, 0.5, 0.9), Word(" b", 0.5, 1.0, 0.8))
    spoken = Transcript.from_segments((Segment(0, 0.0, 1.0, "a b", (1,), -0.5, 0.0, 1.0, words),), "en", 1.0)
    content = json.loads(render(spoken, "json"))
    assert content == spoken.to_dict()
    assert content["segments"][0]["words"][1] == {"word": " b", "start": 0.5, "end": 1.0, "probability": 0.8}


@pytest.mark.parametrize("text", ["AT&T", "a < b > c", "<i>so</i>", "&lt; is &amp;lt;"])
def test_webvtt_is_escaped_and_subrip_is_not(text: str) -> None:
    spoken = Transcript.from_segments((Segment(0, 0.0, 1.0, text, (), 0.0, 0.0, 1.0),), "en", 1.0)
    (caption,) = webvtt.from_string(render(spoken, "vtt"))
    assert "<" not in caption.raw_text and html.unescape(caption.text) == text
    (cue,) = srt.parse(render(spoken, "srt"), ignore_errors=False)
    assert cue.content == text


def test_texts_are_joined_as_the_language_does() -> None:
    segments = tuple(Segment(i, i, i + 1.0, text, (), 0.0, 0.0, 1.0) for i, text in enumerate(["你好。", "", "世界"]))
    assert Transcript.from_segments(segments, "zh", 3.0).text == "你好。世界"
    assert [joiner(language) for language in ("en", "de", "fr", "es", "hi", "zh")] == [" "] * 5 + [""]


def test_silence_gives_files_without_cues() -> None:
    silent = Transcript.from_segments((), "en", 3.0)
    assert [render(silent, form) for form in FORMATS[:4]] == ["", "WEBVTT\n", "", "start\tend\ttext\n"]


def test_timestamps() -> None:
    assert timestamp(0.0) == "00:00.000" and timestamp(59.9996) == "01:00.000"
    assert timestamp(3661.5) == "01:01:01.500" and timestamp(1.5, ",", hours=True) == "00:00:01,500"
