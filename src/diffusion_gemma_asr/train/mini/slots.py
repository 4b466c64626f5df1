"""Imitated audio tokens: what a CTC-trained projector writes into the slots, made from text alone.

A projector trained by CTC through lm_head turns sound into rows that resemble token embeddings: some tokens twice,
blanks between them, now and then a wrong one, none or one too many, and all of them blurred. A backbone that has
learnt to read such slots has the skill that the adapter later builds on.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import AsrError

REPEATS = ((1, 0.68), (2, 0.27), (3, 0.05))  # slots that show one token
BLANKS = ((0, 0.45), (1, 0.3), (2, 0.15), (3, 0.07), (5, 0.03))  # blanks behind it


@dataclass(frozen=True)
class SlotNoise:
    """Largest levels; each example draws its own, uniformly from 0. `spread` is a plain probability."""

    spread: float = 1.0  # probability that a token takes as many slots, blanks included, as in speech, not one
    wrong: float = 0.3  # probability a token
    missing: float = 0.1  # probability a token
    extra: float = 0.1  # probability a token
    blur: float = 0.6  # share of another token mixed into a slot
    gaussian: float = 0.7  # noise relative to the slot's size


def lookalikes(tokens: Sequence[str], first: int, count: int = 8) -> np.ndarray:
    """(V, count) ids of the most similarly spelled tokens of each token, drawn among equals by a fixed seed; ids below
    `first` are special and never chosen."""
    try:
        from rapidfuzz import fuzz, process  # only the small models' backbone needs it
    except ModuleNotFoundError:
        raise AsrError("training a backbone on text needs the package rapidfuzz: pip install rapidfuzz") from None
    names = list(tokens[first:])
    similarity = process.cdist(names, names, scorer=fuzz.ratio, dtype=np.uint8)
    distance = np.random.default_rng(0).integers(0, 64, similarity.shape, dtype=np.int16) - 64 * similarity.astype(np.int16)
    np.fill_diagonal(distance, 64)  # farther than any other
    nearest = np.argpartition(distance, count, axis=1)[:, :count] + first
    special = np.tile(np.arange(first, first + count), (first, 1))
    return np.concatenate([special, nearest])


def imitate(
    target: Sequence[int], similar: np.ndarray, blank: int, noise: SlotNoise, rng: random.Random
) -> tuple[list[int], list[int], float, float]:
    """Spreads a transcript over slots as CTC would, with errors.

    Args:
        target: token ids of the transcript.
        similar: from `lookalikes`.
        blank: the CTC blank, the pad token.
        noise: largest levels.
        rng: of all draws.

    Returns:
        ids of the slots; ids of the tokens blurred into them; the example's blur and gaussian levels.
    """
    wrong, missing, extra = (rng.uniform(0, level) for level in (noise.wrong, noise.missing, noise.extra))

    def other(token: int) -> int:
        return int(rng.choice(similar[token])) if rng.random() < 0.7 else rng.randrange(len(similar))

    slots = [blank] * (rng.randint(0, 3) if rng.random() < noise.spread else 0)
    for token in target:
        if rng.random() < missing:
            slots += [blank] * rng.randint(0, 2)
            continue
        shown = other(token) if rng.random() < wrong else token
        if slots and slots[-1] == shown:
            slots.append(blank)  # CTC reads equal neighbours as one
        spread = rng.random() < noise.spread
        slots += [shown] * (_draw(REPEATS, rng) if spread else 1)
        slots += [blank] * (_draw(BLANKS, rng) if spread else 0)
        if rng.random() < extra:
            slots.append(other(token))
    slots += [blank] * (rng.randint(0, 3) if rng.random() < noise.spread else 0)
    mixed = [rng.randrange(len(similar)) if slot == blank else other(slot) for slot in slots]
    return slots or [blank], mixed or [blank], rng.uniform(0, noise.blur), rng.uniform(0, noise.gaussian)


def collapsed(slots: Sequence[int], blank: int) -> list[int]:
    """What CTC reads in slots: equal neighbours as one, blanks dropped."""
    return [token for i, token in enumerate(slots) if token != blank and (i == 0 or slots[i - 1] != token)]


def _draw(table: Sequence[tuple[int, float]], rng: random.Random) -> int:
    return rng.choices([value for value, _ in table], [weight for _, weight in table])[0]


def slot_rows(shown: Tensor, mixed: Tensor, blur: Tensor, gaussian: Tensor, scale: float) -> Tensor:
    """Blurs token rows into slots of one size, as the projector's output is normalised.

    Args:
        shown, mixed: (N, H) embeddings of the slots' tokens and of those blurred into them.
        blur, gaussian: (N, 1) levels; each slot draws its share of another token up to its blur level.
        scale: root mean square of one component.

    Returns:
        (N, H).
    """
    share = blur * torch.rand_like(blur)
    rows = F.rms_norm(shown, shown.shape[-1:]) * (1 - share) + F.rms_norm(mixed, mixed.shape[-1:]) * share
    rows = rows + gaussian * torch.randn_like(rows)
    return F.rms_norm(rows, rows.shape[-1:]) * scale
