"""The six languages, and the names that people give them."""

from __future__ import annotations

import difflib
import functools
import re
import unicodedata

from .errors import AsrError

LANGUAGES = {
    "en": "English", "de": "German", "fr": "French", "es": "Spanish", "hi": "Hindi", "zh": "Mandarin",
}  # fmt: skip
AUTO = "auto"  # in place of a language's code: the model has to find out

# ISO 639-1, -2 and -3; names in English and in the six languages, without accents.
_NAMES = {
    "en": "en eng english englisch anglais ingles angrezi अंग्रेज़ी अंग्रेजी 英语 英語 英文",
    "de": "de deu ger german deutsch allemand aleman जर्मन 德语 德語 德文",
    "fr": "fr fra fre french franzosisch francais frances फ़्रेंच फ्रेंच 法语 法語 法文",
    "es": "es spa spanish castilian spanisch espagnol espanol castellano castillan स्पेनिश 西班牙语 西班牙語 西班牙文",
    "hi": "hi hin hindi हिन्दी हिंदी 印地语 印地語",
    "zh": "zh zho chi cmn chinese mandarin mandarine chinesisch mandarinchinesisch chinois chino putonghua zhongwen guoyu "
    "hanyu चीनी मंदारिन 中文 汉语 漢語 普通话 普通話 国语 國語 华语 華語",
}  # fmt: skip
# What may stand beside a name without naming another language: "British English", "Chinese (Simplified)".
_BESIDE = (
    "american british us usa uk gb united states kingdom australia australian canada canadian india indian ireland irish "
    "germany austria austrian switzerland france belgium belgian spain european mexico mexican latin america "
    "argentina colombia china mainland taiwan singapore simplified traditional standard modern language"
)
_QUALIFIERS = frozenset(_BESIDE.split())
_TAG = re.compile(  # BCP 47 with - or _: language, (extended), script, region, variants, extensions
    r"(?P<language>[^\W\d_]+)(?:[-_](?P<extended>[a-z]{3}))?(?:[-_][a-z]{4})?(?:[-_](?:[a-z]{2}|\d{3}))?"
    r"(?:[-_](?:[a-z\d]{5,8}|\d[a-z\d]{3}))*(?:[-_][a-z\d](?:[-_][a-z\d]{2,8})+)*"
)


def language_code(name: str, auto: bool = False) -> str:
    """The code of a language, from whatever people write for it.

    Letter case and accents do not count. Names in English and in the six languages are known, ISO 639 codes of two and three
    letters, and BCP 47 tags or locales that begin with any of these: "EN", "en_US.UTF-8", "deutsch", "cmn_hans_cn",
    "es-419", "Chinese (Simplified)", "<|fr|>".

    Args:
        name: what was written.
        auto: whether "auto" is a language here: the model has to find out.

    Returns:
        one of the six codes, or "auto".

    Raises:
        AsrError: it is none of them; the message names the six and the nearest.
    """
    if not isinstance(name, str):
        raise AsrError(f"language is {name!r}; give one of {_offered(auto)}")
    plain = _plain(name)
    if plain == AUTO and auto:
        return AUTO
    code = _code_of(plain)
    if code is None:
        near = difflib.get_close_matches(plain, [*_codes(), *([AUTO] if auto else ())], 1, cutoff=0.7) if plain else []
        hint = f"; did you mean {LANGUAGES.get(_codes().get(near[0], ''), AUTO)}?" if near else ""
        raise AsrError(f"language {name[:40]!r} is not one of {_offered(auto)}{hint}")
    return code


@functools.lru_cache(maxsize=1024)
def _code_of(plain: str) -> str | None:
    """The code of a name in plain letters; None where it is none of ours."""
    codes = _codes()
    tag = _TAG.fullmatch(re.sub(r"[.@][\w.@-]*$", "", plain))  # a locale's encoding: de_DE.UTF-8@euro
    if tag and tag["language"] in codes:
        code = codes[tag["language"]]
        return code if codes.get(tag["extended"] or code) == code else None  # zh-yue is another language
    words = [word for word in re.split(r"[\s,;:/()\[\]_-]+", plain) if word and word not in _QUALIFIERS]
    found = {codes.get(word) for word in words}
    return found.pop() if len(found) == 1 else None


@functools.cache
def _codes() -> dict[str, str]:
    """Every single-word name in plain letters, and its code."""
    return {_plain(name): code for code, names in _NAMES.items() for name in names.split()}


def _plain(name: str) -> str:
    """In lower case, without accents on Latin letters, and without the marks of Whisper's tokens."""
    text = unicodedata.normalize("NFKD", name.strip().removeprefix("<|").removesuffix("|>").strip().casefold())
    return unicodedata.normalize("NFC", "".join(c for c in text if not "\u0300" <= c <= "\u036f"))


def _offered(auto: bool) -> str:
    names = ", ".join(f"{code} ({name})" for code, name in LANGUAGES.items())
    return f"{names}, {AUTO}" if auto else names
