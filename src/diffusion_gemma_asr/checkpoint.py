"""Checkpoints: the trained adapter alone, and by name the frozen parts that it was trained on.

A checkpoint is a folder, or a hub repository, of these files:

- `adapter.safetensors`: the projector and the LoRA matrices, keys `projector.*` and `lora.*`
- `config.json`: names, revisions and shapes of encoder and backbone, settings of projector and LoRA
- `preprocessor_config.json`: the encoder's own, for transformers' pipeline alone; a model without a Whisper has none
- `README.md`: the model card
- `ngram.npz`: the language model of drafts; `classes.npz`: that of word classes; `recurrent.safetensors`: that of whole
  sentences; `lexicon.npz`: the pronouncing dictionary; where there are any

Names of frozen parts are hub names or folders; a relative folder starts from the checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .backbone import Backbone
from .checkpoint_config import (
    CONFIG,
    BackboneEntry,
    CheckpointConfig,
    EncoderEntry,
    check_backbone,
    check_encoder,
    describe,
    read_checkpoint_config,
)
from .ear import load_encoder
from .encoder import AcousticEncoder
from .errors import CheckpointError
from .language_files import load_lexicon, load_lm, save_language_files
from .lexicon import Lexicon
from .model import DiffusionGemmaASR
from .model_card import ModelCard, render_card
from .packing import pack, unpack
from .pretrained import first_line
from .projector import Projector, new_projector
from .quantization import find_quantizer
from .recipe import ModelRecipe, SourceRecipe
from .recipe_files import resolve_source
from .speller import alphabet_size

PRESETS = Path(__file__).resolve().parent / "presets"
BUNDLED = ("mini6", "mini", "mini-whisper-base")  # models inside the package; the last one hears with openai/whisper-base
ADAPTER, CARD, EXTRACTOR = "adapter.safetensors", "README.md", "preprocessor_config.json"


def save_checkpoint(
    model: DiffusionGemmaASR, folder: str | Path, recipe: ModelRecipe, card: ModelCard | None = None, packed: bool = False
) -> Path:
    """Write a model's adapter, config.json, preprocessor_config.json and model card.

    Everything is written to a folder beside the target first. A new target then appears at once and whole;
    in an existing one each file is replaced whole, and other files stay. A frozen part inside the target is
    named relative to it.

    Args:
        model: with LoRA not merged.
        folder: where to write; made if missing.
        recipe: `Recipe.model` of the recipe that the model was built by; its names go into config.json.
        card: text for README.md beyond the settings.
        packed: write the adapter's large matrices in 8 bits (packing.py).

    Returns:
        The folder, absolute.

    Raises:
        CheckpointError: LoRA was merged, so that there is no adapter to save; or the folder is not writable.
    """
    folder = Path(folder).resolve()
    lora = model.backbone.lora_state_dict()
    if not lora:
        raise CheckpointError("the model has no LoRA matrices (merged?); save the checkpoint before merging")
    tensors = {f"projector.{key}": value for key, value in model.projector.state_dict().items()}
    tensors |= {f"lora.{key}": value for key, value in lora.items()}
    recipe = _relative_to(recipe, folder)
    config = describe(model, recipe)
    recipe = replace(recipe, lm=config.lm)
    trained = sum(parameter.numel() for parameter in model.trained().values())
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
        try:
            detached = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
            save_file(pack(detached) if packed else detached, partial / ADAPTER, metadata={"format": "pt"})
            (partial / CARD).write_text(render_card(recipe, card or ModelCard(), trained), encoding="utf-8")
            (partial / CONFIG).write_text(json.dumps(asdict(config), indent=2) + "\n", encoding="utf-8")
            save_language_files(model.lm, model.lexicon, partial)
            if isinstance(model.encoder, AcousticEncoder):
                model.encoder.extractor.save_pretrained(partial)
            _move_into_place(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(f"cannot write the checkpoint {folder}: {error}") from error
    return folder


def load_checkpoint(
    name_or_path: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: torch.dtype | None = None,
    quantization: str | None = None,
    encoder: str | Path | None = None,
    backbone: str | Path | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    merge_lora: bool = True,
) -> DiffusionGemmaASR:
    """Load a checkpoint with the frozen parts that it names, ready to transcribe.

    Shapes are compared before any large file is read or fetched.

    Args:
        name_or_path: "mini6", "mini" or "mini-whisper-base", which travel inside the package; a checkpoint folder; or a hub
            repository.
        device: of torch; "auto" is the first CUDA device, else Apple's GPU, else the processor.
        dtype: of all weights; None is the one of the frozen parts while training.
        quantization: None, or 4 and 8 bits for the backbone's experts (`quantization.QUANTIZATIONS`).
        encoder, backbone: folder or hub name to use in place of the one that the checkpoint names.
        revision: of the checkpoint's repository: branch, tag or commit.
        local_files_only: never ask the network.
        merge_lora: add LoRA into the attention's weights, which is faster; False keeps it apart, to be trained or saved.

    Raises:
        CheckpointError: something is missing, damaged, or does not fit; one line says what, and what to do.
    """
    if quantization is not None:
        find_quantizer(quantization)  # before minutes of reading
    device = choose_device(device)
    folder = find_checkpoint(name_or_path, revision, local_files_only)
    config = read_checkpoint_config(folder)
    adapter = _read_adapter(folder / ADAPTER)
    encoder_source = part_source(config.encoder, encoder, folder)
    backbone_source = part_source(config.backbone, backbone, folder)
    check_encoder(config.encoder, encoder_source, local_files_only)
    check_backbone(config.backbone, backbone_source, local_files_only)
    dtype = dtype or getattr(torch, config.dtype)
    tokenizer = load_tokenizer(backbone_source, local_files_only)
    lexicon = load_lexicon(config.lm, folder)
    projector = _build_projector(config, adapter, folder, alphabet_size(config.projector, tokenizer), lexicon)

    where: dict[str, Any] = {"device": device, "dtype": dtype, "local_files_only": local_files_only}
    loaded_encoder = load_encoder(encoder_source.name, revision=encoder_source.revision, **where)
    loaded_backbone = Backbone.from_pretrained(
        backbone_source.name, revision=backbone_source.revision, quantization=quantization, **where
    )
    loaded_backbone.add_lora(config.lora.rank, config.lora.alpha, config.lora.dropout)
    loaded_backbone.load_lora_state_dict(_strip(adapter, "lora."))
    if merge_lora:
        loaded_backbone.merge_lora()
    parts = loaded_encoder, projector.to(device, dtype), loaded_backbone, tokenizer
    trained = config.languages, config.finds_language, config.reads_context
    lm = load_lm(config.lm, folder, tokenizer)
    model = DiffusionGemmaASR(*parts, config.drafts, config.start, *trained, config.draft_weight, lm, lexicon)
    return model.requires_grad_(False).eval()


def load_adapter(model: DiffusionGemmaASR, folder: str | Path, projector_alone: bool = False) -> None:
    """Fill a model's projector and LoRA with those of a checkpoint.

    The projector's scale stays the model's own, since it belongs to the backbone. So do deep layers, a speller, and its
    phonemes, where the checkpoint's projector lacks them.

    Args:
        model: with projector and LoRA of the shapes in the checkpoint.
        folder: of `save_checkpoint`, or one whose adapter holds a projector alone; LoRA then stays as it is.
        projector_alone: leave the checkpoint's LoRA aside, which belongs to another backbone, or does nothing yet.

    Raises:
        CheckpointError: the folder is no checkpoint, or a tensor is missing, left over or of another shape.
    """
    path = Path(folder) / ADAPTER
    adapter = _read_adapter(path) | {"projector.scale": model.projector.scale}
    for part in ("deep.", "speller.", "speller.phonemes."):
        if not _strip(adapter, f"projector.{part}"):
            own = model.projector.state_dict()
            adapter |= {f"projector.{key}": value for key, value in own.items() if key.startswith(part)}
    _fill_projector(model.projector, adapter, path, "this model's projector is")
    lora = _strip(adapter, "lora.")
    if lora and not projector_alone:
        model.backbone.load_lora_state_dict(lora)


def save_projector(projector: Projector, folder: str | Path) -> None:
    """Writes a projector alone, as an adapter without LoRA that `load_adapter` takes; makes the folder if missing."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file({f"projector.{name}": value for name, value in projector.state_dict().items()}, Path(folder) / ADAPTER)


