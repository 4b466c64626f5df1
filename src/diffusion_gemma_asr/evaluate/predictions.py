"""predictions.jsonl: what a system wrote for each utterance, one JSON line each."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError
from .metrics import Edits

PREDICTIONS, SUMMARY, SETTINGS = "predictions.jsonl", "summary.json", "settings.json"


@dataclass(frozen=True)
class Prediction:
    """One line. A skipped utterance has an error, and nothing of what was written.

    Attributes:
        key: that tells utterances apart.
        audio_filepath: of the sound.
        language: that is spoken.
        duration: seconds.
        reference: what was said.
        hypothesis: what was written.
        reference_normalised: what was said, after Whisper's normaliser.
        hypothesis_normalised: what was written, after Whisper's normaliser.
        unit: "word" or "character".
        edits: hits, substitutions, deletions, insertions between the normalised texts, in `unit`.
        decoder: what wrote the text; see `protocol.Hypothesis`.
        passes: of the decoder, where they are counted.
        seconds: the utterance's share, by length, of its batch's wall time.
        offset: seconds from the start of the file to the utterance.
        data_set: the source that it came from.
        error: why it was skipped.
        language_found: by the system, where the language was not named.
    """

    key: str
    audio_filepath: str
    language: str
    duration: float
    reference: str
    hypothesis: str = ""
    reference_normalised: str = ""
    hypothesis_normalised: str = ""
    unit: str = "word"
    edits: tuple[int, int, int, int] = (0, 0, 0, 0)
    decoder: str = ""
    passes: int | None = None
    seconds: float = 0.0
    offset: float = 0.0
    data_set: str = ""
    error: str | None = None
    language_found: str | None = None

    @property
    def counts(self) -> Edits:
        """The edits with their names."""
        return Edits(*self.edits)


def read_predictions(folder: str | Path) -> list[Prediction]:
    """The lines of a run; what a kill cut short is left out.

    Raises:
        DataError: a line is of another version.
    """
    path = Path(folder) / PREDICTIONS
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
        try:
            content = json.loads(line)
            rows.append(Prediction(**content | {"edits": tuple(content["edits"])}))
        except (TypeError, KeyError, ValueError):
            raise DataError(
                f"{path}: line {len(rows) + 1} is of another version; evaluate again into a new folder"
            ) from None
    return rows
