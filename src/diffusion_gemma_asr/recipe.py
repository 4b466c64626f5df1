"""Recipes: one YAML file says which parts a model is made of, what is trained, how, and on what.

`load_recipe("small")` reads the file that ships with the package, `load_recipe("my/own.yaml")` any other.
The file becomes frozen dataclasses; each option is described, and has its one default, where its field is
declared below.
"""

from __future__ import annotations

import math
import types
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from .data.augment import Masking
from .errors import RecipeError
from .ngram import LM_WEIGHT, TOKEN_BONUS
from .recipe_files import find_recipe, read_yaml, resolve_source, suggest

_T = TypeVar("_T")


@dataclass(frozen=True)
class SourceRecipe:
    """Where a frozen part comes from: a hub repository, or a folder in the same layout."""

    name: str  # hub name or folder; see `resolve_source` for how the two are told apart
    revision: str | None = None  # branch, tag or commit on the hub; None is its main branch


@dataclass(frozen=True)
class ProjectorRecipe:
    """The trained bridge from encoder frames (20 ms) to audio tokens (160 ms)."""

    kind: Literal["convolutions", "linear"] = "convolutions"  # linear: one audio token a frame, no subsampling
    hidden_size: int = 1280  # channels of both convolutions
    strides: tuple[int, int] = (4, 2)  # of both in time; an audio token stands for 20 ms times both
    scaled: bool = True  # bring the output to the scale of the backbone's token embeddings
    layers: int = 0  # deeper layers over audio tokens, beside the linear one (slot_layers.py)
    layer_width: int = 384  # of those, a multiple of 64
    layer_stride: int = 1  # audio tokens that one position of theirs stands for
    spelling_layers: int = 0  # of a branch that spells the encoder's frames in characters (speller.py)
    spelling_width: int = 256  # of those, a multiple of 64

    def __post_init__(self) -> None:
        _require(self.hidden_size >= 1, "projector.hidden_size", self.hidden_size, "at least 1")
        _require(min(self.strides) >= 1, "projector.strides", self.strides, "at least 1 each")
        _require(self.layers >= 0, "projector.layers", self.layers, "at least 0")
        _require(self.layer_stride >= 1, "projector.layer_stride", self.layer_stride, "at least 1")
        _require(self.spelling_layers >= 0, "projector.spelling_layers", self.spelling_layers, "at least 0")
        can_spell = self.kind == "convolutions" or self.spelling_layers == 0
        _require(can_spell, "projector.spelling_layers", self.spelling_layers, "0 where projector.kind is linear")
        for key in ("layer_width", "spelling_width"):
            width = getattr(self, key)
            _require(width >= 64 and width % 64 == 0, f"projector.{key}", width, "a multiple of 64")


@dataclass(frozen=True)
class LoraRecipe:
    """Low-rank updates of q, k, v and o in both stacks of the backbone (Hu et al., 2021)."""

    rank: int = 16
    alpha: int = 32  # the update is scaled by alpha / rank
    dropout: float = 0.0  # on the input of the update, while training

    def __post_init__(self) -> None:
        _require(self.rank >= 1, "lora.rank", self.rank, "at least 1")
        _require(self.alpha >= 1, "lora.alpha", self.alpha, "at least 1")
        _require(0 <= self.dropout < 1, "lora.dropout", self.dropout, "at least 0 and below 1")


@dataclass(frozen=True)
class LmRecipe:
    """The language model that takes part in drafts (beam.py), and a speller's pronouncing dictionary."""

    file: str | None = None  # of `NgramLM.save`; a relative path starts from the working directory; None: there is no model
    weight: float = LM_WEIGHT  # factor on its log-probabilities
    bonus: float = TOKEN_BONUS  # nats added for each token, since it favours short transcripts
    classes: str | None = None  # file of `ClassLM.save`, which takes part where a speller's transcripts are judged
    recurrent: str | None = None  # file of `RecurrentLM.save`, which has the last word on a speller's best transcripts
    lexicon: str | None = None  # file of `Lexicon.save`: what a speller's phonemes mean; None: it writes characters alone

    def __post_init__(self) -> None:
        _require(self.weight >= 0, "lm.weight", self.weight, "at least 0")


