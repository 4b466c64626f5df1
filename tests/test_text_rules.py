"""data/text.py: whatever goes in, plain words come out, and the words that were there are still there."""

from __future__ import annotations

import re
import unicodedata

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from diffusion_gemma_asr.data.text import plain_english

PATIENT = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
PLAIN = re.compile(r"(?:[a-z]+(?:'[a-z]+)*(?: [a-z]+(?:'[a-z]+)*)*)?")

words = st.lists(st.from_regex(r"[a-z]+('[a-z]+)?", fullmatch=True), min_size=1, max_size=8)
MARKS = ' \t\n.,;:!?-\u2013\u2014"\u201c\u201d()0123456789'
separators = st.text(st.sampled_from(MARKS), min_size=1, max_size=4)


@PATIENT
@given(st.text())
@example("'tis the boys' o''clock")
@example("\u0130stanbul \ufb01sh \u212a")
def test_only_words_with_inner_apostrophes_and_single_spaces(text: str) -> None:
    assert PLAIN.fullmatch(plain_english(text))


@PATIENT
@given(st.text())
def test_a_second_time_changes_nothing(text: str) -> None:
    once = plain_english(text)
    assert plain_english(once) == once


@PATIENT
@given(words, st.data())
def test_words_survive_case_and_whatever_stands_between_them(said: list[str], data: st.DataObject) -> None:
    written = "".join(word.title() + data.draw(separators) for word in said)
    assert plain_english(data.draw(separators) + written) == " ".join(said)
    assert plain_english(written.upper()) == " ".join(said)


@pytest.mark.parametrize("apostrophe", ["'", "\u2018", "\u2019", "\u02bc", "`"])
def test_every_apostrophe_is_the_same(apostrophe: str) -> None:
    assert plain_english(f"Don{apostrophe}t") == "don't"


def test_accents_are_stripped_composed_or_not() -> None:
    for form in ("NFC", "NFD"):
        written = unicodedata.normalize(form, "Zo\u00eb's caf\u00e9 na\u00efve")
        assert plain_english(written) == "zoe's cafe naive"


def test_quotes_are_not_apostrophes() -> None:
    assert plain_english("\u2018Yes,\u2019 the dogs\u2019 owner said") == "yes the dogs owner said"
