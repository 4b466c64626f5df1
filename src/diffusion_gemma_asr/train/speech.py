"""Training and dev data: lists of utterances, and a disk cache of the frozen encoder's frames."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..data.batches import UNLIMITED, Mixture, tempered
from ..data.features import FeatureCache, fingerprint
from ..data.hub import Share
from ..data.manifest import Utterance
from ..data.sound import read_utterance
from ..data.sources import read_source
from ..data.text import plain_text
from ..errors import RecipeError
from ..model.encoder import AcousticEncoder
from .recipe import DataRecipe, TrainRecipe
from .workers import rank, wait_for_all, workers


def mel_of(encoder: AcousticEncoder, utterances: Sequence[Utterance]) -> tuple[Tensor, Tensor]:
    """Reads utterances; returns log-mel spectrograms (B, bins, T), a frame per 10 ms, and their lengths (B,)."""
    return encoder.features([read_utterance(u) for u in utterances])


def frame_cache(folder: Path, encoder: AcousticEncoder, utterances: Sequence[Utterance]) -> FeatureCache:
    """A disk cache of the frozen encoder's frames (n, hidden), after computing missing ones; workers share the work.

    Args:
        folder: of the cache.
        encoder: frozen.
        utterances: whose frames are needed.

    Raises:
        DataError: the folder has frames of another encoder.
        AudioError: a sound file cannot be read.
    """
    device = encoder.device

    def compute(batch: list[Utterance]) -> list[np.ndarray]:
        mel, lengths = mel_of(encoder, batch)
        with torch.no_grad():
            frames, frame_lengths = encoder(mel.to(device), lengths.to(device))
        return [row[:n].float().cpu().numpy() for row, n in zip(frames, frame_lengths.tolist(), strict=True)]

    origin = fingerprint(encoder, *([f"{encoder.silence_s:g} s of silence"] if encoder.silence_s else []))
    FeatureCache.build(folder, utterances, encoder.hidden_size, compute, origin, worker=rank(), workers=workers())
    wait_for_all()
    return FeatureCache.open(folder, utterances, origin)


def first_of(utterances: list[Utterance], count: int | None) -> list[Utterance]:
    """A random subset with a fixed seed, such that a larger one contains a smaller one.

    Args:
        utterances: to choose from.
        count: size of the subset; None returns all in their order.
    """
    if count is None:
        return utterances
    return random.Random(0).sample(utterances, len(utterances))[:count]


class SpeechData:
    """Training and dev data of a recipe.

    Args:
        data: section of the recipe.
        train: section of the recipe.
        languages: codes; utterances in others are left out. Folders of sounds are taken to be in the first.
        encoder: frozen.
        folder: of the run; the frames go to its subfolder frames/ if the recipe does not name another.

    Attributes:
        utterances: training utterances, all lists concatenated.
        texts: their transcripts, written or plain as the recipe requires.
        unheard: (n,) bool, those whose frames are not augmented.
        dev: dev utterances of each list, by its name.
        cache: frames of training and dev utterances.
        mixture: samples batches of training utterances.
    """

    def __init__(
        self, data: DataRecipe, train: TrainRecipe, languages: Sequence[str], encoder: AcousticEncoder, folder: Path
    ):
        def read(source: Path, split: str) -> list[Utterance]:
            share = Share(rank(), workers(), wait_for_all)
            return read_source(source, languages, data.max_duration_s, None, languages[0], split, share)

        lists = [first_of(read(item.manifest, "train"), item.first) for item in data.train]
        self.dev: dict[str, list[Utterance]] = {}
        for source in data.dev:
            name = "/".join([*source.parts[-2:-1], source.name.removesuffix(".jsonl").removesuffix(".json")])
            if name in self.dev:
                raise RecipeError(f"'data.dev' has two lists whose paths end in {name}; rename one's folder")
            self.dev[name] = read(source, "validation")[: train.monitor_samples]
        everything = [u for rows in [*lists, *self.dev.values()] for u in rows]
        self.cache = frame_cache(data.cache_dir or folder / "frames", encoder, everything)
        self.utterances = [u for rows in lists for u in rows]
        self.unheard = torch.tensor([item.unheard for item, rows in zip(data.train, lists, strict=True) for _ in rows])
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
        """(name, language code, utterances) of the dev lists; a list in several languages is split by language."""
        parts = []
        for name, rows in self.dev.items():
            codes = sorted({u.language for u in rows})
            for code in codes:
                part = name if len(codes) == 1 else f"{name}/{code}"
                parts.append((part, code, [u for u in rows if u.language == code]))
        return parts
