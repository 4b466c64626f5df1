"""data/text.py: whatever goes in, plain words come out, and the words that were there are still there."""

from __future__ import annotations

import codecs
import gzip
import re
import unicodedata
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from diffusion_gemma_asr.data.text import error_unit, plain_english, plain_text, read_text, speakable
from diffusion_gemma_asr.errors import AsrError, DataError
from diffusion_gemma_asr.languages import LANGUAGES

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


@PATIENT
@given(st.sampled_from(list(LANGUAGES)), st.text())
@example("hi", "हि\u200dन्दी")
@example("fr", "l'\u0301e")
def test_in_every_language_a_second_time_changes_nothing(language: str, text: str) -> None:
    once = plain_text(text, language)
    assert plain_text(once, language) == once == once.strip() and "  " not in once


@pytest.mark.parametrize(
    ("language", "written", "plain"),
    [
        ("de", "„Ich büße“, sagte Zoë; die Straße — ÄÖÜ!", "ich büße sagte zoe die straße äöü"),
        ("fr", "«\u00a0L’été, dit-elle, c’est l'œuvre de Señor…\u00a0»", "l'été dit elle c'est l'œuvre de senor"),
        ("es", "¿Qué dijo el pingüino del Niño? ¡Nada! façade", "qué dijo el pingüino del niño nada facade"),
        ("hi", "“हिन्दी” में, दो‌ पंक्ति। हनुमाऽऽन १२", "हिन्दी में दो पंक्ति हनुमान"),
        ("zh", "“他是日本人”，Tom 说 ３。", "他是日本人说"),
    ],
)
def test_each_language_keeps_its_letters_alone(language: str, written: str, plain: str) -> None:
    assert plain_text(written, language) == plain
    assert plain_text(unicodedata.normalize("NFD", written), language) == plain


@pytest.mark.parametrize(
    ("language", "line", "usable"),
    [
        ("en", "It's fine.", True),
        ("en", "In 1984.", False),
        ("en", "The word γαστριμαργος.", False),
        ("de", "Das Café ist schön.", True),
        ("hi", "अमेजन ExxonMobil को", False),
        ("zh", "他是日本人。", True),
        ("zh", "圖書館在哪裡？", False),  # traditional
        ("zh", "Tom应该要担心。", False),
        ("fr", "…", False),
    ],
)
def test_lines_that_lose_what_is_spoken_are_not_read_out(language: str, line: str, usable: bool) -> None:
    assert speakable(line, language) is usable


def test_hindi_and_mandarin_are_judged_by_characters() -> None:
    assert [error_unit(code) for code in ("en", "de", "hi", "zh")] == ["word", "word", "character", "character"]


def test_a_language_may_be_named() -> None:
    assert plain_text("Ich büße.", "German") == "ich büße" and not speakable("圖書館在哪裡？", "zh-TW")
    with pytest.raises(AsrError, match="'klingon' is not one of"):
        plain_text("nuqneH", "klingon")


TEXT = "Müller sagt “好”\nzwei\n"
FILES = {
    "UTF-8": TEXT.encode(),
    "mark": codecs.BOM_UTF8 + TEXT.encode(),
    "two files with marks": codecs.BOM_UTF8 + TEXT[:16].encode() + codecs.BOM_UTF8 + TEXT[16:].encode(),
    "UTF-16": TEXT.encode("utf-16"),
    "UTF-16, big end first": codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"),
    "UTF-32": TEXT.encode("utf-32"),
    "Windows": codecs.BOM_UTF8 + TEXT.replace("\n", "\r\n").encode(),
    "Windows, UTF-16": TEXT.replace("\n", "\r\n").encode("utf-16"),
    "old Macintosh": TEXT.replace("\n", "\r").encode(),
    "gzip": gzip.compress(TEXT.encode("utf-16")),
}


@pytest.mark.parametrize("kind", FILES)
def test_text_is_read_as_it_was_written(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a.txt").write_bytes(FILES[kind])
    assert read_text(tmp_path / "a.txt") == TEXT


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        ("eins\nMüller".encode("latin-1"), r"no UTF-8 in line 2 \(byte 0xfc\); save the file as UTF-8"),
        ("a “b”".encode("cp1252"), r"no UTF-8 in line 1 \(byte 0x93\)"),
        ("plain".encode("utf-16-le"), "holds NUL characters, as UTF-16 without a byte order mark"),
        (codecs.BOM_UTF16_LE + b"odd", "no UTF-16-LE in line 1"),
        (gzip.compress(TEXT.encode())[:-12], "cannot be read"),
    ],
)
def test_text_that_cannot_be_told_is_one_line(tmp_path: Path, data: bytes, complaint: str) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(DataError, match=rf"a\.txt: {complaint}") as caught:
        read_text(tmp_path / "a.txt")
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"gone\.txt: cannot be read \(No such file"):
        read_text(tmp_path / "gone.txt")
