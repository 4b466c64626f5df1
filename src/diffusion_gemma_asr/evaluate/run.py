"""A measured run: utterances through a system, one JSON line each, resumable, and the summary of what was written."""

from __future__ import annotations

import json
import platform
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from .. import __version__
from ..audio import SAMPLE_RATE, load_audio
from ..data.manifest import Utterance
from ..data.text import error_unit
from ..errors import AudioError, DataError
from .metrics import Edits, confidence_interval, count, total
from .normalise import normaliser
from .systems import System

PREDICTIONS, SUMMARY, SETTINGS = "predictions.jsonl", "summary.json", "settings.json"
MAX_CLIP_S = 30.0
WORST = 20
LONG_S = 2.0  # sound that is long enough to tell its language by


@dataclass(frozen=True)
class Prediction:
    """One line of predictions.jsonl.

    duration is the sound's length in s and seconds its share, by length, of the batch's wall time; edits are hits,
    substitutions, deletions, insertions between the normalised texts, in `unit`; data_set is the source that it came
    from; found is the language that the system found, where it was not told. A skipped utterance has an error and nothing
    else.
    """

    audio_filepath: str
    language: str
    duration: float
    reference: str
    hypothesis: str = ""
    reference_normalised: str = ""
    hypothesis_normalised: str = ""
    unit: str = "word"
    edits: tuple[int, int, int, int] = (0, 0, 0, 0)
    passes: int = 0
    seconds: float = 0.0
    data_set: str = ""
    error: str | None = None
    found: str | None = None

    @property
    def counts(self) -> Edits:
        """The edits with their names."""
        return Edits(*self.edits)


