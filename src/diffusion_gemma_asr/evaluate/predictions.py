"""predictions.jsonl: a system's transcript of each utterance and its edit counts, one JSON line each."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError
from .metrics import Edits

PREDICTIONS, SUMMARY, SETTINGS = "predictions.jsonl", "summary.json", "settings.json"


@dataclass(frozen=True)
class Prediction:
    """The result for one utterance; a skipped one has an `error`, and defaults in the fields of its transcript.

    Attributes:
        key: see `Utterance.key`.
        audio_filepath: path of the sound file.
        language: code of the spoken language.
        duration: of the utterance, in seconds.
        reference: correct transcript.
        hypothesis: the system's transcript.
        reference_normalised: the reference after Whisper's normaliser.
        hypothesis_normalised: the hypothesis after Whisper's normaliser.
        unit: of the edits, "word" or "character".
        edits: hits, substitutions, deletions, insertions between the normalised texts.
        decoder: see `protocol.Hypothesis`.
        passes: see `protocol.Hypothesis`.
        seconds: share of the batch's wall time, in proportion to the utterance's duration.
        offset: start of the utterance in the file, in seconds.
        data_set: name of the source.
        error: reason for skipping it; None if it was transcribed.
        language_found: code that the system identified; None if the language was given.
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
        """The edits as a dataclass."""
        return Edits(*self.edits)


def read_predictions(folder: str | Path) -> list[Prediction]:
    """Reads the predictions of a run, without an unfinished last line.

    Args:
        folder: of the run.

    Returns:
        the predictions in order; none if the run has not started.

    Raises:
        DataError: a line was written by another version.
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
