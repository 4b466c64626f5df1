"""Length-bucketed batches as a function of the step: a resumed run sees the batches of an uninterrupted one."""

from __future__ import annotations

import random
from collections.abc import Sequence

UNLIMITED = 2**62  # a batch_total that leaves the size to batch_size alone


class LengthBuckets:
    """Batches of utterances of similar length, shuffled anew for every epoch.

    Args:
        lengths: length of every utterance, in any unit (frames, tokens).
        batch_total: units in a batch at most, padding included.
        batch_size: utterances in a batch at most.
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
        """The batch of one step; fastest when steps are requested in rising order.

        Args:
            step: counts from 0, over all epochs.

        Returns:
            indices of the batch's utterances.
        """
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
    """Sampling weights size ** (1 / temperature) (Arivazhagan et al. 2019, arXiv 1907.05019).

    Args:
        sizes: utterances in each list.
        temperature: 1 samples in proportion to size; higher values approach uniform sampling.

    Returns:
        a weight for each list, not normalised.
    """
    return [size ** (1 / temperature) for size in sizes]


class Mixture:
    """Weighted sampling from several lists of utterances, in batches of similar length.

    Draws PASSES times as many utterances as all lists have together, and batches these. Within a list sampling is without
    replacement; a list that is exhausted starts again in a new order.

    Args:
        sizes: utterances in each list.
        weights: sampling weight of each list, not normalised.
        lengths: length of every utterance, all lists concatenated.
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
        """The batch of one step, as indices into the concatenated lists."""
        return [self._chosen[i] for i in self._buckets.at(step)]
