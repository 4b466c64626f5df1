"""Batches of like lengths, as a function of the step: a run that resumes at step n sees what it would have seen."""

from __future__ import annotations

import random
from collections.abc import Sequence

UNLIMITED = 2**62  # a batch_total that leaves the size to batch_size alone


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
        """Indices of the utterances of one step; quickest where steps are asked for in rising order."""
        while step < self._epochs[self._current]:
            self._current -= 1
            self._batches = self._draw(self._current)
        while step >= self._epochs[self._current] + len(self._batches):
            if len(self._epochs) == self._current + 1:
                self._epochs.append(self._epochs[self._current] + len(self._batches))
            self._current += 1
            self._batches = self._draw(self._current)
        return self._batches[step - self._epochs[self._current]]


def tempered(sizes: Sequence[int], temperature: float) -> list[float]:
    """Weights size ** (1 / temperature): at 1 lists are drawn by their sizes, the higher the more alike (Arivazhagan et al.
    2019, arXiv 1907.05019)."""
    return [size ** (1 / temperature) for size in sizes]


class Mixture:
    """Draws from several lists of utterances by their weights, in batches of like length.

    Eight passes are drawn ahead, each as long as all lists together; a list that is drawn more often than it is long is
    repeated in a new order, one that is drawn less often is shown in parts.

    Args:
        sizes: utterances in each list; the lists are thought of as joined.
        weights: share of each list.
        lengths: size of every utterance of the joined lists.
        batch_total, batch_size, seed: see `LengthBuckets`.
    """

    PASSES = 8

    def __init__(
        self,
        sizes: Sequence[int],
        weights: Sequence[float],
        lengths: Sequence[int],
        batch_total: int,
        batch_size: int,
        seed: int,
    ):
        rng = random.Random(seed)
        start, chosen = 0, []
        for size, weight in zip(sizes, weights, strict=True):
            count = round(sum(sizes) * self.PASSES * weight / sum(weights))
            while count > 0:
                chosen += [start + i for i in rng.sample(range(size), min(size, count))]
                count -= size
            start += size
        self._chosen = chosen
        self._buckets = LengthBuckets([lengths[i] for i in chosen], batch_total, batch_size, seed)

    def at(self, step: int) -> list[int]:
        """Indices into the joined lists of one batch."""
        return [self._chosen[i] for i in self._buckets.at(step)]