def read_projector(folder: str | Path) -> dict[str, Tensor]:
    """The projector's tensors in a folder that `save_checkpoint` or `save_projector` wrote, by their names in it.

    Raises:
        CheckpointError: there is no adapter, or it is damaged.
    """
    return _strip(_read_adapter(Path(folder) / ADAPTER), "projector.")


def push_to_hub(folder: str | Path, repository: str, *, private: bool = False, revision: str | None = None) -> str:
    """Upload a checkpoint's files; frozen parts inside the folder go along.

    Args:
        folder: of `save_checkpoint`.
        repository: "owner/name"; made if missing. The token is the one that huggingface_hub finds.
        private: for a repository that is made.
        revision: branch; None is the main one.

    Returns:
        The address of the commit.

    Raises:
        CheckpointError: the folder is no checkpoint, or the hub refuses.
    """
    config = read_checkpoint_config(Path(folder))
    _read_adapter(Path(folder) / ADAPTER)
    lm = config.lm.file, config.lm.classes, config.lm.lexicon
    patterns = [ADAPTER, CONFIG, CARD, EXTRACTOR, *(file for file in lm if file)]
    for part in (config.encoder, config.backbone):
        if Path(part.name).is_absolute():
            raise CheckpointError(
                f"{folder} names the local folder {part.name}, which nobody else has; "
                f"copy it into the checkpoint, or write its hub name into {CONFIG}"
            )
        if (Path(folder) / part.name).is_dir():
            patterns.append(f"{part.name}/*")
    try:
        hub = HfApi()
        hub.create_repo(repository, private=private, exist_ok=True)
        return hub.upload_folder(
            repo_id=repository, folder_path=folder, allow_patterns=patterns, revision=revision
        ).commit_url
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot upload to {repository}: {first_line(error)}") from error


