"""Recipes: a YAML file with the parts of a model, the training options and the data.

`load_recipe("small")` reads a recipe that ships with the package, `load_recipe("path/to/recipe.yaml")` any other. It is
parsed into frozen dataclasses; each option is documented, and has its default, at its field: here, in loop.py, and for the
section `model` in model/config.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from ..checkpoint.quantization import QUANTIZATIONS
from ..data.augment import Masking
from ..errors import RecipeError
from ..model.config import ModelConfig
from ..strict import require
from .loop import LoopOptions
from .recipe_files import PART, SOURCE, load_recipe_as


@dataclass(frozen=True)
class LossRecipe:
    """Weights of the losses (0 switches one off), and probabilities for the corruption of canvases."""

    diffusion: float = 1.0  # weight of denoising the transcript on the canvas
    autoregressive: float = 1.0  # weight of predicting the transcript's next token in the backbone's encoder
    ctc: float = 1.0  # weight of CTC on the audio tokens, through the backbone's head
    self_conditioning: float = 0.5  # probability of a first pass whose logits condition the second
    full_noise: float = 0.0  # probability of pure noise on a canvas instead of t ~ U(eps, 1)
    known_start: float = 0.0  # probability of a clean beginning, of random length, and pure noise behind it
    draft_share: float = 0.0  # probability that a canvas starts from the CTC draft
    unroll: float = 0.0  # probability that the second pass continues from the canvas after the first

    def __post_init__(self) -> None:
        weights = {key: getattr(self, key) for key in ("diffusion", "autoregressive", "ctc")}
        for key, weight in weights.items():
            require(weight >= 0, f"losses.{key}", weight, "at least 0")
        require(any(weights.values()), "losses", "weights of 0 alone", "positive for at least one of them")
        for key in ("self_conditioning", "full_noise", "known_start", "draft_share", "unroll"):
            require(0 <= getattr(self, key) <= 1, f"losses.{key}", getattr(self, key), "from 0 to 1")

    @property
    def uses_backbone(self) -> bool:
        """Whether a loss runs the backbone's layers; CTC uses only its head."""
        return self.diffusion > 0 or self.autoregressive > 0


@dataclass(frozen=True, kw_only=True)
class TrainRecipe(LoopOptions):
    """The loop's options, batches, augmentation and evaluation."""

    batch_size: int  # utterances in one forward pass, at most
    batch_frames: int | None = None  # encoder frames (20 ms) in one forward pass at most, with padding; None is no limit
    start_from: Path | None = None  # checkpoint folder with the initial adapter; None is a newly initialised one
    decoder: str | None = field(default=None, metadata=PART)  # Whisper whose decoder the projector's decoder layers begin as
    acoustic: Path | None = None  # folder of the stage `hearing`, whose acoustic tokens the projector begins with
    spec_augment: Masking = field(default_factory=Masking)  # masks on the encoder's frames (20 ms) while training
    warp: tuple[float, float] = (1.0, 1.0)  # range of the factor on an utterance's frequencies; stage `ears` alone
    others: tuple[float, float] = (0.0, 0.0)  # range of the share of another utterance's frames in each utterance's
    unnamed: float = 0.0  # share of prompts that do not name the language, to train language identification
    context: float = 0.0  # share of prompts with hotwords or preceding text, to train their use
    keep: tuple[int, ...] = ()  # evaluated steps whose adapters are kept beside the last, as checkpoint-STEP
    monitor_samples: int = 32  # utterances of each dev list that are transcribed in an evaluation
    shard: Literal["experts"] | None = None  # share the frozen experts among the workers (shard.py); None: each has all
    quantization: str | None = None  # pack the frozen experts in 4 or 8 bits (checkpoint/quantization.py); None: not
    compile: bool = False  # compile the backbone's layers (compiled.py)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.batch_size >= 1, "train.batch_size", self.batch_size, "at least 1")
        require(self.monitor_samples >= 0, "train.monitor_samples", self.monitor_samples, "at least 0")
        for item in fields(self.spec_augment):
            value = getattr(self.spec_augment, item.name)
            require(value >= 0, f"train.spec_augment.{item.name}", value, "at least 0")
        require(self.batch_frames is None or self.batch_frames >= 1, "train.batch_frames", self.batch_frames, "at least 1")
        require(0 < self.warp[0] <= self.warp[1], "train.warp", self.warp, "two factors above 0, the smaller one first")
        low, high = self.others
        require(0 <= low <= high < 1, "train.others", self.others, "two shares from 0 to below 1, the smaller one first")
        evaluated = all(step > 0 and step % self.eval_every == 0 for step in self.keep)
        require(evaluated, "train.keep", list(self.keep), f"multiples of train.eval_every, which is {self.eval_every}")
        require(0 <= self.unnamed <= 1, "train.unnamed", self.unnamed, "from 0 to 1")
        require(0 <= self.context <= 1, "train.context", self.context, "from 0 to 1")
        packings = (None, *QUANTIZATIONS)
        require(self.quantization in packings, "train.quantization", self.quantization, f"one of {', '.join(QUANTIZATIONS)}")
        if self.decoder and self.start_from:
            raise RecipeError("'train.decoder' and 'train.start_from' are both set, but the projector begins as one of them")
        if self.shard and self.quantization:
            raise RecipeError("'train.shard' and 'train.quantization' are both set, but packed experts cannot be shared")
        if self.compile and (self.shard or self.quantization):
            raise RecipeError("'train.compile' wants whole experts: leave out 'train.shard' and 'train.quantization'")


