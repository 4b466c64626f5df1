"""Imitated audio tokens: text corrupted to resemble the output of a CTC-trained projector.

A projector trained by CTC through lm_head maps sound to vectors that resemble token embeddings: repeated tokens, blanks
between them, some substitutions, deletions and insertions, and noise on all. A backbone pretrained to read these is
prepared for real audio tokens.
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

REPEATS = ((1, 0.68), (2, 0.27), (3, 0.05))  # (slots of a token, probability)
BLANKS = ((0, 0.45), (1, 0.3), (2, 0.15), (3, 0.07), (5, 0.03))  # (blanks behind a token, probability)


@dataclass(frozen=True)
class SlotNoise:
    """Levels of noise. All but `spread` are upper limits: each example draws its level uniformly from 0."""

    spread: float = 1.0  # probability that a token has repeats and blanks as in speech, instead of one slot
    wrong: float = 0.3  # probability of substituting a token
    missing: float = 0.1  # probability of deleting a token
    extra: float = 0.1  # probability of an insertion behind a token
    blur: float = 0.6  # share of another token's embedding in a slot
    gaussian: float = 0.7  # standard deviation of noise, relative to a slot's root mean square


def lookalikes(tokens: Sequence[str], first: int, count: int = 8) -> np.ndarray:
    """The most similarly spelled tokens of each token; ties are broken at random with a fixed seed.

    Args:
        tokens: spellings of the vocabulary, in order of their ids.
        first: lowest id of an ordinary token; lower ones are special and never chosen.
        count: similar tokens for each token.

    Returns:
        (V, count) ids.

    Raises:
        AsrError: rapidfuzz is not installed.
    """
    try:
        from rapidfuzz import fuzz, process  # only the small models' backbone needs it
    except ModuleNotFoundError:
        raise AsrError("training a backbone on text needs the package rapidfuzz: pip install rapidfuzz") from None
    names = list(tokens[first:])
    similarity = process.cdist(names, names, scorer=fuzz.ratio, dtype=np.uint8)
    distance = np.random.default_rng(0).integers(0, 64, similarity.shape, dtype=np.int16) - 64 * similarity.astype(np.int16)
    np.fill_diagonal(distance, 64)  # larger than any other: no token is similar to itself
    nearest = np.argpartition(distance, count, axis=1)[:, :count] + first
    special = np.tile(np.arange(first, first + count), (first, 1))
    return np.concatenate([special, nearest])


def imitate(
    target: Sequence[int], similar: np.ndarray, blank: int, noise: SlotNoise, rng: random.Random
) -> tuple[list[int], list[int], float, float]:
    """Draws a CTC path of a transcript, with errors.

    Args:
        target: token ids of the transcript.
        similar: (V, count), see `lookalikes`.
        blank: id of the CTC blank, the pad token.
        noise: upper limits of the levels.
        rng: of all draws.

    Returns:
        token ids of the slots; token ids to blur into them; the example's blur level and gaussian level.
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
            slots.append(blank)  # CTC merges equal neighbours
        spread = rng.random() < noise.spread
        slots += [shown] * (_draw(REPEATS, rng) if spread else 1)
        slots += [blank] * (_draw(BLANKS, rng) if spread else 0)
        if rng.random() < extra:
            slots.append(other(token))
    slots += [blank] * (rng.randint(0, 3) if rng.random() < noise.spread else 0)
    mixed = [rng.randrange(len(similar)) if slot == blank else other(slot) for slot in slots]
    return slots or [blank], mixed or [blank], rng.uniform(0, noise.blur), rng.uniform(0, noise.gaussian)


def collapsed(slots: Sequence[int], blank: int) -> list[int]:
    """Collapses a CTC path: merges equal neighbours, then drops blanks."""
    return [token for i, token in enumerate(slots) if token != blank and (i == 0 or slots[i - 1] != token)]


def _draw(table: Sequence[tuple[int, float]], rng: random.Random) -> int:
    """Samples a value from (value, probability) pairs."""
    return rng.choices([value for value, _ in table], [weight for _, weight in table])[0]


def slot_rows(shown: Tensor, mixed: Tensor, blur: Tensor, gaussian: Tensor, scale: float) -> Tensor:
    """Mixes embeddings and noise into imitated audio tokens, normalised as the projector's output is.

    Args:
        shown: (N, H) embeddings of the slots' tokens.
        mixed: (N, H) embeddings to blur into them.
        blur: (N, 1) levels; the share of `mixed` is uniform from 0 to the level.
        gaussian: (N, 1) levels of noise.
        scale: root mean square of the result's components.

    Returns:
        (N, H).
    """
    share = blur * torch.rand_like(blur)
    rows = F.rms_norm(shown, shown.shape[-1:]) * (1 - share) + F.rms_norm(mixed, mixed.shape[-1:]) * share
    rows = rows + gaussian * torch.randn_like(rows)
    return F.rms_norm(rows, rows.shape[-1:]) * scale
