"""Reading text files, and plain text: the mini model's transcripts, lower-case words without punctuation.

Corpora differ in case and punctuation, which are not audible; the mini model therefore writes plain words, as
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
"""The alphabet of `plain_english`; index 0 is the CTC blank and fills the end of a canvas."""

CHARACTER_LANGUAGES = frozenset({"hi", "zh"})
"""Languages scored by character error rate, the others by word error rate."""

# UTF-32 before UTF-16: its byte order mark begins with that of UTF-16.
_MARKS = {
    codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF32_LE: "utf-32-le", codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be",
}  # fmt: skip
_LETTERS = {"en": "", "de": "äöüß", "fr": "àâæçèéêëîïôœùûüÿ", "es": "áéíñóúü"}  # beyond a to z
_APOSTROPHES = re.compile(r"[\u2018\u2019\u02bc\u0060]")
_LOOSE_APOSTROPHE = re.compile(r"(?<!\w)'|'(?!\w)")
_UNSPOKEN_HINDI = re.compile(r"[\u200b-\u200d\u093d]")  # joiners and the avagraha, which lengthens a vowel
_NOT_HINDI = re.compile(r"[^\u0900-\u0963\u0970-\u097f]+")  # letters and signs; not the danda, not digits
_NOT_CHINESE = re.compile(r"[^\u4e00-\u9fff]+")


def read_text(path: str | Path) -> str:
    """Reads a text file, plain or gzipped: UTF-8, or the encoding of its byte order mark.

    Args:
        path: of the file.

    Returns:
        the text with line ends "\\n" and without byte order marks.

    Raises:
        DataError: the file cannot be read, or its encoding is not certain.
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
        problem = f"no {encoding.upper()} in line {line} (byte 0x{data[len(mark) + error.start]:02x})"
        raise DataError(f"{path}: {problem}; save the file as UTF-8, as `iconv -f LATIN1 -t UTF-8` does") from None
    if "\0" in text:
        raise DataError(f"{path}: holds NUL characters, as UTF-16 without a byte order mark does; save the file as UTF-8")
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text.replace("\n\ufeff", "\n").removeprefix("\ufeff")  # concatenated files have a mark at each start


def plain_text(text: str, language: str) -> str:
    """Reduces text to plain words; all other characters count as spaces.

    English, German, French and Spanish keep a to z, the language's further letters and inner apostrophes, in lower case;
    foreign accents are stripped. Hindi keeps Devanagari with its vowel signs. Mandarin keeps ideographs and has no spaces.

    Args:
        text: any text.
        language: code or name of one of the six languages.

    Returns:
        words separated by single spaces; in Mandarin no spaces.

    Raises:
        AsrError: an unknown language.

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
    letters = _LETTERS[language]
    text = _APOSTROPHES.sub("'", unicodedata.normalize("NFKC", text)).lower()
    text = "".join(c if c in letters else _unaccented(c) for c in text)
    text = _LOOSE_APOSTROPHE.sub(" ", re.sub(f"[^a-z{letters}' ]+", " ", text))
    return " ".join(text.split())


def plain_english(text: str) -> str:
    """`plain_text` of English: words of a to z with inner apostrophes.

    >>> plain_english("“Don’t,” said Zoë — twice.")
    "don't said zoe twice"
    """
    return plain_text(text, "en")


def speakable(text: str, language: str) -> bool:
    """Whether `plain_text` of a line is not empty and writes everything that a reader would say.

    Not speakable are lines with digits, lines with letters of other scripts, and lines in Mandarin with Latin letters or
    with characters outside GB 2312, the set of simplified characters (most of these are traditional).

    Args:
        text: a line.
        language: code or name of one of the six languages.

    Raises:
        AsrError: an unknown language.
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
    """The unit of the error rate: characters for Hindi and Mandarin, words for other languages."""
    return "character" if language in CHARACTER_LANGUAGES else "word"


def error_name(language: str) -> Literal["WER", "CER"]:
    """The name of a language's error rate."""
    return "CER" if error_unit(language) == "character" else "WER"


@functools.cache
def _unaccented(character: str) -> str:
    """A character without its accents; a combining mark alone becomes ""."""
    return "".join(c for c in unicodedata.normalize("NFKD", character) if not unicodedata.combining(c))