# -- saving ------------------------------------------------------------------------------------------------


def _relative_to(recipe: ModelRecipe, folder: Path) -> ModelRecipe:
    """Frozen parts inside `folder` named from there, so that the folder can move; other names as they are."""

    def named(source: SourceRecipe) -> SourceRecipe:
        path = Path(source.name)
        inside = path.is_absolute() and path.is_relative_to(folder)
        return replace(source, name=path.relative_to(folder).as_posix()) if inside else source

    return replace(recipe, encoder=named(recipe.encoder), backbone=named(recipe.backbone))


def _move_into_place(partial: Path, folder: Path) -> None:
    if not folder.exists():
        os.chmod(partial, 0o755)  # mkdtemp makes it private
        partial.rename(folder)
        return
    for path in sorted(partial.iterdir()):
        os.replace(path, folder / path.name)


# -- loading -----------------------------------------------------------------------------------------------


def find_checkpoint(name_or_path: str | Path, revision: str | None = None, local_files_only: bool = False) -> Path:
    """The folder of a checkpoint; a hub repository is fetched into the hub's cache first.

    Args:
        name_or_path, revision, local_files_only: see `load_checkpoint`.

    Raises:
        CheckpointError: there is no such checkpoint, or it cannot be fetched.
    """
    if str(name_or_path) in BUNDLED:
        folder = PRESETS / name_or_path
        if not (folder / CONFIG).is_file():
            raise CheckpointError(f"the bundled model {name_or_path} is missing from {folder}; reinstall the package")
        return folder
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if folder.is_absolute() or str(name_or_path).startswith((".", "~")) or len(folder.parts) != 2:
        raise CheckpointError(
            f"{name_or_path}: no such checkpoint; give {' or '.join(BUNDLED)}, an existing folder, or a hub repository "
            "(owner/name)"
        )
    try:
        return Path(snapshot_download(str(name_or_path), revision=revision, local_files_only=local_files_only))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{name_or_path} is no folder here and cannot be fetched from the hub: {first_line(error)}"
        ) from error


def _read_adapter(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"{path.parent} is no checkpoint: it has no {path.name}")
    try:
        return unpack(load_file(path))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged ({first_line(error)}); fetch or save it again") from error


def part_source(entry: EncoderEntry | BackboneEntry, override: str | Path | None, folder: Path) -> SourceRecipe:
    """Where a frozen part is: hub name or absolute folder, and revision.

    Args:
        entry: as the checkpoint in `folder` names it.
        override: folder or hub name to use in its place.
    """
    if override is not None:
        return SourceRecipe(resolve_source(str(override), Path.cwd()))
    return SourceRecipe(resolve_source(entry.name, folder), entry.revision)


def _build_projector(
    config: CheckpointConfig, adapter: dict[str, Tensor], folder: Path, characters: int, lexicon: Lexicon | None
) -> Projector:
    scale = 1.0 if config.projector.scaled else None  # the value itself is among the saved tensors
    phonemes = 0 if lexicon is None else len(lexicon)
    projector = new_projector(config.projector, config.encoder.width, config.backbone.width, scale, characters, phonemes)
    _fill_projector(projector, adapter, folder / ADAPTER, f"{CONFIG} asks for")
    return projector


def _fill_projector(projector: Projector, adapter: dict[str, Tensor], path: Path, wanted_by: str) -> None:
    saved, wanted = _strip(adapter, "projector."), projector.state_dict()
    if odd := sorted(saved.keys() ^ wanted.keys()):
        raise CheckpointError(
            f"{path} does not hold this projector: {len(odd)} names differ, first projector.{odd[0]}; fetch or save it again"
        )
    for key, value in wanted.items():
        if saved[key].shape != value.shape:
            raise CheckpointError(
                f"{path}: projector.{key} is {tuple(saved[key].shape)}, but {wanted_by} {tuple(value.shape)}; "
                "the two are of different checkpoints"
            )
    projector.load_state_dict(saved)


def load_tokenizer(source: SourceRecipe, local_files_only: bool = False) -> PreTrainedTokenizerBase:
    """The backbone's tokenizer.

    Raises:
        CheckpointError: the backbone has none that can be read.
    """
    try:
        return AutoTokenizer.from_pretrained(source.name, revision=source.revision, local_files_only=local_files_only)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"cannot read the tokenizer of {source.name}: {first_line(error)}") from error


def _strip(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def choose_device(device: str | torch.device) -> torch.device:
    """What "auto" means here; anything else is taken at its word."""
    if str(device) != "auto":
        return torch.device(device)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
