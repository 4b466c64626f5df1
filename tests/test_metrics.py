"""evaluate/metrics.py and normalise.py: jiwer's and Whisper's own numbers, cases worked out by hand, intervals and tests."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_gemma_asr.evaluate.metrics import (
    Edits,
    align,
    confidence_interval,
    count,
    edits,
    error_rate,
    paired_bootstrap,
    percent,
    total,
)
from diffusion_gemma_asr.evaluate.normalise import normaliser

words = st.lists(st.sampled_from(["a", "b", "c", "dd"]), max_size=8).map(" ".join)


@pytest.mark.parametrize(
    ("said", "written", "hits", "substitutions", "deletions", "insertions"),
    [  # from the tests and the documentation of jiwer
        ("hello world", "hello duck", 1, 1, 0, 0),
        ("This is a short Sentence with a few Words with upper and lower cases".lower(),
         "this is a short sentence with a few words with upper and lower cases", 14, 0, 0, 0),
        ("i am a short ground truth", "i am a considerably longer and very weird hypothesis", 3, 3, 0, 3),
        ("a b c d e f", "b c d e f", 5, 0, 1, 0),
        ("", "two words", 0, 0, 0, 2),
        ("two words", "", 0, 0, 2, 0),
        ("", "", 0, 0, 0, 0),
    ],
)  # fmt: skip
def test_words(said: str, written: str, hits: int, substitutions: int, deletions: int, insertions: int) -> None:
    found = count(said, written, "word")
    assert found == Edits(hits, substitutions, deletions, insertions)
    assert found.reference == len(said.split())


@pytest.mark.parametrize(
    ("text", "expected"),
    [  # from the tests of openai/whisper
        ("Let's", "let us"),
        ("he's like", "he is like"),
        ("she's been like", "she has been like"),
        ("10km", "10 km"),
        ("10mm", "10 mm"),
        ("RC232", "rc 232"),
        ("Mr. Park visited Assoc. Prof. Kim Jr.", "mister park visited associate professor kim junior"),
        ("two", "2"),
        ("thirty one", "31"),
        ("five twenty four", "524"),
        ("nineteen ninety nine", "1999"),
        ("twenty nineteen", "2019"),
        ("two point five million", "2500000"),
        ("four point two billions", "4200000000s"),
        ("200 thousand", "200000"),
        ("200 thousand dollars", "$200000"),
        ("$20 million", "$20000000"),
        ("€52.4 million", "€52400000"),
        ("£77 thousands", "£77000s"),
        ("two double o eight", "2008"),
        ("three thousand twenty nine", "3029"),
        ("forty three thousand two hundred sixty", "43260"),
        ("nineteen sixties", "1960s"),
        ("thirty", "30"),
        ("one o one", "101"),
        ("mobilisation", "mobilization"),
        ("cancelation", "cancellation"),
    ],
)
def test_english_rules_are_whispers(text: str, expected: str) -> None:
    assert normaliser("en")(text) == expected


def test_hindi_falls_apart_by_whispers_rules_and_stays_whole_with_marks() -> None:
    assert normaliser("hi")("हिन्दी!") == "ह न द"
    assert normaliser("hi", "marks")("हिन्दी!") == "हिन्दी"
    # One wrong vowel sign (ी for ि) in six characters, which Whisper's rules do not see at all.
    said, written = "हिन्दी", "हीन्दी"
    assert count(*(normaliser("hi")(text) for text in (said, written)), "character") == Edits(5, 0, 0, 0)
    assert count(*(normaliser("hi", "marks")(text) for text in (said, written)), "character") == Edits(5, 1, 0, 0)


def test_mandarin_is_counted_by_characters() -> None:
    said, written = (normaliser("zh")(text) for text in ("今天天气很好。", "今天天很好吗"))
    assert count(said, written, "character") == Edits(hits=5, substitutions=0, deletions=1, insertions=1)
    assert count(said, written, "character").rate == pytest.approx(2 / 6)


def test_the_error_rate_is_of_the_corpus_in_the_language_s_unit_after_whispers_normaliser() -> None:
    assert error_rate(["Mr. Park's here.", "It is 10km"], ["mister park is here", "it is ten"], "en") == pytest.approx(1 / 8)
    assert error_rate(["今天天气很好。"], ["今天天很好吗"], "zh") == pytest.approx(2 / 6)
    assert error_rate(["हिन्दी!"], ["हिन्दी"], "hi") == 0
    assert error_rate(["nothing"], [""], "de") == 1
    assert error_rate([""], ["something"], "de") == float("inf")
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        error_rate(["one", "two"], ["one"], "en")


@given(st.lists(st.tuples(words, words), max_size=4))
def test_the_error_rate_counts_as_its_parts_do(pairs: list[tuple[str, str]]) -> None:
    said, written = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    assert error_rate(said, written, "de") == total([edits(*pair, "de") for pair in pairs]).rate


def test_a_rate_that_there_is_not_is_a_dash() -> None:
    assert [percent(rate, 2) for rate in (0.1234, None, float("inf"))] == ["12.34%", "–", "–"]


@pytest.mark.parametrize("package", ["jiwer", "whisper_normalizer"])
def test_what_evaluation_needs_is_named_in_one_line(package: str) -> None:
    """In a process of its own, where the package cannot be found."""
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from diffusion_gemma_asr.errors import AsrError\n"
        "try:\n    import diffusion_gemma_asr.evaluate.metrics\n"
        "except AsrError as error:\n    print(error)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.startswith(f"error rates need {package}")
    assert "pip install 'diffusion-gemma-asr[evaluation]'" in found.stdout and found.stdout.count("\n") == 1


@settings(derandomize=True, deadline=None)
@given(words, words)
def test_an_alignment_spells_both_texts_and_has_the_counts(said: str, written: str) -> None:
    pieces = align(said, written, "word")
    assert " ".join(p.said for p in pieces if p.said) == said
    assert " ".join(p.written for p in pieces if p.written) == written
    found = {kind: sum(len((p.said or p.written).split()) for p in pieces if p.kind == kind)
             for kind in ("equal", "substitute", "delete", "insert")}  # fmt: skip
    assert Edits(found["equal"], found["substitute"], found["delete"], found["insert"]) == count(said, written, "word")


def test_rates_of_a_corpus_weigh_utterances_by_their_length() -> None:
    edits = [Edits(9, 1, 0, 0), Edits(0, 1, 0, 0)]
    assert total(edits).rate == pytest.approx(2 / 11)
    assert Edits().rate == 0.0 and Edits(insertions=1).rate == float("inf")


def test_the_interval_holds_the_rate_and_shrinks_with_more_utterances() -> None:
    some = [Edits(8, 2, 0, 0), Edits(10, 0, 0, 0)] * 20
    low, high = confidence_interval(some)
    assert low < 0.1 < high
    assert (low, high) == confidence_interval(some)
    more_low, more_high = confidence_interval(some * 25)
    assert more_high - more_low < (high - low) / 4
    assert confidence_interval([Edits(5, 0, 0, 0)] * 3) == (0.0, 0.0)


def test_the_paired_test_tells_a_real_difference_from_chance() -> None:
    first = [Edits(9, 1, 0, 0), Edits(10, 0, 0, 0), Edits(8, 2, 0, 0)] * 20
    worse = [Edits(e.hits - 1, e.substitutions + 1, 0, 0) for e in first]
    found = paired_bootstrap(first, worse)
    assert found.difference == pytest.approx(0.1) and 0.09 < found.low <= found.high < 0.11 and found.p_value < 0.01
    swapped = [*first[1:], first[0]]
    same = paired_bootstrap(first, swapped)
    assert abs(same.difference) < 1e-9 and same.p_value > 0.3
    with pytest.raises(ValueError, match="same utterances"):
        paired_bootstrap(first, worse[1:])
