from __future__ import annotations

import pytest

from diffusion_gemma_asr.transcribe.repetition import repeats


@pytest.mark.parametrize(
    "text",
    [
        "the the the the the",
        "and so I said The the THE the the cat",
        "go on go on go on go on",
        "you will see you will see you will see",
        "when I was young and when I was young and when I was young and",
        "我很好我很好我很好我很好",
        "哈哈哈哈哈哈哈哈哈",
        "नहीं नहीं नहीं नहीं नहीं",
    ],
)
def test_circles(text: str) -> None:
    assert repeats(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "word",
        "no no no no",
        "that that is is that that is not is not",
        "very very very good, very very very good",
        "one two three one two three",
        "hahahahahaha"[:8],
        "我今天很高兴，他今天也很高兴",
        "the cat and the dog and the bird and the fish",
    ],
)
def test_speech(text: str) -> None:
    assert not repeats(text)
