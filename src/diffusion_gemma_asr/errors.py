"""Errors that a user can act on. Every message names the file or value and says what to do about it."""

from __future__ import annotations

__version__ = "0.2.0"


class AsrError(Exception):
    """Base of all errors raised on purpose; the command line prints its message without a traceback."""


class AudioError(AsrError):
    """Sound that cannot be read or used."""


class CheckpointError(AsrError):
    """A model folder or hub repository that is missing, incomplete, or does not fit its other parts."""


class RecipeError(AsrError):
    """A recipe file with a missing, unknown or impossible value."""


class DataError(AsrError):
    """A manifest or data set that cannot be used."""


class SynthesisError(AsrError):
    """Synthetic speech that cannot be made, for instance because espeak-ng is missing."""


def first_line(error: Exception) -> str:
    """The first line of an exception's message; other libraries write paragraphs."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
