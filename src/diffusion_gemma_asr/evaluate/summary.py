"""summary.json: error rates by language and data set, decoders, speed, and the machine. Always valid JSON."""

from __future__ import annotations

import math
import platform
from collections import Counter
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers

from ..errors import __version__
from .metrics import Edits, confidence_interval, edits, percent, total
from .normalise import NORMALISER
from .predictions import Prediction

REASONS = 20  # listed reasons of skipped utterances at most
LONG_S = 2.0  # sound above this length is also scored apart in language identification


def summarise(rows: Sequence[Prediction], settings: dict[str, Any], skipped: Sequence[str] = ()) -> dict[str, Any]:
    """The content of summary.json.

    Args:
        rows: predictions of the run.
        settings: of the run.
        skipped: messages about utterances that could not be listed.
    """
    transcribed = [row for row in rows if row.error is None]
    names = sorted({row.data_set for row in transcribed})
    sound, wall = sum(row.duration for row in transcribed), sum(row.seconds for row in transcribed)
    passes = [row.passes for row in transcribed if row.passes is not None]
    return {
        "settings": settings,
        "normaliser": NORMALISER,
        "languages": rates_by_language(transcribed),
        "data_sets": {name: rates_by_language([row for row in transcribed if row.data_set == name]) for name in names},
        "utterances": len(transcribed),
        "skipped": len(skipped) + len(rows) - len(transcribed),
        "skipped_why": [*skipped, *(row.error for row in rows if row.error is not None)][:REASONS],
        "sound_s": round(sound, 2),
        "decoders": decoders(transcribed),
        "passes": round(sum(passes) / len(passes), 3) if passes else None,
        "speed": {
            "seconds": round(wall, 2),
            "rtfx": round(sound / wall, 2) if wall else None,
            "peak_memory_mb": peak_memory_mb(),
            "peak_gpu_memory_mb": torch.cuda.max_memory_allocated() >> 20 if torch.cuda.is_available() else None,
        },
        "machine": machine(),
    }


def rates_by_language(rows: Sequence[Prediction]) -> dict[str, dict[str, Any]]:
    """Rates, decoders and language identification by language code.

    Languages other than English also have rates with the normaliser that keeps Unicode marks, under "with_marks".
    """
    languages = {}
    for language in sorted({row.language for row in rows}):
        part = [row for row in rows if row.language == language]
        languages[language] = {"utterances": len(part)} | rates([row.counts for row in part])
        languages[language] |= {"unit": part[0].unit, "decoders": decoders(part)} | language_accuracy(part)
        if language != "en":
            with_marks = [edits(row.reference, row.hypothesis, language, "marks") for row in part]
            languages[language]["with_marks"] = rates(with_marks)
    return languages


def decoders(rows: Sequence[Prediction]) -> dict[str, int]:
    """The number of texts by each decoder, in descending order."""
    return dict(Counter(row.decoder for row in rows).most_common())


def language_accuracy(rows: Sequence[Prediction]) -> dict[str, Any]:
    """Accuracy of language identification.

    Returns:
        language_found: the accuracy on all rows;
        language_found_over_2_s: that on sounds of over 2 s, None without any;
        over_2_s: the number of these. Empty if the language was given.
    """
    identified = [row for row in rows if row.language_found is not None]
    if not identified:
        return {}
    longer = [row for row in identified if row.duration > LONG_S]

    def accuracy(part: Sequence[Prediction]) -> float | None:
        return round(sum(row.language_found == row.language for row in part) / len(part), 5) if part else None

    return {
        "language_found": accuracy(identified),
        "language_found_over_2_s": accuracy(longer),
        "over_2_s": len(longer),
    }


def rates(rows: Sequence[Edits]) -> dict[str, Any]:
    """The error rate with its 95 % bootstrap interval and edit counts; a rate that is not finite is None."""
    whole = total(rows)
    low, high = confidence_interval(rows)
    return {
        "error_rate": round(whole.rate, 5) if math.isfinite(whole.rate) else None,
        "low": round(low, 5),
        "high": round(high, 5),
        "substitutions": whole.substitutions,
        "deletions": whole.deletions,
        "insertions": whole.insertions,
        "reference": whole.reference,
    }


def parts(summary: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """(data set, language, rates) of a summary, by data set; with several data sets also those of "all"."""
    rows = [(name, key, rates) for name, languages in summary["data_sets"].items() for key, rates in languages.items()]
    if len(summary["data_sets"]) > 1:
        rows += [("all", key, rates) for key, rates in summary["languages"].items()]
    return rows


def cells(summary: dict[str, Any], row: dict[str, Any]) -> dict[str, str]:
    """The cells of a table for one of `parts`, by the heading of the column.

    Args:
        summary: of the run.
        row: rates of a data set and language.
    """
    measure = "WER" if row["unit"] == "word" else "CER"
    return {
        "error rate": f"{measure} {percent(row['error_rate'], 2)} ({percent(row['low'])} – {percent(row['high'])})",
        "written by": ", ".join(f"{name} {count}" for name, count in row["decoders"].items()),
        "passes": "–" if summary["passes"] is None else str(summary["passes"]),
        "RTFx": "–" if summary["speed"]["rtfx"] is None else str(summary["speed"]["rtfx"]),
    }


def peak_memory_mb() -> int | None:
    """Peak resident memory of this process in MB; None on Windows."""
    try:
        import resource
    except ModuleNotFoundError:
        return None
    unit = 1 << 20 if platform.system() == "Darwin" else 1 << 10  # macOS counts bytes, Linux kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit


def machine() -> dict[str, Any]:
    """Hardware, versions and date of a measurement."""
    return {
        "processor": processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "package": __version__,
        "date": date.today().isoformat(),
    }


def processor() -> str:
    """Number and name of the CPUs; on systems other than Linux the name alone."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} × {names[0]}" if names else platform.processor()