@dataclass(frozen=True)
class LossRecipe:
    """Weights of the losses; 0 switches a loss off."""

    diffusion: float = 1.0
    autoregressive: float = 1.0
    ctc: float = 1.0
    spelling: float = 0.0  # CTC of the projector's characters, where it has spelling_layers
    phonemes: float = 0.0  # and of its phonemes, where there is a dictionary as well (lm.lexicon)
    self_conditioning: float = 0.5  # probability of a first pass whose logits the second sees; not a weight
    full_noise: float = 0.0  # probability of pure noise on a canvas instead of t ~ U(eps, 1); not a weight
    draft_share: float = 0.0  # probability that a canvas starts from the CTC draft instead; not a weight
    unroll: float = 0.0  # probability that a second pass goes on with the canvas that the first makes; not a weight

    def __post_init__(self) -> None:
        weights = {key: getattr(self, key) for key in ("diffusion", "autoregressive", "ctc", "spelling", "phonemes")}
        for key, weight in weights.items():
            _require(weight >= 0, f"losses.{key}", weight, "at least 0")
        _require(any(weights.values()), "losses", "weights of 0 alone", "positive for at least one of them")
        for key in ("self_conditioning", "full_noise", "draft_share", "unroll"):
            _require(0 <= getattr(self, key) <= 1, f"losses.{key}", getattr(self, key), "from 0 to 1")


@dataclass(frozen=True)
class TrainRecipe:
    """The optimiser, its schedule (linear warm-up, then cosine), and what happens every few steps."""

    steps: int  # optimiser steps
    batch_size: int  # utterances in one forward pass, at most
    batch_frames: int | None = None  # and encoder frames (20 ms), padding included, at most; None: any number
    accumulation: int = 1  # forward passes in one optimiser step
    optimizer: Literal["adamw", "muon", "muon-bfloat16"] = "adamw"  # Muon: see train/muon.py
    lr: float = 1.5e-4  # peak learning rate
    betas: tuple[float, float] = (0.95, 0.99)
    weight_decay: float = 0.0
    warmup_steps: int = 0  # steps over which the rate rises linearly from 0 to `lr`
    min_lr_ratio: float = 0.0  # the cosine ends at this share of `lr`
    clip: float = 1.0  # largest norm of the gradient
    start_from: str | None = None  # checkpoint folder whose adapter training begins with; None is a new one
    seed: int = 0
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the computation; trained weights stay float32
    spec_augment: Masking = field(default_factory=Masking)  # masks on the encoder's frames (20 ms) while training
    unnamed: float = 0.0  # share of the prompts that do not name the language, so that the model learns to find it
    context: float = 0.0  # share of the prompts that hold words that may occur, or the text before, to learn to read these
    eval_every: int = 500  # steps between transcriptions of `monitor_samples` utterances
    save_every: int = 500  # steps between checkpoints
    monitor_samples: int = 32  # utterances of the dev lists that are transcribed to judge the run

    def __post_init__(self) -> None:
        for key in ("steps", "batch_size", "accumulation", "eval_every", "save_every"):
            _require(getattr(self, key) >= 1, f"train.{key}", getattr(self, key), "at least 1")
        for key in ("warmup_steps", "seed", "weight_decay", "monitor_samples"):
            _require(getattr(self, key) >= 0, f"train.{key}", getattr(self, key), "at least 0")
        for item in fields(self.spec_augment):
            value = getattr(self.spec_augment, item.name)
            _require(value >= 0, f"train.spec_augment.{item.name}", value, "at least 0")
        for key in ("lr", "clip"):
            _require(getattr(self, key) > 0, f"train.{key}", getattr(self, key), "above 0")
        _require(self.batch_frames is None or self.batch_frames >= 1, "train.batch_frames", self.batch_frames, "at least 1")
        _require(self.warmup_steps <= self.steps, "train.warmup_steps", self.warmup_steps, "at most train.steps")
        _require(0 <= self.unnamed <= 1, "train.unnamed", self.unnamed, "from 0 to 1")
        _require(0 <= self.context <= 1, "train.context", self.context, "from 0 to 1")
        _require(0 <= self.min_lr_ratio <= 1, "train.min_lr_ratio", self.min_lr_ratio, "from 0 to 1")
        _require(all(0 <= beta < 1 for beta in self.betas), "train.betas", self.betas, "at least 0 and below 1")


