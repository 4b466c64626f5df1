"""What can be evaluated: anything that turns a batch of sounds into texts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True)
class Hypothesis:
    """What a system wrote for one sound.

    Attributes:
        text: the transcript.
        decoder: what wrote it; several are joined by "+", and "none" wrote nothing because there was no speech.
        passes: of the decoder; None where the system does not count them.
        language: that the system found, where it was not named.
    """

    text: str
    decoder: str
    passes: int | None = None
    language: str | None = None


class System(Protocol):
    """A speech recogniser under test.

    Attributes:
        longest_s: seconds of sound that it takes at most.
        languages: codes that it knows.
    """

    longest_s: float
    languages: tuple[str, ...]

    def settings(self) -> dict[str, Any]:
        """What defines it, as JSON: two runs with equal settings on the same audio give the same texts."""

    def transcribe(self, sounds: Sequence[np.ndarray], languages: Sequence[str]) -> list[Hypothesis]:
        """Texts of (n,) float32 arrays of 16 kHz, in their order.

        Args:
            sounds: at most `longest_s` each.
            languages: the code of each.
        """


def fingerprint(files: Iterable[Path]) -> str:
    """32 hexadecimal digits for what files hold, by which a run knows its model again."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:32]