@dataclass(frozen=True)
class TrainList:
    """A list of utterances to train on, and its sampling weight."""

    manifest: Path = field(metadata=SOURCE)  # JSONL, folder of sounds, Shar, or corpus by name (data/sources.py)
    weight: float = 1.0  # its share of the sampled utterances is weight / sum of all weights; see data.temperature
    first: int | None = None  # use only so many utterances, the first after a shuffle with a fixed seed
    unheard: bool = False  # the projector was not trained on them: its drafts are as wrong as any, without augmentation

    def __post_init__(self) -> None:
        require(self.weight > 0, "data.train.weight", self.weight, "above 0")
        require(self.first is None or self.first >= 1, "data.train.first", self.first, "at least 1")


@dataclass(frozen=True)
class DataRecipe:
    """Training and dev lists."""

    train: tuple[TrainList, ...]
    dev: tuple[Path, ...] = field(metadata=SOURCE)  # for evaluation only
    max_duration_s: float = 30.0  # longer utterances are left out
    temperature: float | None = None  # T: weights are multiplied by utterances ** (1 / T); None does not change them
    cache_dir: Path | None = None  # folder for the frozen encoder's frames, one per encoder; None is frames/ of the run
    transcript: Literal["written", "plain"] = "written"  # the manifest's text, or plain words (data/text.py)

    def __post_init__(self) -> None:
        for key in ("train", "dev"):
            require(len(getattr(self, key)) >= 1, f"data.{key}", "an empty list", "a list of at least one")
        if self.temperature is not None:
            require(self.temperature > 0, "data.temperature", self.temperature, "above 0")
        limit = self.max_duration_s
        require(0 < limit <= 30, "data.max_duration_s", limit, "above 0 and at most 30")


@dataclass(frozen=True)
class Recipe:
    """A model and the run that trains it."""

    model: ModelConfig
    train: TrainRecipe
    data: DataRecipe
    losses: LossRecipe = field(default_factory=LossRecipe)
    stage: Literal["adapter", "reading", "ears"] = "adapter"  # what is trained; the other two are in train/mini/

    def __post_init__(self) -> None:
        model, train, losses = self.model, self.train, self.losses
        _agree(model.finds_language, "model.finds_language", train.unnamed, "train.unnamed")
        _agree(model.reads_context, "model.reads_context", train.context, "train.context")
        _agree(model.ctc, "model.ctc", losses.ctc, "losses.ctc")
        if train.acoustic is not None and not model.projector.acoustic:
            raise RecipeError("'train.acoustic' is set, but 'model.projector.acoustic' is not: no prompt would hold them")
        if train.decoder is not None and not model.projector.decoder_layers:
            raise RecipeError("'train.decoder' is set, but 'model.projector.decoder_layers' is 0: nothing would begin as it")
        _agree(model.start == "draft", "model.start: draft", losses.draft_share, "losses.draft_share")
        if train.warp != (1, 1) and self.stage != "ears":
            raise RecipeError(f"'train.warp' is {list(train.warp)}, but spectrograms are warped, in the stage 'ears' alone")
        require(model.dtype == "float32", "model.dtype", model.dtype, "left out of a recipe, which has train.dtype")

    @property
    def name(self) -> str:
        """The model's name, and by default that of the run's folder."""
        return self.model.name


def _agree(ability: bool, ability_key: str, share: float, key: str) -> None:
    """Raises RecipeError if a model's ability is declared but not trained (`key`), or trained but not declared."""
    if ability and share == 0:
        raise RecipeError(f"'{ability_key}' is set, but '{key}' is 0: the model would not learn it")
    if share > 0 and not ability:
        raise RecipeError(f"'{key}' is {share}, but '{ability_key}' is not set: the model would learn what nobody uses")


def load_recipe(path_or_name: str | Path) -> Recipe:
    """Reads the recipe of an adapter, or of the stage `reading`.

    Args:
        path_or_name: a YAML file, or the name of a recipe that ships with the package ("small").

    Returns:
        the recipe with absolute paths.

    Raises:
        RecipeError: see `load_recipe_as`.
    """
    return load_recipe_as(Recipe, path_or_name)
