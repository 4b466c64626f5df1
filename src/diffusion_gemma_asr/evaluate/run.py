"""An evaluation run: transcribes utterances with a system, resumably, and writes predictions and their summary."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..audio.read import SAMPLE_RATE
from ..data.manifest import Utterance
from ..data.sound import read_utterance
from ..data.text import error_unit
from ..errors import AudioError, DataError
from ..files import write_whole
from .metrics import Edits, count, total
from .normalise import normaliser
from .predictions import PREDICTIONS, SETTINGS, SUMMARY, Prediction, read_predictions
from .protocol import Hypothesis, System
from .summary import summarise


def evaluate(
    system: System,
    utterances: Sequence[Utterance],
    folder: str | Path,
    batch_size: int = 16,
    skipped: Sequence[str] = (),
    on_batch: Callable[[int, Edits], None] | None = None,
    data_sets: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Transcribes utterances and writes predictions.jsonl and summary.json, resuming an interrupted run.

    Utterances are sorted by language and length. Batches do not depend on interruptions: an incomplete batch is repeated.
    The measured time of a batch is from samples to texts; the first one is transcribed twice, to warm up.

    Args:
        system: to evaluate.
        utterances: with their references.
        folder: of the run, created if missing.
        batch_size: utterances in one call of the system.
        skipped: messages about utterances that could not be listed; they count as skipped.
        on_batch: called after every batch with the number of finished utterances and their summed edits.
        data_sets: name of the data set of each utterance, by its key; the summary has the rates of each data set.

    Returns:
        the content of summary.json.

    Raises:
        DataError: the folder has a run with other settings, model or utterances, or there is nothing to evaluate.
    """
    if not utterances:
        raise DataError("nothing to evaluate: no utterance could be read" + (f" ({skipped[0]})" if skipped else ""))
    folder = Path(folder)
    settings = system.settings() | {"batch_size": batch_size} | _data_settings(utterances)
    _claim(folder, settings)
    done = {row.key: row for row in read_predictions(folder)}
    finished = total([row.counts for row in done.values()])
    warm = False
    with (folder / PREDICTIONS).open("a", encoding="utf-8") as file:
        for batch in _batches(utterances, batch_size):
            if all(u.key in done for u in batch):
                continue
            rows = _transcribe(system, batch, warm, data_sets or {})
            warm = True
            file.write(_lines(rows))
            file.flush()
            done |= {row.key: row for row in rows}
            finished = finished + total([row.counts for row in rows])
            if on_batch is not None:
                on_batch(len(done), finished)
    rows = [done[u.key] for u in utterances]
    write_whole(folder / PREDICTIONS, _lines(rows))
    summary = summarise(rows, settings, skipped)
    write_whole(folder / SUMMARY, json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return summary


def _batches(utterances: Sequence[Utterance], size: int) -> list[list[Utterance]]:
    """The utterances sorted by language and length, in batches."""
    order = sorted(utterances, key=lambda u: (u.language, u.duration))
    return [order[start : start + size] for start in range(0, len(order), size)]


def _transcribe(system: System, batch: Sequence[Utterance], warm: bool, data_sets: Mapping[str, str]) -> list[Prediction]:
    """The predictions of a batch; utterances that cannot be read or are too long for the system are skipped.

    Args:
        system: to evaluate.
        batch: utterances.
        warm: False transcribes the batch once before time is measured.
        data_sets: names by the utterances' keys.
    """
    sounds: dict[str, np.ndarray] = {}
    errors: dict[str, str] = {}
    for u in batch:
        try:
            sound = read_utterance(u)
            if len(sound) > system.longest_s * SAMPLE_RATE:
                raise AudioError(f"{u.audio_filepath}: longer than {system.longest_s:.0f} s; cut it first")
            sounds[u.key] = sound
        except AudioError as error:
            errors[u.key] = str(error)
    readable = [u for u in batch if u.key in sounds]
    samples, languages = list(sounds.values()), [u.language for u in readable]
    if readable and not warm:
        system.transcribe(samples, languages)
    start = time.perf_counter()
    hypotheses = system.transcribe(samples, languages) if readable else []
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds_per_sample = (time.perf_counter() - start) / max(1, sum(map(len, samples)))
    by_key = dict(zip(sounds, hypotheses, strict=True))
    rows = []
    for u in batch:
        key = u.key
        if key in by_key:
            row = _scored(u, by_key[key], len(sounds[key]), seconds_per_sample)
        else:
            row = Prediction(key, u.audio_filepath, u.language, u.duration, u.text, error=errors[key])
        rows.append(replace(row, offset=u.offset, data_set=data_sets.get(key, "")))
    return rows


def _scored(u: Utterance, result: Hypothesis, samples: int, seconds_per_sample: float) -> Prediction:
    """A system's result with its edits against the reference."""
    normalise, unit = normaliser(u.language), error_unit(u.language)
    reference, hypothesis = normalise(u.text), normalise(result.text)
    return Prediction(
        u.key,
        u.audio_filepath,
        u.language,
        duration=round(samples / SAMPLE_RATE, 3),
        reference=u.text,
        hypothesis=result.text,
        reference_normalised=reference,
        hypothesis_normalised=hypothesis,
        unit=unit,
        edits=count(reference, hypothesis, unit).counts,
        decoder=result.decoder,
        passes=result.passes,
        seconds=round(seconds_per_sample * samples, 4),
        language_found=result.language,
    )


def _lines(rows: Sequence[Prediction]) -> str:
    return "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)


def _data_settings(utterances: Sequence[Utterance]) -> dict[str, Any]:
    """The number of utterances, and a hash of their keys of 32 hexadecimal digits, for the settings of a run."""
    digest = hashlib.sha256()
    for u in utterances:
        digest.update(u.key.encode())
    return {"utterances": len(utterances), "utterances_sha256": digest.hexdigest()[:32]}


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    """Writes settings.json, or raises DataError if the folder has a run with others; drops an unfinished last prediction."""
    folder.mkdir(parents=True, exist_ok=True)
    path, settings = folder / SETTINGS, json.loads(json.dumps(settings))
    if path.exists() and (other := json.loads(path.read_text(encoding="utf-8"))) != settings:
        changed = sorted(key for key in other.keys() | settings.keys() if other.get(key) != settings.get(key))
        raise DataError(f"{folder} holds a run with other settings ({', '.join(changed)}); give another --out, or delete it")
    write_whole(path, json.dumps(settings, indent=1) + "\n")
    if (folder / PREDICTIONS).exists():
        text = (folder / PREDICTIONS).read_text(encoding="utf-8")
        write_whole(folder / PREDICTIONS, text[: text.rfind("\n") + 1])
