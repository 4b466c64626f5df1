"""Compares runs on their common utterances, with a paired significance test against the first run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import DataError
from .metrics import paired_bootstrap, total
from .predictions import SETTINGS, read_predictions
from .report import label
from .summary import rates


def compare(runs: Sequence[str | Path]) -> list[dict[str, Any]]:
    """Compares runs.

    Args:
        runs: folders that `evaluate` wrote.

    Returns:
        a row for each language and run, with run, language, utterances and error_rate; rows of all runs but the first also
        have `against_first`, the fields of `Paired`.

    Raises:
        DataError: a folder has no run, or the runs have no utterance in common.
    """
    loaded = []
    for run in runs:
        if not (Path(run) / SETTINGS).is_file():
            raise DataError(f"{run} holds no run; give folders that `evaluate --out` wrote")
        rows = {row.key: row for row in read_predictions(run) if row.error is None}
        loaded.append((label(json.loads((Path(run) / SETTINGS).read_text(encoding="utf-8"))), rows))
    shared = sorted(set.intersection(*(set(rows) for _, rows in loaded)))
    shared = [key for key in shared if len({rows[key].reference_normalised for _, rows in loaded}) == 1]
    if not shared:
        raise DataError("these runs have no utterance in common; compare runs over the same data")
    first = loaded[0][1]
    table = []
    for language in sorted({first[key].language for key in shared}):
        keys = [key for key in shared if first[key].language == language]
        base = [first[key].counts for key in keys]
        for index, (name, rows) in enumerate(loaded):
            counts = [rows[key].counts for key in keys]
            row: dict[str, Any] = {"run": name, "language": language, "utterances": len(keys)}
            row["error_rate"] = rates(counts)["error_rate"]
            if index and total(base).reference:
                row["against_first"] = {k: round(v, 5) for k, v in asdict(paired_bootstrap(base, counts)).items()}
            table.append(row)
    return table
