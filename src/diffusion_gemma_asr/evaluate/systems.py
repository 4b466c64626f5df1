"""What can be evaluated: anything that turns a batch of clips into texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import torch

from ..decoding import EngineName, Start
from ..denoise import DenoiseOptions
from ..model import DiffusionGemmaASR
from ..prompt import AUTO


@dataclass(frozen=True)
class Hypothesis:
    """What a system wrote for a clip, how many passes of its decoder that took, and the language that it found, if it had
    to."""

    text: str
    passes: int
    language: str | None = None


class System(Protocol):
    """A speech recogniser under test."""

    def settings(self) -> dict[str, Any]:
        """What defines it, as JSON: two runs with equal settings on the same audio give the same texts."""

    def transcribe(self, clips: Sequence[np.ndarray], languages: Sequence[str]) -> list[Hypothesis]:
        """Texts of (n,) float32 clips of 16 kHz, at most 30 s each, in their order."""


class Diffusion:
    """Our model through its denoising decoder; with `auto` it is not told the language."""

    def __init__(
        self, model: DiffusionGemmaASR, name: str, options: DenoiseOptions, start: Start | None = None, seed: int = 0,
        engine: EngineName = "fast", canvas_length: int | None = None, auto: bool = False,
    ):  # fmt: skip
        self.model, self.name, self.options, self.seed = model, name, options, seed
        self.start: Start = start or model.start
        self.engine, self.canvas_length, self.auto = engine, canvas_length, auto

    def settings(self) -> dict[str, Any]:
        """Model, denoising options, first canvas, engine and seed."""
        chosen = {
            "system": "diffusion", "model": self.name, "start": self.start, "canvas": self.canvas_length or "fitted",
            "engine": self.engine, "seed": self.seed,
        }  # fmt: skip
        chosen |= {"language": AUTO} if self.auto else {}
        return chosen | asdict(self.options) | {"dtype": dtype_name(self.model)}

    def transcribe(self, clips: Sequence[np.ndarray], languages: Sequence[str]) -> list[Hypothesis]:
        """See `System`."""
        found = self.model.transcribe_batch(
            clips, AUTO if self.auto else languages, self.options, self.seed, self.canvas_length, start=self.start,
            engine=self.engine,
        )  # fmt: skip
        return [Hypothesis(row.text, row.steps, row.language if self.auto else None) for row in found]


class CtcGreedy:
    """The projector's slots straight through the frozen lm_head, greedily: no decoder at all."""

    def __init__(self, model: DiffusionGemmaASR, name: str):
        self.model, self.name = model, name

    def settings(self) -> dict[str, Any]:
        """The model."""
        return {"system": "ctc", "model": self.name, "dtype": dtype_name(self.model)}

    @torch.no_grad()
    def transcribe(self, clips: Sequence[np.ndarray], languages: Sequence[str]) -> list[Hypothesis]:
        """See `System`; the languages are not used."""
        drafts = self.model.draft(*self.model.encode_audio(clips))
        return [Hypothesis(self.model.text([token.id for token in row]), 0) for row in drafts]


def dtype_name(model: DiffusionGemmaASR) -> str:
    """Of the backbone's weights, as JSON."""
    return str(model.backbone.lm_head_weight.dtype).removeprefix("torch.")
