"""Text that goes round in circles, as decoders write where they do not understand."""

from __future__ import annotations

MAX_PERIOD = 12  # units: a longer phrase that comes so often shows in the compression ratio
TIMES = {1: 5, 2: 4}  # so often in a row must a phrase of so many units come; longer ones three times


def repeats(text: str) -> bool:
    """Whether a phrase comes so often in a row that nobody will have said it: "the the the the the", "go on" four times.

    Units are words; in text without spaces of more than 8 characters (Mandarin) they are characters.
    """
    words = text.lower().split()
    units = list(text) if len(words) == 1 and len(text) > 8 else words
    return any(_longest_run(units, period) >= TIMES.get(period, 3) for period in range(1, MAX_PERIOD + 1))


def _longest_run(units: list[str], period: int) -> int:
    """How often at most a phrase of `period` units comes in a row."""
    longest = same = 0
    for unit, before in zip(units[period:], units, strict=False):
        same = same + 1 if unit == before else 0
        longest = max(longest, same)
    return 1 + longest // period
