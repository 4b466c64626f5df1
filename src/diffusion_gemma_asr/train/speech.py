"""Speech to train on and to judge by: lists of utterances, and the frozen encoder's frames of them, on disk."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..data.batches import UNLIMITED, Mixture, tempered
from ..data.features import FeatureCache, fingerprint
from ..data.manifest import Utterance
from ..data.sound import read_utterance
from ..data.sources import read_source
from ..data.text import plain_text
from ..model.encoder import AcousticEncoder
from .recipe import DataRecipe, TrainRecipe
from .workers import rank, wait_for_all, workers


def mel_of(encoder: AcousticEncoder, utterances: Sequence[Utterance]) -> tuple[Tensor, Tensor]:
    """Log-mel spectrograms (B, bins, T) of utterances, and their lengths (B,)."""
    return encoder.features([read_utterance(u) for u in utterances])


def frame_cache(folder: Path, encoder: AcousticEncoder, utterances: Sequence[Utterance]) -> FeatureCache:
    """Frames (n, hidden) of the frozen encoder for all utterances, computed once and kept in `folder`.

    Raises:
        DataError: the folder holds frames of another encoder.
        AudioError: a sound cannot be read.
    """
    device = next(encoder.parameters()).device

    def compute(batch: list[Utterance]) -> list[np.ndarray]:
        mel, lengths = mel_of(encoder, batch)
        with torch.no_grad():
            frames, frame_lengths = encoder(mel.to(device), lengths.to(device))
        return [row[:n].float().cpu().numpy() for row, n in zip(frames, frame_lengths.tolist(), strict=True)]

    origin = fingerprint(encoder)
    FeatureCache.build(folder, utterances, encoder.hidden_size, compute, origin, worker=rank(), workers=workers())
    wait_for_all()
    return FeatureCache.open(folder, utterances, origin)


def first_of(utterances: list[Utterance], count: int | None) -> list[Utterance]:
    """So many utterances out of a shuffle that is always the same, so that a larger count holds a smaller one's; None: all,
    as they come."""
    if count is None:
        return utterances
    return random.Random(0).sample(utterances, len(utterances))[:count]


class SpeechData:
    """What a recipe trains on and is judged by.

    Args:
        data, train: of the recipe.
        languages: codes; utterances in others are left out. A folder of sounds, which does not say its language, is in the
            first.
        encoder: frozen.
        folder: of the run, for the frames where the recipe names no place.

    Attributes:
        utterances: to train on.
        texts: what they say, as the recipe wants it written.
        dev: lists to judge by, by name.
        cache: frames of all of them.
        mixture: which utterances make up a batch.
    """

    def __init__(
        self, data: DataRecipe, train: TrainRecipe, languages: Sequence[str], encoder: AcousticEncoder, folder: Path
    ):
        def read(source: Path, split: str) -> list[Utterance]:
            return read_source(source, languages, data.max_duration_s, None, languages[0], split)

        lists = [first_of(read(item.manifest, "train"), item.first) for item in data.train]
        self.dev = {
            "/".join(source.with_suffix("").parts[-2:]): read(source, "validation")[: train.monitor_samples]
            for source in data.dev
        }
        everything = [u for rows in [*lists, *self.dev.values()] for u in rows]
        self.cache = frame_cache(data.cache_dir or folder / "frames", encoder, everything)
        self.utterances = [u for rows in lists for u in rows]
        plain = data.transcript == "plain"
        self.texts = [plain_text(u.text, u.language) if plain else u.text.strip() for u in self.utterances]
        sizes = [len(rows) for rows in lists]
        factors = [1.0] * len(sizes) if data.temperature is None else tempered(sizes, data.temperature)
        self.mixture = Mixture(
            sizes,
            [factor * item.weight for factor, item in zip(factors, data.train, strict=True)],
            [self.cache.length(u) for u in self.utterances],
            train.batch_frames or UNLIMITED,
            train.batch_size,
            train.seed,
        )

    def dev_by_language(self) -> list[tuple[str, str, list[Utterance]]]:
        """The lists to judge by, those in several languages in parts: name, code, utterances."""
        parts = []
        for name, rows in self.dev.items():
            codes = sorted({u.language for u in rows})
            for code in codes:
                part = name if len(codes) == 1 else f"{name}/{code}"
                parts.append((part, code, [u for u in rows if u.language == code]))
        return parts
