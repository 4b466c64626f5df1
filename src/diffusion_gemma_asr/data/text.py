"""Transcript conventions of the mini model: lower case, words and apostrophes only.

The corpora disagree about case and punctuation, and neither can be heard; version 0 of the mini model therefore writes
plain words, as LibriSpeech does.
"""

from __future__ import annotations

import re
import unicodedata

CHARACTERS = "\0 abcdefghijklmnopqrstuvwxyz'"
"""What `plain_english` may hold; index 0 stands for nothing: the CTC blank, the rest of a canvas."""

_APOSTROPHES = re.compile(r"[\u2018\u2019\u02bc\u0060]")
_NOT_WORD = re.compile(r"[^a-z' ]+")
_LOOSE_APOSTROPHE = re.compile(r"(?<![a-z])'|'(?![a-z])")


def plain_english(text: str) -> str:
    """Lower-case words a–z with inner apostrophes, single spaces; accents are stripped, everything else separates
    words.

    >>> plain_english("“Don’t,” said Zoë — twice.")
    "don't said zoe twice"
    """
    text = _APOSTROPHES.sub("'", unicodedata.normalize("NFKD", text))
    text = "".join(c for c in text if not unicodedata.combining(c)).lower()
    text = _LOOSE_APOSTROPHE.sub(" ", _NOT_WORD.sub(" ", text))
    return " ".join(text.split())
