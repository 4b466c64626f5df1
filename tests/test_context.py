from __future__ import annotations

import random

import pytest

from diffusion_gemma_asr.data.context import drawn_context

TEXTS = [
    "the old miller went down to the river",
    "seven sisters live in a house by the sea",
    "नमस्ते दुनिया कैसे हो",
    "我们今天去公园散步吧",
]


def test_the_same_draws_give_the_same_context() -> None:
    assert [drawn_context(0, TEXTS, random.Random(seed)) for seed in range(50)] == [
        drawn_context(0, TEXTS, random.Random(seed)) for seed in range(50)
    ]


@pytest.mark.parametrize("index", range(len(TEXTS)))
def test_some_words_are_said_and_most_are_not(index: int) -> None:
    rng = random.Random(1)
    contexts = [drawn_context(index, TEXTS, rng) for _ in range(300)]
    words = [
        text.removeprefix("Words that may occur: ").rstrip(".").split(", ") for text in contexts if text.startswith("Words")
    ]
    assert 150 < len(words) < 270
    said = [[word for word in row if word in TEXTS[index]] for row in words]
    assert 0.5 < sum(map(bool, said)) / len(said) < 1
    assert sum(map(len, said)) < 0.8 * sum(map(len, words))
    assert all(1 <= len(row) <= 9 and len(set(row)) == len(row) for row in words)
    before = {text for text in contexts if not text.startswith("Words")}
    assert before == {f"Before it was said: {text}." for text in TEXTS}