def evaluate(
    system: System,
    utterances: Sequence[Utterance],
    folder: str | Path,
    batch_size: int = 8,
    skipped: Sequence[str] = (),
    on_batch: Callable[[int, Edits], None] | None = None,
    data_sets: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Transcribes utterances and writes predictions.jsonl and summary.json, going on where a killed run stopped.

    Batches hold clips of like length and are the same however often the run is interrupted: a batch whose lines are not
    all there is done again. The time of a batch covers everything from samples to text; one batch warms up before.

    Args:
        folder: of the run, made if missing.
        skipped: messages about utterances that could not even be listed; they count as skipped.
        on_batch: called after every batch with the utterances done and all edits so far.
        data_sets: name of the data set of each sound file; with several, each has its own rates in the summary.

    Returns:
        what summary.json holds.

    Raises:
        DataError: the folder holds a run with other settings or utterances, or there is nothing to evaluate.
    """
    if not utterances:
        raise DataError("nothing to evaluate: no utterance could be read" + (f" ({skipped[0]})" if skipped else ""))
    folder = Path(folder)
    settings = system.settings() | {"batch_size": batch_size, "utterances": len(utterances)}
    _claim(folder, settings)
    done = {row.audio_filepath: row for row in read_predictions(folder)}
    order = sorted(range(len(utterances)), key=lambda i: (utterances[i].duration, i))
    batches = [[utterances[i] for i in order[at : at + batch_size]] for at in range(0, len(order), batch_size)]
    finished = total([row.counts for row in done.values()])
    warm = False
    with (folder / PREDICTIONS).open("a", encoding="utf-8") as file:
        for batch in batches:
            if all(u.audio_filepath in done for u in batch):
                continue
            rows = _transcribe(system, batch, warm)
            rows = [replace(row, data_set=(data_sets or {}).get(row.audio_filepath, "")) for row in rows]
            warm = True
            lines = [json.dumps(asdict(row), ensure_ascii=False) for row in rows]
            file.write("\n".join(lines) + "\n")
            file.flush()
            done |= {row.audio_filepath: row for row in rows}
            finished = finished + total([row.counts for row in rows])
            if on_batch is not None:
                on_batch(len(done), finished)
    rows = [done[u.audio_filepath] for u in utterances]
    write_whole(folder / PREDICTIONS, "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows))
    summary = summarise(rows, settings, skipped)
    write_whole(folder / SUMMARY, json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    return summary


def _transcribe(system: System, batch: Sequence[Utterance], warm: bool) -> list[Prediction]:
    """The lines of one batch; clips that cannot be read or are too long are skipped."""
    clips: dict[str, np.ndarray] = {}
    errors: dict[str, str] = {}
    for u in batch:
        try:
            clip = load_audio(u.audio_filepath)
            if len(clip) > MAX_CLIP_S * SAMPLE_RATE:
                raise AudioError(f"{u.audio_filepath}: longer than {MAX_CLIP_S:.0f} s; cut it first")
            clips[u.audio_filepath] = clip
        except AudioError as error:
            errors[u.audio_filepath] = str(error)
    heard = [u for u in batch if u.audio_filepath in clips]
    if heard and not warm:
        system.transcribe([clips[u.audio_filepath] for u in heard], [u.language for u in heard])
    start = time.perf_counter()
    found = system.transcribe([clips[u.audio_filepath] for u in heard], [u.language for u in heard]) if heard else []
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    sound_s = {u.audio_filepath: len(clips[u.audio_filepath]) / SAMPLE_RATE for u in heard}
    texts = dict(zip((u.audio_filepath for u in heard), found, strict=True))
    rows = []
    for u in batch:
        key = u.audio_filepath
        if key in errors:
            rows.append(Prediction(key, u.language, u.duration, u.text, error=errors[key]))
            continue
        share = seconds * sound_s[key] / sum(sound_s.values())
        said, written = (normaliser(u.language)(text) for text in (u.text, texts[key].text))
        unit = error_unit(u.language)
        row = Prediction(
            key, u.language, round(sound_s[key], 3), u.text, texts[key].text, said, written, unit,
            count(said, written, unit).counts, texts[key].passes, round(share, 4), found=texts[key].language,
        )  # fmt: skip
        rows.append(row)
    return rows


def summarise(rows: Sequence[Prediction], settings: dict[str, Any], skipped: Sequence[str] = ()) -> dict[str, Any]:
    """Error rates by language with counts and intervals, speed, memory, and the machine."""
    heard = [row for row in rows if row.error is None]
    names = sorted({row.data_set for row in heard})
    sound, wall = sum(row.duration for row in heard), sum(row.seconds for row in heard)
    return {
        "settings": settings,
        "languages": rates_by_language(heard),
        "data_sets": {name: rates_by_language([row for row in heard if row.data_set == name]) for name in names},
        "utterances": len(heard),
        "skipped": len(skipped) + len(rows) - len(heard),
        "skipped_why": [*skipped, *(row.error for row in rows if row.error is not None)][:WORST],
        "sound_s": round(sound, 2),
        "passes": round(sum(row.passes for row in heard) / max(1, len(heard)), 3),
        "speed": {
            "seconds": round(wall, 2),
            "rtfx": round(sound / wall, 2) if wall else None,
            "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            "peak_gpu_memory_mb": torch.cuda.max_memory_allocated() >> 20 if torch.cuda.is_available() else None,
        },
        "machine": machine(),
    }


def rates_by_language(rows: Sequence[Prediction]) -> dict[str, dict[str, Any]]:
    """The rates of each language's rows; but for English also with Unicode's marks kept."""
    languages = {}
    for language in sorted({row.language for row in rows}):
        mine = [row for row in rows if row.language == language]
        languages[language] = {"utterances": len(mine)} | rates([row.counts for row in mine]) | {"unit": mine[0].unit}
        languages[language] |= found_rightly(mine)
        if language != "en":
            kept = normaliser(language, "marks")
            unit = error_unit(language)
            with_marks = [count(kept(row.reference), kept(row.hypothesis), unit) for row in mine]
            languages[language]["with_marks"] = rates(with_marks)
    return languages


def found_rightly(rows: Sequence[Prediction]) -> dict[str, Any]:
    """How often the language was found rightly, and how often in sound of over 2 s; nothing where it was told."""
    asked = [row for row in rows if row.found is not None]
    if not asked:
        return {}
    longer = [row for row in asked if row.duration > LONG_S]

    def share(part: Sequence[Prediction]) -> float | None:
        return round(sum(row.found == row.language for row in part) / len(part), 5) if part else None

    return {"language_found": share(asked), "language_found_over_2_s": share(longer), "over_2_s": len(longer)}


def rates(edits: Sequence[Edits]) -> dict[str, Any]:
    """An error rate with its 95 % bootstrap interval and its counts."""
    whole = total(edits)
    low, high = confidence_interval(edits)
    return {
        "error_rate": round(whole.rate, 5), "low": round(low, 5), "high": round(high, 5),
        "substitutions": whole.substitutions, "deletions": whole.deletions, "insertions": whole.insertions,
        "reference": whole.reference,
    }  # fmt: skip


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": processor(), "gpu": gpu,
        "threads": torch.get_num_threads(), "torch": torch.__version__, "transformers": transformers.__version__,
        "package": __version__, "date": date.today().isoformat(),
    }  # fmt: skip


def processor() -> str:
    """The processor's name and how many there are, as Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} × {names[0]}" if names else platform.processor()


def read_predictions(folder: str | Path) -> list[Prediction]:
    """The lines of a run; what a kill cut short is left out."""
    path = Path(folder) / PREDICTIONS
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
        content = json.loads(line)
        rows.append(Prediction(**content | {"edits": tuple(content["edits"])}))
    return rows


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    """Makes the folder this run's, or finds that it is; drops a line that a kill cut short."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SETTINGS
    if path.exists() and (held := json.loads(path.read_text(encoding="utf-8"))) != settings:
        odd = sorted(key for key in held.keys() | settings.keys() if held.get(key) != settings.get(key))
        raise DataError(f"{folder} holds a run with other settings ({', '.join(odd)}); give another --out, or delete it")
    write_whole(path, json.dumps(settings, indent=1) + "\n")
    if (folder / PREDICTIONS).exists():
        text = (folder / PREDICTIONS).read_text(encoding="utf-8")
        write_whole(folder / PREDICTIONS, text[: text.rfind("\n") + 1])


def write_whole(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
