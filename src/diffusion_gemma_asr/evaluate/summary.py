"""summary.json: error rates by language and data set, what wrote the texts, speed, and the machine. Always valid JSON."""

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

REASONS = 20  # that are named, of utterances that were skipped
LONG_S = 2.0  # sound that is long enough to tell its language by


def summarise(rows: Sequence[Prediction], settings: dict[str, Any], skipped: Sequence[str] = ()) -> dict[str, Any]:
    """What summary.json holds.

    Args:
        rows: of the run.
        settings: of the run.
        skipped: messages about utterances that could not even be listed.
    """
    written = [row for row in rows if row.error is None]
    names = sorted({row.data_set for row in written})
    sound, wall = sum(row.duration for row in written), sum(row.seconds for row in written)
    passes = [row.passes for row in written if row.passes is not None]
    return {
        "settings": settings,
        "normaliser": NORMALISER,
        "languages": rates_by_language(written),
        "data_sets": {name: rates_by_language([row for row in written if row.data_set == name]) for name in names},
        "utterances": len(written),
        "skipped": len(skipped) + len(rows) - len(written),
        "skipped_why": [*skipped, *(row.error for row in rows if row.error is not None)][:REASONS],
        "sound_s": round(sound, 2),
        "decoders": decoders(written),
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
    """The rates of each language's rows; but for English also with Unicode's marks kept."""
    languages = {}
    for language in sorted({row.language for row in rows}):
        mine = [row for row in rows if row.language == language]
        languages[language] = {"utterances": len(mine)} | rates([row.counts for row in mine])
        languages[language] |= {"unit": mine[0].unit, "decoders": decoders(mine)} | found_rightly(mine)
        if language != "en":
            with_marks = [edits(row.reference, row.hypothesis, language, "marks") for row in mine]
            languages[language]["with_marks"] = rates(with_marks)
    return languages


def decoders(rows: Sequence[Prediction]) -> dict[str, int]:
    """How many texts each decoder wrote, the most first."""
    return dict(Counter(row.decoder for row in rows).most_common())


def found_rightly(rows: Sequence[Prediction]) -> dict[str, Any]:
    """How often the language was found rightly, and how often in sound of over 2 s; nothing where it was named."""
    asked = [row for row in rows if row.language_found is not None]
    if not asked:
        return {}
    longer = [row for row in asked if row.duration > LONG_S]

    def share(part: Sequence[Prediction]) -> float | None:
        return round(sum(row.language_found == row.language for row in part) / len(part), 5) if part else None

    return {"language_found": share(asked), "language_found_over_2_s": share(longer), "over_2_s": len(longer)}


def rates(rows: Sequence[Edits]) -> dict[str, Any]:
    """An error rate, None where nothing was said, with its 95 % bootstrap interval and its counts."""
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
    """(data set, language, rates) of a summary: each data set's languages and, where there are several, those of all."""
    rows = [(name, key, rates) for name, by in summary["data_sets"].items() for key, rates in by.items()]
    if len(summary["data_sets"]) > 1:
        rows += [("all", key, rates) for key, rates in summary["languages"].items()]
    return rows


def cells(summary: dict[str, Any], row: dict[str, Any]) -> dict[str, str]:
    """What tables say of one of `parts`, by the heading of the column; the rate with its unit and its 95 % interval."""
    measure = "WER" if row["unit"] == "word" else "CER"
    return {
        "error rate": f"{measure} {percent(row['error_rate'], 2)} ({percent(row['low'])} – {percent(row['high'])})",
        "written by": ", ".join(f"{name} {count}" for name, count in row["decoders"].items()),
        "passes": "–" if summary["passes"] is None else str(summary["passes"]),
        "RTFx": "–" if summary["speed"]["rtfx"] is None else str(summary["speed"]["rtfx"]),
    }


def peak_memory_mb() -> int | None:
    """The most memory that this process has held, in MB; None on Windows, which does not say it this way."""
    try:
        import resource
    except ModuleNotFoundError:
        return None
    unit = 1 << 20 if platform.system() == "Darwin" else 1 << 10  # macOS counts bytes, Linux kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
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
    """The processor's name and how many there are, as Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} × {names[0]}" if names else platform.processor()
