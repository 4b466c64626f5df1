"""The interface of systems under evaluation: a batch of sounds to texts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True)
class Hypothesis:
    """A system's transcript of one sound.

    Attributes:
        text: the transcript.
        decoder: name of the decoder; several are joined by "+", "none" if there was no speech to decode.
        passes: number of decoder passes; None if the system does not count them.
        language: code that the system identified; None if the language was given.
    """

    text: str
    decoder: str
    passes: int | None = None
    language: str | None = None


class System(Protocol):
    """A speech recogniser under test.

    Attributes:
        longest_s: longest supported sound, in seconds.
        languages: codes of the supported languages.
    """

    longest_s: float
    languages: tuple[str, ...]

    def settings(self) -> dict[str, Any]:
        """Everything that determines the texts, as JSON: equal settings give equal texts for the same audio."""

    def transcribe(self, sounds: Sequence[np.ndarray], languages: Sequence[str]) -> list[Hypothesis]:
        """Transcribes a batch.

        Args:
            sounds: (n,) float32 at 16 kHz each, of at most `longest_s`.
            languages: code of each sound.

        Returns:
            a transcript for each sound, in order.
        """


def fingerprint(files: Iterable[Path]) -> str:
    """A hash of the contents of files: 32 hexadecimal digits, by which a run identifies its model."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:32]