@dataclass(frozen=True)
class TrainList:
    """One manifest to train on, and its share."""

    manifest: str  # JSONL, or another source of data/sources.py; a relative path starts from the working directory
    weight: float = 1.0  # its share of the drawn utterances is weight / sum of all weights; see data.temperature
    first: int | None = None  # use only so many utterances, the first ones after a shuffle that is always the same

    def __post_init__(self) -> None:
        _require(self.weight > 0, "data.train.weight", self.weight, "above 0")
        _require(self.first is None or self.first >= 1, "data.train.first", self.first, "at least 1")


@dataclass(frozen=True)
class DataRecipe:
    """Manifests to train on and to judge by. Relative paths start from the working directory."""

    train: tuple[TrainList, ...]
    dev: tuple[str, ...]  # manifests or other sources; never trained on
    max_duration_s: float = 30.0  # longer utterances are left out
    temperature: float | None = None  # T: weights are multiplied by utterances ** (1 / T); None leaves them as they are
    cache_dir: str | None = None  # folder for the frozen encoder's output, one for each encoder; None is frames/ of the run
    languages: tuple[str, ...] = ("en",)  # codes as Whisper has them; utterances in others are left out
    transcript: Literal["written", "plain"] = "written"  # as the manifest has it, or plain words (data/text.py)

    def __post_init__(self) -> None:
        for key in ("train", "dev", "languages"):
            _require(len(getattr(self, key)) >= 1, f"data.{key}", "an empty list", "a list of at least one")
        if self.temperature is not None:
            _require(self.temperature > 0, "data.temperature", self.temperature, "above 0")
        _require(
            0 < self.max_duration_s <= 30,
            "data.max_duration_s",
            self.max_duration_s,
            "above 0 and at most 30",
        )


@dataclass(frozen=True)
class ModelRecipe:
    """The part of a recipe that defines the model; a checkpoint carries it on."""

    name: str
    encoder: SourceRecipe
    backbone: SourceRecipe
    projector: ProjectorRecipe
    lora: LoraRecipe
    languages: tuple[str, ...]
    finds_language: bool = False  # whether training asked without naming the language
    reads_context: bool = False  # whether training put context into the prompts
    lm: LmRecipe = field(default_factory=LmRecipe)


@dataclass(frozen=True)
class Recipe:
    """Everything that defines a model and the run that trains it."""

    name: str
    encoder: SourceRecipe
    backbone: SourceRecipe
    train: TrainRecipe
    data: DataRecipe
    projector: ProjectorRecipe = field(default_factory=ProjectorRecipe)
    lora: LoraRecipe = field(default_factory=LoraRecipe)
    losses: LossRecipe = field(default_factory=LossRecipe)
    lm: LmRecipe = field(default_factory=LmRecipe)

    def __post_init__(self) -> None:
        can_spell = self.projector.spelling_layers > 0 or self.losses.spelling == 0
        _require(can_spell, "losses.spelling", self.losses.spelling, "0 where projector.spelling_layers is 0")
        can_hear = self.losses.phonemes == 0 or (self.projector.spelling_layers > 0 and self.lm.lexicon is not None)
        _require(can_hear, "losses.phonemes", self.losses.phonemes, "0 without projector.spelling_layers and lm.lexicon")

    @property
    def model(self) -> ModelRecipe:
        """What a checkpoint has to remember of this recipe."""
        found, read = self.train.unnamed > 0, self.train.context > 0
        parts = self.name, self.encoder, self.backbone, self.projector, self.lora
        return ModelRecipe(*parts, self.data.languages, found, read, self.lm)


def load_recipe(path_or_name: str | Path) -> Recipe:
    """Read a recipe.

    Args:
        path_or_name: a YAML file, or the name of a recipe that ships with the package ("small").

    Returns:
        The recipe; `encoder.name` and `backbone.name` are hub names or absolute paths (`resolve_source`).

    Raises:
        RecipeError: there is no such file, it is not YAML, or a key is unknown, missing, or has an
        impossible value.
    """
    return load_recipe_as(Recipe, path_or_name, ("encoder", "backbone"))


