"""What a checkpoint says of itself, its `config.json`, and whether frozen parts fit what it says."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from transformers import DiffusionGemmaConfig, WhisperConfig

from . import __version__
from .ear import WAVEFORM
from .errors import CheckpointError, RecipeError
from .language_files import describe_language_files
from .model import DiffusionGemmaASR
from .pretrained import first_line, read_config
from .recipe import LmRecipe, LoraRecipe, ModelRecipe, ProjectorRecipe, SourceRecipe, from_mapping

CONFIG = "config.json"
FORMAT = 1  # of config.json and of the keys; raised when an older reader would misread them


@dataclass(frozen=True)
class EncoderEntry:
    """The frozen encoder: where it comes from, and the shapes the projector was trained for."""

    name: str
    revision: str | None
    width: int  # of a frame
    mel_bins: int  # or samples of a frame, where there is no acoustic encoder


@dataclass(frozen=True)
class BackboneEntry:
    """The frozen backbone: where it comes from, and the shapes projector and LoRA were trained for."""

    name: str
    revision: str | None
    width: int  # of a token row
    vocab_size: int
    layers: int


@dataclass(frozen=True)
class CheckpointConfig:
    """`config.json` of a checkpoint."""

    format: int
    package_version: str
    recipe: str
    encoder: EncoderEntry
    backbone: BackboneEntry
    projector: ProjectorRecipe
    lora: LoraRecipe
    languages: tuple[str, ...]
    drafts: bool  # whether CTC trained the projector, so that its slots spell a draft
    dtype: Literal["float32", "bfloat16", "float16"]  # of the frozen parts in training; the default in loading
    start: Literal["noise", "draft"] = "noise"  # what canvases hold at first, where the caller does not say
    finds_language: bool = False  # whether training asked without naming the language
    reads_context: bool = False  # whether training put context into the prompts
    draft_weight: float = 0.0  # how much CTC's log-probabilities count on canvases that start from the draft
    lm: LmRecipe = field(default_factory=LmRecipe)  # of drafts; its files are beside this one
    model_type: Literal["diffusion_gemma_asr"] = "diffusion_gemma_asr"  # for transformers' Auto classes

    @property
    def model(self) -> ModelRecipe:
        """The same as a recipe has it, for saving again."""
        encoder = SourceRecipe(self.encoder.name, self.encoder.revision)
        backbone = SourceRecipe(self.backbone.name, self.backbone.revision)
        parts = self.recipe, encoder, backbone, self.projector, self.lora
        return ModelRecipe(*parts, self.languages, self.finds_language, self.reads_context, self.lm)


def describe(model: DiffusionGemmaASR, recipe: ModelRecipe) -> CheckpointConfig:
    """config.json of a model: the recipe's names and settings, with the shapes that the model really has."""
    backbone, encoder = model.backbone, model.encoder
    return CheckpointConfig(
        format=FORMAT,
        package_version=__version__,
        recipe=recipe.name,
        encoder=EncoderEntry(
            recipe.encoder.name,
            recipe.encoder.revision,
            encoder.hidden_size,
            encoder.input_size,
        ),
        backbone=BackboneEntry(
            recipe.backbone.name,
            recipe.backbone.revision,
            backbone.hidden_size,
            backbone.vocab_size,
            backbone.config.num_hidden_layers,
        ),
        projector=recipe.projector,
        lora=recipe.lora,
        languages=recipe.languages,
        drafts=model.drafts,
        start=model.start,
        finds_language=recipe.finds_language,
        reads_context=recipe.reads_context,
        draft_weight=model.draft_weight,
        lm=describe_language_files(model.lm, model.lexicon),
        dtype=str(backbone.lm_head_weight.dtype).removeprefix("torch."),  # type: ignore[arg-type]
    )


def read_checkpoint_config(folder: Path) -> CheckpointConfig:
    """A checkpoint's config.json.

    Raises:
        CheckpointError: it is missing, no JSON, of another program or a newer version, or a key is wrong.
    """
    path = folder / CONFIG
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is no checkpoint: it has no {CONFIG}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {first_line(error)}; fetch or save it again") from None
    if not isinstance(content, dict) or "format" not in content:
        raise CheckpointError(f"{path} is not of this program; give a folder that save_checkpoint wrote")
    if content["format"] != FORMAT:
        raise CheckpointError(
            f"{path} has format {content['format']} of version {content.get('package_version')}, "
            f"this is {__version__} with format {FORMAT}; update diffusion-gemma-asr"
        )
    try:
        return from_mapping(CheckpointConfig, content)
    except RecipeError as error:
        raise CheckpointError(f"{path}: {error}") from None


def check_encoder(entry: EncoderEntry, source: SourceRecipe, local_files_only: bool) -> None:
    if entry.name == source.name == WAVEFORM:
        return
    found = read_config(source.name, revision=source.revision, local_files_only=local_files_only)
    if not isinstance(found, WhisperConfig):
        raise CheckpointError(f"the encoder {source.name} is a {found.model_type}; it must be a Whisper")
    if (found.d_model, found.num_mel_bins) != (entry.width, entry.mel_bins):
        raise CheckpointError(
            f"the adapter was trained for an encoder {entry.width} wide with {entry.mel_bins} mel bins "
            f"({entry.name}), but {source.name} is {found.d_model} wide with {found.num_mel_bins}; "
            "load the one it was trained with"
        )


def check_backbone(entry: BackboneEntry, source: SourceRecipe, local_files_only: bool) -> None:
    config = read_config(source.name, revision=source.revision, local_files_only=local_files_only)
    if not isinstance(config, DiffusionGemmaConfig):
        kind = config.model_type
        raise CheckpointError(f"the backbone {source.name} is a {kind}; it must be a DiffusionGemma")
    text = config.text_config
    found = (text.hidden_size, text.num_hidden_layers, text.vocab_size)
    trained = (entry.width, entry.layers, entry.vocab_size)
    if found != trained:
        raise CheckpointError(
            "the adapter was trained for a backbone {} wide with {} layers and a vocabulary of {} ".format(*trained)
            + f"({entry.name}), but {source.name} is "
            + "{} wide with {} layers and {}; load the one it was trained with".format(*found)
        )
