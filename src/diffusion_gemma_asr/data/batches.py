"""Batches of like lengths, as a function of the step: a run that resumes at step n sees what it would have seen."""

from __future__ import annotations

import random
from collections.abc import Sequence


class LengthBuckets:
    """Cuts utterances into batches of like length, anew for every epoch.

    Args:
        lengths: size of every utterance (any unit: frames, tokens).
        batch_total: a batch holds at most this many units, padding included.
        batch_size: and at most this many utterances.
        seed: of the shuffle.
    """

    def __init__(self, lengths: Sequence[int], batch_total: int, batch_size: int, seed: int):
        self.lengths, self.batch_total, self.batch_size, self.seed = lengths, batch_total, batch_size, seed
        self._epochs: list[int] = [0]  # first step of every epoch drawn so far
        self._batches = self._draw(0)
        self._current = 0

    def _draw(self, epoch: int) -> list[list[int]]:
        rng = random.Random(self.seed * 7919 + epoch)
        # Jittered lengths: neighbours in a batch change from epoch to epoch.
        order = sorted(range(len(self.lengths)), key=lambda i: self.lengths[i] * rng.uniform(0.9, 1.1))
        batches: list[list[int]] = []
        batch: list[int] = []
        longest = 0
        for i in order:
            longest_now = max(longest, self.lengths[i])
            if batch and (longest_now * (len(batch) + 1) > self.batch_total or len(batch) == self.batch_size):
                batches.append(batch)
                batch, longest_now = [], self.lengths[i]
            batch.append(i)
            longest = longest_now
        batches.append(batch)
        rng.shuffle(batches)
        return batches

    def at(self, step: int) -> list[int]:
        """Indices of the utterances of one step; steps are asked for in rising order."""
        while step >= self._epochs[self._current] + len(self._batches):
            self._epochs.append(self._epochs[self._current] + len(self._batches))
            self._current += 1
            self._batches = self._draw(self._current)
        return self._batches[step - self._epochs[self._current]]
