from __future__ import annotations

import json
import zlib

import pytest

from diffusion_gemma_asr.transcribe.results import Segment, Transcript, Word, compression_ratio


def segment(index: int, text: str, words: tuple[Word, ...] | None = None) -> Segment:
    return Segment(
        id=index,
        start=30.0 * index,
        end=30.0 * (index + 1),
        text=text,
        tokens=(1, 2),
        avg_logprob=-0.5,
        no_speech_prob=0.0,
        compression_ratio=compression_ratio(text),
        words=words,
    )


def test_text_is_that_of_the_segments_without_the_silent_ones() -> None:
    segments = (segment(0, "good morning."), segment(1, ""), segment(2, "good night."))
    assert Transcript.from_segments(segments, "en", 90.0).text == "good morning. good night."
    assert Transcript.from_segments((segment(0, ""),), "en", 30.0).text == ""


def test_to_dict_is_what_json_gives_back() -> None:
    words = (Word(" good", 0.1, 0.4, 0.9), Word(" morning", 0.4, 1.0, 0.8))
    transcript = Transcript.from_segments((segment(0, "good morning", words), segment(1, "ü")), "en", 60.0)
    content = transcript.to_dict()
    assert json.loads(json.dumps(content)) == content
    assert content["text"] == "good morning ü"
    assert content["segments"][0]["words"][1] == {
        "word": " morning",
        "start": 0.4,
        "end": 1.0,
        "probability": 0.8,
    }
    assert content["segments"][1]["words"] is None


def test_compression_ratio() -> None:
    assert compression_ratio("") == 0.0
    assert compression_ratio("a quick brown fox") < 1.0
    assert compression_ratio("the " * 100) > 10.0
    assert compression_ratio("über") == pytest.approx(5 / len(zlib.compress("über".encode())))
