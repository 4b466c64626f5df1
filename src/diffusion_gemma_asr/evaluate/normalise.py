"""Text normalisation before scoring: Whisper's rules, and a variant that keeps the marks of Indic scripts.

Both come from the `whisper-normalizer` package, which carries OpenAI's own code. References and hypotheses go through the
same normaliser.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

from ..errors import AsrError
from . import INSTALL

try:
    from whisper_normalizer.basic import BasicTextNormalizer
    from whisper_normalizer.english import EnglishTextNormalizer
except ModuleNotFoundError as error:
    raise AsrError(f"error rates need {error.name}: {INSTALL}") from None

Normaliser = Callable[[str], str]
Rules = Literal["whisper", "marks"]

NORMALISER = "Whisper's normaliser"
"""The name of the rules "whisper" in the headings of tables."""


@functools.cache
def normaliser(language: str, rules: Rules = "whisper") -> Normaliser:
    """The normaliser of a language.

    Args:
        language: code; "en" is Whisper's English rules (numbers, contractions, British spelling), others its basic ones.
        rules: "whisper" as published, whose basic rules replace every Unicode mark by a space ("हिन्दी" becomes "ह न द");
            "marks" keeps marks, with no difference for English.

    Returns:
        a function from text to normalised text.
    """
    rewrite = EnglishTextNormalizer() if language == "en" else BasicTextNormalizer(preserve_marks=rules == "marks")
    return lambda text: " ".join(rewrite(text).split())