def load_recipe_as(kind: type[_T], path_or_name: str | Path, sources: tuple[str, ...]) -> _T:
    """Read a recipe of any kind; `sources` are its sections whose name is a hub name or a folder (`resolve_source`).

    Raises:
        RecipeError: as `load_recipe`.
    """
    path = find_recipe(path_or_name)
    content = read_yaml(path)
    try:
        if not isinstance(content, dict):
            raise RecipeError(f"expected sections (name:, encoder:, ...), found {_kind(content)}")
        for part in sources:
            source = content.get(part)
            if isinstance(source, dict) and isinstance(source.get("name"), str):
                content[part] = source | {"name": resolve_source(source["name"], path.parent)}
        return from_mapping(kind, content)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None


def from_mapping(cls: type[_T], content: dict[Any, Any]) -> _T:
    """A dataclass of this module's kind from nested mappings, as YAML or JSON gives them.

    Raises:
        RecipeError: a key is unknown, missing, or has an impossible value. The caller adds the file's name.
    """
    return _build(cls, content, "")


def _build(cls: type[_T], content: Any, where: str) -> _T:
    """A dataclass from a mapping, strictly: every key known, every required key there, every type right."""
    if not isinstance(content, dict):
        raise RecipeError(f"'{where}' must be a section of key: value lines, found {_kind(content)}")
    known = {item.name: item for item in fields(cls)}  # type: ignore[arg-type]
    for key in content:
        if key not in known:
            place = f"in section '{where}'" if where else "at the top level"
            hint = suggest(str(key), list(known)) or f"; known here: {', '.join(known)}"
            raise RecipeError(f"unknown key '{key}' {place}{hint}")
    hints = get_type_hints(cls)
    values = {}
    for key, item in known.items():
        name = f"{where}.{key}" if where else key
        if key in content:
            values[key] = _convert(hints[key], content[key], name)
        elif item.default is MISSING and item.default_factory is MISSING:
            raise RecipeError(f"'{name}' is missing; add it (recipes/small.yaml shows every key)")
    return cls(**values)


def _convert(kind: Any, value: Any, where: str) -> Any:
    """`value` as the annotated type `kind`, or an error that names key, value and what is expected."""
    origin, arguments = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        return _build(kind, value, where)  # type: ignore[arg-type]
    if origin in (Union, types.UnionType):  # only `X | None` occurs
        inner = next(argument for argument in arguments if argument is not type(None))
        return None if value is None else _convert(inner, value, where)
    if origin is Literal:
        if value not in arguments:
            raise RecipeError(f"'{where}' must be one of {', '.join(arguments)}, found {_kind(value)}")
        return value
    if origin is tuple:
        return _convert_tuple(arguments, value, where)
    expected = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}[kind]
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise RecipeError(f"'{where}' must be {expected}, found {_kind(value)}")
    return value


def _convert_tuple(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    """A YAML list as tuple[X, ...] or tuple[X, Y]."""
    if not isinstance(value, list):
        raise RecipeError(f"'{where}' must be a list, found {_kind(value)}")
    if arguments[-1] is Ellipsis:
        arguments = (arguments[0],) * len(value)
    if len(value) != len(arguments):
        raise RecipeError(f"'{where}' must be a list of {len(arguments)}, found {_kind(value)}")
    return tuple(
        _convert(kind, item, f"{where}[{index}]") for index, (kind, item) in enumerate(zip(arguments, value, strict=True))
    )


def _require(holds: bool, key: str, value: Any, must_be: str) -> None:
    if not holds:
        raise RecipeError(f"'{key}' must be {must_be}, found {value}")


def _kind(value: Any) -> str:
    """A value for an error message, with its kind where that is not obvious."""
    if value is None:
        return "nothing"
    if isinstance(value, str):
        return f"the text '{value}'"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a section"
    if isinstance(value, list):
        return f"the list {value}"
    return str(value)
