"""What utterances sound like, in phonemes: espeak-ng's, without stress and what else a listener can do without."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .espeak import phonemes_of
from .manifest import Utterance
from .synth import ACCENTS
from .text import plain_text

_TONE = re.compile(r"(.*?)(\d+)")
_NOTHING = frozenset(("", ":", ";", "|", "_"))


def simplified(said: str, language: str) -> list[str]:
    """The phonemes of a text in espeak-ng's notation (`espeak.phonemes_of`).

    Marks of stress, pauses and word boundaries are left out, and so are the numbers that tell allophones apart. Mandarin's
    tones, which are numbers too, become symbols of their own.
    """
    found = []
    for symbol in re.split(r"[ _]+", said):
        symbol = symbol.lstrip("',%=!|")
        if symbol in _NOTHING or symbol.startswith("("):
            continue
        if language == "zh":
            tone = _TONE.fullmatch(symbol)
            found += [part for part in (tone.groups() if tone else (symbol,)) if part]
            continue
        symbol = symbol.replace("**", "*").removesuffix("-")
        symbol = symbol.rstrip("0123456789") or symbol
        found.append(symbol.removesuffix("#") if language == "en" else symbol)
    return found


def pronounced(texts: Sequence[str], language: str, voice: str) -> list[list[str]]:
    """How a voice of espeak-ng says texts of its language, in phonemes.

    Raises:
        SynthesisError: espeak-ng is missing, or has no such voice.
    """
    return [simplified(said, language) for said in phonemes_of(texts, voice)]


def accent_of(utterance: Utterance) -> str:
    """The voice of espeak-ng that says a synthetic utterance, or would say a real one."""
    voice, accents = utterance.speaker.partition("+")[0], ACCENTS[utterance.language]
    return voice if voice in accents else accents[0]


def pronunciations(utterances: Sequence[Utterance]) -> list[list[str]]:
    """The phonemes of each utterance, in its accent.

    Raises:
        SynthesisError: see `pronounced`.
    """
    rows: dict[tuple[str, str], list[int]] = {}
    for i, utterance in enumerate(utterances):
        rows.setdefault((utterance.language, accent_of(utterance)), []).append(i)
    found: list[list[str]] = [[] for _ in utterances]
    for (language, voice), own in rows.items():
        texts = [plain_text(utterances[i].text, language) for i in own]
        for i, said in zip(own, pronounced(texts, language, voice), strict=True):
            found[i] = said
    return found
