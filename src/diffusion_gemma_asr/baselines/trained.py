"""The baselines that are trained by a recipe: a frozen encoder, a decoder of their own, saved and loaded as one folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_model, save_model
from torch import Tensor

from ..checkpoint import load_tokenizer
from ..data.text import CHARACTERS, plain_english
from ..encoder import AcousticEncoder
from ..errors import CheckpointError, RecipeError
from ..evaluate.systems import Hypothesis
from ..recipe import DataRecipe, SourceRecipe, TrainRecipe, from_mapping, load_recipe_as
from .canvas_decoder import CanvasDecoder
from .transfusion import CharacterDiffusion
from .whisfusion import MaskDiffusion
from .whisper_decoder import WhisperDecoder

CONFIG, WEIGHTS = "baseline.json", "decoder.safetensors"


@dataclass(frozen=True)
class DecoderRecipe:
    """Sizes of the baseline's transformer."""

    width: int = 192
    layers: int = 4
    heads: int = 4
    ffn: int = 768
    dropout: float = 0.1


@dataclass(frozen=True)
class BaselineRecipe:
    """Everything that defines a trained baseline and the run that trains it."""

    baseline: Literal["whisfusion", "transfusion", "whisper"]
    name: str
    encoder: SourceRecipe  # frozen
    train: TrainRecipe
    data: DataRecipe
    tokenizer: SourceRecipe | None = None  # of the tokens that it writes; transfusion writes characters
    decoder: DecoderRecipe = field(default_factory=DecoderRecipe)
    steps: int = 8  # of whisfusion's decoder; transfusion always takes its 200

    def __post_init__(self) -> None:
        if (self.tokenizer is None) != (self.baseline == "transfusion"):
            raise RecipeError("'tokenizer' must be given for whisfusion and whisper, and not for transfusion")


def load_baseline_recipe(path: str | Path) -> BaselineRecipe:
    """Reads a baseline's recipe; names of folders are taken relative to it.

    Raises:
        RecipeError: there is no such file, or a key is unknown, missing, or has an impossible value.
    """
    return load_recipe_as(BaselineRecipe, path, ("encoder", "tokenizer"))


class TrainedBaseline:
    """One of them, ready to train or to transcribe.

    Args:
        recipe: what it is made of.
        name: of the checkpoint, for reports.
        seed: of each clip's own generator when it transcribes.
    """

    def __init__(self, recipe: BaselineRecipe, name: str, seed: int = 0):
        self.recipe, self.name, self.seed = recipe, name, seed
        self.encoder = AcousticEncoder.from_pretrained(recipe.encoder.name, revision=recipe.encoder.revision)
        self.tokenizer = None if recipe.tokenizer is None else load_tokenizer(recipe.tokenizer)
        self.net = self._new_decoder()

    def _new_decoder(self) -> MaskDiffusion | CharacterDiffusion | WhisperDecoder:
        size, sizes = self.encoder.hidden_size, asdict(self.recipe.decoder)
        if self.tokenizer is None:
            return CharacterDiffusion(CanvasDecoder(len(CHARACTERS), size, **sizes, timed=True))
        end = self.tokenizer.eos_token_id
        if self.recipe.baseline == "whisfusion":
            return MaskDiffusion(CanvasDecoder(len(self.tokenizer) + 1, size, **sizes), end, self.recipe.steps)
        begin, pad = self.tokenizer.bos_token_id, self.tokenizer.pad_token_id
        return WhisperDecoder(len(self.tokenizer), size, **sizes, begin=begin, end=end, pad=pad)

    def spell(self, text: str) -> list[int]:
        """What the decoder is to write for a transcript; characters are plain English only."""
        if self.tokenizer is None:
            return [CHARACTERS.index(c) for c in plain_english(text)]
        return self.tokenizer.encode(text, add_special_tokens=False)

    def read(self, row: Sequence[int]) -> str:
        """The text of what the decoder wrote."""
        if self.tokenizer is None:
            return "".join(CHARACTERS[i] for i in row).strip()
        return self.tokenizer.decode(row, skip_special_tokens=True).strip()

    @torch.no_grad()
    def decode(self, frames: Tensor, frame_lengths: Tensor) -> list[Hypothesis]:
        """Texts of B clips from their frames (B, F, width), each clip with a generator of its own."""
        generators = [torch.Generator().manual_seed(self.seed) for _ in frame_lengths]
        self.net.eval()
        rows = self.net.decode(frames, frame_lengths, generators)
        return [Hypothesis(self.read(row), self.net.passes(row)) for row in rows]

    # -- as evaluate/systems.py asks ----------------------------------------------------------------------------------

    def settings(self) -> dict[str, Any]:
        """The baseline, its checkpoint and seed."""
        return {"system": self.recipe.baseline, "model": self.name, "seed": self.seed, "dtype": "float32"}

    @torch.no_grad()
    def transcribe(self, clips: Sequence[np.ndarray], languages: Sequence[str]) -> list[Hypothesis]:
        """See `System`; the languages are not used."""
        return self.decode(*self.encoder(*self.encoder.features(clips)))

    # -- folder -------------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Writes decoder and recipe; the frozen encoder and the tokenizer are named, not copied."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_model(self.net, str(folder / WEIGHTS))
        part = folder / (CONFIG + ".part")
        part.write_text(json.dumps(asdict(self.recipe), indent=2) + "\n", encoding="utf-8")
        part.replace(folder / CONFIG)

    @classmethod
    def load(cls, folder: str | Path, seed: int = 0) -> TrainedBaseline:
        """Reads what `save` wrote.

        Raises:
            CheckpointError: the folder is none of a baseline, or is damaged.
        """
        folder = Path(folder)
        if not (folder / CONFIG).is_file():
            raise CheckpointError(f"{folder}: no {CONFIG} here; give the checkpoint folder that training a baseline wrote")
        try:
            recipe = from_mapping(BaselineRecipe, json.loads((folder / CONFIG).read_text(encoding="utf-8")))
            found = cls(recipe, str(folder), seed)
            load_model(found.net, folder / WEIGHTS)
        except (OSError, ValueError, RuntimeError, RecipeError) as error:
            raise CheckpointError(f"{folder}: cannot be read as a baseline: {str(error).splitlines()[0]}") from error
        return found
