"""Text: files of it as people have them, and transcript conventions of the mini model: lower-case words without
punctuation, as they are spelled in each language.

The corpora disagree about case and punctuation, and neither can be heard; the mini model therefore writes plain words, as
LibriSpeech does. Mandarin is written without spaces, in simplified characters.
"""

from __future__ import annotations

import codecs
import functools
import gzip
import re
import unicodedata
import zlib
from pathlib import Path
from typing import Literal

from ..errors import DataError
from ..languages import language_code

CHARACTERS = "\0 abcdefghijklmnopqrstuvwxyz'"
"""What `plain_english` may hold; index 0 stands for nothing: the CTC blank, the rest of a canvas."""

CHARACTER_LANGUAGES = frozenset({"hi", "zh"})
"""Languages judged by characters, not by words."""

# UTF-16's mark is how UTF-32's begins, so that one is tried first.
_MARKS = {
    codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF32_LE: "utf-32-le", codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be",
}  # fmt: skip
_OWN_LETTERS = {"en": "", "de": "äöüß", "fr": "àâæçèéêëîïôœùûüÿ", "es": "áéíñóúü"}  # beyond a to z
_APOSTROPHES = re.compile(r"[\u2018\u2019\u02bc\u0060]")
_LOOSE_APOSTROPHE = re.compile(r"(?<!\w)'|'(?!\w)")
_UNSPOKEN_HINDI = re.compile(r"[\u200b-\u200d\u093d]")  # joiners and the sign of a drawn-out vowel
_NOT_HINDI = re.compile(r"[^\u0900-\u0963\u0970-\u097f]+")  # letters and signs; not the danda, not digits
_NOT_CHINESE = re.compile(r"[^\u4e00-\u9fff]+")


def read_text(path: str | Path) -> str:
    """The text of a file: UTF-8, or what its byte order mark says; from a gzip archive as well.

    Returns:
        text whose lines end in "\\n" alone, without byte order marks.

    Raises:
        DataError: it cannot be read, or its encoding cannot be told for certain.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    mark = next((mark for mark in _MARKS if data.startswith(mark)), b"")
    encoding = _MARKS.get(mark, "utf-8")
    try:
        text = data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, len(mark) + error.start) + 1
        held = f"no {encoding.upper()} in line {line} (byte 0x{data[len(mark) + error.start]:02x})"
        raise DataError(f"{path}: {held}; save the file as UTF-8, as `iconv -f LATIN1 -t UTF-8` does") from None
    if "\0" in text:
        raise DataError(f"{path}: holds NUL characters, as UTF-16 without a byte order mark does; save the file as UTF-8")
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text.replace("\n\ufeff", "\n").removeprefix("\ufeff")  # files that begin with a mark, put together


def plain_text(text: str, language: str) -> str:
    """Plain words of a language; everything else separates words.

    English, German, French and Spanish keep a to z, their own letters and inner apostrophes, in lower case; accents that are
    not theirs are stripped. Hindi keeps Devanagari with its vowel signs. Mandarin keeps ideographs and has no spaces.

    Args:
        language: one of the six, by code or name.

    Raises:
        AsrError: it is none of them.

    >>> plain_text("«L’été, dit Zoë, c'est fini !»", "fr")
    "l'été dit zoë c'est fini"
    >>> plain_text("他是日本人。", "zh")
    '他是日本人'
    """
    language = language_code(language)
    if language == "zh":
        return _NOT_CHINESE.sub("", unicodedata.normalize("NFKC", text))
    if language == "hi":
        text = _UNSPOKEN_HINDI.sub("", unicodedata.normalize("NFC", text))
        return " ".join(_NOT_HINDI.sub(" ", text).split())
    own = _OWN_LETTERS[language]
    text = _APOSTROPHES.sub("'", unicodedata.normalize("NFKC", text)).lower()
    text = "".join(c if c in own else _unaccented(c) for c in text)
    text = _LOOSE_APOSTROPHE.sub(" ", re.sub(f"[^a-z{own}' ]+", " ", text))
    return " ".join(text.split())


def plain_english(text: str) -> str:
    """`plain_text` of English: words of a to z with inner apostrophes.

    >>> plain_english("“Don’t,” said Zoë — twice.")
    "don't said zoe twice"
    """
    return plain_text(text, "en")


def speakable(text: str, language: str) -> bool:
    """Whether a line can be read out and written as `plain_text` has it: it holds something, and nothing that is spoken and
    would get lost.

    Left out are lines with digits, lines in Mandarin with Latin letters or with characters that GB 2312, the set of
    simplified characters, lacks (most are traditional), and lines with letters of other scripts.
    """
    plain = plain_text(text, language)
    if not plain or any(map(str.isdigit, text)):
        return False
    if language_code(language) == "zh":
        try:
            plain.encode("gb2312")
        except UnicodeEncodeError:
            return False
    return sum(map(str.isalpha, plain)) >= sum(map(str.isalpha, unicodedata.normalize("NFC", text)))


def error_unit(language: str) -> Literal["word", "character"]:
    """What errors are counted in: characters for Hindi and Mandarin, words elsewhere."""
    return "character" if language in CHARACTER_LANGUAGES else "word"


def error_name(language: str) -> Literal["WER", "CER"]:
    """What the rate of these errors is called."""
    return "CER" if error_unit(language) == "character" else "WER"


@functools.cache
def _unaccented(character: str) -> str:
    """A letter without its marks; combining marks of their own are dropped."""
    return "".join(c for c in unicodedata.normalize("NFKD", character) if not unicodedata.combining(c))
