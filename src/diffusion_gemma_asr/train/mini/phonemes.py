"""Phoneme labels of encoder frames, for synthetic speech."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ...data.manifest import Utterance
from ...errors import DataError

FRAME_S = 0.02  # of an encoder frame


class PhonemeTimes:
    """The times of phonemes in synthetic corpora.

    Args:
        files: phonemes.jsonl of each corpus (data/synthetic/synth.py).

    Attributes:
        symbols: all phonemes of the corpora, sorted; the classes of a phoneme head.

    Raises:
        DataError: a file is missing or damaged.
    """

    def __init__(self, files: Sequence[Path]):
        self._spans: dict[str, list[tuple[str, float, float]]] = {}
        for file in files:
            try:
                for line in file.read_text(encoding="utf-8").splitlines():
                    row = json.loads(line)
                    self._spans[os.path.abspath(file.parent / row["audio_filepath"])] = row["phonemes"]
            except (OSError, ValueError, KeyError) as error:
                raise DataError(f"{file} holds no times of phonemes ({error}); make the synthetic speech anew") from None
        self.symbols = sorted({symbol for spans in self._spans.values() for symbol, _, _ in spans})
        self._index = {symbol: i for i, symbol in enumerate(self.symbols)}

    def frames(self, utterance: Utterance, count: int) -> Tensor:
        """Labels of an utterance's frames.

        Args:
            utterance: of any corpus.
            count: number of 20 ms frames.

        Returns:
            (count,) index of the phoneme in the middle of each frame; -100 if there is none, or it is unknown.
        """
        labels = torch.full((count,), -100)
        for symbol, start, end in self._spans.get(utterance.audio_filepath, ()):
            labels[max(0, round(start / FRAME_S)) : round(end / FRAME_S)] = self._index[symbol]
        return labels
