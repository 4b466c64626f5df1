"""languages.py: what people write for a language, and what is none of ours."""

from __future__ import annotations

import pytest

from diffusion_gemma_asr.errors import AsrError
from diffusion_gemma_asr.languages import LANGUAGES, language_code

WRITTEN = {
    "en": ["en", "EN", "English", "eng", "en-US", "en_GB", "en_us", "en-IN", "en_US.UTF-8", "eng_Latn", "Englisch",
           "anglais", "American English", "English (US)", "English-US", "<|en|>", " en ", "en-US-x-twain",
           "en-GB-oxendict", "Inglés"],
    "de": ["de", "ger", "deu", "deutsch", "German", "de-DE", "de_de", "de-CH-1996", "de_DE@euro", "Allemand", "alemán"],
    "fr": ["fr", "fra", "fre", "Français", "FRANCAIS", "fr-CA", "fr_fr", "Französisch", "french", "Franc\u0327ais"],
    "es": ["es", "spa", "es-419", "es_419", "Castilian", "Spanish; Castilian", "español", "Spanish (Latin America)"],
    "hi": ["hi", "hin", "hi_in", "hi-IN", "Hindi", "हिन्दी", "हिंदी", "hin_Deva"],
    "zh": ["zh", "zh-CN", "zh-Hans", "zh_Hans_CN", "zh-Hant-TW", "zh-TW", "cmn", "cmn_hans_cn", "cmn-Hans-CN", "zh-cmn-Hans",
           "zho", "chi", "zho_Hans", "Chinese", "mandarin", "Mandarin Chinese", "Chinese (Simplified)", "Chinese, Mandarin",
           "中文", "普通话"],
}  # fmt: skip


@pytest.mark.parametrize(("code", "name"), [(code, name) for code, names in WRITTEN.items() for name in names])
def test_what_people_write(code: str, name: str) -> None:
    assert language_code(name) == code
    assert language_code(name.upper()) == code


def test_the_names_that_we_write_ourselves() -> None:
    assert {code: language_code(name) for code, name in LANGUAGES.items()} == {code: code for code in LANGUAGES}


@pytest.mark.parametrize(
    "name",
    ["klingon", "tlh", "", " ", "-", "it", "nl-NL", "yue", "zh-yue", "zh_yue_Hant", "Cantonese", "Chinese (Cantonese)",
     "en,de", "en de", "English German", "us", "american", "enn", "en-!!", "e", "unknown", "und", "auto", "None", "x" * 999],
)  # fmt: skip
def test_what_is_none_of_ours(name: str) -> None:
    with pytest.raises(AsrError) as caught:
        language_code(name)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 220
    assert "is not one of en (English), de (German), fr (French), es (Spanish), hi (Hindi), zh (Mandarin)" in message


@pytest.mark.parametrize("value", [None, 5, ["en"], b"en"])
def test_what_is_no_name(value: object) -> None:
    with pytest.raises(AsrError, match=r"language is .*; give one of en \(English\)"):
        language_code(value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "near"), [("englsh", "English"), ("Mandrin", "Mandarin"), ("germann", "German"), ("hinid", "Hindi")]
)
def test_the_nearest_is_offered(name: str, near: str) -> None:
    with pytest.raises(AsrError, match=f"did you mean {near}\\?$"):
        language_code(name)


def test_auto_only_where_it_is_asked_for() -> None:
    assert [language_code(name, auto=True) for name in ("auto", "AUTO", "en-US")] == ["auto", "auto", "en"]
    with pytest.raises(AsrError, match=r"zh \(Mandarin\), auto; did you mean auto\?$"):
        language_code("auot", auto=True)
